"""The pictures of explain.py: each image with Grad-CAM and gate maps, and every channel's gate."""

import io
import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch

from kit.files import write_atomically

matplotlib.use("Agg")  # the figures never go to a window
import matplotlib.pyplot as plt

# In inches. side: room for names to the left of the strips, and half of that of the tiles.
INCH = dict(tile=0.68, caption=0.26, gap=0.05, between=0.35, top=0.85, strip=1.3, side=1.0)
LEGEND = (
    "Below an image its class and the probability of the prediction; ✗: what it is taken for. Dark "
    "blue: low, yellow: high; each Grad-CAM has a scale of its own."
)


@dataclass
class Explained:
    """What is drawn of one model. Everything is on the CPU."""

    name: str  # of the picture
    choice: str  # how the images were chosen, a sentence
    quick: bool
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
    headings, tiles = ["image"], []
    for i, label in enumerate(e.labels):
        tiles.append([image_tile(e, i, f"{short(e.classes[label])}\n{verdict(e, i, ' ')}")])
    for layer, maps in e.cams.items():
        headings.append(f"Grad-CAM\n{layer}")
        for i, row in enumerate(tiles):
            row.append(cam_tile(e, i, maps[i]))
    for stage, maps in e.gate_maps.items():
        low, high = np.nanmin(maps), np.nanmax(maps)
        headings.append(f"gate, {stage}\n{low:.2f} to {high:.2f}")
        for i, row in enumerate(tiles):
            row.append([dict(X=maps[i].numpy(), cmap="cividis", vmin=low, vmax=high), ""])
    title = e.name + ", quick run" * e.quick
    legend = LEGEND
    if any(maps.isnan().any() for maps in [*e.gate_maps.values(), *e.gates_by_class.values()]):
        legend += " White: no signal reaches the gate."
    draw(title, [e.choice, legend], headings, tiles, e.gates_by_class, e.classes, path)


def draw_comparison(models: list[Explained], path: Path) -> None:
    """Every image, and where each model looks for what it takes it for."""
    first = models[0]
    headings = ["image"]
    tiles = [[image_tile(first, i, short(first.classes[first.labels[i]]))]
             for i in range(len(first.labels))]  # fmt: skip
    for e in models:
        headings.append(e.name.replace(", ", "\n"))
        for i, row in enumerate(tiles):
            heat, _ = cam_tile(e, i, e.cams["layer4"][i])
            row.append([heat, verdict(e, i, "\n")])
    title = "Grad-CAM at layer4" + ", quick runs" * any(e.quick for e in models)
    draw(title, [first.choice, LEGEND], headings, tiles, {}, first.classes, path)


def image_tile(e: Explained, i: int, caption: str) -> list:
    return [dict(X=e.pixels[i].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255), caption]


def cam_tile(e: Explained, i: int, heat: torch.Tensor) -> list:
    """The map over the grey image; empty where nothing speaks for the class."""
    if not heat.max() > 0:
        return [None, "empty map"]
    return [dict(X=over_image(e.pixels[i : i + 1], heat[None])[0].permute(1, 2, 0).numpy()), ""]


def over_image(pixels: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
    """Maps (N, H, W) from 0 to 1 over uint8 images (N, C, H, W): float (N, 3, H, W)."""
    colours = torch.from_numpy(matplotlib.colormaps["cividis"](heat.numpy())[..., :3])
    grey = pixels.float().mean(1, keepdim=True) / 255
    return 0.35 * grey + 0.65 * colours.permute(0, 3, 1, 2)


def verdict(e: Explained, i: int, between: str) -> str:
    """The probability of the predicted class, and before it which that is if it is wrong."""
    probability, predicted = f"{e.probabilities[i]:.0%}", e.predictions[i]
    if predicted == e.labels[i]:
        return probability
    return f"✗ {short(e.classes[predicted])}{between}{probability}"


def short(name: str) -> str:
    return name if len(name) <= 14 else f"{name[:6]}…{name[-7:]}"


def draw(title, notes, headings, tiles, gates_by_class, classes, path) -> None:
    """Two images a row, each with its tiles; below, a strip of channel gates for each stage.

    tiles: for each image a list of [arguments of imshow or None, caption].
    """
    inch, n, stages = INCH, len(tiles), list(gates_by_class)
    blocks = min(n, 2) if len(headings) <= 8 else 1
    rows = -(-n // blocks)
    step, row_height = inch["tile"] + inch["gap"], inch["tile"] + inch["caption"]
    block = len(headings) * step
    side = inch["side"] if stages else inch["between"] / 2
    width = max(blocks * block + (blocks - 1) * inch["between"] + inch["between"],
                side + 1.7 * len(stages), 4.5)  # fmt: skip
    margin = (width - blocks * block - (blocks - 1) * inch["between"]) / 2
    top = inch["top"] + rows * row_height
    height = top + (inch["strip"] + 0.45 if stages else 0)
    figure = plt.figure(figsize=(width, height))

    def place(left, top, wide, high):  # in inches from the upper left corner
        axes = figure.add_axes(
            [left / width, 1 - (top + high) / height, wide / width, high / height]
        )
        axes.set_xticks([])
        axes.set_yticks([])
        return axes

    figure.text(0.5, 1 - 0.13 / height, title, ha="center", va="center", fontsize=10)
    notes = "\n".join("\n".join(textwrap.wrap(note, int(21 * width))) for note in notes if note)
    figure.text(0.5, 1 - 0.24 / height, notes, ha="center", va="top", fontsize=6)
    for i, of_image in enumerate(tiles):
        left = margin + i // rows * (block + inch["between"])
        for j, (shown, caption) in enumerate(of_image):
            axes = place(left + j * step, inch["top"] + i % rows * row_height, inch["tile"],
                         inch["tile"])  # fmt: skip
            if shown:
                axes.imshow(**shown, aspect="auto")
            else:
                axes.spines[:].set_color("0.7")
            axes.set_xlabel(caption, fontsize=5.5, labelpad=1.5, linespacing=1.0, parse_math=False,
                            weight="bold" if "✗" in caption else "normal")  # fmt: skip
            if i % rows == 0:
                axes.set_title(headings[j], fontsize=5.5, pad=3)
    for k, stage in enumerate(stages):
        gates = gates_by_class[stage]
        gates = gates[:, gates.nanmean(0).argsort()].numpy()
        wide = (width - side) / len(stages)
        axes = place(side + k * wide, top + 0.35, wide - 0.1, inch["strip"] - 0.05)
        low, high = np.nanmin(gates), np.nanmax(gates)
        axes.imshow(gates, cmap="cividis", aspect="auto", vmin=low, vmax=high)
        axes.set_title(f"mean gates, {stage}: {low:.2f} to {high:.2f}", fontsize=5.5, pad=3)
        axes.set_xlabel("channels, by their mean", fontsize=5.5, labelpad=1.5)
        if k == 0 and len(gates) <= 20:
            axes.set_yticks(range(len(gates)), [short(name) for name in classes], fontsize=5.5,
                            parse_math=False)  # fmt: skip
            axes.tick_params(length=0, pad=2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    plt.close(figure)
    write_atomically(path, buffer.getbuffer())
