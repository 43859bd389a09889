"""The gates of a model's attention: what each module multiplies its input by.

A gate is measured, not read off, so that it is there for every module: output / input, element by
element, averaged over the positions of each channel (one number a channel) or over the channels of
each position (a map). A module that does not give 0 for 0, such as GC, adds something and has no
gate; `sk` and `bot` take the place of a convolution and have none either.
"""

import contextlib

import torch
import torch.nn as nn

from kit.grad_cam import BATCH, captured, evaluation

STAGES = ("layer1", "layer2", "layer3", "layer4", "classifier")


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Those that gate: {"layer1.0.attention": module, ...}, without the empty places."""
    names = ("attention", "attention_before_bn2")
    return {
        name: module
        for name, module in model.named_modules()
        if name.split(".")[-1] in names and not isinstance(module, nn.Identity)
    }


def stage_of(name: str) -> str:
    return name.split(".")[0] if name.startswith("layer") else "classifier"


def ratio(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """output / input; NaN where the input is as good as 0, and nothing can be said."""
    return torch.where(inputs.abs() > 1e-6, outputs / inputs, torch.nan)


def adds(module: nn.Module, inputs: torch.Tensor) -> bool:
    """Whether something is left where nothing comes in."""
    return bool(module.forward(torch.zeros_like(inputs[:1])).abs().max() > 1e-6)


class Fixed(nn.Module):
    """In place of a module: what it does on average over images, whatever the image."""

    def __init__(self, gate: torch.Tensor | float, term: torch.Tensor | float):
        super().__init__()
        self.gate, self.term = gate, term  # (C, H, W) each

    def forward(self, x):
        return x * self.gate + self.term


@torch.no_grad()
def gates_of(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, dict, dict]:
    """(probabilities (N, num_classes), {module: gates (N, C)}, {module: Fixed}), in one pass.

    images: normalised. A gate is NaN where its channel has no input. What adds has no gates.
    """
    modules = attention_modules(model)
    probabilities, gates, sums, counts = [], {}, {}, {}
    with evaluation(model), captured(modules) as seen:
        for batch in images.split(BATCH):
            probabilities.append(model(batch).softmax(1))
            for name, (inputs, outputs) in seen.items():
                if adds(modules[name], inputs):
                    of_batch = outputs - inputs
                else:
                    of_batch = ratio(inputs, outputs)
                    gates.setdefault(name, []).append(of_batch.nanmean((2, 3)).cpu())
                sums[name] = sums.get(name, 0) + of_batch.nansum(0)
                counts[name] = counts.get(name, 0) + (~of_batch.isnan()).sum(0)
    fixed = {}
    for name in modules:
        mean = sums[name] / counts[name].clamp(min=1)
        if name in gates:
            fixed[name] = Fixed(torch.where(counts[name] > 0, mean, 1.0), 0.0)
        else:
            fixed[name] = Fixed(1.0, mean)
    return torch.cat(probabilities), {name: torch.cat(g) for name, g in gates.items()}, fixed


@torch.no_grad()
def gate_maps_of(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """{stage: maps (N, h, w)} of the last module of each stage, if it tells positions apart."""
    modules = {stage_of(name): module for name, module in attention_modules(model).items()}
    maps = {}
    with evaluation(model):
        with captured(modules) as seen:
            model(images)
        for stage, (inputs, outputs) in seen.items():
            if not adds(modules[stage], inputs):
                found = ratio(inputs, outputs).nanmean(1)
                if (found - found.nanmean((1, 2), keepdim=True)).abs().nan_to_num().max() > 1e-3:
                    maps[stage] = found
    return maps


def gate_numbers(gates: dict[str, torch.Tensor]) -> dict[str, dict]:
    """{stage: numbers}, of gates (N, C) of each module. Spread: standard deviations.

    saturated is None of gates that are not between 0 and 1, such as BAM's.
    """
    numbers = {}
    for stage in STAGES:
        of_stage = [g for name, g in gates.items() if stage_of(name) == stage]
        if of_stage:
            every = torch.cat(of_stage, dim=1)
            every = every[:, ~every.isnan().all(0)]
        if of_stage and every.numel():  # otherwise nothing ever comes in
            of_channel = every.nanmean(0)
            over_images = (every - of_channel).square().nanmean(0).sqrt()
            known = every[~every.isnan()]
            from_0_to_1 = known.min() > -0.001 and known.max() < 1.001
            saturated = ((known < 0.05) | (known > 0.95)).float().mean().item()
            numbers[stage] = {
                "mean": known.mean().item(),
                "spread_over_channels": of_channel.std(correction=0).item(),
                "spread_over_images": over_images.mean().item(),
                "saturated": saturated if from_0_to_1 else None,
                "hardly_vary": (over_images < 0.01).float().mean().item(),
            }
    return numbers


@contextlib.contextmanager
def replaced(model: nn.Module, others: dict[str, nn.Module]):
    """Within the block the modules of these names are others."""
    own = {name: model.get_submodule(name) for name in others}

    def put(modules):
        for name, module in modules.items():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module)

    put(others)
    try:
        yield
    finally:
        put(own)
