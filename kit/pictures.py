"""The pictures of explain.py: images with Grad-CAM and gate maps, and every channel's gate."""

import functools
import io
import itertools
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

from kit.files import write_atomically
from kit.plots import matplotlib, plt, shortened

import numpy as np
import torch

# Inches: the page, names at its left, a line of text, the gap between tiles.
WIDTH, LABEL, LINE, GAP = 6.5, 0.9, 0.12, 0.04
FONT_SIZE = 7  # points
COLUMNS = 10  # images side by side
STEP = (WIDTH - LABEL) / COLUMNS
TILE = STEP - GAP  # an image's width
COLOURS = matplotlib.colormaps["cividis"].with_extremes(bad="lightgrey")
LEGEND = """\
For each of the first ten classes, unless --images chose others, of the test images tried: the \
first that the model named below classifies correctly, and the first that it misclassifies; an \
empty cell: none. \
Below an image: predicted class, probability, red with ✗ if wrong. Each Grad-CAM map has its own \
scale, dark blue (lowest) to yellow; pale: no evidence for the predicted class."""
GATES = " All gates have the scale below: a stage's last module; grey: no input (inactive)."


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

    def __post_init__(self):
        self.classes = [shortened(name, TILE, FONT_SIZE) for name in self.classes]


def draw_model(e: Explained, first: Explained, path: Path) -> None:
    """Every image, its Grad-CAM and gate maps, and the channels' gates of each class. The first
    model chose the images."""
    rows = [("image", e.pixels.expand(-1, 3, -1, -1) / 255, predicted(e))]
    rows += [(f"Grad-CAM\n{k}", over_image(e.pixels, maps), None) for k, maps in e.cams.items()]
    low, high = scale = gate_scale([*e.gate_maps.values(), *e.gates_by_class.values()])
    for stage, maps in e.gate_maps.items():
        tiles = coloured((maps - low) / (high - low))
        rows.append((f"gate, {stage}\n{span(maps)}", tiles, None))
    draw(e.name, first, rows, path, e.gates_by_class, scale)


def draw_comparison(models: list[Explained], path: Path) -> None:
    """Every image, and where each model finds evidence for its prediction."""
    rows = [("image", models[0].pixels.expand(-1, 3, -1, -1) / 255, None)]
    for e in models:
        heat = over_image(e.pixels, e.cams["layer4"])
        rows.append((e.name.replace(", ", "\n"), heat, predicted(e)))
    draw("Grad-CAM at layer4", models[0], rows, path, {})


def gate_scale(gates: list[torch.Tensor]) -> tuple[int, int]:
    """From 0 to 1, however little gates vary; wider where they are no sigmoids."""
    every = np.concatenate([[0, 1], *(g.flatten() for g in gates)])
    return math.floor(np.nanmin(every) + 1e-3), math.ceil(np.nanmax(every) - 1e-3)


def span(gates: torch.Tensor) -> str:
    return f"{np.nanmin(gates):.2f} to {np.nanmax(gates):.2f}"


def coloured(maps: torch.Tensor) -> torch.Tensor:
    """(n, 3, h, w) of maps (n, h, w) from 0 to 1."""
    return torch.from_numpy(COLOURS(maps.numpy())[..., :3]).permute(0, 3, 1, 2)


def over_image(pixels: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
    """Maps (N, H, W) from 0 to 1 over uint8 images (N, C, H, W): float (N, 3, H, W)."""
    empty = (heat.amax((1, 2)) <= 0)[:, None, None, None]  # the image is pale, without colours
    grey = pixels.float().mean(1, keepdim=True) / 255
    return 0.35 * grey + 0.65 * torch.where(empty, 0.83, coloured(heat))


def predicted(e: Explained) -> list[tuple[str, str]]:
    """For each image the predicted class and its probability, and the text's colour."""
    captions = []
    for k, p, label in zip(e.predictions, e.probabilities, e.labels, strict=True):
        mark, colour = ("", "black") if k == label else ("✗ ", "firebrick")
        captions.append((f"{e.classes[k]}\n{mark}{p:.0%}", colour))
    return captions


def columns_of(e: Explained) -> list[tuple[int, int | None, int | None]]:
    """(class, an image that is right or None, one that is wrong or None) for each column."""
    columns = []
    for label in sorted(set(e.labels)):
        shown = [i for i, own in enumerate(e.labels) if own == label]
        right = [i for i in shown if e.predictions[i] == label]
        wrong = [i for i in shown if i not in right]
        columns += [(label, *pair) for pair in itertools.zip_longest(right, wrong)]
    return columns


def draw(title: str, e: Explained, rows: list[tuple], path: Path, gates: dict, scale=None) -> None:
    """Bands of images that `e` gets right or wrong, each with all rows; below, strips of `gates`.

    rows: (name, tiles (n, 3, H, W), what predicted() gives or None). Coordinates: inches.
    """
    figure, axes = plt.subplots()
    axes.set_position((0, 0, 1, 1))
    text = functools.partial(axes.text, fontsize=FONT_SIZE, va="top", ha="center")
    text(WIDTH / 2, 0.08, title, fontsize=10)
    legend = textwrap.fill(LEGEND + GATES * bool(gates), width=122)
    text(0.1, 0.32, legend, ha="left")
    y = 0.4 + LINE * (legend.count("\n") + 1)
    if gates:
        y = draw_scale(axes, text, y, *scale)
    columns, (height, width) = columns_of(e), e.pixels.shape[2:]
    tile_height = TILE * height / width
    for first, band in itertools.product(range(0, len(columns), COLUMNS), (1, 2)):
        part = columns[first : first + COLUMNS]
        cells = {LABEL + k * STEP: (column[0], column[band]) for k, column in enumerate(part)}
        if all(i is None for _, i in cells.values()):
            continue
        heading = ("Correctly classified", "Misclassified")[band - 1] + f" by {e.name}"
        text(LABEL, y + LINE, heading, ha="left", weight="bold")
        y += 3.5 * LINE
        for x, (label, _) in cells.items():
            text(x + TILE / 2, y - 0.03, e.classes[label], va="bottom")
        for name, tiles, captions in rows:
            lines = name.replace("_", "_ ").split("\n")  # a long model's name breaks after a "_"
            label = "\n".join(textwrap.fill(line, 15) for line in lines).replace("_ ", "_")
            least = LINE * (label.count("\n") + 1)
            text(LABEL - 0.08, y + max(tile_height, least) / 2, label, ha="right", va="center")
            for x, (_, i) in cells.items():
                if i is not None:
                    extent = (x, x + TILE, y + tile_height, y)
                    axes.imshow(tiles[i].permute(1, 2, 0).numpy(), extent=extent)
                    caption, colour = captions[i] if captions else ("", "black")
                    text(x + TILE / 2, y + tile_height + 0.02, caption, color=colour)
            y += max(tile_height + (2.5 * LINE if captions else GAP), least + GAP)
    if gates:
        y = draw_strips(axes, text, y + 2 * LINE, gates, e.classes, *scale)
    axes.set(xlim=(0, WIDTH), ylim=(y + 0.1, 0), aspect="auto")
    axes.axis("off")
    figure.set_size_inches(WIDTH, y + 0.1)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    plt.close(figure)
    write_atomically(path, buffer.getvalue())


def draw_scale(axes, text, y: float, low: int, high: int) -> float:
    """The gates' colour bar; where it ends."""
    left, width, y = LABEL, 4 * STEP - GAP, y + LINE
    extent = (left, left + width, y + LINE, y)
    axes.imshow(np.linspace(0, 1, 256)[None], COLOURS, extent=extent)
    text(left - 0.08, y + LINE / 2, "gate", ha="right", va="center")
    for share in (0, 0.25, 0.5, 0.75, 1):
        text(left + share * width, y + LINE + 0.02, f"{low + share * (high - low):g}")
    return y + 2.2 * LINE


def draw_strips(axes, text, y: float, gates: dict, classes: list[str], low, high) -> float:
    """Mean gates (classes, C) of each stage; where they end."""
    text(LABEL, y, "Mean gate of each class (row) and channel (column, sorted by mean)", ha="left")
    y += 2.7 * LINE
    names = classes if len(classes) <= 20 else []  # more would not be legible
    height, step = LINE * (len(names) or 12), (WIDTH - LABEL) / len(gates)
    for i, name in enumerate(names):
        text(LABEL - 0.08, y + (i + 0.5) * LINE, name, ha="right", va="center")
    for k, (stage, of_stage) in enumerate(gates.items()):
        left, right = LABEL + k * step, LABEL + (k + 1) * step - GAP
        text((left + right) / 2, y - 0.03, f"{stage}: {span(of_stage)}", va="bottom")
        ordered = of_stage[:, of_stage.nanmean(0).argsort()].numpy()
        axes.imshow(ordered, COLOURS, vmin=low, vmax=high, extent=(left, right, y + height, y))
    return y + height
