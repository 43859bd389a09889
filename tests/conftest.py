import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import data
import train

REPO = Path(__file__).resolve().parent.parent
# A run of a second or two: narrow, three batches an epoch, the last of them partial.
SMALL = ["--width", "8", "--limit-train", "160", "--limit-test", "100", "--device", "cpu"]


@pytest.fixture(scope="session")
def fashion_mnist():
    return data.load_dataset("fashion_mnist", REPO / "data")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The folder of a small finished run of cbam_blocks, two epochs; not to be changed."""
    runs = tmp_path_factory.mktemp("finished")
    assert train_small("cbam_blocks", runs, "--epochs", "2", "--keep-last") == 0
    return runs / "fashion_mnist/published/cbam_blocks/seed0"


def train_small(model, runs, *flags):
    """Runs train.py in this process; the exit code."""
    place = ["--data-dir", str(REPO / "data"), "--runs", str(runs)]
    return train.main(["--model", model, *SMALL, *place, *flags])


def script(*command, **options):
    """Runs `python SCRIPT ...` as a user would, from the repository's folder."""
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=REPO, capture_output=True, text=True, **options
    )


def copy_run(source, runs, model, seed, **changes):
    """A copy of a finished run as another model or seed, its result changed."""
    folder = runs / "fashion_mnist" / "published" / model / f"seed{seed}"
    shutil.copytree(source, folder)
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(
        json.dumps(result | {"model": model, "seed": seed} | changes)
    )
    return folder


def is_one_line(text):
    return len(text.strip().splitlines()) == 1 and "Traceback" not in text
