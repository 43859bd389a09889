"""The pictures of explain.py: images with Grad-CAM and gate maps, and every channel's gate."""

import functools
import io
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kit.files import write_atomically
from kit.plots import matplotlib, plt

WIDTH, LABEL, LINE, GAP = 7.2, 0.9, 0.12, 0.04  # inches: page, names at its left, text, tiles
COLUMNS = 10  # images side by side
COLOURS = matplotlib.colormaps["cividis"].with_extremes(bad="lightgrey")
LEGEND = textwrap.fill(
    "Images, unless chosen by hand: for each class the first that the (first) model gets right, "
    "then the first that it gets wrong. Above an image its class; below, the predicted class and "
    "its probability, bold red if wrong. Dark blue: low, yellow: high; each Grad-CAM map has its "
    "own scale. Grey: no evidence for the predicted class, or no input (the gate is inactive).",
    width=140,
)


@dataclass
class Explained:
    """What is drawn of one model. Everything is on the CPU."""

    name: str  # in words
    classes: list[str]
    pixels: torch.Tensor  # uint8 (n, C, H, W), the images shown
    labels: list[int]
    predictions: list[int]
    probabilities: list[float]  # of the predicted classes
    cams: dict[str, torch.Tensor]  # layer -> maps (n, H, W), each from 0 to 1
    gate_maps: dict[str, torch.Tensor]  # stage -> (n, h, w)
    gates_by_class: dict[str, torch.Tensor]  # stage -> mean gates (classes, C), NaN: not seen


def draw_model(e: Explained, path: Path) -> None:
    """Every image, its Grad-CAM and gate maps, and the channels' gates of each class."""
    rows = [("image", e.pixels.expand(-1, 3, -1, -1) / 255, predicted(e))]
    rows += [(f"Grad-CAM\n{k}", over_image(e.pixels, maps), None) for k, maps in e.cams.items()]
    for stage, maps in e.gate_maps.items():
        low, high = np.nanmin(maps), np.nanmax(maps)
        tiles = coloured((maps - low) / (high - low))
        rows.append((f"gate, {stage}\n{low:.2f} to {high:.2f}", tiles, None))
    draw(e.name, e, rows, e.gates_by_class, path)


def draw_comparison(models: list[Explained], path: Path) -> None:
    """Every image, and where each model finds evidence for the class that it predicts."""
    rows = [("image", models[0].pixels.expand(-1, 3, -1, -1) / 255, None)]
    for e in models:
        heat = over_image(e.pixels, e.cams["layer4"])
        rows.append((e.name.replace(", ", "\n"), heat, predicted(e)))
    draw("Grad-CAM at layer4", models[0], rows, {}, path)


def coloured(maps: torch.Tensor) -> torch.Tensor:
    """(n, 3, h, w) of maps (n, h, w) from 0 to 1."""
    return torch.from_numpy(COLOURS(maps.numpy())[..., :3]).permute(0, 3, 1, 2)


def over_image(pixels: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
    """Maps (N, H, W) from 0 to 1 over uint8 images (N, C, H, W): float (N, 3, H, W).

    Over an empty map the image is pale, without colours.
    """
    empty = (heat.amax((1, 2)) <= 0)[:, None, None, None]
    grey = pixels.float().mean(1, keepdim=True) / 255
    return 0.35 * grey + 0.65 * torch.where(empty, 0.83, coloured(heat))


def short(name: str) -> str:
    return name if len(name) <= 11 else f"{name[:5]}…{name[-5:]}"


def wrapped(name: str) -> str:
    """Lines as long as fit to the left of the tiles; a long model's name breaks after a "_"."""
    lines = name.replace("_", "_ ").split("\n")
    return "\n".join(textwrap.fill(line, 15) for line in lines).replace("_ ", "_")


def predicted(e: Explained) -> list[tuple[str, dict]]:
    """For each image the predicted class and its probability, and the style of a wrong one."""
    wrong = {"weight": "bold", "color": "firebrick"}
    shown = zip(e.predictions, e.probabilities, e.labels, strict=True)
    return [(f"{short(e.classes[k])}\n{p:.0%}", wrong if k != i else {}) for k, p, i in shown]


def draw(title: str, e: Explained, rows: list[tuple], gates_by_class: dict, path: Path) -> None:
    """Bands of up to COLUMNS images, each with all rows; below, a strip of gates for each stage.

    rows: (name, tiles (n, 3, H, W), what predicted() gives or None). All is drawn in one axes, with
    coordinates in inches from the upper left corner.
    """
    figure = plt.figure()
    axes = figure.add_axes((0, 0, 1, 1))
    text = functools.partial(axes.text, fontsize=7, va="top", ha="center", parse_math=False)
    text(WIDTH / 2, 0.08, title, fontsize=10)
    text(WIDTH / 2, 0.3, LEGEND)
    y = 0.4 + LINE * (LEGEND.count("\n") + 1)
    n, _, height, width = e.pixels.shape
    step = (WIDTH - LABEL) / COLUMNS
    tile_width, tile_height = step - GAP, (step - GAP) * height / width
    for first in range(0, n, COLUMNS):
        columns = {i: LABEL + (i - first) * step for i in range(first, min(first + COLUMNS, n))}
        y += 2 * LINE
        for i, x in columns.items():
            text(x + tile_width / 2, y - 0.03, short(e.classes[e.labels[i]]), va="bottom")
        for name, tiles, captions in rows:
            text(LABEL - 0.08, y + tile_height / 2, wrapped(name), ha="right", va="center")
            for i, x in columns.items():
                extent = (x, x + tile_width, y + tile_height, y)
                axes.imshow(tiles[i].permute(1, 2, 0).numpy(), extent=extent)
                caption, style = captions[i] if captions else ("", {})
                text(x + tile_width / 2, y + tile_height + 0.02, caption, **style)
            y += tile_height + (2.5 * LINE if captions else GAP)
    if gates_by_class:
        y = draw_strips(axes, text, y + 2 * LINE, gates_by_class, e.classes)
    axes.set(xlim=(0, WIDTH), ylim=(y + 0.1, 0), aspect="auto")
    axes.axis("off")
    figure.set_size_inches(WIDTH, y + 0.1)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    plt.close(figure)
    write_atomically(path, buffer.getbuffer())


def draw_strips(axes, text, y: float, gates_by_class: dict, classes: list[str]) -> float:
    """Mean gates (classes, C) of each stage, on a scale of its own; where they end."""
    text(LABEL, y, "Mean gate of each class (row) and channel (column, sorted by mean)", ha="left")
    y += 2.7 * LINE
    names = classes if len(classes) <= 20 else []  # more would not be legible
    height, step = LINE * (len(names) or 12), (WIDTH - LABEL) / len(gates_by_class)
    for i, name in enumerate(names):
        text(LABEL - 0.08, y + (i + 0.5) * LINE, short(name), ha="right", va="center")
    for k, (stage, gates) in enumerate(gates_by_class.items()):
        left, right = LABEL + k * step, LABEL + (k + 1) * step - GAP
        low, high = np.nanmin(gates), np.nanmax(gates)
        title = f"{stage}: {low:.2f} to {high:.2f}"
        text((left + right) / 2, y - 0.03, title, va="bottom")
        ordered = gates[:, gates.nanmean(0).argsort()].numpy()
        axes.imshow(ordered, cmap=COLOURS, extent=(left, right, y + height, y))
    return y + height
