"""train.py against the loop most people write: torchvision's model, PIL, a DataLoader."""

import json

import data
import train
from kit.training_speed import PilImages, plain_steps
from models import build_model

import pytest
import torch
from conftest import REPO
from test_models import torchvision_resnet18
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
    model = torchvision_resnet18().to(memory_format=torch.channels_last)
    model.load_state_dict(build_model("baseline", seed=0).state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)
    # Adam's first step is the learning rate times the sign of each gradient, however small that is:
    # rounding, which differs between the two, moves the loss in the third digit.
    for row in ours:
        order = data.shuffled(train_idx, 0, row["epoch"])  # each epoch has one of its own
        loader = DataLoader(PilImages(images[order], labels[order]), 64)
        total = sum(loss * n for loss, n in plain_steps(model, loader, optimizer, "cpu"))
        scheduler.step()
        assert row["train_loss"] == pytest.approx(total / 66, rel=5e-3)
        ((val_images, val_labels),) = DataLoader(PilImages(images[val_idx], labels[val_idx]), 64)
        with torch.no_grad():
            predictions = model.eval()(val_images).argmax(1)
        assert row["val_acc"] == pytest.approx(train.accuracy(predictions, val_labels))
    best = torch.load(folder / "best.pt", weights_only=True)
    assert len(ours) == 2 and best.keys() == model.state_dict().keys()
