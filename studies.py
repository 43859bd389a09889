"""Run folders and benchmark.json, read and checked: what report.py may compare.

Reads files alone and needs no torch. A file that is damaged or does not fit the others is named
and left out, never guessed at.
"""

import json
import math
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
RUN_COLUMNS = (
    "dataset", "recipe", "overrides", "quick", "model", "seed", "width", "test_acc",
    "test_acc_last", "val_acc", "best_epoch", "epochs_run", "stopped_early", "test_images",
    "params", "train_seconds", "images_per_second", "precision", "mode", "device",
)  # fmt: skip


NUMBERS = (
    "test_acc", "test_acc_last", "val_acc", "epochs_run", "params", "train_seconds",
    "images_per_second", "test_images", "width",
)  # fmt: skip
CONFIG_COLUMNS = ("epochs", "limit_train", "limit_test", "width", "command")
ENV_COLUMNS = ("device", "torch", "cuda", "driver", "python", "git_commit", "git_dirty")
METRIC_COLUMNS = ("epoch", "val_acc", "train_loss")
COST_WORDS = ("model", "precision", "mode", "device", "torch")
COST_NUMBERS = (
    "params", "flops", "batch_size", "width", "ms_per_image", "ms_per_image_p10",
    "ms_per_image_p90", "ms_per_image_p99", "tflops", "share_of_ceiling",
)  # fmt: skip


@dataclass
class Run:
    folder: Path
    result: dict  # result.json
    config: dict  # config.json
    env: dict  # env.json
    metrics: list[dict]  # metrics.jsonl
    correct: np.ndarray | None  # bool (test images,); None where test_labels.npy is not there


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
        """The published rows, for the data set they are of."""
        return PUBLISHED if self.dataset == "fashion_mnist" else {}

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
        parts = [f"{config['epochs']} epoch" + "s" * (config["epochs"] != 1)]
        for key, what in (("limit_train", "training images"), ("limit_test", "test images")):
            if config[key]:
                parts.append(f"{config[key]:,} {what}")
        if config["width"] != 64:
            parts.append(f"width {config['width']} instead of 64")
        return f"quick run: {', '.join(parts)}"

    def seeds(self) -> list[int]:
        return sorted({run.result["seed"] for runs in self.runs.values() for run in runs})


class ReportError(RuntimeError):
    """There is nothing to report. The message says in one line why and what to do."""


def read_studies(runs_dir: Path) -> tuple[list[Study], list[str]]:
    """All studies below `runs_dir`, full ones first, and the problems met on the way, in words."""
    studies, problems = {}, []
    for folder in sorted(runs_dir.glob("*/*/*/seed*"), key=by_seed):
        try:
            if not (folder / "result.json").exists():
                metrics = folder / "metrics.jsonl"
                epochs = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
                problems.append(f"begun, not finished: {folder}, {epochs} epochs done")
                continue
            run = read_run(folder)
            key = (run.result["dataset"], run.result["recipe"], json.dumps(run.result["overrides"]))
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            reason = f"{type(error).__name__}: {error}"
            problems.append(f"{folder} left out, its files are damaged or not readable ({reason})")
            continue
        study = studies.setdefault(key, Study(*key[:2], run.result["overrides"], {}))
        study.runs.setdefault(run.result["model"], []).append(run)
    for study in studies.values():
        study.runs = {model: study.runs[model] for model in in_table_order(study.runs)}
    ordered = sorted(studies.values(), key=lambda s: (s.quick, len(s.overrides), s.title))
    return ordered, problems


def read_run(folder: Path) -> Run:
    """Raises OSError, EOFError, ValueError, KeyError or TypeError if one is damaged."""
    result, config, env = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("result", "config", "env")
    )
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    correct = None
    if (folder / "test_labels.npy").exists():
        predictions, labels = (np.load(folder / f"test_{x}.npy") for x in ("predictions", "labels"))
        if not predictions.shape == labels.shape == (result["test_images"],):
            raise ValueError(f"{len(predictions):,} predictions, {len(labels):,} labels")
        correct = predictions == labels
    run = Run(folder, result, config, env, [json.loads(line) for line in lines], correct)
    needed = [(result, RUN_COLUMNS), (config, CONFIG_COLUMNS), (env, ENV_COLUMNS)]
    for content, columns in needed + [(row, METRIC_COLUMNS) for row in run.metrics]:
        for column in columns:
            content[column]  # a KeyError names what is not there
    numbers = [result[column] for column in NUMBERS]
    numbers += [row[column] for row in run.metrics for column in METRIC_COLUMNS]
    if not (run.metrics and isinstance(result["overrides"], dict) and all(map(is_finite, numbers))):
        raise ValueError("no epochs, or something else where a number should be")
    named = [str(result[key]) for key in ("dataset", "recipe", "model")] + [f"seed{result['seed']}"]
    if list(folder.parts[-4:]) != named:  # a copied folder would count as one more run
        raise ValueError(f"result.json is that of {result['model']} seed {result['seed']}")
    return run


def is_finite(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def by_seed(folder: Path) -> tuple:
    number = folder.name.removeprefix("seed")
    return (*folder.parts[:-1], int(number) if number.isdecimal() else -1)


def in_table_order(models) -> list[str]:
    return [m for m in PUBLISHED if m in models] + sorted(set(models) - PUBLISHED.keys())


def read_costs(paths: list[Path]) -> list[dict]:
    """The rows of the first benchmark.json that exists; an empty list if there is none."""
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return []
    try:
        rows = json.loads(path.read_text())
        for row in rows:
            numbers = [row[column] for column in COST_NUMBERS]  # a KeyError names what is missing
            words = [row[column] for column in COST_WORDS]
            if not all(is_finite(number) and number > 0 for number in numbers):
                raise ValueError("something else where a positive number should be")
            if not all(isinstance(word, str) for word in words):
                raise ValueError("something else where a word should be")
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(
            f"{path} is damaged ({type(error).__name__}: {error}): run python benchmark.py again"
        ) from error
    return rows


def costs_of(study: Study, rows: list[dict], mode="eager", precision="fp32") -> dict[str, dict]:
    """{model: its row} at this study's width and batch 64, or else the largest measured."""
    wanted = {"mode": mode, "precision": precision, "width": study.any_run.result["width"]}
    rows = [row for row in rows if wanted.items() <= row.items()]
    sizes = {row["batch_size"] for row in rows}
    size = 64 if 64 in sizes else max(sizes, default=64)
    return {row["model"]: row for row in rows if row["batch_size"] == size}


def fastest_costs_of(study: Study, rows: list[dict]) -> dict[str, dict]:
    """As costs_of, in the mode and precision in which the models took the least time together."""
    variants = {(row["mode"], row["precision"]) for row in rows}
    measured = [costs_of(study, rows, *variant) for variant in sorted(variants)]
    models = max((len(costs) for costs in measured), default=0)
    complete = [costs for costs in measured if len(costs) == models]
    total = [sum(row["ms_per_image"] for row in costs.values()) for costs in complete]
    return complete[total.index(min(total))] if models else {}
