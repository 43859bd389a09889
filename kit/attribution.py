"""Where a model looks, and what its attention does: Grad-CAM (arXiv 1610.02391) and gates.

A gate is what an attention module multiplies its input by: output / input, averaged over the
positions of each channel (a number per channel) or over the channels of each position (a map).
Modules that add something, like GC, or replace a convolution, like `sk`, are skipped. Models are in
evaluation mode.
"""

import copy
import re
from collections import defaultdict
from functools import partial

from kit.command_line import UserError

import torch
import torch.nn as nn
import torch.nn.functional as F

LAYERS = ("layer3", "layer4")
PIXELS = 196_000  # per batch: 250 images of 28x28


def wrapped(model: nn.Module, names, wrapper) -> nn.Module:
    """A copy of the model, with wrapper(name, forward, x) as the forward of the named modules."""
    model = copy.deepcopy(model)
    for name in names:
        module = model.get_submodule(name)
        module.forward = partial(wrapper, name, module.forward)
    return model


def batches_of(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Batches, smaller for larger images, as in train.evaluate."""
    return images.split(max(1, PIXELS // images[0, 0].numel()))


@torch.no_grad()
def predict(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Probabilities (N, num_classes) of normalised images."""
    return torch.cat([model(batch).softmax(1) for batch in batches_of(images)])


def grad_cam(model: nn.Module, images: torch.Tensor, classes: torch.Tensor) -> dict:
    """{layer: maps (N, h, w)} of the evidence for `classes` (N,) in normalised images (N, C, H, W).

    relu(sum_k a_k A_k): a_k is the mean of d score / d A_k over positions, the score is a logit
    (eq. 1 and 2). A map of zeros is empty: no evidence.
    """
    maps, activations = {layer: [] for layer in LAYERS}, {}

    def keep(layer, forward, x):
        activations[layer] = forward(x)
        return activations[layer]

    model, batches = wrapped(model, LAYERS, keep), batches_of(images)
    for batch, of_batch in zip(batches, classes.split(len(batches[0])), strict=True):
        with torch.enable_grad():
            # The weights may not require gradients: an EMA's, for example.
            score = model(batch.clone().requires_grad_()).gather(1, of_batch[:, None]).sum()
            gradients = torch.autograd.grad(score, [activations[layer] for layer in LAYERS])
        for layer, gradient in zip(LAYERS, gradients, strict=True):
            weights = gradient.mean((2, 3), keepdim=True)
            maps[layer].append(F.relu((weights * activations[layer]).sum(1)).detach())
    return {layer: torch.cat(parts) for layer, parts in maps.items()}


def scaled(maps: torch.Tensor) -> torch.Tensor:
    """Each map scaled to [0, 1]; a constant map becomes 1, an empty one stays 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    stretched = (maps - low) / (high - low).clamp(min=1e-12)
    return torch.where(high > low, stretched, (high > 0).to(maps.dtype))


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """{"layer1.0.attention": module, ...}."""
    return {
        name: module
        for name, module in model.named_modules()
        if re.fullmatch(r"(layer\d\.\d\.)?attention(_before_bn2)?", name)
        and not isinstance(module, nn.Identity)
    }


@torch.no_grad()
def check_shapes(model: nn.Module, images: torch.Tensor) -> None:
    """Raises UserError if a module changes shape or dtype, since PyTorch would broadcast a gate, or
    has layers that would not be trained or saved."""
    modules = attention_modules(model)
    trained = {*model.modules(), *model.parameters()}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            inside = value if isinstance(value, (list, tuple)) else ()
            if {x for x in inside if isinstance(x, (nn.Module, nn.Parameter))} - trained:
                why = "a plain list, so they would not be trained: use nn.ModuleList"
                raise UserError(f"{f'{name}.{key}'.lstrip('.')} has its layers in {why}")

    def check(name, forward, x):
        try:
            output = forward(x)
        except RuntimeError as error:
            if "view size is not compatible" in str(error):
                advice = "use reshape instead of view, since x is in the channels_last layout"
                raise UserError(f"{name}: {advice}") from None
            raise
        made, taken = (
            (getattr(t, "dtype", type(t)), getattr(t, "shape", None)) for t in (output, x)
        )
        if made != taken and not tried.training:  # stochastic depth may return 0 there
            raise UserError(
                f"{name} ({type(modules[name]).__name__}) makes {made[0]} {made[1]} of {taken[0]} "
                f"{taken[1]}: return the input times the gate, in the input's shape and dtype"
            )
        return output

    tried = wrapped(model, modules, check).eval()
    tried(images)
    tried.train()(images)  # two at once, for BatchNorm
    if late := sorted(tried.state_dict().keys() - model.state_dict().keys()):
        why = "so it would not be trained or restored: make it in __init__"
        raise UserError(f"{late[0]} is made in the first forward, {why}")


@torch.no_grad()
def gates_by_batch(model: nn.Module, images: torch.Tensor):
    """Yields (probabilities (N, num_classes), {module: gates (N, C, H, W)}) of normalised images.

    Gates are NaN (inactive) where the input is nearly 0. A module counts as a gate if its output
    is 0 wherever its input is 0; others are skipped.
    """
    gates, is_gate = {}, {}

    def measure(name, forward, x):
        output = forward(x.clone())  # a module may work in place
        if name not in is_gate:
            half = torch.rand(x[:1].shape, generator=torch.Generator().manual_seed(0)) < 0.5
            half = half.to(x.device)
            is_gate[name] = not (forward(x[:1] * half)[~half].abs() > 1e-6).any()
        if is_gate[name]:
            gates[name] = torch.where(x.abs() > 1e-6, output / x, torch.nan)
        return output

    model = wrapped(model, attention_modules(model), measure)
    for batch in batches_of(images):
        yield model(batch).softmax(1), gates


def gates_of(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, dict, dict]:
    """(probabilities (N, num_classes), {module: gates (N, C)}, {module: mean gate (C, H, W)}) of
    normalised images (N, C, H, W). Inactive gates are NaN, or 1 in a mean gate."""
    probabilities, gates = [], defaultdict(list)
    sums, counts = defaultdict(int), defaultdict(int)
    for of_batch, found in gates_by_batch(model, images):
        probabilities.append(of_batch)
        for name, gate in found.items():
            gates[name].append(gate.nanmean((2, 3)).cpu())
            sums[name] += gate.nansum(0)
            counts[name] += (~gate.isnan()).sum(0)
    means = {name: (sums[name] / counts[name]).nan_to_num(nan=1.0) for name in sums}
    return torch.cat(probabilities), {name: torch.cat(g) for name, g in gates.items()}, means


def replaced(model: nn.Module, means: dict[str, torch.Tensor]) -> nn.Module:
    """A copy of the model with its gates replaced by these means."""
    return wrapped(model, means, lambda name, forward, x: x * means[name])


def by_stage(gates: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """{stage: its modules' gates}."""
    stages = defaultdict(list)
    for name, gate in gates.items():
        stages[name.split(".")[0] if name.startswith("layer") else "classifier"].append(gate)
    return stages


def gate_maps_of(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """{stage: maps (N, h, w), on the CPU} of each stage's last gate, if it varies by position."""
    maps = defaultdict(list)
    for _, gates in gates_by_batch(model, images):
        for stage, of_modules in by_stage(gates).items():
            maps[stage].append(of_modules[-1].nanmean(1).cpu())
    maps = {stage: torch.cat(parts) for stage, parts in maps.items()}
    means = {stage: found.nanmean((1, 2), keepdim=True) for stage, found in maps.items()}
    return {k: found for k, found in maps.items() if ((found - means[k]).abs() > 1e-3).any()}


def gate_numbers(gates: dict[str, torch.Tensor]) -> dict[str, dict]:
    """{stage: statistics} of the modules' gates (N, C); inactive stages are left out."""
    numbers = {}
    for stage, of_modules in by_stage(gates).items():
        every = torch.cat(of_modules, dim=1)
        every = every[:, ~every.isnan().all(0)]
        if every.numel():
            of_channel = every.nanmean(0)
            over_images = (every - of_channel).square().nanmean(0).sqrt()
            known = every[~every.isnan()]
            in_0_to_1 = known.min() > -0.001 and known.max() < 1.001  # BAM's are not
            saturated = ((known < 0.05) | (known > 0.95)).float().mean().item()
            numbers[stage] = {
                "mean": known.mean().item(),
                "spread_over_channels": of_channel.std(correction=0).item(),  # standard deviations
                "spread_over_images": over_images.mean().item(),
                "saturated": saturated if in_0_to_1 else None,
                "hardly_vary": (over_images < 0.01).float().mean().item(),  # share of channels
            }
    return numbers


def gates_by_class(gates: dict[str, torch.Tensor], labels: torch.Tensor, n_classes: int) -> dict:
    """{stage: mean gates (n_classes, C) of its last module}; NaN for classes without images."""
    return {
        stage: torch.stack([last[labels == label].nanmean(0) for label in range(n_classes)])
        for stage, (*_, last) in by_stage(gates).items()
        if not last.isnan().all()
    }
