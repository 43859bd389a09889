"""Train one model with one recipe and one seed, and save it all in the run's folder.

    python train.py --model se                    # the published recipe: up to 50 epochs
    python train.py --model se --recipe short     # 10 epochs, lr annealed to 0: for comparisons
    python train.py --model se --recipe quick     # smoke test: 1 epoch on 1,920 images
    python train.py --model se --dry-run          # one batch each; keeps no run
    python train.py --model se --target-acc 92    # exit 1 below 92% test accuracy
    tensorboard --logdir runs

The folder is RUNS/<dataset>/<recipe>/<model>/seed<k>/. Ctrl-C and SIGTERM stop a run after the
current step; the same command resumes it, or says that it is complete. Each epoch prints a line;
* marks the best validation accuracy so far. Two idle CPU cores train 65 to 100 images/s, depending
on their kind: `quick` takes half a minute, one epoch of the published recipe 9 to 14 minutes.
"""

import math
import sys
import time

import data
import models
from kit.checkpoint import seed_generators
from kit.command_line import UserError, exit_code
from kit.ema import EMA
from kit.fast import autocast, channels_last, set_up_torch
from kit.preflight import preflight
from kit.run import Run
from kit.settings import parse_settings

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from tqdm import trange

# --- Recipes: each setting's published value, and what it does; 0 turns an optional one off -------

SETTINGS = {
    "epochs": (50, "at most; the cosine schedule reaches a learning rate of 0 after the last"),
    "batch_size": (64, "the last partial batch is kept"),
    "lr": (1e-3, "learning rate of Adam"),
    "anneal": ("epoch", "how often the learning rate is set: per epoch or per batch"),
    "patience": (10, "stop after this many epochs without better validation accuracy; 0: never"),
    "tested": ("best", "which weights are tested: those of the best validation epoch, or the last"),
    "limit_train": (0, "training images; validation takes a ninth, at least a batch; 0: all"),
    "limit_test": (0, "test images, a stratified sample; 0: all"),
    # The published recipe has none of these.
    "weight_decay": (0.0, "of AdamW, for all but biases and BatchNorm"),
    "warmup": (0, "epochs in which the learning rate rises to lr"),
    "label_smoothing": (0.0, "share of each label that is spread over all classes"),
    "ema": (0.0, "EMA decay; the EMA weights are validated and tested"),
    "normalize": ("half", "half: pixels scaled to [-1, 1]; data: mean 0, std 1 in each channel"),
    "crop": (0, "pixels of random-crop padding"),
    "flip": (False, "mirror images with probability 1/2"),
    "randaugment": (0, "operations per image"),
    "erase": (0.0, "probability of random erasing, per image"),
    "cutmix": (0.0, "alpha of Beta(alpha, alpha), the mixing weight"),
}
PUBLISHED = {name: value for name, (value, _) in SETTINGS.items()}
RECIPES = {
    "published": PUBLISHED,
    "quick": PUBLISHED | dict(epochs=1, limit_train=1920, limit_test=1000),
    # Runs of equal length that end at a learning rate of 0 should vary less between seeds, so fewer
    # seeds distinguish two models. Validation selects nothing.
    "short": PUBLISHED | dict(epochs=10, anneal="batch", patience=0, tested="last"),
    # Selected on validation images at width 16, 16 epochs on half the images: docs/recipes.md.
    "strong": PUBLISHED
    | dict(patience=50, lr=2e-3, weight_decay=0.05, warmup=3, label_smoothing=0.1, ema=0.999)
    | dict(normalize="data", crop=2, flip=True, erase=0.25),
}

# --- Training -------------------------------------------------------------------------------------


def build_model(settings, loader):
    """The model on its device, in the fastest layout for convolutions."""
    model = models.build_model(
        settings.base_model, len(loader.classes), loader.channels, settings.width, settings.seed,
        settings.position, settings.reduction,
    )  # fmt: skip
    return channels_last(model.to(settings.device))


def prepare(settings, dataset):
    """(loader, model, optimizer, scheduler, ema, forward, step); `forward` may get compiled."""
    device = settings.device
    set_up_torch(settings.precision)

    # Data: all of it stays on the device as uint8, and a batch is an index into it.
    loader = data.Loader(dataset, settings, device)  # splits, shuffles, augments, normalises

    # Model, optimizer, schedule.
    seed_generators(settings.seed)  # for modules that draw random numbers, such as dropout
    model = build_model(settings, loader)
    optimizer = adam(model, settings.lr, settings.weight_decay)
    unit = loader.steps if settings.anneal == "batch" else 1  # scheduler steps per epoch
    scheduler = cosine(optimizer, settings.epochs * unit, settings.warmup * unit)
    ema = EMA(model, settings.ema) if settings.ema else None

    def forward(idx, aug_params):  # -> mean loss, number of correct predictions
        images, labels, label_weight = loader.batch(idx, aug_params)
        with autocast(settings.precision, device):
            logits = model(images).float()
        loss = cross_entropy(logits, labels, label_weight, settings.label_smoothing)
        return loss, (logits.argmax(1) == labels).sum()

    def step(idx, aug_params, forward=forward):  # kit/fast.py passes the compiled forward
        optimizer.zero_grad()
        loss, correct = forward(idx, aug_params)
        loss.backward()
        optimizer.step()
        if ema:
            ema.update()
        return loss.detach(), correct

    return loader, model, optimizer, scheduler, ema, forward, step


def train(settings, dataset, run: Run) -> dict:
    """Data -> loss -> backward -> step -> validate -> save, then test; returns the accuracies."""
    loader, model, optimizer, scheduler, ema, forward, step = prepare(settings, dataset)
    eval_model = ema.model if ema else model  # validated, tested and saved

    # Resume if the run's folder has a checkpoint. Then compile the step or capture it as one CUDA
    # graph, if that pays (kit/fast.py): the same computation, up to rounding.
    progress = run.restore(loader, model, optimizer, scheduler, ema)
    step = run.speed_up(step, forward)

    for epoch in range(progress.epochs + 1, settings.epochs + 1):
        if settings.patience and progress.epochs - progress.best_epoch >= settings.patience:
            break  # early stopping

        model.train()
        batches = loader.epoch(epoch)
        progress.begin_epoch(len(batches), settings.device)  # or resume it at progress.step
        start = time.perf_counter() - progress.seconds
        bar = dict(desc=f"epoch {epoch}", leave=False, disable=None)  # None: only on a terminal
        try:
            for i in trange(progress.step, len(batches), **bar):
                run.leave_if_stopped()
                progress.losses[i], correct = step(*batches[i])  # forward, loss, backward, Adam
                progress.correct += correct
                progress.step = i + 1
                if settings.anneal == "batch":
                    scheduler.step()
            losses = progress.losses.double().cpu()  # the first synchronisation of the epoch
        finally:  # also if stopped: the resumed epoch continues its clock
            progress.seconds = time.perf_counter() - start

        val_loss, predictions = evaluate(eval_model, loader, *loader.validation, run)
        stop_if_not_finite(losses, val_loss, epoch, settings.lr)
        row = {
            "epoch": epoch,
            "lr": float(scheduler.get_last_lr()[0]),  # if set per batch: after the epoch
            "train_loss": loader.mean_over_images(losses),
            "train_acc": 100 * progress.correct.item() / loader.n_train,
            "val_loss": val_loss,
            "val_acc": accuracy(predictions, loader.validation[1]),
            "seconds": progress.seconds,  # without validation
            "images_per_second": loader.n_train / progress.seconds,
        }
        progress.end_epoch(row, eval_model, settings.tested)
        if settings.anneal == "epoch":
            scheduler.step()
        run.log_and_save()

    # The test set is used only here: with the last weights, and with best.pt's in a new model.
    _, last_predictions = evaluate(eval_model, loader, *loader.test, run)
    tested_model = build_model(settings, loader)
    tested_model.load_state_dict(progress.best)
    _, predictions = evaluate(tested_model, loader, *loader.test, run)
    run.save_predictions(predictions)
    labels = loader.test[1]
    return {
        "test_acc": accuracy(predictions, labels),
        "test_acc_last": accuracy(last_predictions, labels),
        "balanced_acc": balanced_accuracy(predictions, labels),
    }


def adam(model, lr: float, weight_decay: float = 0.0) -> torch.optim.Adam:
    """Fused Adam; with weight decay AdamW, without decay on biases and BatchNorm.

    On a GPU the learning rate is a tensor: a CUDA graph would freeze a Python number.
    """
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    lr = torch.tensor(lr, device=device) if cuda else lr
    if not weight_decay:
        return torch.optim.Adam(model.parameters(), lr, fused=True, capturable=cuda)
    decay = [p for p in model.parameters() if p.dim() > 1]
    no_decay = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr, weight_decay=weight_decay, fused=True, capturable=cuda)


def cosine(optimizer, steps: int, warmup: int = 0):
    """Cosine from the optimizer's learning rate to 0 over `steps` scheduler steps (epochs or
    batches). The first `warmup` of them are a linear warm-up."""
    if not warmup:
        return CosineAnnealingLR(optimizer, T_max=steps)

    def factor(step):
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    return LambdaLR(optimizer, factor)


def cross_entropy(logits, labels, label_weight, smoothing: float):
    """Mean over the batch. CutMix mixes image i with image i - 1: label_weight (N,) is the
    weight of its own label, the other label has the rest."""
    if label_weight is None:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    own, other = (
        F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
        for target in (labels, labels.roll(1))
    )
    return (label_weight * own + (1 - label_weight) * other).mean()


@torch.no_grad()
def evaluate(model, loader, images, labels, run):
    """(mean cross-entropy, predicted classes (N,)) of uint8 images, in evaluation mode."""
    model.eval()
    loss, predictions = 0.0, []
    size = 784_000 // images[0, 0].numel()  # 1,000 images of 28x28
    size = max(1, min(size, 16 * run.settings.batch_size))  # a smaller batch saves memory here too
    for batch, targets in zip(images.split(size), labels.split(size), strict=True):
        run.leave_if_stopped()
        with autocast(run.settings.precision, images.device):
            logits = model(loader.normalize(batch)).float()
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        predictions.append(logits.argmax(1))
    return loss / len(labels), torch.cat(predictions)


def accuracy(predictions, labels) -> float:
    """Percent."""
    return 100 * (predictions == labels).sum().item() / len(labels)


def balanced_accuracy(predictions, labels) -> float:
    """Percent: the unweighted mean over the classes."""
    classes = labels.unique()
    own = [accuracy(predictions[labels == k], labels[labels == k]) for k in classes]
    return sum(own) / len(own)


def stop_if_not_finite(losses, val_loss: float, epoch: int, lr: float) -> None:
    """Raises UserError that names the first step whose loss is NaN or infinite."""
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    if bad:
        where, loss = f"step {bad[0] + 1} of {len(losses)}", losses[bad[0]]
        raise UserError(f"the loss is {loss:g} at epoch {epoch}, {where}: lower --lr {lr:g}")
    if not math.isfinite(val_loss):
        raise UserError(
            f"the validation loss is {val_loss:g} after epoch {epoch}: lower --lr {lr:g}"
        )


def parse(argv: list[str] | None):
    """All settings of a run, from its flags and recipe. Exits with 2 on wrong usage."""
    return parse_settings(argv, __doc__, SETTINGS, RECIPES, models, data)


@exit_code
def main(argv: list[str] | None = None) -> int:
    """Runs the script with `argv` as its command line; returns the exit code."""
    settings = parse(argv)
    preflight(settings.device, None if settings.dry_run else settings.runs)
    dataset = data.load_dataset(settings.dataset, settings.data_dir, settings.image_size)
    with Run(settings, dataset.digest) as run:
        # A finished run already has its result.
        result = run.result or run.complete(train(settings, dataset, run))
    return run.finish(result)


if __name__ == "__main__":
    sys.exit(main())
