"""Train one model with one recipe and one seed, and leave a folder that explains itself.

    python train.py --model se                    # the published recipe: 50 epochs
    python train.py --model se --recipe quick     # 1 epoch on 1,920 images: a look, not a result
    python train.py --model se --dry-run          # one batch of each kind; keeps nothing
    python train.py --model se --target-acc 92    # exit 1 below 92 % test accuracy
    python train.py --self-check                  # do all modes do the same step?
    tensorboard --logdir runs

The folder is RUNS/<dataset>/<recipe>/<model>/seed<k>/. The same command again goes on after the
last finished epoch, or says that the run is complete. Each epoch prints a line; * marks the best
validation accuracy so far. Two otherwise idle CPU cores train about 100 images/s: `quick` takes
half a minute, an epoch of the published recipe ten.
"""

import argparse
import math
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the loop begins, Ctrl-C just ends it

import torch
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import checkpoint
import data
import run_folder
from environment import (
    choose_device,
    describe_environment,
    device_name,
    is_out_of_memory,
    peak_memory_mb,
    source_hashes,
)
from models import MODELS, build_model, count_parameters
from modes import MODES, PRECISIONS, set_up_torch, why_not
from run_folder import RunError
from self_check import self_check
from stop_signals import Stopped, watch_signals
from tensorboard_log import log_epoch, log_test
from training_step import adam, choose_mode, choose_precision, logits_of, make_step

# --- Settings -------------------------------------------------------------------------------------

PUBLISHED = dict(
    epochs=50,  # also the length of the cosine schedule of the learning rate
    batch_size=64,  # the last partial batch is kept
    lr=1e-3,  # Adam's; there is no weight decay
    patience=10,  # stop when validation accuracy has not improved for so many epochs
    limit_train=None,  # images taken of the training split, None: all. Validation then takes a
    # ninth of that number, or a batch if that is more
    limit_test=None,  # images taken of the test set; None: all
)
RECIPES = {
    "published": PUBLISHED,
    "quick": PUBLISHED | dict(epochs=1, limit_train=1920, limit_test=1000),
}
WIDTH = 64  # channels of the first stage, as published
EVAL_BATCH = 1000  # a matter of speed and memory, not of figures


def parse_settings(argv: list[str] | None) -> argparse.Namespace:
    """All settings, resolved: explicit flags win over the recipe. Exits with 2 on wrong usage."""

    def within(least, most, kind):
        def parse(text):
            value = kind(text)
            if not least <= value <= most:
                raise argparse.ArgumentTypeError(f"{text} is not from {least:g} to {most:g}")
            return value

        parse.__name__ = kind.__name__  # argparse then says "invalid int value"
        return parse

    def of_recipe(key):
        values = (f"{name}: {recipe[key] or 'all'}" for name, recipe in RECIPES.items())
        return f"default: the recipe's ({', '.join(values)})"

    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # an error is then a single line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, default = parser.add_argument, "default: %(default)s"
    count = within(1, 10**9, int)
    add("--model", choices=MODELS)
    add("--dataset", default="fashion_mnist", choices=data.DATASETS, help=default)
    add("--data-dir", type=Path, default=Path("data"), help=default)
    add("--recipe", default="published", choices=RECIPES, help=default)
    add("--epochs", type=count, help=of_recipe("epochs"))
    add("--batch-size", type=count, help=of_recipe("batch_size"))
    add("--lr", type=within(1e-9, 1e9, float), help=of_recipe("lr"))
    add("--patience", type=count, help=of_recipe("patience"))
    add("--limit-train", type=count, help=of_recipe("limit_train"))
    add("--limit-test", type=count, help=of_recipe("limit_test"))
    add("--seed", type=within(0, 10**9, int), default=0, help=f"split, order, weights; {default}")
    add("--width", type=count, default=WIDTH, help=f"channels of stage 1; {default}")
    add(
        "--precision",
        default="auto",
        choices=["auto", *PRECISIONS],
        help="auto: bf16 on a GPU of compute capability 8.0 or more, else fp32",
    )
    add(
        "--mode",
        default="auto",
        choices=["auto", *MODES],
        help="how a training step is run (modes.py); auto: by device and length of the run",
    )
    add("--device", default="auto", help="auto (a CUDA GPU if there is one), cpu, cuda or cuda:N")
    add("--runs", type=Path, default=Path("runs"), help=f"folder of all runs; {default}")
    add(
        "--target-acc",
        type=within(0, 100, float),
        help="exit 1 if test accuracy (percent) is below this",
    )
    add("--overwrite", action="store_true", help="discard what the run's folder holds")
    add(
        "--dry-run",
        action="store_true",
        help="one batch each of training, validation and test; keeps nothing",
    )
    add(
        "--self-check",
        action="store_true",
        help="compare every mode with eager mode, train nothing",
    )
    settings = parser.parse_args(argv)
    if not (settings.model or settings.self_check):
        parser.error("--model is missing: choose from " + ", ".join(MODELS))

    recipe = RECIPES[settings.recipe]
    for key, value in recipe.items():
        if getattr(settings, key) is None:
            setattr(settings, key, value)
    if settings.dry_run:
        settings.epochs = 1
        settings.limit_train = settings.limit_test = settings.batch_size
    try:
        settings.device = choose_device(settings.device)
    except ValueError as error:
        parser.error(str(error))
    if impossible := why_not(settings.mode, settings.precision, settings.device):
        parser.error(impossible)
    settings.precision = choose_precision(settings.precision, settings.device)
    # What differs from the recipe: the report keeps such runs apart.
    own = recipe | dict(width=WIDTH, precision=choose_precision("auto", settings.device))
    chosen = {key: getattr(settings, key) for key in own}
    settings.overrides = {key: value for key, value in chosen.items() if value != own[key]}
    # Whether it is a look rather than a result: the report says so wherever it shows its figures.
    settings.quick = bool(
        settings.limit_train
        or settings.limit_test
        or settings.epochs < PUBLISHED["epochs"]
        or settings.patience < PUBLISHED["patience"]
        or settings.width != WIDTH
    )
    settings.command = shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)])
    return settings


def as_config(settings: argparse.Namespace) -> dict:
    """The settings as they stand in config.json."""
    special = (Path, torch.device)
    return {k: str(v) if isinstance(v, special) else v for k, v in vars(settings).items()}


# --- Training -------------------------------------------------------------------------------------


def train(settings: argparse.Namespace, folder: Path) -> dict:
    """Trains, evaluates, fills the run's folder; returns the content of result.json.

    Raises DataError, RunError or OSError, each with a message of one line.
    """
    device = settings.device
    set_up_torch(settings.precision)

    # Data: all of it stays on the device as bytes, and a batch is an index into it.
    dataset = data.load_dataset(settings.dataset, settings.data_dir)
    train_idx, val_idx = data.split_indices(len(dataset.train_images), settings.seed)
    if settings.limit_train:
        train_idx = train_idx[: settings.limit_train]
        val_idx = val_idx[: max(settings.batch_size, settings.limit_train // 9)]
    images, labels = dataset.train_images.to(device), dataset.train_labels.to(device)
    val_images, val_labels = images[val_idx], labels[val_idx]
    test_images = dataset.test_images[: settings.limit_test].to(device)
    test_labels = dataset.test_labels[: settings.limit_test].to(device)

    # Model, optimizer, schedule. channels_last is the layout that convolutions are fastest in.
    torch.manual_seed(settings.seed)
    model = build_model(
        settings.model,
        num_classes=len(dataset.classes),
        in_channels=images.shape[1],
        width=settings.width,
        seed=settings.seed,
    ).to(device, memory_format=torch.channels_last)
    optimizer = adam(model, settings.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.epochs)

    # `auto` looks at the length of the whole run, so that one that is resumed takes the same mode.
    n_steps = settings.epochs * len(train_idx) // settings.batch_size
    mode = choose_mode(settings.mode, device, n_steps)
    if len(train_idx) < settings.batch_size:
        mode = "eager"  # the other modes are for full batches
    config = as_config(settings) | {"mode": mode}

    # Go on after the last finished epoch, if there is one.
    if settings.overwrite:
        run_folder.clear(folder)  # only now that data and model are there
    run_folder.remove_strays(folder)
    # One object an epoch, as in metrics.jsonl.
    history = checkpoint.take_up(folder, model, optimizer, scheduler, device, config)
    if history:
        edits = run_folder.note_on_edits(folder, source_hashes())
        print(f"going on after epoch {len(history)}{edits}")

    # Compiled or captured before the clock of the epochs starts.
    if "compile" in mode:
        print("compiling the training step, the first time up to a minute", flush=True)
    start = time.perf_counter()
    train_step, mode, failures = make_step(
        model, optimizer, images, labels, mode, settings.precision, settings.batch_size
    )
    set_up_seconds = time.perf_counter() - start
    for failure in failures:
        print(f"note: {failure}; going on in mode {mode}", file=sys.stderr)

    run_folder.write_json(folder / "config.json", config)
    run_folder.write_json(folder / "env.json", describe_environment(device))
    summaries = SummaryWriter(folder, purge_step=len(history) + 1)
    with watch_signals() as leave_if_stopped, summaries as writer, checkpoint.Saver(device) as save:
        print(
            f"{settings.model}, {settings.dataset}, recipe {settings.recipe}, seed "
            f"{settings.seed} -> {folder}\n"
            f"{count_parameters(model):,} parameters; {len(train_idx):,} training, "
            f"{len(val_idx):,} validation, {len(test_labels):,} test images {dataset.source}; "
            f"{device_name(device)}; {settings.precision}, {mode}",
            flush=True,
        )

        for epoch in range(len(history) + 1, settings.epochs + 1):
            if history and epoch - 1 - best_epoch_of(history) >= settings.patience:
                break  # early stopping

            start = time.perf_counter()
            model.train()
            batches = data.shuffled(train_idx, settings.seed, epoch).to(device)
            batches = batches.split(settings.batch_size)
            losses = torch.zeros(len(batches), device=device)  # read once an epoch: reading waits
            correct = torch.zeros((), dtype=torch.int64, device=device)
            progress = tqdm(batches, f"epoch {epoch}/{settings.epochs}", leave=False, disable=None)
            for step, idx in enumerate(progress):
                leave_if_stopped()
                losses[step], hits = train_step(idx)  # forward, loss, backward, Adam
                correct += hits

            losses = losses.double().cpu()
            seconds = time.perf_counter() - start
            if not losses.isfinite().all():
                step = (~losses.isfinite()).nonzero()[0].item()
                raise RunError(
                    f"the loss is {losses[step]:g} at epoch {epoch}, step {step + 1} of "
                    f"{len(losses)}, with --lr {settings.lr:g}: try a lower one"
                )
            sizes = torch.tensor([len(idx) for idx in batches], dtype=torch.float64)
            leave_if_stopped()
            val_loss, val_predictions = evaluate(model, settings.precision, val_images, val_labels)
            if not math.isfinite(val_loss):
                raise RunError(
                    f"the validation loss is {val_loss:g} after epoch {epoch}, with --lr "
                    f"{settings.lr:g}: try a lower one"
                )
            row = {
                "epoch": epoch,
                "lr": float(scheduler.get_last_lr()[0]),
                "train_loss": (losses @ sizes).item() / len(train_idx),
                "train_acc": 100 * correct.item() / len(train_idx),
                "val_loss": val_loss,
                "val_acc": accuracy(val_predictions, val_labels),
                "seconds": seconds,  # of training alone, validation not counted
                "images_per_second": len(train_idx) / seconds,
            }
            history.append(row)
            scheduler.step()

            # best.pt before last.pt: killed in between, this epoch is trained and written again.
            is_best = best_epoch_of(history) == epoch
            files = {folder / "best.pt": model.state_dict()} if is_best else {}
            state = checkpoint.state_of(model, optimizer, scheduler, device, history, config)
            files |= {folder / "last.pt": state}
            save(files | {folder / "metrics.jsonl": run_folder.metrics_text(history)})
            log_epoch(writer, row)
            print(
                f"epoch {epoch:2d}/{settings.epochs}  lr {row['lr']:.2e}  "
                f"train {row['train_loss']:.4f} {row['train_acc']:6.2f} %  "
                f"val {row['val_loss']:.4f} {row['val_acc']:6.2f} %{' *' if is_best else '  '}  "
                f"{row['images_per_second']:,.0f} images/s  {seconds:.1f} s",
                flush=True,
            )

        # The test set is used only here: with the last weights, and with the best.
        leave_if_stopped()
        best_epoch = best_epoch_of(history)
        _, predictions = evaluate(model, settings.precision, test_images, test_labels)
        test_acc_last = accuracy(predictions, test_labels)
        if best_epoch != len(history):
            save.wait()
            model.load_state_dict(checkpoint.load(folder / "best.pt"))
            _, predictions = evaluate(model, settings.precision, test_images, test_labels)
        run_folder.write_classes(folder / "test_predictions.npy", predictions)
        run_folder.write_classes(folder / "test_labels.npy", test_labels)
        train_seconds = sum(row["seconds"] for row in history)
        result = {
            "model": settings.model,
            "dataset": settings.dataset,
            "recipe": settings.recipe,
            "seed": settings.seed,
            "width": settings.width,
            "test_acc": accuracy(predictions, test_labels),
            "test_acc_last": test_acc_last,
            "val_acc": history[best_epoch - 1]["val_acc"],
            "best_epoch": best_epoch,
            "epochs_run": len(history),
            "stopped_early": len(history) < settings.epochs,
            "test_images": len(test_labels),
            "classes": dataset.classes,
            "params": count_parameters(model),
            "train_seconds": train_seconds,
            "images_per_second": len(history) * len(train_idx) / train_seconds,
            "peak_memory_mb": peak_memory_mb(device),
            "precision": settings.precision,
            "mode": mode,
            "set_up_seconds": set_up_seconds,  # of compiling or capturing, not in train_seconds
            "fallback": "; ".join(failures) or None,  # why it ran in no faster mode
            "device": device_name(device),
            "quick": settings.quick,
            "overrides": settings.overrides,
        }
        log_test(writer, config, result, test_images, test_labels, predictions, dataset.classes)
    run_folder.write_json(folder / "result.json", result)  # last: it means that all is there
    return result


def best_epoch_of(history: list[dict]) -> int:
    """The first epoch with the highest validation accuracy, counted from 1."""
    return max(history, key=lambda row: row["val_acc"])["epoch"]


@torch.inference_mode()
def evaluate(model, precision, images, labels) -> tuple[float, torch.Tensor]:
    """(mean cross-entropy, predicted classes int64 (N,)) of `images` in evaluation mode."""
    model.eval()
    loss, predictions = 0.0, []
    for batch, batch_labels in zip(images.split(EVAL_BATCH), labels.split(EVAL_BATCH), strict=True):
        logits = logits_of(model, batch, precision)
        loss += F.cross_entropy(logits, batch_labels, reduction="sum").item()
        predictions.append(logits.argmax(1))
    return loss / len(labels), torch.cat(predictions)


def accuracy(predictions: torch.Tensor, labels: torch.Tensor) -> float:
    """Percent."""
    return 100 * (predictions == labels).sum().item() / len(labels)


# --- Command line ---------------------------------------------------------------------------------


# What run() prints of a result.json.
SUMMARY = (
    "test_acc",
    "test_acc_last",
    "val_acc",
    "best_epoch",
    "epochs_run",
    "train_seconds",
    "quick",
)


def run(settings: argparse.Namespace, runs: Path) -> int:
    """One run in its folder below `runs`: skipped, taken up again or started. The exit code."""
    folder = runs / settings.dataset / settings.recipe / settings.model / f"seed{settings.seed}"
    try:
        if (folder / "result.json").exists() and not settings.overwrite:
            there = run_folder.read_json(folder / "config.json", "model")
            config = as_config(settings) | {"mode": there.get("mode")}  # it is done, anyhow
            run_folder.check_same_run(folder, config, there)
            print(f"already complete: {folder}{run_folder.note_on_edits(folder, source_hashes())}")
            result = run_folder.read_json(folder / "result.json", *SUMMARY)
        else:
            result = train(settings, folder)
    except (data.DataError, RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(
            f"error: out of memory on {device_name(settings.device)} with --batch-size "
            f"{settings.batch_size} and --width {settings.width}: try a smaller one",
            file=sys.stderr,
        )
        return 1
    except Stopped as stopped:
        if settings.dry_run:
            return 128 + stopped.signal
        print(
            f"stopped by {stopped.signal.name}: finished epochs are kept in "
            f"{folder}, and the same command"
            + (" without --overwrite" if settings.overwrite else "")
            + " goes on after them",
            file=sys.stderr,
        )
        return 128 + stopped.signal

    if settings.dry_run:
        print("dry run: one batch of each step went through; nothing was kept")
        return 0
    print(
        f"test accuracy {result['test_acc']:.2f} % with the best weights (epoch "
        f"{result['best_epoch']}, validation {result['val_acc']:.2f} %), "
        f"{result['test_acc_last']:.2f} % with the last; epochs: {result['epochs_run']}, training: "
        f"{result['train_seconds']:.0f} s" + ("; a quick run, not a result" * result["quick"])
    )
    if settings.target_acc is not None and result["test_acc"] < settings.target_acc:
        print(
            f"error: test accuracy {result['test_acc']:.2f} % misses the target of "
            f"{settings.target_acc:g} %",
            file=sys.stderr,
        )
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    settings = parse_settings(argv)
    if settings.self_check:
        models = [settings.model] if settings.model else list(MODELS)
        return 0 if self_check(models, settings.device, settings.width) else 1
    if not settings.dry_run:
        return run(settings, settings.runs)
    with tempfile.TemporaryDirectory(prefix="dry-run-") as runs:
        return run(settings, Path(runs))


if __name__ == "__main__":
    sys.exit(main())
