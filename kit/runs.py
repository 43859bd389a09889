"""Run folders: reading and checking their files, comparing two runs, and locking.

    RUNS/<dataset>/<recipe>/<model>/seed<k>/
        config.json env.json metrics.jsonl best.pt test_predictions.npy test_labels.npy result.json
        last.pt prev.pt .lock                   while it runs
        explain.json explain.png                by explain.py

Every file is written atomically, `result.json` last: it marks the run as complete. A run whose
files are damaged or contradict each other is no result.

Two runs are the same experiment if their settings and data are equal. Otherwise one is neither
resumed as the other nor paired with it. The verdict names differences in code, device, torch,
precision and mode. Needs no torch.
"""

import hashlib
import io
import os
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kit.command_line import UserError, in_one_line, is_name
from kit.files import check, maybe, read_json, read_small, say_no_locks

import numpy as np
from filelock import FileLock, Timeout

# --- The keys used from each file: {key: kind}, see kit/files.fits --------------------------------

NUMBER, POSITIVE, PERCENT = (-1e15, 1e15), (1e-12, 1e15), (0, 100)
COUNT, SIZE, WIDTH = range(10**15), range(1, 10**15), range(1, 2**16)


def is_text(value) -> bool:
    return type(value) is str and value.isprintable()


RESULT = dict(
    dataset=is_name, recipe=is_name, model=is_name, seed=COUNT, width=WIDTH, quick=bool,
    overrides=dict, classes=list, image=[COUNT], device=str, precision=is_name, mode=is_name,
    params=SIZE, test_images=SIZE, epochs_run=SIZE, best_epoch=SIZE, test_acc=PERCENT,
    test_acc_last=PERCENT, val_acc=PERCENT, train_seconds=POSITIVE, images_per_second=POSITIVE,
    peak_memory_mb=maybe(POSITIVE), fallback=maybe(str),
)  # fmt: skip
CONFIG = dict(
    model=is_name, base_model=str, dataset=is_text, dataset_name=is_name, data=str,
    data_dir=is_text, recipe=is_name, seed=COUNT, width=WIDTH, epochs=COUNT, limit_train=COUNT,
    limit_test=COUNT, overrides=dict, image_size=maybe(COUNT), position=maybe(str),
    reduction=maybe(COUNT), normalize=maybe(str),
)  # fmt: skip
ENV = dict(torch=str, sha256={str: str}, variables=maybe(dict), changes=maybe(list))
METRICS = dict(epoch=COUNT, train_loss=NUMBER, lr=NUMBER, val_acc=PERCENT)
COST = dict(
    model=is_name, precision=is_name, mode=is_name, device=str, torch=str, image=str, classes=SIZE,
    batch_size=SIZE, width=SIZE, sha256={str: str}, params=POSITIVE, flops=POSITIVE,
    flops_aten=POSITIVE, ms_per_image=POSITIVE, ms_per_image_p10=POSITIVE,
    ms_per_image_p90=POSITIVE, ms_per_image_p99=POSITIVE,
)  # fmt: skip
STAGE = dict(
    mean=NUMBER, spread_over_channels=NUMBER, spread_over_images=NUMBER, hardly_vary=(0, 1),
    saturated=maybe((0, 1)),
)  # fmt: skip
EXPLAINED = dict(
    test_images=SIZE, test_acc=PERCENT, test_acc_gates_fixed=maybe(PERCENT), won=COUNT, lost=COUNT,
    gates=lambda gates: all(check(stage, STAGE) for stage in gates.values()),
)  # fmt: skip

# --- A finished run -------------------------------------------------------------------------------


@dataclass(eq=False)
class FinishedRun:
    folder: Path
    result: dict  # result.json
    config: dict  # config.json
    env: dict  # env.json
    metrics: list[dict]  # metrics.jsonl
    labels: np.ndarray | None  # (test images,); None: missing
    predictions: np.ndarray | None  # (test images,), by best.pt; None: missing
    explained: dict | None = None  # explain.json

    @property
    def seed(self) -> int:
        return self.result["seed"]

    @property
    def correct(self) -> np.ndarray | None:
        """bool (test images,): whether best.pt is correct; None if unknown."""
        known = self.labels is not None and self.predictions is not None
        return self.predictions == self.labels if known else None

    @cached_property
    def settings(self) -> dict:
        """What all runs of a study must share; see `different`."""
        of_model = {"model", "seed", "position", "reduction", "precision", "mode"}
        unlike = NO_SETTING - {"overrides", "chosen"} | of_model
        found = {k: v for k, v in self.config.items() if k not in unlike}
        of_result = {key: self.result[key] for key in ("test_images", "image")}
        found |= of_result | {"classes": len(self.result["classes"])}
        if self.labels is not None:
            labels = self.labels.astype(np.int64).tobytes()
            found["labels"] = hashlib.sha256(labels).hexdigest()
        return found


def read_run(folder: Path) -> FinishedRun:
    """The finished run in `folder`. Raises ValueError if its files are damaged or inconsistent."""
    kinds = dict(result=RESULT, config=CONFIG, env=ENV)
    result, config, env = (read_json(folder / f"{k}.json", kinds[k]) for k in kinds)
    metrics = read_json(folder / "metrics.jsonl", METRICS)
    stated = config | {"dataset": config["dataset_name"]}
    for key in ("model", "dataset", "recipe", "seed", "width", "precision", "quick", "overrides"):
        if (there := stated.get(key)) != result[key]:
            raise ValueError(f"{key} is {result[key]} in result.json, {there} in config.json")
    if [row["epoch"] for row in metrics] != list(range(1, result["epochs_run"] + 1)):
        raise ValueError(f"metrics.jsonl has not the {result['epochs_run']} epochs of result.json")
    paths = (folder / f"test_{part}.npy" for part in ("labels", "predictions"))
    classes = (read_classes(path, result["test_images"]) for path in paths)
    run = FinishedRun(folder, result, config, env, metrics, *classes)
    test_acc = result["test_acc"]
    found = test_acc if run.correct is None else 100 * run.correct.mean()
    if abs(found - test_acc) > 1e-6:
        words = f"{found:.2f}% of its predictions are correct, but its test_acc is {test_acc:.2f}%"
        raise ValueError(words)
    return run


def read_classes(path: Path, n_images: int) -> np.ndarray | None:
    """A class per test image; None without the file. Raises ValueError naming the file."""
    if not path.exists():
        return None
    try:
        classes = np.load(io.BytesIO(read_small(path)))
        if classes.shape != (n_images,):
            raise ValueError(f"it has shape {classes.shape}, {n_images:,} images were tested")
        if classes.dtype.kind not in "iu" or classes.max() > 9999:
            raise ValueError("something else than classes")
        return classes
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{path.name}: {in_one_line(error)}") from error


def completed(folder: Path, config: dict) -> FinishedRun | None:
    """The finished run in `folder`, or None. Raises UserError if it is damaged, or not the run of
    `config`, which is in the form of config.json."""
    if not (folder / "result.json").exists():
        return None
    try:
        run = read_run(folder)
    except ValueError as error:
        advice = "use --overwrite to train that run again"
        raise UserError(f"{folder} is damaged ({in_one_line(error)}): {advice}") from error
    chosen = run.config["overrides"] | config["overrides"]
    is_chosen = "precision" in chosen or not config.get("auto_precision", True)
    by_device = {"mode"} if is_chosen else {"mode", "precision"}
    refuse_another_run(folder, run.config, config, ignore=by_device)
    return run


# --- The same run? --------------------------------------------------------------------------------

# Keys of config.json that are not compared: paths, and what follows from other settings.
# All others are, so that a new setting cannot be forgotten.
NO_SETTING = {
    "command", "data_dir", "dataset", "runs", "device", "target_acc", "overwrite", "dry_run",
    "overrides", "chosen", "quick", "base_model", "auto_precision",
}  # fmt: skip
CIRCUMSTANCES = ("device", "torch", "precision", "mode")  # should be equal, like the code


def different(there: dict, here: dict, ignore: Iterable[str] = ()) -> list[str]:
    """The settings that differ between two config.json, or parts of them, in words.

    A setting that only one of them has counts if it was chosen there, by a flag or the recipe, and
    is not off (None, 0, False). So a new setting does not change finished runs; the verdict reports
    its new code.
    """
    known = there.keys() & here.keys()
    for config in (there, here):
        known |= {*config.get("overrides", ()), *config.get("chosen", ())}
    special = {"data": "other images or labels", "labels": "other test labels"}
    return [
        special.get(key) or f"{key} {there.get(key) or 'none'} instead of {here.get(key) or 'none'}"
        for key in sorted(known - NO_SETTING - set(ignore))
        if (there.get(key) or None) != (here.get(key) or None)
    ]


def refuse_another_run(folder: Path, there: dict, config: dict, ignore: Iterable[str] = ()) -> None:
    """Raises UserError unless `there`, the config.json in `folder`, is this run's."""
    if differences := different(there, config, ignore):
        advice = "use --overwrite to discard that run, or another --runs folder"
        by_device = {"mode", "precision"} - {*ignore}
        if not different(there, config, {*ignore, *by_device}):  # `auto` chose others here
            flags = (f"--{key} {there.get(key)}" for key in sorted(by_device))
            advice = f"resume it with {' '.join(flags)}, {advice}"
        raise UserError(f"{folder} holds a run with {'; '.join(differences)}: {advice}")


def edited(then: dict, now: dict) -> list[str]:
    """The scripts or definitions whose sha256 differs. A definition that only one has is no
    change: the code that was there before does not use it."""
    both = then.keys() & now.keys()
    known = {name.partition(": ")[0] for name in both if ": " in name}  # compared by definition
    return sorted(name for name in both - known if then[name] != now[name])


def changes_since(then: dict, env: dict) -> list[str]:
    """Earlier changes, then how `env` (scripts, device, torch, mode, variables) differs from an
    env.json, in words."""
    changes = list(map(str, then.get("changes") or []))
    if scripts := edited(then.get("sha256", {}), env["sha256"]):
        changes.append(f"{', '.join(scripts)} edited since")
    variables = then.get("variables") or {}
    before, since = then | variables, env | env.get("variables", {})
    for key in ("device", "torch", "numpy", "mode", *variables):
        if key in since and key in before and before[key] != since[key]:
            changes.append(f"{key} {before[key] or 'unset'} before, {since[key] or 'unset'} since")
    return changes


def in_brackets(changes: list[str]) -> str:
    return f" ({'; '.join(changes)}; --overwrite starts from scratch)" if changes else ""


def who(runs: list) -> str:
    """'se seeds 0 1, baseline seed 0'."""
    seeds = {}
    for run in runs:
        seeds.setdefault(run.result["model"], set()).add(run.seed)
    return ", ".join(f"{model} {seeds_of(of_model)}" for model, of_model in seeds.items())


def unlike(pairs: list[tuple]) -> list[str]:
    """How the two runs of each pair differ in code, device, torch, precision and mode, in words.

    pairs: (run, the run it is compared with). Pairs may differ from each other: that does not
    affect the difference within each.
    """
    found = {}
    for run, other in pairs:
        here, there = run.env | run.result, other.env | other.result
        words = [f"{k} {here[k]} against {there[k]}" for k in CIRCUMSTANCES if here[k] != there[k]]
        if scripts := edited(here["sha256"], there["sha256"]):
            words.append(f"other code ({', '.join(scripts)})")
        for each in (run, other):
            said = f"{each.result['model']} changed during the run: "
            words += [f"{said}{change}" for change in each.env.get("changes") or []]
        for each in words:
            found.setdefault(each, []).append(run.seed)
    return [f"{seeds_of(seeds)}: {words}" for words, seeds in found.items()]


def seeds_of(seeds) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {' '.join(map(str, sorted(seeds)))}"


# --- Locking --------------------------------------------------------------------------------------


def lock(folder: Path, stack: ExitStack) -> None:
    """Locks `folder`, which is created if needed, until `stack` is closed.

    The lock ends with the process, however that ends. Folders created for it are removed if they
    stay empty. Raises UserError if another process has the lock; under run_all.sh it waits instead.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)

    def remove_empty():
        with suppress(OSError):  # rmdir raises at the first that is not empty
            for path in made:
                path.rmdir()

    stack.callback(remove_empty)
    timeout = 1  # second
    while True:
        try:
            stack.enter_context(FileLock(folder / ".lock", timeout=timeout))
            break
        except FileNotFoundError:  # another process removed its empty folder
            folder.mkdir(parents=True, exist_ok=True)
        except Timeout:
            if not os.environ.get("WAIT_FOR_RUNS"):
                advice = "wait for it, or use another --runs folder"
                raise UserError(f"another process is training in {folder}: {advice}") from None
            print(f"waiting: another process is training in {folder}", flush=True)
            timeout = -1  # forever
        except OSError as error:
            say_no_locks(folder, error)
            break
    stack.callback((folder / ".lock").unlink, missing_ok=True)  # while still locked


def lock_of(folder: Path) -> tuple | None:
    """Identifies the folder's lock file: a deleted and recreated folder has another one."""
    try:
        found = (folder / ".lock").stat()
        return found.st_dev, found.st_ino
    except FileNotFoundError:
        return None


def is_locked(folder: Path) -> bool:
    """Whether another process is training in it."""
    if not (folder / ".lock").exists():
        return False
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except OSError as error:  # any other error is reported by whoever locks it
        return isinstance(error, Timeout)
