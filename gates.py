"""The gates of a model's attention: what each module multiplies its input by.

A gate is measured, not read off, so that it is there for every module: the least-squares factor g
of output = g x input, over the positions of each channel (one number a channel) or over the
channels of each position (a map). For SE and ECA the first is exact, for CBAM it is both gates
together; of a module that adds, such as GC, it says how much is added in the input's own direction.
`sk` and `bot` take the place of a convolution and have no gate.
"""

import contextlib

import torch
import torch.nn as nn

from grad_cam import BATCH, captured, evaluation

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


def factor(inputs: torch.Tensor, outputs: torch.Tensor, dims) -> torch.Tensor:
    """The g that makes |output - g x input| least, summed over `dims`; 1 where all inputs are 0."""
    squares = inputs.square().sum(dims)
    products = (inputs * outputs).sum(dims)
    return torch.where(squares > 0, products / squares.clamp(min=1e-30), 1.0)


class Fixed(nn.Module):
    """In place of a module: its gate, averaged over images, whatever the image."""

    def __init__(self, gate: torch.Tensor):
        super().__init__()
        self.gate = gate  # (C, H, W)

    def forward(self, x):
        return x * self.gate


@torch.no_grad()
def gates_of(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, dict, dict]:
    """(probabilities (N, num_classes), {module: gates (N, C)}, {module: Fixed}), in one pass.

    images: normalised.
    """
    modules = attention_modules(model)
    probabilities, gates = [], {name: [] for name in modules}
    products, squares = {}, {}
    with evaluation(model), captured(modules) as seen:
        for batch in images.split(BATCH):
            probabilities.append(model(batch).softmax(1))
            for name, (inputs, outputs) in seen.items():
                gates[name].append(factor(inputs, outputs, (2, 3)).cpu())
                products[name] = products.get(name, 0) + (inputs * outputs).sum(0)
                squares[name] = squares.get(name, 0) + inputs.square().sum(0)
    fixed = {
        name: Fixed(torch.where(squares[name] > 0, products[name] / squares[name], 1.0))
        for name in modules
    }
    gates = {name: torch.cat(parts) for name, parts in gates.items()}
    return torch.cat(probabilities), gates, fixed


@torch.no_grad()
def gate_maps_of(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """{stage: maps (N, h, w)} of the last module of each stage that sees more than one position."""
    modules = {stage_of(name): module for name, module in attention_modules(model).items()}
    with evaluation(model), captured(modules) as seen:
        model(images)
    return {
        stage: factor(inputs, outputs, 1)
        for stage, (inputs, outputs) in seen.items()
        if inputs.shape[2] > 1
    }


def gate_numbers(gates: dict[str, torch.Tensor]) -> dict[str, dict]:
    """{stage: numbers}, of gates (N, C) of each module. Spread: standard deviations."""
    numbers = {}
    for stage in STAGES:
        of_stage = [g for name, g in gates.items() if stage_of(name) == stage]
        if of_stage:
            every = torch.cat(of_stage, dim=1)
            over_images = every.std(0, correction=0)
            numbers[stage] = {
                "mean": every.mean().item(),
                "spread_over_channels": every.mean(0).std(correction=0).item(),
                "spread_over_images": over_images.mean().item(),
                "saturated": ((every < 0.05) | (every > 0.95)).float().mean().item(),
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
