"""What TensorBoard shows of a run: curves, and at the end hyper-parameters, pictures and gates.

tensorboard --logdir runs
"""

import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from kit.attribution import attention_modules, enlarged, gates_of, grad_cam, scaled, stage_of
from kit.pictures import over_image
from kit.plots import legible, plt

HPARAMS = ("model", "dataset", "recipe", "seed", "width", "epochs", "batch_size", "lr", "precision")
SHOWN = 12  # misclassified images: the first ones in the order of samples of the test set
GATED = 32  # test images whose gates are shown: enough for a histogram, and soon done


def open_writer(folder: Path, stack: ExitStack) -> SummaryWriter:
    """The run's events file, closed with `stack`. A full disk is an OSError of the next call.

    The library's own thread raises it once more, which Python would print with a traceback.
    """
    others = threading.excepthook

    def excepthook(raised):
        if not isinstance(raised.exc_value, OSError):
            others(raised)

    threading.excepthook = excepthook
    return stack.enter_context(SummaryWriter(folder))


def log_epoch(writer: SummaryWriter, row: dict) -> None:
    """One line of metrics.jsonl."""
    for part in ("train", "val"):
        writer.add_scalar(f"loss/{part}", row[f"{part}_loss"], row["epoch"])
        writer.add_scalar(f"accuracy/{part}", row[f"{part}_acc"], row["epoch"])
    writer.add_scalar("lr", row["lr"], row["epoch"])


def log_test(writer: SummaryWriter, config: dict, epoch: int, model, loader, predictions) -> None:
    """Test accuracy, hyper-parameters, confusion matrix, misclassified images, Grad-CAM, gates.

    loader: has the test images, `test`, an order to draw samples in, `test_order`, and normalises;
    predictions: int64 (N,), of the test images.
    """
    (images, labels), classes = loader.test, legible(loader.classes)
    accuracy = 100 * (predictions == labels).double().mean().item()
    writer.add_scalar("accuracy/test", accuracy, epoch)
    # Not writer.add_hparams: that opens a second run in a folder of its own.
    for summary in hparams({key: config[key] for key in HPARAMS}, {"accuracy/test": accuracy}):
        writer.file_writer.add_summary(summary)
    order = loader.test_order
    for stage, gates in gates_by_stage(model, loader.normalize(images[order[:GATED]])).items():
        writer.add_histogram(f"gates/{stage}", gates, epoch)
    wrong = order[(predictions != labels)[order]][:SHOWN]
    if len(wrong):
        maps = grad_cam(model, loader.normalize(images[wrong]), predictions[wrong])
        writer.add_images("grad_cam", with_maps(images[wrong], maps), epoch)
    images, labels, predictions = images.cpu(), labels.cpu(), predictions.cpu()
    title = f"{config['model']}, seed {config['seed']}, test set"
    confusion = draw_confusion(labels, predictions, classes, title)
    writer.add_figure("confusion_matrix", confusion, epoch)
    shown = (part[wrong.cpu()] for part in (images, labels, predictions))
    writer.add_figure("misclassified", draw_misclassified(*shown, classes), epoch)


def gates_by_stage(model: torch.nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """{stage: the gates of all its modules, flat}, of normalised images; see kit/attribution.py."""
    if not attention_modules(model):
        return {}
    found = {}
    for name, gates in gates_of(model, images)[1].items():
        found.setdefault(stage_of(name), []).append(gates.flatten())
    return {stage: torch.cat(parts) for stage, parts in found.items()}


def with_maps(images: torch.Tensor, maps: dict[str, torch.Tensor]) -> torch.Tensor:
    """Each image with its maps to the right, fourfold, and a white gap: float (N, 3, h, w)."""
    images = images.cpu()
    tiles = [(images.float() / 255).expand(-1, 3, -1, -1)]
    for heat in maps.values():
        tiles.append(over_image(images, enlarged(scaled(heat), tuple(images.shape[2:])).cpu()))
    tiles = torch.cat(tiles, dim=3).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    return F.pad(tiles, (0, 16, 0, 16), value=1.0)


def draw_confusion(labels, predictions, classes, title) -> plt.Figure:
    """Counts of true class by predicted class; labels, predictions: int64 (N,) on the CPU."""
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


def draw_misclassified(images, labels, predictions, classes) -> plt.Figure:
    """Misclassified images, SHOWN at most, with their labels and predictions."""
    figure, grid = plt.subplots(3, SHOWN // 3, figsize=(8, 7))
    figure.subplots_adjust(0, 0.01, 1, 0.93, 0.05, 0.3)  # a layout that is found costs more time
    for axes in grid.flat:
        axes.axis("off")
    for axes, i in zip(grid.flat, range(len(images)), strict=False):
        axes.imshow(images[i].permute(1, 2, 0).numpy(), cmap="gray")
        axes.set_title(
            f"{classes[labels[i]]}\npredicted {classes[predictions[i]]}",
            fontsize=8,
            parse_math=False,
        )
    return figure
