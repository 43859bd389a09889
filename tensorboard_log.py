"""What TensorBoard shows of a run: curves, and at the end hyper-parameters and two pictures.

tensorboard --logdir runs
"""

import threading
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

matplotlib.use("Agg")  # the figures never go to a window
import matplotlib.pyplot as plt

HPARAMS = ("model", "dataset", "recipe", "seed", "width", "epochs", "batch_size", "lr", "precision")


def open_writer(folder: Path) -> SummaryWriter:
    """The run's events file. A full disk is an OSError of the next call, or of closing it.

    The library's own thread raises it once more, which Python would print with a traceback.
    """
    others = threading.excepthook

    def excepthook(raised):
        if not isinstance(raised.exc_value, OSError):
            others(raised)

    threading.excepthook = excepthook
    return SummaryWriter(folder)


def log_epoch(writer: SummaryWriter, row: dict) -> None:
    """One line of metrics.jsonl."""
    for part in ("train", "val"):
        writer.add_scalar(f"loss/{part}", row[f"{part}_loss"], row["epoch"])
        writer.add_scalar(f"accuracy/{part}", row[f"{part}_acc"], row["epoch"])
    writer.add_scalar("lr", row["lr"], row["epoch"])


def log_test(
    writer: SummaryWriter,
    config: dict,
    result: dict,
    images: torch.Tensor,
    labels: torch.Tensor,
    predictions: torch.Tensor,
    classes: list[str],
) -> None:
    """Test accuracy, hyper-parameters, confusion matrix, misclassified images.

    images: uint8 (N, C, H, W); labels, predictions: int64 (N,).
    """
    epoch = result["epochs_run"]
    writer.add_scalar("accuracy/test", result["test_acc"], epoch)
    shown = {key: config[key] for key in HPARAMS}
    # Not writer.add_hparams: that opens a second run in a folder of its own.
    for summary in hparams(shown, {"accuracy/test": result["test_acc"]}):
        writer.file_writer.add_summary(summary)
    images, labels, predictions = images.cpu(), labels.cpu(), predictions.cpu()
    title = f"{config['model']}, seed {config['seed']}, test set"
    writer.add_figure(
        "confusion_matrix", draw_confusion(labels, predictions, classes, title), epoch
    )
    writer.add_figure("misclassified", draw_wrong(images, labels, predictions, classes), epoch)


def draw_confusion(labels, predictions, classes, title) -> plt.Figure:
    k = len(classes)
    matrix = torch.bincount(labels * k + predictions, minlength=k * k).view(k, k).numpy()
    figure, axes = plt.subplots(figsize=(7, 7), layout="constrained")
    axes.imshow(matrix, cmap="Blues")
    axes.set(xlabel="predicted", ylabel="true", title=title)
    axes.set_xticks(range(k), classes, rotation=90, parse_math=False)
    axes.set_yticks(range(k), classes, parse_math=False)
    if k <= 20:  # more numbers would not be legible
        for (true, predicted), count in np.ndenumerate(matrix):
            color = "white" if count > matrix.max() / 2 else "black"
            axes.text(predicted, true, count, ha="center", va="center", color=color)
    return figure


def draw_wrong(images, labels, predictions, classes) -> plt.Figure:
    """The first 20 misclassified images of the test set."""
    figure, grid = plt.subplots(4, 5, figsize=(9, 9), layout="constrained")
    wrong = (predictions != labels).nonzero().flatten().tolist()
    for axes in grid.flat:
        axes.axis("off")
    for axes, i in zip(grid.flat, wrong, strict=False):
        axes.imshow(images[i].permute(1, 2, 0).numpy(), cmap="gray")
        axes.set_title(
            f"{classes[labels[i]]}\ntaken for {classes[predictions[i]]}",
            fontsize=8,
            parse_math=False,
        )
    return figure
