"""Run folders, benchmark.json and explain.json, read and checked: what report.py may compare.

Needs no torch. A run folder lies anywhere below --runs and is what its result.json says. Only what
the report uses is checked. A file that is damaged or does not fit the others is named in one line
and left out, never guessed at.
"""

import glob
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# The published report: one run per model, 50 epochs, Fashion-MNIST; time on an RTX 4070, batch 64.
PUBLISHED = {
    "baseline": dict(test_acc=93.27, params_m=11.17, flops_g=0.92, ms_per_image=0.06),
    "se": dict(test_acc=92.70, params_m=11.26, flops_g=0.92, ms_per_image=0.07),
    "cbam_blocks": dict(test_acc=92.59, params_m=11.26, flops_g=0.92, ms_per_image=0.09),
    "cbam_classifier": dict(test_acc=93.18, params_m=11.21, flops_g=0.92, ms_per_image=0.07),
}
# Runs are compared only where these settings are the same in config.json.
SETTINGS = (
    "epochs", "batch_size", "lr", "patience", "limit_train", "limit_test", "weight_decay", "warmup",
    "label_smoothing", "ema", "normalize", "crop", "flip", "randaugment", "erase", "cutmix",
    "mixup", "width", "precision", "data", "image_size", "optimizer",
)  # fmt: skip

# --- What the files must hold: {kind: keys}; a key with a ? may be absent or null ----------------


def between(low: float, high: float):
    return lambda x: type(x) in (int, float) and low <= x <= high  # which nan and inf are not


NUMBER, POSITIVE = between(-1e15, 1e15), between(1e-12, 1e15)
SHARE, PERCENT, CORRELATION = between(0, 1), between(0, 100), between(-1.001, 1.001)
NAME, COUNT, SIZE, SHAPE, GATES, CORRELATIONS = (
    lambda x: type(x) is str and re.fullmatch(r"[\w.+-]+", x),
    lambda x: type(x) is int and 0 <= x < 1e15,
    lambda x: COUNT(x) and x > 0,
    lambda x: type(x) is list and all(map(COUNT, x)),
    lambda x: all(check(stage, STAGE) for stage in x.values()),
    lambda x: check(x, {CORRELATION: "layer3? layer4?"}) is x,
)
RESULT = {
    NAME: "dataset recipe model precision mode", COUNT: "seed width", bool: "quick",
    PERCENT: "test_acc test_acc_last val_acc", str: "device fallback?", list: "classes?",
    POSITIVE: "epochs_run train_seconds images_per_second params peak_memory_mb?",
    dict: "overrides?", SIZE: "test_images?", SHAPE: "image?",
}  # fmt: skip
DEFAULTS = {"overrides": {}, "classes": range(10), "image": (1, 28, 28), "test_images": None}
FILES = {
    "result": RESULT, "config": {COUNT: "epochs? limit_train? limit_test?"},
    "env": {list: "changes?"},
}  # fmt: skip
METRICS = {NUMBER: "epoch train_loss", PERCENT: "val_acc"}
COST = {
    NAME: "model precision mode", str: "device torch?", COUNT: "batch_size width?",
    POSITIVE: "params flops flops_aten ms_per_image ms_per_image_p10 ms_per_image_p90 "
    "ms_per_image_p99? tflops? share_of_ceiling?",
}  # fmt: skip
STAGE = {NUMBER: "mean spread_over_channels spread_over_images", SHARE: "hardly_vary saturated?"}
EXPLAINED = {
    NAME: "model dataset recipe picture", dict: "overrides", COUNT: "seed cam_images won lost",
    SIZE: "test_images", PERCENT: "test_acc test_acc_gates_fixed?", GATES: "gates",
    SHARE: "deletion deletion_random insertion insertion_random",
    CORRELATIONS: "correlation_with_random_weights",
}  # fmt: skip
ROWS = {"benchmark": COST, "explain": EXPLAINED}


def check(content: dict, kinds: dict) -> dict:
    """`content`, or an exception of any kind that names a value that is missing or cannot be."""
    for kind, names in kinds.items():
        for name in names.split():
            key = name.rstrip("?")
            value = content[key] if key == name else content.get(key)
            fits = type(value) is kind if type(kind) is type else kind(value)
            if not (fits or (key != name and value is None)):
                raise ValueError(f"{key} is {value}")
    return content


@dataclass
class Run:
    folder: Path
    result: dict  # result.json
    config: dict  # config.json
    env: dict  # env.json
    metrics: list[dict]  # metrics.jsonl
    labels: np.ndarray | None = None  # (test images,), test_labels.npy; None: not there, not used
    correct: np.ndarray | None = None  # bool (test images,), whether best.pt is right; likewise

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
    def all_runs(self) -> list[Run]:
        return [run for runs in self.runs.values() for run in runs]

    @property
    def published(self) -> dict[str, dict]:
        """The published rows for this data set and recipe; of a study of other models, one."""
        if self.dataset != "fashion_mnist" or self.recipe not in ("published", "quick"):
            return {}
        of_others = len(self.runs) > 1 and self.runs.keys() & PUBLISHED.keys() == {"baseline"}
        return {"baseline": PUBLISHED["baseline"]} if of_others else PUBLISHED

    @property
    def title(self) -> str:
        changed = "".join(f", {key} = {value}" for key, value in self.overrides.items())
        return f"{self.dataset}, recipe {self.recipe}{changed}"

    @property
    def result(self) -> dict:
        """Of the first run: width, quick, image, classes and test_images are those of all."""
        return self.all_runs[0].result

    def by_seed(self, model: str) -> dict[int, Run]:
        return {run.seed: run for run in self.runs.get(model, [])}

    def accuracies(self, model: str) -> dict[int, float]:
        return {run.seed: run.result["test_acc"] for run in self.runs.get(model, [])}


def read_studies(runs_dir: Path) -> tuple[list[Study], list[str]]:
    """All studies below `runs_dir`, full ones first, and the problems met on the way, in words."""
    groups, problems = {}, []
    for folder in run_folders(runs_dir):
        try:
            run = read_run(folder, problems)
        except Exception as error:  # whatever a damaged file leads to
            reason = f"{type(error).__name__}: {error}"
            problems.append(f"{folder} left out, its files are damaged or not readable ({reason})")
            continue
        if run:
            overrides = {key: used(value) for key, value in run.result["overrides"].items()}
            key = [run.result[key] for key in ("dataset", "recipe", "quick")]
            groups.setdefault((*key, json.dumps(overrides, sort_keys=True)), []).append(run)
    studies = [
        Study(dataset, recipe, runs[0].result["overrides"], comparable(runs, problems))
        for (dataset, recipe, *_), runs in groups.items()
    ]
    return sorted(studies, key=lambda s: (s.result["quick"], len(s.overrides), s.title)), problems


def run_folders(runs_dir: Path) -> list[Path]:
    """At any depth, hidden folders aside: those with a result.json and those of unfinished runs."""
    found = {
        (runs_dir / path).parent
        for pattern in ("**/result.json", "**/seed[0-9]*/config.json")
        for path in glob.glob(pattern, root_dir=runs_dir, recursive=True)
    }
    # The highest comes first, so that of a run and a copy of it the run is kept.
    return sorted(found, key=lambda path: (len(path.parts), path.parent, len(path.name), path.name))


def read_run(folder: Path, problems: list[str]) -> Run | None:
    """None for an unfinished run; adds to the problems. Raises anything where files are damaged."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines() if metrics.exists() else []
    if not (folder / "result.json").exists():
        problems.append(f"unfinished: {folder}, {len(lines)} epochs done")
        return None
    if not lines:
        raise ValueError("metrics.jsonl has no epochs")
    result, config, env = (
        check(json.loads((folder / f"{name}.json").read_bytes()), FILES[name]) for name in FILES
    )
    for key in ("model", "seed"):
        if config.get(key, result[key]) != result[key]:
            raise ValueError(f"config.json is that of {key} {config[key]}")
    older = "AdamW" if config.get("weight_decay") else "Adam"  # runs that do not say
    config.setdefault("optimizer", older)
    result |= {key: value for key, value in DEFAULTS.items() if result.get(key) is None}
    metrics = [check(json.loads(line), METRICS) for line in lines]
    run = Run(folder, result, config, env, metrics, *read_classes(folder, result))
    if run.correct is not None and abs(100 * run.correct.mean() - result["test_acc"]) > 1e-6:
        problems.append(
            f"{folder}: its predictions are not used: {100 * run.correct.mean():.2f}% of them are "
            f"correct, but result.json says {result['test_acc']:.2f}%"
        )
        run.labels = run.correct = None
    if changes := "; ".join(map(str, env.get("changes") or [])):
        problems.append(
            f"{folder}: its epochs were not all trained under the same conditions ({changes})"
        )
    return run


def read_classes(folder: Path, result: dict) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The labels of the test images and whether the model was right; None without both files."""
    found = []
    for path in (folder / "test_labels.npy", folder / "test_predictions.npy"):
        if path.exists():
            classes = np.load(path)
            if classes.dtype.kind not in "iu" or classes.max(initial=0) > 9999:
                raise ValueError(f"{path.name} holds something else than classes")
            n_images = result["test_images"] = result["test_images"] or classes.size
            if classes.shape != (n_images,):
                raise ValueError(f"{path.stem} of shape {classes.shape}, {n_images:,} test images")
            found.append(classes)
    return (found[0], found[0] == found[1]) if len(found) == 2 else (None, None)


def comparable(runs: list[Run], problems: list[str]) -> dict[str, list[Run]]:
    """{model: its runs by seed} with the settings that most have; the others are problems."""
    settings = [
        {key: used(run.config.get(key)) for key in SETTINGS}
        | {"test_images": run.result["test_images"]}
        for run in runs
    ]
    usual, kept = max(settings, key=settings.count), {}
    for own, run in zip(settings, runs, strict=True):
        different = [f"{k} {own[k]} instead of {usual[k]}" for k in usual if own[k] != usual[k]]
        if different:
            reason = f"it has other settings: {', '.join(different)}"
        elif (first := kept.setdefault((run.result["model"], run.seed), run)) is not run:
            reason = f"same model and seed as {first.folder}"
        else:
            continue
        problems.append(f"{run.folder} left out, {reason}")
    models = in_table_order({model for model, _ in kept})
    return {model: [kept[key] for key in sorted(kept) if key[0] == model] for model in models}


def used(value):
    """A setting that is not used is None in older runs; 0, False or (normalize) half in newer."""
    return None if value in (0, "half") else value


def in_table_order(models) -> list[str]:
    return [m for m in PUBLISHED if m in models] + sorted(set(models) - PUBLISHED.keys())


def read_rows(script: str, folders: list[Path]) -> tuple[list[dict], list[str]]:
    """The rows of the first benchmark.json or explain.json in `folders`; what is wrong with it."""
    path = next((p for f in folders if (p := f / f"{script}.json").exists()), None)
    if path is None:
        return [], []
    try:
        rows = json.loads(path.read_bytes())
        if type(rows) is not list:
            raise ValueError("no list")
        for row in rows:
            check(row, ROWS[script])
            low, median, high = (row.get(f"ms_per_image{p}", 0) for p in ("_p10", "", "_p90"))
            if not low <= median <= high:
                raise ValueError("a median that is not between p10 and p90")
    except Exception as error:  # whatever a damaged file leads to
        reason = f"{type(error).__name__}: {error}"
        return [], [f"{path} left out, it is damaged ({reason}): run python {script}.py again"]
    return rows, []
