"""Run folders and benchmark.json, read and checked: what report.py may compare.

Reads files alone and needs no torch. A file that is damaged or does not fit the others is named
and left out, never guessed at.
"""

import json
import math
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# The published report: one run a model, 50 epochs, Fashion-MNIST; time a NVIDIA RTX 4070, batch 64.
PUBLISHED = {
    "baseline": dict(test_acc=93.27, params_m=11.17, flops_g=0.92, ms_per_image=0.06),
    "se": dict(test_acc=92.70, params_m=11.26, flops_g=0.92, ms_per_image=0.07),
    "cbam_blocks": dict(test_acc=92.59, params_m=11.26, flops_g=0.92, ms_per_image=0.09),
    "cbam_classifier": dict(test_acc=93.18, params_m=11.21, flops_g=0.92, ms_per_image=0.07),
}
# What a run's files must hold. Everything else is used where it is there.
RUN_COLUMNS = (
    "dataset", "recipe", "quick", "model", "seed", "width", "test_acc", "test_acc_last", "val_acc",
    "best_epoch", "epochs_run", "stopped_early", "params", "train_seconds", "images_per_second",
    "precision", "mode", "device",
)  # fmt: skip
PERCENT = {"test_acc", "test_acc_last", "val_acc"}
POSITIVE = {
    "epochs_run", "params", "train_seconds", "images_per_second", "width", "epoch", "test_images",
}  # fmt: skip
NUMBERS = PERCENT | POSITIVE | {"train_loss"}
WORDS = ("dataset", "recipe", "model", "precision", "mode", "device")
METRIC_COLUMNS = ("epoch", "val_acc", "train_loss")
# Runs are compared only where these are the same in config.json.
SETTINGS = (
    "epochs", "batch_size", "lr", "patience", "limit_train", "limit_test", "width", "precision",
    "data", "image_size",
)  # fmt: skip
COST_WORDS = ("model", "precision", "mode", "device", "torch")
COST_NUMBERS = (
    "params", "flops", "flops_aten", "batch_size", "width", "ms_per_image", "ms_per_image_p10",
    "ms_per_image_p90", "ms_per_image_p99", "tflops", "share_of_ceiling",
)  # fmt: skip


@dataclass
class Run:
    folder: Path
    result: dict  # result.json
    config: dict  # config.json
    env: dict  # env.json
    metrics: list[dict]  # metrics.jsonl
    labels: np.ndarray | None  # (test images,), test_labels.npy; None where that is not there
    correct: np.ndarray | None  # bool (test images,), whether best.pt is right; None likewise
    problem: str | None = None  # why labels and predictions are not used, though they are there

    @property
    def seed(self) -> int:
        return self.result["seed"]


@dataclass
class Study:
    """Runs that may be compared: one data set, one recipe, the same explicit settings."""

    dataset: str
    recipe: str
    overrides: dict
    runs: dict[str, list[Run]]  # model -> its runs by seed

    @property
    def any_run(self) -> Run:
        return next(run for runs in self.runs.values() for run in runs)

    @property
    def published(self) -> dict[str, dict]:
        """The published rows, for the data set and recipe they are of (quick is its short form).

        All of them, unless the study sets other models beside the baseline: then that row alone.
        """
        if self.dataset != "fashion_mnist" or self.recipe not in ("published", "quick"):
            return {}
        others = self.runs.keys() - PUBLISHED.keys()
        only_the_baseline = self.runs.keys() & PUBLISHED.keys() == {"baseline"}
        if others and only_the_baseline:
            return {"baseline": PUBLISHED["baseline"]}
        return PUBLISHED

    @property
    def quick(self) -> bool:
        return self.any_run.result["quick"]

    @property
    def title(self) -> str:
        changed = "".join(f", {key} = {value}" for key, value in self.overrides.items())
        return f"{self.dataset}, recipe {self.recipe}{changed}"

    @property
    def mark(self) -> str:
        """How much less than the published recipe this is, in words; empty for a full study."""
        if not self.quick:
            return ""
        config = self.any_run.config
        epochs, width = config.get("epochs", "?"), self.width
        parts = [f"{epochs} epoch" + "s" * (epochs != 1)]
        for key, what in (("limit_train", "training images"), ("limit_test", "test images")):
            if config.get(key):
                parts.append(f"{config[key]:,} {what}")
        if width != 64:
            parts.append(f"width {width} instead of 64")
        if len(parts) == 1 and "patience" in self.overrides:
            parts.append(f"patience {self.overrides['patience']}")
        return f"quick run: {', '.join(parts)}"

    @property
    def width(self) -> int:
        return self.any_run.result["width"]

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for runs in self.runs.values() for run in runs})

    @property
    def n_images(self) -> int | None:
        """Test images; None where neither result.json nor predictions tell."""
        return self.any_run.result.get("test_images")

    def by_seed(self, model: str) -> dict[int, Run]:
        return {run.seed: run for run in self.runs.get(model, [])}


# What reading a damaged file may raise.
DAMAGED = (
    OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, ArithmeticError,
    RecursionError, MemoryError, zipfile.BadZipFile,
)  # fmt: skip


class ReportError(RuntimeError):
    """There is nothing to report. The message says in one line why and what to do."""


def read_studies(runs_dir: Path) -> tuple[list[Study], list[str]]:
    """All studies below `runs_dir`, full ones first, and the problems met on the way, in words."""
    found, problems = {}, []
    for folder in sorted(runs_dir.glob("*/*/*/seed*"), key=by_seed):
        try:
            if not (folder / "result.json").exists():
                metrics = folder / "metrics.jsonl"
                epochs = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
                problems.append(f"begun, not finished: {folder}, {epochs} epochs done")
                continue
            run = read_run(folder)
        except DAMAGED as error:
            reason = f"{type(error).__name__}: {error}"
            problems.append(f"{folder} left out, its files are damaged or not readable ({reason})")
            continue
        if run.problem:
            problems.append(f"{folder}: {run.problem}")
        if run.env.get("changes"):
            changes = "; ".join(map(str, run.env["changes"]))
            problems.append(f"{folder}: not all of its epochs were trained alike ({changes})")
        result = run.result
        overrides = json.dumps(result["overrides"], sort_keys=True)
        key = (result["dataset"], result["recipe"], overrides, result["quick"])
        found.setdefault(key, []).append(run)
    studies = []
    for (dataset, recipe, _, _), runs in found.items():
        runs, others = with_the_same_settings(runs)
        problems += others
        models = in_table_order({run.result["model"] for run in runs})
        by_model = {model: [r for r in runs if r.result["model"] == model] for model in models}
        studies.append(Study(dataset, recipe, runs[0].result["overrides"], by_model))
    return sorted(studies, key=lambda s: (s.quick, len(s.overrides), s.title)), problems


def with_the_same_settings(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """The runs with the settings that most of them have, and the others, in words."""
    settings = [
        {key: run.config.get(key) for key in SETTINGS}
        | {"test_images": run.result.get("test_images")}
        for run in runs
    ]
    usual = max(settings, key=settings.count)
    others = []
    for run, own in zip(runs, settings, strict=True):
        different = [f"{k} {own[k]} instead of {usual[k]}" for k in usual if own[k] != usual[k]]
        if different:
            others.append(f"{run.folder} left out, it has other settings: {', '.join(different)}")
    return [run for run, own in zip(runs, settings, strict=True) if own == usual], others


def read_run(folder: Path) -> Run:
    """Raises one of DAMAGED."""
    result, config, env = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("result", "config", "env")
    )
    if not all(isinstance(content, dict) for content in (result, config, env)):
        raise ValueError("a JSON file that is no object")
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = {"overrides": {}} | result
    for content, columns in [(result, RUN_COLUMNS), *((row, METRIC_COLUMNS) for row in metrics)]:
        for column in columns:
            content[column]  # a KeyError names what is not there
    for content in (result, *metrics):
        for column in NUMBERS & content.keys():
            check_number(column, content[column])
    if not metrics:
        raise ValueError("metrics.jsonl has no epochs")
    kinds = {"overrides": dict, "seed": int, "quick": bool} | dict.fromkeys(WORDS, str)
    for column, kind in kinds.items():
        if type(result[column]) is not kind:
            raise ValueError(f"{column} is {result[column]}")
    for column in ("dataset", "recipe", "model"):
        if not re.fullmatch(r"[\w.+-]+", result[column]):
            raise ValueError(f"{column} is no name")
    for key in ("epochs", "limit_train", "limit_test"):
        if type(config.get(key)) not in (int, type(None)):
            raise ValueError(f"{key} is {config[key]} in config.json")
    named = [str(result[key]) for key in ("dataset", "recipe", "model")] + [f"seed{result['seed']}"]
    if list(folder.parts[-4:]) != named:  # a copied folder would count as one more run
        raise ValueError(f"result.json is that of {result['model']} seed {result['seed']}")
    for key in ("model", "seed"):
        if config.get(key, result[key]) != result[key]:
            raise ValueError(f"config.json is that of {key} {config[key]}")
    labels, correct = read_classes(folder, result)
    run = Run(folder, result, config, env, metrics, labels, correct)
    if correct is not None and abs(100 * correct.mean() - result["test_acc"]) > 1e-6:
        run.labels = run.correct = None
        run.problem = (
            f"its predictions are not used, {100 * correct.mean():.2f} % of them are right, and "
            f"result.json says {result['test_acc']:.2f} %"
        )
    return run


def read_classes(folder: Path, result: dict) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The labels of the test images and whether the model was right; None without the files.

    Sets result["test_images"] where train.py has not. Raises ValueError where lengths differ.
    """
    found = {}
    for name in ("predictions", "labels"):
        path = folder / f"test_{name}.npy"
        if path.exists():
            found[name] = np.load(path)
            if found[name].dtype.kind not in "iu" or found[name].max(initial=0) > 9999:
                raise ValueError(f"{path.name} holds something else than classes")
            n_images = result.setdefault("test_images", found[name].size)
            if found[name].shape != (n_images,):
                raise ValueError(f"{name} of shape {found[name].shape}, {n_images:,} test images")
    if len(found) < 2:
        return None, None
    return found["labels"], found["predictions"] == found["labels"]


def check_number(column: str, value) -> None:
    """Raises ValueError: NaN, say, or an accuracy of 930 %."""
    bad = not is_finite(value) or (column in POSITIVE and value <= 0)
    if bad or (column in PERCENT and not 0 <= value <= 100):
        raise ValueError(f"{column} is {value}")


def is_finite(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def by_seed(folder: Path) -> tuple:
    number = folder.name.removeprefix("seed")
    return (*folder.parts[:-1], int(number) if number.isdecimal() else -1)


def in_table_order(models) -> list[str]:
    return [m for m in PUBLISHED if m in models] + sorted(set(models) - PUBLISHED.keys())


def read_costs(paths: list[Path]) -> tuple[list[dict], list[str]]:
    """The rows of the first benchmark.json that exists, and what is wrong with it, in words."""
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return [], []
    try:
        rows = json.loads(path.read_text())
        for row in rows:
            numbers = [row[column] for column in COST_NUMBERS]  # a KeyError names what is missing
            words = [row[column] for column in COST_WORDS]
            if not all(is_finite(number) and number > 0 for number in numbers):
                raise ValueError("something else where a positive number should be")
            if not all(isinstance(word, str) for word in words):
                raise ValueError("something else where a word should be")
            if not row["ms_per_image_p10"] <= row["ms_per_image"] <= row["ms_per_image_p90"]:
                raise ValueError("a median that is not between p10 and p90")
    except DAMAGED as error:
        reason = f"{type(error).__name__}: {error}"
        return [], [f"{path} left out, it is damaged ({reason}): run python benchmark.py again"]
    return rows, []


def costs_of(study: Study, rows: list[dict], mode="eager", precision="fp32") -> dict[str, dict]:
    """{model: its row} at this study's width and batch 64, or else the largest measured."""
    wanted = {"mode": mode, "precision": precision, "width": study.width}
    rows = [row for row in rows if wanted.items() <= row.items() and is_for(row, study)]
    rows.sort(key=lambda row: row["model"] != "baseline")
    if rows:  # times are compared on one machine
        wanted = {key: rows[0][key] for key in ("device", "torch")}
        rows = [row for row in rows if wanted.items() <= row.items()]
    sizes = {row["batch_size"] for row in rows}
    size = 64 if 64 in sizes else max(sizes, default=64)
    return {row["model"]: row for row in rows if row["batch_size"] == size}


def image_of(study: Study) -> str:
    """As benchmark.py has it, "1x28x28", which it also is where files do not say so."""
    return "x".join(map(str, study.any_run.result.get("image") or (1, 28, 28)))


def n_classes_of(study: Study) -> int:
    return len(study.any_run.result.get("classes") or range(10))


def is_for(row: dict, study: Study) -> bool:
    """Whether images and classes were those of the study."""
    shape = row.get("image", "1x28x28"), row.get("classes", 10)
    return shape == (image_of(study), n_classes_of(study))


def fastest_costs_of(study: Study, rows: list[dict]) -> dict[str, dict]:
    """As costs_of, in the mode and precision in which the models took the least time together."""
    variants = {(row["mode"], row["precision"]) for row in rows}
    measured = [costs_of(study, rows, *variant) for variant in sorted(variants)]
    models = max((len(costs) for costs in measured), default=0)
    complete = [costs for costs in measured if len(costs) == models]
    total = [sum(row["ms_per_image"] for row in costs.values()) for costs in complete]
    return complete[total.index(min(total))] if models else {}
