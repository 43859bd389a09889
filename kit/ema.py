"""Exponential moving average (EMA) of a model's weights; the recipe `strong` tests them."""

import copy

import torch
import torch.nn as nn


class EMA:
    """`model` holds the EMA of the weights and of BatchNorm's statistics.

    After each step ema += rate (weights - ema), rate = max(1 - decay, 9 / (10 + steps)): the first
    steps are soon forgotten. (torch.optim.swa_utils.AveragedModel reads its counter on the host in
    every step, which a CUDA graph cannot capture.)
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False)
        tensors = ([*m.parameters(), *m.buffers()] for m in (self.model, model))  # shared: once
        pairs = list(zip(*tensors, strict=True))
        self.floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self.counts = [pair for pair in pairs if not pair[0].is_floating_point()]
        self.decay = decay
        self.steps = torch.zeros((), device=next(model.parameters()).device)

    @torch.no_grad()
    def update(self) -> None:
        rate = (9 / (10 + self.steps)).clamp(min=1 - self.decay)
        averages, weights = map(list, zip(*self.floats, strict=True))
        changes = torch._foreach_sub(weights, averages)  # a few kernels, not hundreds, on a GPU
        torch._foreach_mul_(changes, rate)
        torch._foreach_add_(averages, changes)
        for average, count in self.counts:
            average.copy_(count)
        self.steps += 1

    def state_dict(self) -> dict:
        return {"model": self.model.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.steps.copy_(state["steps"])
