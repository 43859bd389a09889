"""The training loop as most people write it: a yardstick for train.py's speed, and its slow twin.

    python tests/plain_loop.py                                # one epoch of the published recipe
    python tests/plain_loop.py --limit-train 960 --epochs 2   # seconds on a CPU

torchvision's ResNet-18 with a 3x3 stem, PIL transforms in a DataLoader, eager float32 with
PyTorch's default flags, `.item()` in every step. Prints a JSON object per epoch; images_per_second
is that of training alone. The first epoch of a process is the slowest.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
from torch.utils.data import DataLoader
from torchvision.models import resnet18

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from kit.training_speed import PilImages, plain_steps


def adapted_resnet18() -> nn.Module:
    model = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(1, 64, kernel_size=3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def train(model, train_loader, val_loader, epochs, t_max=50, device="cpu"):
    """Trains with the published recipe and yields a dict per epoch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=t_max)
    for epoch in range(1, epochs + 1):
        start, total, n = time.perf_counter(), 0.0, 0
        for loss, size in plain_steps(model, train_loader, optimizer, device):
            total += loss * size
            n += size
        seconds = time.perf_counter() - start
        scheduler.step()
        model.eval()
        correct = 0
        with torch.no_grad():
            for images, labels in val_loader:
                predictions = model(images.to(device)).argmax(1)
                correct += (predictions == labels.to(device)).sum().item()
        yield {
            "epoch": epoch,
            "train_loss": total / n,
            "val_acc": 100 * correct / len(val_loader.dataset),
            "images_per_second": n / seconds,
        }


def main(argv=None):
    """Prints a JSON object per epoch: train_loss, val_acc (percent), images_per_second."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--limit-train", type=int, help="training images; default: all 54,000")
    parser.add_argument("--workers", type=int, default=0, help="of the DataLoader")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    dataset = data.load_dataset("fashion_mnist", args.data_dir)
    train_idx, val_idx = data.split_indices(len(dataset.train_images), seed=0)
    if args.limit_train:
        train_idx, val_idx = train_idx[: args.limit_train], val_idx[: args.limit_train // 9]
    options = dict(batch_size=64, num_workers=args.workers, pin_memory=args.device != "cpu")
    train_images, val_images = (
        PilImages(dataset.train_images[idx], dataset.train_labels[idx])
        for idx in (train_idx, val_idx)
    )
    loaders = DataLoader(train_images, shuffle=True, **options), DataLoader(val_images, **options)
    for row in train(adapted_resnet18().to(args.device), *loaders, args.epochs, 50, args.device):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
