"""Grad-CAM: which part of an image speaks for a class, and whether that can be believed.

Grad-CAM: Selvaraju et al., ICCV 2017 (arXiv 1610.02391). Deletion and insertion: Petsiuk et al.,
BMVC 2018 (arXiv 1806.07421). That maps must change with the weights: Adebayo et al., NeurIPS 2018
(arXiv 1810.03292).
"""

import contextlib

import torch
import torch.nn as nn
import torch.nn.functional as F

LAYERS = ("layer3", "layer4")
BATCH = 250
STEPS = 7  # of deletion and insertion


@contextlib.contextmanager
def captured(modules: dict[str, nn.Module]):
    """Within the block every forward pass leaves (input, output) of each module in a dict."""
    seen, hooks = {}, []
    for name, module in modules.items():
        hooks.append(
            module.register_forward_hook(
                lambda _, inputs, output, name=name: seen.__setitem__(name, (inputs[0], output))
            )
        )
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def evaluation(model: nn.Module):
    """Within the block the model is in evaluation mode; afterwards in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def predict(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Probabilities (N, num_classes) of normalised images."""
    with evaluation(model):
        return torch.cat([model(batch).softmax(1) for batch in images.split(BATCH)])


def grad_cam(
    model: nn.Module, images: torch.Tensor, classes: torch.Tensor, layers: tuple[str, ...] = LAYERS
) -> dict[str, torch.Tensor]:
    """{layer: maps (N, h, w)} of what speaks for `classes` (N,) in normalised images (N, C, H, W).

    relu(sum_k a_k A_k), a_k the mean of d score / d A_k over positions, the score a logit (eq. 1
    and 2). A map of zeros is empty: nothing there speaks for the class. The model is left in the
    mode it was in, without hooks and gradients.
    """
    maps = {layer: [] for layer in layers}
    for batch, of_batch in zip(images.split(BATCH), classes.split(BATCH), strict=True):
        with evaluation(model), torch.enable_grad():
            with captured({layer: getattr(model, layer) for layer in layers}) as seen:
                # The weights, say, of a run that has just ended may ask for no gradient.
                score = model(batch.clone().requires_grad_()).gather(1, of_batch[:, None]).sum()
            activations = [seen[layer][1] for layer in layers]
            gradients = torch.autograd.grad(score, activations)
        for layer, activation, gradient in zip(layers, activations, gradients, strict=True):
            weights = gradient.mean((2, 3), keepdim=True)
            maps[layer].append(F.relu((weights * activation).sum(1)).detach())
    return {layer: torch.cat(parts) for layer, parts in maps.items()}


def scaled(maps: torch.Tensor) -> torch.Tensor:
    """Each map from 0 to 1; one that is the same everywhere becomes 1, an empty one stays 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    stretched = (maps - low) / (high - low).clamp(min=1e-12)
    return torch.where(high > low, stretched, (high > 0).to(maps.dtype))


def enlarged(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


# --- Is it faithful? ------------------------------------------------------------------------------


def deletion_and_insertion(
    model: nn.Module, images: torch.Tensor, classes: torch.Tensor, maps: torch.Tensor
) -> tuple[float, float]:
    """Mean probability of `classes` while pixels go, and while they come, most important first.

    maps: (N, H, W). What is not there is 0 in normalised pixels; of pixels of one rank the order is
    random. Of a good map deletion is low and insertion high.
    """
    n, _, height, width = images.shape
    noise = torch.rand(maps.shape, generator=torch.Generator().manual_seed(1)).to(maps.device)
    most_important_first = (scaled(maps) + 1e-6 * noise).flatten(1).argsort(1, descending=True)
    rank = most_important_first.argsort(dim=1).view(n, 1, height, width)
    scores = []
    for keep_first in (False, True):
        total = 0.0
        for step in range(STEPS + 1):
            first = rank < step * height * width / STEPS
            shown = images * (first if keep_first else ~first)
            total += predict(model, shown).gather(1, classes[:, None]).mean().item()
        scores.append(total / (STEPS + 1))
    return scores[0], scores[1]


def correlation(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """The mean correlation of the maps (N, h, w) of a with those of b; None if all are constant."""
    a, b = (m.flatten(1) - m.flatten(1).mean(1, keepdim=True) for m in (a, b))
    norms = a.norm(dim=1) * b.norm(dim=1)
    if not (norms > 0).any():
        return None
    return ((a * b).sum(1)[norms > 0] / norms[norms > 0]).mean().item()
