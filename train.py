"""Train one model with one recipe and one seed, and leave a folder that explains itself.

    python train.py --model se                    # the published recipe: 50 epochs
    python train.py --model se --recipe quick     # 1 epoch on 1,920 images: a look, not a result
    python train.py --model se --dry-run          # one batch of each step; keeps nothing
    python train.py --model se --target-acc 92    # exit 1 below 92 % test accuracy
    tensorboard --logdir runs

The folder is RUNS/<dataset>/<recipe>/<model>/seed<k>/. The same command again goes on after the
last finished epoch, or says that the run is complete. Each epoch prints a line; * marks the best
validation accuracy so far. Two otherwise idle CPU cores train about 100 images/s: `quick` takes
half a minute, an epoch of the published recipe ten.
"""

import argparse
import math
import os
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the loop begins, Ctrl-C just ends it
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic; read as CUDA starts

import torch
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import data
import run_folder
from environment import (
    choose_device,
    describe_environment,
    device_name,
    is_out_of_memory,
    source_hashes,
)
from models import MODELS, build_model, count_parameters
from run_folder import RunError
from stop_signals import Stopped, watch_signals
from tensorboard_log import log_epoch, log_test

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
NORMALIZE = (0.5, 0.5)  # mean and standard deviation taken for all data, pixels in [0, 1]
EVAL_BATCH = 500  # a matter of speed and memory, not of figures


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
    add("--model", required=True, choices=MODELS)
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
    add("--precision", default="auto", choices=["auto", "fp32", "tf32", "bf16"], help="auto: fp32")
    add("--mode", default="auto", choices=["auto", "eager"], help="auto: eager")
    add("--device", default="auto", help="auto (a CUDA GPU if there is one), cpu, cuda or cuda:N")
    add("--runs", type=Path, default=Path("runs"), help=f"folder of all runs; {default}")
    add(
        "--target-acc",
        type=within(0, 100, float),
        help="exit 1 if test accuracy (percent) is below this",
    )
    add("--overwrite", action="store_true", help="discard what the run's folder holds")
    add("--dry-run", action="store_true", help="one batch of each step; keeps nothing")
    settings = parser.parse_args(argv)

    recipe = RECIPES[settings.recipe]
    for key, value in recipe.items():
        if getattr(settings, key) is None:
            setattr(settings, key, value)
    if settings.dry_run:
        settings.epochs = 1
        settings.limit_train = settings.limit_test = settings.batch_size
    settings.mode = "eager"
    settings.precision = "fp32" if settings.precision == "auto" else settings.precision
    # What differs from the recipe: the report keeps such runs apart.
    own = recipe | dict(width=WIDTH, precision="fp32")
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
    try:
        settings.device = choose_device(settings.device)
    except ValueError as error:
        parser.error(str(error))
    if settings.precision == "tf32" and settings.device.type != "cuda":
        parser.error("--precision tf32 needs a CUDA GPU")
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
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = settings.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = settings.precision == "tf32"

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
    mean, std = (torch.tensor(value, device=device).view(1, 1, 1) for value in NORMALIZE)

    # Model, optimizer, schedule. channels_last is the layout that convolutions are fastest in.
    torch.manual_seed(settings.seed)
    model = build_model(
        settings.model,
        num_classes=len(dataset.classes),
        in_channels=images.shape[1],
        width=settings.width,
        seed=settings.seed,
    ).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.epochs)

    def logits_of(batch):  # uint8 (N, C, H, W) on the device -> float32 (N, num_classes)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            return model(data.normalize(batch, mean, std)).float()

    # Go on after the last finished epoch, if there is one.
    config = as_config(settings)
    history = []  # one object an epoch, as in metrics.jsonl
    if settings.overwrite:
        run_folder.clear(folder)  # only now that data and model are there
    run_folder.remove_strays(folder)
    if (folder / "last.pt").exists():
        checkpoint = run_folder.load(folder / "last.pt")
        try:
            run_folder.check_same_run(folder, config, checkpoint["config"])
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            scheduler.load_state_dict(checkpoint["scheduler"])
            torch.set_rng_state(checkpoint["rng"])
            if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
                torch.cuda.set_rng_state(checkpoint["cuda_rng"], device)
            history = checkpoint["history"]
        except RunError:
            raise
        except (*run_folder.NO_CHECKPOINT, RuntimeError) as error:
            raise RunError(
                f"{folder / 'last.pt'} does not fit this model (was models.py edited?): use "
                "--overwrite to start anew"
            ) from error
        edits = run_folder.note_on_edits(folder, source_hashes())
        print(f"going on after epoch {len(history)}{edits}")

    run_folder.write_json(folder / "config.json", config)
    run_folder.write_json(folder / "env.json", describe_environment(device))
    summaries = SummaryWriter(folder, purge_step=len(history) + 1)
    with watch_signals() as leave_if_stopped, summaries as writer:
        print(
            f"{settings.model}, {settings.dataset}, recipe {settings.recipe}, seed "
            f"{settings.seed} -> {folder}\n"
            f"{count_parameters(model):,} parameters; {len(train_idx):,} training, "
            f"{len(val_idx):,} validation, {len(test_labels):,} test images {dataset.source}; "
            f"{device_name(device)}; {settings.precision}, {settings.mode}",
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
                batch_labels = labels[idx]
                logits = logits_of(images[idx])
                loss = F.cross_entropy(logits, batch_labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[step] = loss.detach()
                correct += (logits.argmax(1) == batch_labels).sum()

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
            val_loss, val_predictions = evaluate(model, logits_of, val_images, val_labels)
            if not math.isfinite(val_loss):
                raise RunError(
                    f"the validation loss is {val_loss:g} after epoch {epoch}, with --lr "
                    f"{settings.lr:g}: try a lower one"
                )
            row = {
                "epoch": epoch,
                "lr": scheduler.get_last_lr()[0],
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
            if is_best:
                run_folder.save(folder / "best.pt", model.state_dict())
            checkpoint = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
                "history": history,
                "config": config,
            }
            run_folder.save(folder / "last.pt", checkpoint)
            run_folder.write_metrics(folder / "metrics.jsonl", history)
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
        _, predictions = evaluate(model, logits_of, test_images, test_labels)
        test_acc_last = accuracy(predictions, test_labels)
        if best_epoch != len(history):
            model.load_state_dict(run_folder.load(folder / "best.pt"))
            _, predictions = evaluate(model, logits_of, test_images, test_labels)
        run_folder.write_predictions(folder / "test_predictions.npy", predictions)
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
            "params": count_parameters(model),
            "train_seconds": train_seconds,
            "images_per_second": len(history) * len(train_idx) / train_seconds,
            "precision": settings.precision,
            "mode": settings.mode,
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
def evaluate(model, logits_of, images, labels) -> tuple[float, torch.Tensor]:
    """(mean cross-entropy, predicted classes int64 (N,)) of `images` in evaluation mode."""
    model.eval()
    loss, predictions = 0.0, []
    for batch, batch_labels in zip(images.split(EVAL_BATCH), labels.split(EVAL_BATCH), strict=True):
        logits = logits_of(batch)
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
            run_folder.check_same_run(folder, as_config(settings), there)
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
    if not settings.dry_run:
        return run(settings, settings.runs)
    with tempfile.TemporaryDirectory(prefix="dry-run-") as runs:
        return run(settings, Path(runs))


if __name__ == "__main__":
    sys.exit(main())
