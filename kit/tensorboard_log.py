"""TensorBoard logs of a run: curves, and at the end hyper-parameters and pictures.

tensorboard --logdir runs
"""

import math
import threading
from contextlib import ExitStack
from pathlib import Path

from kit.command_line import noted
from kit.pictures import FONT_SIZE, rgb
from kit.plots import legible, plt, shortened
from kit.runs import NO_SETTING

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

INCOMPLETE = "not all is in TensorBoard"
SHOWN = 12  # misclassified test images, the first in data.sampling_order
LINE = 0.13  # inches per label in FONT_SIZE


def open_writer(folder: Path, stack: ExitStack) -> SummaryWriter:
    """The run's events file, closed with `stack`."""
    others = threading.excepthook
    # A full disk raises OSError in the next call and in the library's thread: no traceback there.
    threading.excepthook = lambda raised: isinstance(raised.exc_value, OSError) or others(raised)
    writer = SummaryWriter(folder)
    stack.callback(noted(INCOMPLETE)(writer.close))
    return writer


@noted(INCOMPLETE)
def log_epoch(writer: SummaryWriter, row: dict) -> None:
    """One line of metrics.jsonl."""
    for part in ("train", "val"):
        writer.add_scalar(f"loss/{part}", row[f"{part}_loss"], row["epoch"])
        writer.add_scalar(f"accuracy/{part}", row[f"{part}_acc"], row["epoch"])
    writer.add_scalar("lr", row["lr"], row["epoch"])


def log_test(writer: SummaryWriter, config: dict, epoch: int, loader, predictions) -> None:
    """Test accuracy, hyper-parameters, and pictures of the predictions, int64 (N,)."""
    (images, labels), classes = loader.test, legible(loader.classes)
    accuracy = 100 * (predictions == labels).double().mean().item()
    writer.add_scalar("accuracy/test", accuracy, epoch)
    # Not writer.add_hparams: it opens a second run in a new folder.
    settings = {key: value for key, value in config.items() if key not in NO_SETTING}
    settings |= {key: "none" for key, value in settings.items() if value is None}
    for summary in hparams(settings, {"accuracy/test": accuracy}):
        writer.file_writer.add_summary(summary)
    title = f"{config['model']}, seed {config['seed']}, test set"
    confusion = draw_confusion(labels.cpu(), predictions.cpu(), classes, title)
    writer.add_figure("confusion_matrix", confusion, epoch)
    order = loader.test_order
    wrong = order[(predictions != labels)[order]][:SHOWN]
    if len(wrong):
        found = images[wrong].cpu(), labels[wrong].tolist(), predictions[wrong].tolist()
        writer.add_figure("misclassified", draw_misclassified(*found, classes), epoch)


def draw_confusion(labels, predictions, classes, title) -> plt.Figure:
    """Counts of true by predicted class, int64 (N,) on the CPU; colours only if many."""
    k = len(classes)
    matrix = torch.bincount(labels * k + predictions, minlength=k * k).view(k, k).numpy()
    side = LINE * min(max(k, 42), 100)
    figure, axes = plt.subplots(figsize=(side + 1.8, side + 1.8), layout="constrained")
    shades = axes.imshow(matrix, cmap="Blues", vmin=0)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    ticks = range(0, k, math.ceil(k / 100))
    names = [shortened(classes[i], 0.75, FONT_SIZE) for i in ticks]
    axes.set_xticks(ticks, names, rotation=90, fontsize=FONT_SIZE)
    axes.set_yticks(ticks, names, fontsize=FONT_SIZE)
    if k > 20:  # numbers would not be legible
        figure.colorbar(shades, aspect=100, shrink=0.9)
        return figure
    style = {"ha": "center", "va": "center", "fontsize": 11 if k <= 10 else FONT_SIZE}
    for (true, predicted), count in np.ndenumerate(matrix):
        color = "white" if shades.norm(count) > 0.715 else "black"  # a contrast of 4.5 or more
        axes.text(predicted, true, count, color=color, **style)
    return figure


def draw_misclassified(images, labels, predictions, classes) -> plt.Figure:
    """At most SHOWN images (N, C, H, W), each with its true and predicted class."""
    shape = images.shape[2] / images.shape[3]
    columns = 4 if shape > 0.5 else 2
    size = 8, SHOWN // columns * min(0.4 + 8 / columns * shape, 3.4)  # inches
    figure, grid = plt.subplots(SHOWN // columns, columns, figsize=size, layout="constrained")
    for axes in grid.flat:
        axes.axis("off")
    names = [shortened(name, 1.2, 8) for name in classes]
    for axes, image, label, k in zip(grid.flat, rgb(images), labels, predictions, strict=False):
        axes.imshow(image.numpy())
        axes.set_title(f"{names[label]}\npredicted {names[k]}", fontsize=8)
    return figure
