import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import data
import models
import train
from kit import checkpoint
from kit.command_line import Stopped
from kit.run import Run
from kit.settings import parse_settings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REPO = Path(__file__).resolve().parent.parent
# A run of a second or two: narrow, three batches an epoch, the last of them partial.
SMALL = ["--width", "8", "--limit-train", "160", "--limit-test", "100", "--device", "cpu"]


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, alone or after others."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def figures_closed():
    yield
    if plt := sys.modules.get("matplotlib.pyplot"):
        plt.close("all")


@pytest.fixture(scope="session")
def fashion_mnist():
    return data.load_dataset("fashion_mnist", REPO / "data")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The folder of a small finished run of cbam_blocks, two epochs; not to be changed."""
    runs = tmp_path_factory.mktemp("finished")
    assert train_small("cbam_blocks", runs, "--epochs", "2") == 0
    return runs / "fashion_mnist/published/cbam_blocks/seed0"


def unaligned(text: str) -> str:
    """Markdown without what aligns its tables."""
    return re.sub(" +", " ", re.sub("-{4,}", "---", text))


def train_small(model, runs, *flags):
    """Runs train.py in this process; the exit code."""
    folders = ["--data-dir", str(REPO / "data"), "--runs", str(runs)]
    return train.main(["--model", model, *SMALL, *folders, *flags])


def settings_of(*flags):
    """As train.py parses them."""
    return parse_settings(list(flags), "", train.SETTINGS, train.RECIPES, models, data)


def stop_at(n, patch, error=lambda: Stopped(signal.SIGINT)):
    """Ctrl-C, or another error, when the run asks for the n-th time whether a signal has arrived.

    It asks before each step, and before each batch that it evaluates.
    """
    calls = iter(range(1, n))

    def leave_if_stopped(run):
        if next(calls, None) is None:
            raise error()

    patch.setattr(Run, "leave_if_stopped", leave_if_stopped)


def state_at(n, runs, command):
    """last.pt of the only run in `runs`: begun or resumed, and stopped as by stop_at(n)."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(n, patch)
        assert train.main([*command, "--runs", str(runs)]) == 130
    (path,) = runs.rglob("last.pt")
    return checkpoint.load(path)


def needs_pins():
    """Skips a test of run_all.sh where it would not use this Python, but make itself a .venv."""
    for line in (REPO / "requirements.txt").read_text().splitlines():
        name, _, pin = line.partition("==")
        if pin and metadata.version(name).partition("+")[0].replace("-", ".post") != pin:
            pytest.skip(f"needs {line}, as pinned")


def script(*command, **options):
    """Runs `python SCRIPT ...` as a user would, from the repository's folder."""
    options = {"cwd": REPO, "capture_output": True, "text": True} | options
    return subprocess.run([sys.executable, *map(str, command)], **options)


def variables(**environment):
    """Those of ./run_all.sh, which uses this Python."""
    needs_pins()
    return os.environ | {"PYTHON": sys.executable} | {k: str(v) for k, v in environment.items()}


def run_all(*arguments, **environment):
    """Runs ./run_all.sh with these variables."""
    options = dict(cwd=REPO, capture_output=True, text=True)
    return subprocess.run(["./run_all.sh", *arguments], env=variables(**environment), **options)


def copy_run(source, runs, model, seed, test_acc=50.0, **changes):
    """A copy of a finished run as another model or seed, its settings and result changed.

    test_acc: so many percent of its 10,000 predictions are correct; which ones is random.
    """
    folder = runs / "fashion_mnist" / "published" / model / f"seed{seed}"
    shutil.copytree(source, folder)
    labels = np.arange(10_000, dtype=np.uint8) % 10
    wrong = 10_000 - round(100 * test_acc)
    order = np.random.default_rng([seed, len(model)]).permutation(10_000)
    predictions = labels.copy()
    predictions[order[:wrong]] = (predictions[order[:wrong]] + 1) % 10
    np.save(folder / "test_labels.npy", labels)
    np.save(folder / "test_predictions.npy", predictions)
    changes |= {"model": model, "seed": seed, "test_acc": test_acc, "test_images": 10_000}
    changes |= {"dataset_name": changes["dataset"]} if "dataset" in changes else {}
    config = json.loads((folder / "config.json").read_text())
    result = json.loads((folder / "result.json").read_text())
    config |= {key: value for key, value in changes.items() if key in config and key != "mode"}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[0]["seconds"] += seed + len(model)  # a copy to the letter would be no result
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "result.json").write_text(json.dumps(result | changes))
    return folder


def metrics_of(folder):
    """metrics.jsonl without the times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = ("seconds", "images_per_second")
    return [{key: value for key, value in row.items() if key not in times} for row in rows]


def is_one_line(text):
    return len(text.strip().splitlines()) == 1 and "Traceback" not in text


def assert_same(found, expected):
    """Nested states, bit for bit."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected) and found.dtype == expected.dtype
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    else:
        assert found == expected


class HostWatch(TorchDispatchMode):
    """Notes what makes the host wait: values read, tensors of the CPU among those of the GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        kinds = {t.device.type for t in tensors if t.dim()}
        if len(kinds) > 1 or function is torch.ops.aten._local_scalar_dense.default:
            self.found.append(str(function))
        return out


# --- Studies that were never trained, as report.py sees them --------------------------------------

ROW = {
    "params": 177_890, "flops": 915_000_000, "flops_aten": 911_000_000, "batch_size": 64,
    "precision": "fp32", "mode": "eager", "ms_per_image": 0.25, "ms_per_image_p10": 0.2,
    "ms_per_image_p90": 0.3, "ms_per_image_p99": 0.4, "images_per_second": 4000.0,
    "peak_memory_mb": None, "device": "a test", "torch": "2", "width": 64, "image": "1x28x28",
    "classes": 10, "sha256": {},
}  # fmt: skip
SLOWER = {"ms_per_image": 0.375, "ms_per_image_p10": 0.35, "ms_per_image_p90": 0.4}
FULL = {"quick": False, "overrides": {}, "width": 64}


def make_runs(finished_run, runs, accuracies, **changes):
    """Run folders {model: [accuracy of seed 0, of seed 1, ...]}."""
    for model, values in accuracies.items():
        for seed, value in enumerate(values):
            copy_run(finished_run, runs, model, seed, **(FULL | {"test_acc": value} | changes))


@pytest.fixture
def study(finished_run, tmp_path):
    """A study of two models with three seeds and one with two, and a benchmark of all four."""
    runs, out = tmp_path / "runs", tmp_path / "out"
    accuracies = {
        "baseline": [93.1, 93.3, 93.2],
        "se": [92.9, 93.4, 93.0],
        "cbam_blocks": [92.5, 92.7],
    }
    make_runs(finished_run, runs, accuracies)
    out.mkdir()
    rows = [ROW | {"model": m} for m in ("baseline", "cbam_classifier", "se", "cbam_blocks")]
    (out / "benchmark.json").write_text(json.dumps(rows))
    return runs, out


@pytest.fixture
def explained(finished_run, tmp_path):
    """A folder with runs/ of two seeds, the first of which is explained, and out/."""
    for seed in (0, 1):
        folder = copy_run(finished_run, tmp_path / "runs", "cbam_blocks", 1 - seed)
    result = json.loads((folder / "result.json").read_text())
    gates = {"mean": 0.25, "spread_over_channels": 0.01, "spread_over_images": 0.002}
    found = {
        "test_images": 100, "test_acc": result["test_acc"], "won": 1, "lost": 3,
        "test_acc_gates_fixed": result["test_acc"] - 2, "images": [1],
        "gates": {"layer4": gates | {"saturated": None, "hardly_vary": 1.0}},
    }  # fmt: skip
    (folder / "explain.json").write_text(json.dumps(found))
    Image.new("RGB", (500, 500)).save(folder / "explain.png")
    return tmp_path
