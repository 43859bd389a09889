"""train.py against the loop most people write: torchvision's model, PIL, a DataLoader."""

import json
import subprocess
import sys

import data
import train
from models import build_model

import plain_loop
import pytest
import torch
from conftest import REPO
from torch.utils.data import DataLoader


def test_the_training_loop_equals_the_plain_one(tmp_path, fashion_mnist):
    flags = ["--limit-train", "66", "--limit-test", "100", "--epochs", "2", "--device", "cpu"]
    place = ["--data-dir", str(REPO / "data"), "--runs", str(tmp_path)]
    assert train.main(["--model", "baseline", *flags, *place]) == 0
    folder = tmp_path / "fashion_mnist/published/baseline/seed0"
    ours = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    train_idx, val_idx = data.split_indices(60_000, seed=0)
    train_idx, val_idx = train_idx[:66], val_idx[:64]
    images, labels = fashion_mnist.train_images, fashion_mnist.train_labels
    model = plain_loop.adapted_resnet18().to(memory_format=torch.channels_last)
    model.load_state_dict(build_model("baseline", seed=0).state_dict())
    # One epoch after the other, for each has an order of its own.
    orders = [data.shuffled(train_idx, 0, epoch) for epoch in (1, 2)]
    both = iter([DataLoader(plain_loop.PilImages(images[o], labels[o]), 64) for o in orders])

    class EachEpoch:
        def __iter__(self):
            return iter(next(both))

    val_loader = DataLoader(plain_loop.PilImages(images[val_idx], labels[val_idx]), 64)
    # Adam's first step is the learning rate times the sign of each gradient, however small that is:
    # rounding, which differs between the two, moves the loss in the third digit.
    for row, plain in zip(ours, plain_loop.train(model, EachEpoch(), val_loader, 2, t_max=2)):
        assert row["train_loss"] == pytest.approx(plain["train_loss"], rel=5e-3)
        assert row["val_acc"] == pytest.approx(plain["val_acc"])
    last = torch.load(folder / "best.pt", weights_only=True)
    assert last.keys() == model.state_dict().keys()


def test_the_yardstick_runs_as_documented():
    done = subprocess.run(
        [sys.executable, "tests/plain_loop.py", "--limit-train", "64", "--device", "cpu"],
        cwd=REPO, capture_output=True, text=True,
    )  # fmt: skip
    (row,) = map(json.loads, done.stdout.splitlines())
    assert row["epoch"] == 1 and row["images_per_second"] > 0
