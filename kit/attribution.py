"""Where a model looks, and what its attention does: Grad-CAM (arXiv 1610.02391) and gates.

A gate is what an attention module multiplies its input by: output / input, averaged over the
positions of each channel (a number per channel) or over the channels of each position (a map). Of
modules that add something, like GC, or replace a convolution, like `sk`, nothing is said. Models
are in evaluation mode.
"""

import contextlib
import copy
import re

from kit.command_line import UserError

import torch
import torch.nn as nn
import torch.nn.functional as F

LAYERS = ("layer3", "layer4")
PIXELS = 196_000  # of a batch: 250 images of 28x28


@contextlib.contextmanager
def captured(modules: dict[str, nn.Module]):
    """Within the block every forward pass leaves (input, output) of each module in a dict."""
    seen = {}
    with contextlib.ExitStack() as stack:
        for name, module in modules.items():

            def before(module, inputs, name=name):
                seen[name] = inputs[0].detach().clone()  # a module may work in place

            def after(module, inputs, output, name=name):
                seen[name] = seen[name], output

            stack.enter_context(module.register_forward_pre_hook(before))
            stack.enter_context(module.register_forward_hook(after))
        yield seen


def batches_of(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of fewer images where they are larger, as in train.evaluate."""
    return images.split(max(1, PIXELS // images[0, 0].numel()))


@torch.no_grad()
def predict(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Probabilities (N, num_classes) of normalised images."""
    return torch.cat([model(batch).softmax(1) for batch in batches_of(images)])


def grad_cam(model: nn.Module, images: torch.Tensor, classes: torch.Tensor) -> dict:
    """{layer: maps (N, h, w)} of the evidence for `classes` (N,) in normalised images (N, C, H, W).

    relu(sum_k a_k A_k), a_k the mean of d score / d A_k over positions, the score a logit (eq. 1
    and 2). A map of zeros is empty: no evidence for the class.
    """
    maps = {layer: [] for layer in LAYERS}
    modules = {layer: getattr(model, layer) for layer in LAYERS}
    batches = batches_of(images)
    for batch, of_batch in zip(batches, classes.split(len(batches[0])), strict=True):
        with captured(modules) as seen, torch.enable_grad():
            # The weights may need no gradient: those of an EMA, for example.
            score = model(batch.clone().requires_grad_()).gather(1, of_batch[:, None]).sum()
            activations = [seen[layer][1] for layer in LAYERS]
            gradients = torch.autograd.grad(score, activations)
        for layer, activation, gradient in zip(LAYERS, activations, gradients, strict=True):
            weights = gradient.mean((2, 3), keepdim=True)
            maps[layer].append(F.relu((weights * activation).sum(1)).detach())
    return {layer: torch.cat(parts) for layer, parts in maps.items()}


def scaled(maps: torch.Tensor) -> torch.Tensor:
    """Each map from 0 to 1; one that is the same everywhere becomes 1, an empty one stays 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    stretched = (maps - low) / (high - low).clamp(min=1e-12)
    return torch.where(high > low, stretched, (high > 0).to(maps.dtype))


def enlarged(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(maps[:, None], size, mode="bilinear")[:, 0]


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """{"layer1.0.attention": module, ...}."""
    return {
        name: module
        for name, module in model.named_modules()
        if re.search(r"\battention(_before_bn2)?$", name) and not isinstance(module, nn.Identity)
    }


def stage_of(name: str) -> str:
    return name.split(".")[0] if name.startswith("layer") else "classifier"


def gating_modules(model: nn.Module, images: torch.Tensor) -> dict[str, nn.Module]:
    """The attention modules whose output is 0 wherever their input is 0."""
    modules, gating = attention_modules(model), {}
    with captured(modules) as seen:
        model(images[:1])
        for name, (inputs, _) in seen.items():
            half = torch.rand(inputs.shape, generator=torch.Generator().manual_seed(0)) < 0.5
            half = half.to(inputs.device)
            if not (modules[name].forward(inputs * half)[~half].abs() > 1e-6).any():
                gating[name] = modules[name]
    return gating


def gate_of(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """output / input, NaN where the input is (nearly) 0: inactive."""
    return torch.where(inputs.abs() > 1e-6, outputs / inputs, torch.nan)


def check_shapes(model: nn.Module, images: torch.Tensor) -> None:
    """Raises UserError for a module whose output has not its input's shape: PyTorch would broadcast
    a gate."""
    names = {module: name for name, module in attention_modules(model).items()}

    def check(module, inputs, output):
        if (shape := getattr(output, "shape", None)) != inputs[0].shape:
            raise UserError(
                f"{names[module]} ({type(module).__name__}) makes {shape or type(output)} of "
                f"{inputs[0].shape}: return the input times the gate, in the input's shape"
            )

    with contextlib.ExitStack() as stack:
        for module in names:
            stack.enter_context(module.register_forward_hook(check))
        predict(model.eval(), images)


class MeanGate(nn.Module):
    """Replaces a module by its mean gate (C, H, W)."""

    def __init__(self, gate: torch.Tensor):
        super().__init__()
        self.gate = gate

    def forward(self, x):
        return x * self.gate


@torch.no_grad()
def gates_of(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, dict, dict]:
    """(probabilities (N, num_classes), {module: gates (N, C)}, {module: MeanGate}) of normalised
    images (N, C, H, W). Inactive gates are NaN, or 1 in a MeanGate."""
    modules, probabilities = gating_modules(model, images), []
    gates = {name: [] for name in modules}
    sums, counts = dict.fromkeys(modules, 0), dict.fromkeys(modules, 0)
    with captured(modules) as seen:
        for batch in batches_of(images):
            probabilities.append(model(batch).softmax(1))
            for name, both in seen.items():
                gate = gate_of(*both)
                gates[name].append(gate.nanmean((2, 3)).cpu())
                sums[name] += gate.nansum(0)
                counts[name] += (~gate.isnan()).sum(0)
    means = {
        name: MeanGate(torch.where(count > 0, sums[name] / count.clamp(min=1), 1.0))
        for name, count in counts.items()
    }
    return torch.cat(probabilities), {name: torch.cat(g) for name, g in gates.items()}, means


@torch.no_grad()
def gate_maps_of(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """{stage: maps (N, h, w), on the CPU} of each stage's last gate, if it varies by position."""
    modules = {stage_of(name): each for name, each in gating_modules(model, images).items()}
    maps = {}
    with captured(modules) as seen:
        model(images)
    for stage, both in seen.items():
        found = gate_of(*both).nanmean(1)
        spread = (found - found.nanmean((1, 2), keepdim=True)).abs().nan_to_num().max()
        maps |= {stage: found.cpu()} if spread > 1e-3 else {}
    return maps


def gate_numbers(gates: dict[str, torch.Tensor]) -> dict[str, dict]:
    """{stage: numbers} from the gates (N, C) of each module; without stages that are inactive."""
    numbers = {}
    for stage in dict.fromkeys(map(stage_of, gates)):
        every = torch.cat([g for name, g in gates.items() if stage_of(name) == stage], dim=1)
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
    last_of_stage = {stage_of(name): of_module.float() for name, of_module in gates.items()}
    return {
        stage: torch.stack([found[labels == label].nanmean(0) for label in range(n_classes)])
        for stage, found in last_of_stage.items()
        if not found.isnan().all()
    }


def replaced(model: nn.Module, others: dict[str, nn.Module]) -> nn.Module:
    """A copy of the model with these modules in place of those of the same names."""
    model = copy.deepcopy(model)
    for name, module in others.items():
        model.set_submodule(name, module)
    return model
