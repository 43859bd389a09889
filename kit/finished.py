"""A finished run, read and checked: what its files must hold to be a result. Needs no torch.

Only what a report uses is checked. What is damaged, or contradicts another file of the run, is no
result, and is never guessed at.
"""

import hashlib
import io
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kit.command_line import UserError, in_one_line, is_name
from kit.files import read_small
from kit.identity import refuse_another_run, settings_of

import numpy as np

# --- What the files must hold: {kind: keys}; a key with a ? may be absent or null ----------------


def between(low: float, high: float):
    return lambda x: type(x) in (int, float) and low <= x <= high  # which nan and inf are not


NUMBER, POSITIVE = between(-1e15, 1e15), between(1e-12, 1e15)
SHARE, PERCENT = between(0, 1), between(0, 100)
NAME, COUNT, SIZE, SHAPE, GATES, HASHES = (
    lambda x: type(x) is str and is_name(x),
    lambda x: type(x) is int and 0 <= x < 1e15,
    lambda x: COUNT(x) and x > 0,
    lambda x: type(x) is list and all(map(COUNT, x)),
    lambda x: all(check(stage, STAGE) for stage in x.values()),
    lambda x: type(x) is dict and all(type(value) is str for value in x.values()),
)
RESULT = {
    NAME: "dataset recipe model precision mode", COUNT: "seed width", bool: "quick",
    PERCENT: "test_acc test_acc_last val_acc", str: "device fallback?", list: "classes?",
    POSITIVE: "train_seconds images_per_second peak_memory_mb?", dict: "overrides?",
    SIZE: "epochs_run best_epoch params test_images?", SHAPE: "image?",
}  # fmt: skip
DEFAULTS = {"classes": range(10), "image": (1, 28, 28), "test_images": None}
FILES = {
    "result": RESULT,
    "config": {NAME: "model", COUNT: "seed epochs? limit_train? limit_test?", dict: "overrides?"},
    "env": {list: "changes?", str: "torch?", HASHES: "sha256?"},
}  # fmt: skip
METRICS = {NUMBER: "epoch train_loss lr?", PERCENT: "val_acc"}
COST = {
    NAME: "model precision mode", str: "device torch? image?", SIZE: "batch_size width? classes?",
    HASHES: "sha256?",
    POSITIVE: "params flops flops_aten ms_per_image ms_per_image_p10 ms_per_image_p90 "
    "ms_per_image_p99?",
}  # fmt: skip
STAGE = {NUMBER: "mean spread_over_channels spread_over_images", SHARE: "hardly_vary saturated?"}
EXPLAINED = {
    NAME: "model dataset recipe picture", dict: "overrides", COUNT: "seed won lost",
    SIZE: "test_images", PERCENT: "test_acc test_acc_gates_fixed?", GATES: "gates",
    str: "predictions?", list: "compared?",
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


@dataclass(eq=False)
class Run:
    folder: Path
    result: dict  # result.json
    config: dict  # config.json
    env: dict  # env.json
    metrics: list[dict]  # metrics.jsonl
    labels: np.ndarray | None = None  # (test images,), test_labels.npy; None: not there
    predictions: np.ndarray | None = None  # (test images,), by best.pt; None: not there

    @property
    def seed(self) -> int:
        return self.result["seed"]

    @property
    def predicted(self) -> str | None:
        """The digest of its predictions."""
        return None if self.predictions is None else digest_of(self.predictions)

    @property
    def correct(self) -> np.ndarray | None:
        """bool (test images,): whether best.pt is right; None where that is not known."""
        known = self.labels is not None and self.predictions is not None
        return self.predictions == self.labels if known else None

    @cached_property
    def settings(self) -> dict:
        """What must be the same in all runs of a study; the test labels aside."""
        of_model = {"model", "seed", "position", "reduction", "precision", "mode"}
        found = {k: v for k, v in settings_of(self.config).items() if k not in of_model}
        image, n_classes = list(self.result["image"]), len(self.result["classes"])
        of_data = {"test_images": self.result["test_images"], "image": image, "classes": n_classes}
        return found | of_data

    @cached_property
    def circumstances(self) -> dict:
        """What should be the same, as far as it is known."""
        of_result = {key: self.result[key] for key in ("device", "precision", "mode")}
        return of_result | {"torch": self.env.get("torch"), "code": self.env.get("sha256") or {}}

    def check_accuracy(self) -> None:
        """Raises ValueError if the predictions do not bear it out."""
        if self.correct is None:
            return
        found, stated = 100 * self.correct.mean(), self.result["test_acc"]
        if abs(found - stated) > 1e-6:
            raise ValueError(
                f"{found:.2f}% of its predictions are correct, but its test_acc is {stated:.2f}%"
            )


def read_run(folder: Path) -> Run:
    """The finished run in `folder`. Raises ValueError with one line where its files are damaged or
    contradict each other."""
    result, config, env = (read(folder / f"{name}.json", FILES[name])[0] for name in FILES)
    metrics = read(folder / "metrics.jsonl", METRICS)
    defaults = DEFAULTS | {"overrides": config.get("overrides") or {}}
    result |= {key: value for key, value in defaults.items() if result.get(key) is None}
    stated = config | {"dataset": settings_of(config)["dataset_name"]}
    for key in ("model", "dataset", "recipe", "seed", "width", "precision", "quick", "overrides"):
        if stated.get(key) not in (None, "", result[key]):
            raise ValueError(f"{key} is {result[key]} in result.json, {stated[key]} in config.json")
    epochs = [row["epoch"] - metrics[0]["epoch"] for row in metrics]  # once they began with 0
    if epochs != list(range(result["epochs_run"])):
        raise ValueError(f"metrics.jsonl has not the {result['epochs_run']} epochs of result.json")
    run = Run(folder, result, config, env, metrics)
    run.labels, run.predictions = (
        read_classes(folder / f"test_{name}.npy", result) for name in ("labels", "predictions")
    )
    run.check_accuracy()
    return run


def read(path: Path, kinds: dict) -> list[dict]:
    """The objects in a .json or .jsonl file. Raises ValueError that names the file."""
    try:
        body = read_small(path)
        lines = body.splitlines() if path.suffix == ".jsonl" else [body]
        return [check(json.loads(line), kinds) for line in lines]
    except Exception as error:  # whatever a damaged file leads to
        raise ValueError(f"{path.name}: {in_one_line(error)}") from error


def read_classes(path: Path, result: dict) -> np.ndarray | None:
    """A class for each test image; None without the file. Raises ValueError that names it."""
    if not path.exists():
        return None
    try:
        classes = np.load(io.BytesIO(read_small(path)))
        if classes.dtype.kind not in "iu" or not classes.size or classes.max() > 9999:
            raise ValueError("something else than classes")
    except Exception as error:  # a damaged file raises what it likes
        raise ValueError(f"{path.name}: {in_one_line(error)}") from error
    n_images = result["test_images"] = result["test_images"] or classes.size
    if classes.shape != (n_images,):
        raise ValueError(f"{path.name} has shape {classes.shape}, {n_images:,} images were tested")
    return classes


def digest_of(classes: np.ndarray) -> str:
    """16 hexadecimal digits, whatever kind of integers they are."""
    return hashlib.sha256(classes.astype("<u2").tobytes()).hexdigest()[:16]


def completed(folder: Path, config: dict) -> Run | None:
    """The finished run in `folder`, None if there is none. Raises UserError if it is damaged, or
    another than that of `config`, which has the settings as config.json has them."""
    if not (folder / "result.json").exists():
        return None
    try:
        run = read_run(folder)
    except (ValueError, RecursionError) as error:
        advice = "use --overwrite to train that run again"
        raise UserError(f"{folder} is damaged ({in_one_line(error)}): {advice}") from error
    chosen = (run.config.get("overrides") or {}) | config["overrides"]
    is_chosen = "precision" in chosen or not config.get("auto_precision", True)
    by_device = {"mode"} if is_chosen else {"mode", "precision"}
    refuse_another_run(folder, run.config, config, ignore=by_device)
    return run
