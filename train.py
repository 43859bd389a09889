"""Train one model with one recipe and one seed, and leave a folder that explains itself.

    python train.py --model se                    # the published recipe: 50 epochs
    python train.py --model se --recipe quick     # 1 epoch on 1,920 images: a look, not a result
    python train.py --model se --dry-run          # one batch of each kind; keeps nothing
    python train.py --model se --target-acc 92    # exit 1 below 92 % test accuracy
    python train.py --self-check                  # do all modes do the same step?
    tensorboard --logdir runs

The folder is RUNS/<dataset>/<recipe>/<model>/seed<k>/. Ctrl-C and SIGTERM stop a run between two
steps; the same command again goes on from there, or says that the run is complete. Each epoch
prints a line; * marks the best validation accuracy so far. Two otherwise idle CPU cores train about
100 images/s: `quick` takes half a minute, an epoch of the published recipe ten.
"""

import argparse
import contextlib
import math
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while this imports, Ctrl-C just ends it

import torch
import torch.nn.functional as F
from tqdm import tqdm

from kit import checkpoint
import data
from kit import parallel
from kit import run_folder
from kit.augment import Augmentation
from kit.environment import (
    describe_environment,
    device_name,
    is_out_of_memory,
    peak_memory_mb,
    source_hashes,
)
from models import MODELS, build_model, count_parameters
from kit.modes import set_up_torch
from kit.run_folder import RunError
from kit.self_check import self_check
from kit.settings import (
    AUGMENTATIONS,
    RECIPES,  # noqa: F401 (train.RECIPES is for all)
    as_config,
    parse_settings,
)
from kit.stop_signals import Stopped, leaving_at_once, watch_signals
from kit.tensorboard_log import log_epoch, log_test, open_writer
from kit.training_step import Average, adam, choose_mode, halves, logits_of, make_step, schedule

EVAL_PIXELS = 1000 * 28 * 28  # in a batch: a matter of speed and memory, not of figures

# --- Training -------------------------------------------------------------------------------------


def train(settings: argparse.Namespace, folder: Path) -> dict:
    """Trains, evaluates, fills the run's folder; returns the content of result.json.

    Raises DataError, RunError or OSError, each with a message of one line.
    """
    device = settings.device
    set_up_torch(settings.precision)

    # Data: all of it stays on the device as bytes, and a batch is an index into it.
    dataset = data.load_dataset(settings.dataset, settings.data_dir, settings.image_size)
    train_idx, val_idx = data.split_indices(len(dataset.train_images), settings.seed)
    if settings.limit_train:
        train_idx = train_idx[: settings.limit_train]
        val_idx = val_idx[: max(settings.batch_size, settings.limit_train // 9)]
    check_batches(len(train_idx), settings.batch_size, dataset.train_images.shape)
    images, labels = dataset.train_images.to(device), dataset.train_labels.to(device)
    val_images, val_labels = images[val_idx], labels[val_idx]
    test_images = dataset.test_images[: settings.limit_test].to(device)
    test_labels = dataset.test_labels[: settings.limit_test].to(device)

    # Model, optimizer, schedule. channels_last is the layout that convolutions are fastest in.
    torch.manual_seed(settings.seed)
    model = build_model(
        settings.base_model,
        place=settings.place,
        reduction=settings.reduction,
        num_classes=len(dataset.classes),
        in_channels=images.shape[1],
        width=settings.width,
        seed=settings.seed,
    ).to(device, memory_format=torch.channels_last)
    optimizer = adam(model, settings.lr, settings.weight_decay)
    scheduler = schedule(optimizer, settings.epochs, settings.warmup)
    average = Average(model, settings.ema) if settings.ema else None
    shown = average.model if average else model  # what is validated, tested and kept
    moments = halves(device) if settings.normalize is None else dataset.moments_on(device)
    augmentation = Augmentation(**{key: getattr(settings, key) for key in AUGMENTATIONS})

    # `auto` looks at the length of the whole run, so that one that is resumed takes the same mode.
    n_steps = settings.epochs * len(train_idx) // settings.batch_size
    mode = choose_mode(settings.mode, device, n_steps)
    if len(train_idx) < settings.batch_size:
        mode = "eager"  # the other modes are for full batches
    config = as_config(settings) | {"mode": mode, "data": dataset.key}

    # Go on where the run was stopped, if it has begun.
    environment = describe_environment(device)
    parts = checkpoint.Parts(model, optimizer, scheduler, device, average)
    progress = parallel.by_the_first(begin, settings, folder, config, environment, parts)
    if parallel.WORLD > 1:
        state = checkpoint.state_of(parts, progress, config)
        state = parallel.of_the_first(checkpoint.copied(state, torch.device("cpu")))
        progress = checkpoint.put_back(state, parts, config)
    history = progress.history  # one object an epoch, as in metrics.jsonl

    # Compiled or captured before the clock of the epochs starts.
    if "compile" in mode:
        print("compiling the training step, the first time up to a minute", flush=True)
    start = time.perf_counter()
    train_step, mode, failures = make_step(
        model, optimizer, images, labels, mode, settings.precision, settings.batch_size, moments,
        augmentation, settings.label_smoothing or 0.0, average,
    )  # fmt: skip
    set_up_seconds = time.perf_counter() - start
    for failure in failures:
        print(f"note: {failure}; going on in mode {mode}", file=sys.stderr)

    run_folder.write_json(folder / "config.json", config)
    run_folder.write_json(folder / "env.json", environment)
    summaries = open_writer(folder)
    with watch_signals() as leave_if_stopped, summaries as writer, checkpoint.Saver(device) as save:
        inode = folder.stat().st_ino

        def save_state(files=None):
            run_folder.check_in_place(folder, inode)
            if parallel.RANK:
                return  # the first process does
            state = checkpoint.state_of(parts, progress, config)
            save({folder / "last.pt": state} | (files or {}))

        how = (settings.precision, moments, leave_if_stopped)
        on_a_terminal = sys.stderr and sys.stderr.isatty() and not parallel.RANK
        for row in history:
            log_epoch(writer, row)
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

            model.train()
            batches = data.shuffled(train_idx, settings.seed, epoch).to(device)
            batches = batches.split(settings.batch_size)
            draws = augmentation.draw(len(train_idx), settings.seed, epoch).to(device)
            draws = draws.split(settings.batch_size)
            losses = torch.zeros(len(batches), device=device)  # read once an epoch: reading waits
            correct = torch.zeros((), dtype=torch.int64, device=device)
            first, spent = 0, 0.0
            if progress.begun:  # this epoch, when it was stopped
                first, spent = progress.begun["step"], progress.begun["seconds"]
                losses[:first] = progress.begun["losses"]
                correct += progress.begun["correct"] if parallel.RANK == 0 else 0
                progress.begun = None
            start = time.perf_counter() - spent
            try:
                for step in tqdm(
                    range(first, len(batches)), f"epoch {epoch}/{settings.epochs}", leave=False,
                    initial=first, total=len(batches), disable=not on_a_terminal,
                ):  # fmt: skip
                    leave_if_stopped()
                    # forward, loss, backward, Adam
                    losses[step], hits = train_step(batches[step], draws[step])
                    correct += hits
                step = len(batches)
                losses, correct = parallel.over_all(losses, correct)
                losses = losses.double().cpu()
                seconds = time.perf_counter() - start
                val_loss, val_predictions = evaluate(shown, val_images, val_labels, *how)
            except Stopped:
                if step < len(batches):
                    seconds = time.perf_counter() - start
                    losses, correct = parallel.over_all(losses, correct)
                progress.begun = dict(
                    step=step, losses=losses[:step], correct=correct, seconds=seconds
                )
                save_state()
                raise

            if not losses.isfinite().all():
                step = (~losses.isfinite()).nonzero()[0].item()
                raise RunError(
                    f"the loss is {losses[step]:g} at epoch {epoch}, step {step + 1} of "
                    f"{len(losses)}, with --lr {settings.lr:g}: try a lower one"
                )
            sizes = torch.tensor([len(idx) for idx in batches], dtype=torch.float64)
            if not math.isfinite(val_loss):
                raise RunError(
                    f"the validation loss is {val_loss:g} after epoch {epoch}, with --lr "
                    f"{settings.lr:g}: try a lower one"
                )
            row = parallel.of_the_first({
                "epoch": epoch,
                "lr": float(scheduler.get_last_lr()[0]),
                "train_loss": (losses @ sizes).item() / len(train_idx),
                "train_acc": 100 * correct.item() / len(train_idx),
                "val_loss": val_loss,
                "val_acc": accuracy(val_predictions, val_labels),
                "seconds": seconds,  # of training alone, validation not counted
                "images_per_second": len(train_idx) / seconds,
            })  # fmt: skip
            history.append(row)
            scheduler.step()

            files = {}
            if is_best := best_epoch_of(history) == epoch:
                progress.best = checkpoint.copied(shown.state_dict(), device)
                files = {folder / "best.pt": progress.best}
            save_state(files | {folder / "metrics.jsonl": run_folder.metrics_text(history)})
            log_epoch(writer, row)
            print(
                f"epoch {epoch:2d}/{settings.epochs}  lr {row['lr']:.2e}  "
                f"train {row['train_loss']:.4f} {row['train_acc']:6.2f} %  "
                f"val {row['val_loss']:.4f} {row['val_acc']:6.2f} %{' *' if is_best else '  '}  "
                f"{row['images_per_second']:,.0f} images/s  {seconds:.1f} s",
                flush=True,
            )

        # The test set is used only here: with the last weights, and with the best.
        best_epoch = best_epoch_of(history)
        _, predictions = evaluate(shown, test_images, test_labels, *how)
        test_acc_last = accuracy(predictions, test_labels)
        if best_epoch != len(history):
            shown.load_state_dict(progress.best)
            _, predictions = evaluate(shown, test_images, test_labels, *how)
        run_folder.write_classes(folder / "test_predictions.npy", predictions, len(dataset.classes))
        run_folder.write_classes(folder / "test_labels.npy", test_labels, len(dataset.classes))
        train_seconds = sum(row["seconds"] for row in history)
        result = {
            "model": settings.model,
            "dataset": data.name_of(settings.dataset),
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
            "image": list(images.shape[1:]),
            "params": count_parameters(model),
            "train_seconds": train_seconds,
            "images_per_second": len(history) * len(train_idx) / train_seconds,
            "peak_memory_mb": peak_memory_mb(device),
            "precision": settings.precision,
            "mode": mode,
            "set_up_seconds": set_up_seconds,  # of compiling or capturing, not in train_seconds
            "save_seconds": save.seconds,  # that training stood still for checkpoints, neither
            "fallback": "; ".join(failures) or None,  # why it ran in no faster mode
            "device": device_name(device),
            "quick": settings.quick,
            "overrides": settings.overrides,
        }
        log_test(
            writer, config, result, test_images, test_labels, predictions, dataset.classes,
            shown, moments,
        )  # fmt: skip
    run_folder.check_in_place(folder, inode)
    run_folder.write_json(folder / "result.json", result)  # last: it means that all is there
    run_folder.discard_states(folder, settings.keep_last)
    return result


def check_batches(n: int, batch_size: int, shape: torch.Size) -> None:
    """Raises DataError for what BatchNorm cannot normalise: one image, and one pixel of it left."""
    if n == 0:
        raise data.DataError("there is no image to train on beside those to validate: add some")
    if 1 in (batch_size, n % batch_size) and max(shape[2:]) <= 8:
        raise data.DataError(
            f"of {n:,} images of {shape[2]}x{shape[3]}, one would be left for a batch of its own, "
            "too small for BatchNorm: use another --batch-size"
        )


def begin(settings, folder, config, environment, parts) -> checkpoint.Progress:
    """Makes the folder ready, and puts back what it holds of this run into the `parts` it is of."""
    if settings.overwrite:
        run_folder.clear(folder)  # only now that data and model are there
    elif (folder / "config.json").exists():
        advice = "delete it to go on from last.pt, or use --overwrite to start anew"
        there = run_folder.read_json(folder / "config.json", advice, model=str)
        run_folder.check_same_run(folder, config, there)
    run_folder.remove_strays(folder)
    progress = checkpoint.take_up(folder, parts, config)
    if progress.history or progress.begun:
        where = f"after epoch {len(progress.history)}"
        if progress.begun:
            where = f"in epoch {len(progress.history) + 1}, after {progress.begun['step']:,} steps"
        changes = run_folder.changes_since(folder, environment["sha256"], environment["device"])
        environment["changes"] = changes  # so that they are not forgotten
        print(f"going on {where}" + in_brackets(changes))
    return progress


def in_brackets(changes: list[str]) -> str:
    return f" ({'; '.join(changes)}; --overwrite starts anew)" if changes else ""


def best_epoch_of(history: list[dict]) -> int:
    """The first epoch with the highest validation accuracy, counted from 1."""
    return max(history, key=lambda row: row["val_acc"])["epoch"]


@torch.inference_mode()
def evaluate(model, images, labels, precision, moments, leave_if_stopped):
    """(mean cross-entropy, predicted classes int64 (N,)) of `images`, in evaluation mode."""
    model.eval()
    loss, predictions = 0.0, []
    size = max(1, EVAL_PIXELS // images[0, 0].numel())
    for batch, batch_labels in zip(images.split(size), labels.split(size), strict=True):
        leave_if_stopped()
        logits = logits_of(model, batch, precision, moments)
        loss += F.cross_entropy(logits, batch_labels, reduction="sum").item()
        predictions.append(logits.argmax(1))
    return loss / len(labels), torch.cat(predictions)


def accuracy(predictions: torch.Tensor, labels: torch.Tensor) -> float:
    """Percent."""
    return 100 * (predictions == labels).sum().item() / len(labels)


# --- Command line ---------------------------------------------------------------------------------


# What run() prints of a result.json.
SUMMARY = dict(
    test_acc=float,
    test_acc_last=float,
    val_acc=float,
    best_epoch=int,
    epochs_run=int,
    train_seconds=float,
    quick=bool,
)


def run(settings: argparse.Namespace, runs: Path) -> int:
    """One run in its folder below `runs`: skipped, taken up again or started. The exit code."""
    dataset = data.name_of(settings.dataset)
    folder = runs / dataset / settings.recipe / settings.model / f"seed{settings.seed}"
    try:
        result = parallel.by_the_first(finished, settings, folder)
        if result is None:
            with contextlib.ExitStack() as stack:
                parallel.by_the_first(stack.enter_context, run_folder.locked(folder))
                # Another process may have finished it while this one waited for the lock.
                result = parallel.by_the_first(finished, settings, folder)
                result = result or train(settings, folder)
    except RunError as error:
        if not parallel.RANK:  # all have the same
            print(f"error: {error}", file=sys.stderr)
        return 1
    except data.DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}. Once that is mended the same command goes on", file=sys.stderr)
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
        if settings.dry_run or parallel.RANK:
            return 128 + stopped.signal
        print(
            f"stopped by {stopped.signal.name}: all is kept in {folder}, and the same command"
            + (" without --overwrite" if settings.overwrite else "")
            + " goes on from there",
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


def finished(settings: argparse.Namespace, folder: Path) -> dict | None:
    """The result of the run if it is complete and not to be overwritten."""
    if settings.overwrite or not (folder / "result.json").exists():
        return None
    there = run_folder.read_json(folder / "config.json", model=str)
    # It is done, in whatever mode, and the data are not read again.
    config = as_config(settings) | {key: there.get(key) for key in ("mode", "data")}
    run_folder.check_same_run(folder, config, there)
    result = run_folder.read_json(folder / "result.json", **SUMMARY)
    # It may have been killed after its result was written, before these went.
    run_folder.discard_states(folder, there.get("keep_last", True))
    changes = run_folder.changes_since(folder, source_hashes())
    print(f"already complete: {folder}" + in_brackets(changes))
    return result


def main(argv: list[str] | None = None) -> int:
    """The script, with `argv` in place of the command line; the exit code."""
    settings = parse_settings(argv, __doc__)
    if settings.self_check:
        models = [settings.base_model] if settings.model else list(MODELS)
        check = settings.self_check
        return 0 if self_check(models, settings.device, settings.width, *check) else 1
    with parallel.joined(settings.device), contextlib.ExitStack() as stack:
        stack.enter_context(leaving_at_once(stack.close))
        runs = settings.runs
        if settings.dry_run or parallel.RANK:  # the other processes only train along
            runs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="runs-")))
        if parallel.RANK:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        return run(settings, runs)


if __name__ == "__main__":
    sys.exit(main())
