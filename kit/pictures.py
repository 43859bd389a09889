"""explain.py's pictures: images with Grad-CAM and gate maps, and every channel's gate.

A picture is a column of axes: bands of up to COLUMNS images, with one row for the images and one
per map, then the strips of all gates. The unit of length is a column's width.
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path

from kit.files import write_atomically
from kit.plots import matplotlib, plt, shortened

import numpy as np
import torch
import torch.nn.functional as F

COLUMNS, TILE = 10, 0.93  # images per row; an image's width relative to its column's
WIDTH, NAME, FONT_SIZE = 6.5, 0.52, 7  # widths of page and class names, inches; points
LINE = 0.23  # height of a line of text
LEGIBLE = 20  # with more classes, strips have no class names
COLOURS = matplotlib.colormaps["cividis"].with_extremes(bad="lightgrey")
STYLE = {
    "font.size": FONT_SIZE, "figure.titlesize": 10, "axes.titlesize": FONT_SIZE,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.spines.left": False,
    "axes.spines.bottom": False, "xtick.labeltop": True, "xtick.labelbottom": False,
    "xtick.major.size": 0, "ytick.major.size": 0,
    "figure.constrained_layout.h_pad": 0.02, "figure.constrained_layout.hspace": 0,
}  # fmt: skip
LEGEND = """\
Unless --images chose others: for each of the first ten classes the first test image that the model
named above classifies correctly, and the first that it misclassifies. Above an image: its class;
below: predicted class, probability, red with ✗ if wrong. Each Grad-CAM map has its own scale, dark
blue (lowest) to yellow; pale: no evidence for the predicted class."""
GATES = """
All gates share the scale above. Each stage shows its last module. Grey: no input (inactive)."""


@dataclass
class Explained:
    """What to draw for one model. Everything is on the CPU."""

    name: str  # in words, for titles
    classes: list[str]
    images: torch.Tensor  # uint8 (n, H, W, 3)
    labels: torch.Tensor  # (n,)
    probabilities: torch.Tensor  # (n, classes)
    cams: dict[str, torch.Tensor]  # layer -> maps (n, h, w), each from 0 to 1
    gate_maps: dict[str, torch.Tensor]  # stage -> (n, h, w)
    gates_by_class: dict[str, torch.Tensor]  # stage -> mean gates (classes, C), NaN: no images

    def __post_init__(self):
        self.classes = [shortened(name, NAME, FONT_SIZE) for name in self.classes]


def rgb(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, C, H, W) as it is drawn, (N, H, W, 3): of more channels the first three."""
    images = images[:, :3] if images.shape[1] > 2 else images[:, :1].expand(-1, 3, -1, -1)
    return images.permute(0, 2, 3, 1)


def draw_model(e: Explained, first: Explained, path: Path) -> None:
    """Images with Grad-CAM and gate maps, and gates by class. Model `first` chose the images."""
    rows = [("image", e.images, e)]
    rows += [(f"Grad-CAM\n{k}", over_image(e.images, maps), None) for k, maps in e.cams.items()]
    rows += [(f"gate, {k}\n{span(maps)}", maps, None) for k, maps in e.gate_maps.items()]
    norm = gate_scale([*e.gate_maps.values(), *e.gates_by_class.values()])
    draw(e.name, first, rows, path, norm, e.gates_by_class)


def draw_comparison(models: list[Explained], path: Path) -> None:
    """Images, and where each model finds evidence for its prediction."""
    rows = [("image", models[0].images, None)]
    for e in models:
        name = "\n".join(shortened(part, 1, FONT_SIZE) for part in e.name.split(", "))
        rows.append((name, over_image(e.images, e.cams["layer4"]), e))
    draw("Grad-CAM at layer4", models[0], rows, path)


def over_image(images: torch.Tensor, heat: torch.Tensor) -> np.ndarray:
    """Maps (n, h, w) from 0 to 1 over uint8 images (n, H, W, 3): float (n, H, W, 3)."""
    empty = (heat.amax((1, 2)) <= 0)[:, None, None, None]  # drawn pale, without colours
    heat = F.interpolate(heat[:, None], images.shape[1:3], mode="bilinear")[:, 0]
    grey = images.float().mean(3, keepdim=True).numpy() / 255
    return 0.35 * grey + 0.65 * np.where(empty, 0.83, COLOURS(heat.numpy())[..., :3])


def gate_scale(gates: list[torch.Tensor]) -> plt.Normalize:
    """0 to 1, however little gates vary; wider for gates outside that range."""
    every = np.concatenate([[0, 1], *(g.flatten() for g in gates)])
    return plt.Normalize(math.floor(np.nanmin(every) + 1e-3), math.ceil(np.nanmax(every) - 1e-3))


def span(gates: torch.Tensor) -> str:
    return f"{np.nanmin(gates):.2f} to {np.nanmax(gates):.2f}"


@plt.rc_context(STYLE)
def draw(title: str, e: Explained, rows: list, path: Path, norm=None, gates=None) -> None:
    """Bands of images that `e` gets right, then wrong, each with all rows; strips of `gates`.

    rows: (name, images (n, h, w, 3) or gates (n, h, w), model of the predictions below or None).
    """
    right, panels = e.probabilities.argmax(1) == e.labels, []
    for heading, chosen in (("Correctly classified", right), ("Misclassified", ~right)):
        for images in chosen.nonzero().flatten().split(COLUMNS):
            panels += [(heading, images, *row) for row in rows if len(images)]
    height = TILE * e.images.shape[1] / e.images.shape[2]
    strip = LINE * (0.5 + (len(e.classes) if len(e.classes) <= LEGIBLE else 12))
    heights = [height] * len(panels) + [strip, LINE] * bool(gates)
    # Taller than needed: `compressed` and `tight` cut off the excess.
    size = WIDTH, 2 + sum(heights) + 0.5 * len(heights)
    layout = {"figsize": size, "layout": "compressed", "height_ratios": heights}
    figure, grid = plt.subplots(len(heights), **layout)
    for axes, (heading, images, name, tiles, model) in zip(grid, panels, strict=False):
        for k, i in enumerate(images):
            axes.imshow(np.asarray(tiles[i]), COLOURS, norm, extent=(k, k + TILE, height, 0))
            if model:
                p, predicted = model.probabilities[i].max(0)
                mark, colour = ("", "black") if predicted == e.labels[i] else ("✗ ", "firebrick")
                text = f"{e.classes[predicted]}\n{mark}{p:.0%}"
                axes.text(k + TILE / 2, height + 0.05, text, color=colour, va="top", ha="center")
        axes.set(xlim=(0, COLUMNS), ylim=(height, 0), xticks=[])
        axes.set_yticks([height / 2], [name])
        if name == "image":
            axes.set_title(f"\n{heading} by {e.name}")
            classes = [e.classes[label] for label in e.labels[images]]
            axes.set_xticks(TILE / 2 + np.arange(len(images)), classes)
    if gates:
        draw_strips(*grid[-2:], gates, e.classes, strip, norm)
    figure.suptitle(title)
    grid[-1].set_xlabel(LEGEND + GATES * bool(gates), loc="left", labelpad=5 if gates else 25)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None}, bbox_inches="tight")
    plt.close(figure)
    write_atomically(path, buffer.getvalue())


def draw_strips(axes, bar, gates: dict, classes: list[str], height: float, norm) -> None:
    """Each stage's mean gates (classes, C), and their colour bar in `bar`."""
    step = COLUMNS / len(gates)
    for k, of_stage in enumerate(gates.values()):
        ordered = of_stage[:, of_stage.nanmean(0).argsort()].numpy()
        extent = (k * step, (k + 1) * step - 1 + TILE, height - LINE / 2, 0)
        shown = axes.imshow(ordered, COLOURS, norm, extent=extent)
    axes.set(xlim=(0, COLUMNS), ylim=(height, 0), yticks=[])
    axes.set_title("\nMean gate of each class (row) and channel (column, sorted by mean)")
    names = [f"{stage}: {span(of_stage)}" for stage, of_stage in gates.items()]
    axes.set_xticks(step * (np.arange(len(gates)) + 0.5), names)
    if len(classes) <= LEGIBLE:
        axes.set_yticks(LINE * (np.arange(len(classes)) + 0.5), classes)
    axes.figure.colorbar(shown, bar, orientation="horizontal")
    bar.set_yticks([0.5], ["gate"])
    bar.set_box_aspect(LINE / COLUMNS)
