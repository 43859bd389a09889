"""How long a training step takes: train.py's own in every mode and precision, and a plain loop's.

`python benchmark.py --train` measures it. The plain loop is the one most people write: PIL
transforms in a DataLoader without workers, PyTorch's default flags and layout, eager, an optimizer
that is not fused, `.item()` in every step. All of them train the same models on the same random
images in one process, and take turns of some steps, so that a machine that slows down slows them
all. A ratio is taken within a turn; given are its median and its range over the turns.
"""

import io
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from statistics import median

import train
from kit.datasets import ImageData
from kit.fast import DEFAULT, set_up_torch
from kit.run import Run
from kit.tables import table
from models import build_model

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

PLAIN = "plain loop"
STEPS = {"cuda": 100, "cpu": 3}  # of a turn


class PilImages(Dataset):
    """Grey images, decoded and normalised one by one."""

    def __init__(self, images, labels):
        from torchvision import transforms  # slow to import, and rarely needed

        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [transforms.Resize(28), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i, 0].numpy())), int(self.labels[i])


def plain_steps(model, loader, optimizer, device) -> Iterator[tuple[float, int]]:
    """One epoch of the training loop as most people write it: each step's loss, and its images."""
    criterion = torch.nn.CrossEntropyLoss()
    model.train()
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        yield loss.item(), len(labels)


def our_turn(dataset: ImageData, flags: list) -> tuple[Callable, Run]:
    """(function of a number of steps, their run): train.py's step, in the mode of these flags."""
    settings = train.parse(list(map(str, flags)))
    loader, model, optimizer, scheduler, ema, forward, step = train.prepare(settings, dataset)
    with redirect_stdout(io.StringIO()), Run(settings, dataset.digest) as run:
        run.restore(loader, model, optimizer, scheduler, ema)
        step = run.speed_up(step, forward)
    batch = loader.epoch(1)[0]

    def turn(steps):
        set_up_torch(settings.precision)
        losses = torch.zeros(steps, device=settings.device)
        for i in range(steps):
            losses[i], _ = step(*batch)
        losses.cpu()  # waits for the device, once

    return turn, run


def plain_turn(model, dataset: ImageData, batch_size: int, device) -> Callable[[int], None]:
    """turn(steps): so many steps of the plain loop, its images decoded and normalised anew."""
    model = model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def turn(steps):
        set_up_torch(DEFAULT)
        n = steps * batch_size
        images = PilImages(dataset.train_images[:n], dataset.train_labels[:n])
        loader = DataLoader(images, batch_size, shuffle=True, pin_memory=device.type == "cuda")
        for _ in plain_steps(model, loader, optimizer, device):
            pass

    return turn


def random_images(n: int) -> ImageData:
    """Of the size of Fashion-MNIST's: what they show changes no time."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 1, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.arange(n) % 10
    return ImageData(images, labels, images[:100], labels[:100], list("0123456789"), "random")


def measure(args, common: dict) -> list[dict]:
    """Rows of benchmark_train.json. args: benchmark.py's; common: what all rows share."""
    steps, turns, rows, device = STEPS[args.device.type], args.repeats or 7, [], args.device
    for size in args.batch_sizes:
        dataset = random_images(max(2 * size, steps * size))
        for model in args.models:
            row = common | {"model": model, "batch_size": size, "steps": steps, "turns": turns}
            plain = plain_turn(build_model(model, width=args.width, seed=0), dataset, size, device)
            rows.append((row | {"mode": PLAIN, "precision": DEFAULT}, plain, []))
            for precision, mode in itertools.product(args.precisions, args.modes):
                flags = ["--model", model, "--mode", mode, "--precision", precision, "--dry-run"]
                flags += ["--batch-size", size, "--width", args.width, "--device", device]
                turn, run = our_turn(dataset, flags)
                if run.mode == mode:
                    case = {"mode": mode, "precision": precision}
                    case["set_up_seconds"] = run.set_up_seconds
                    rows.append((row | case, turn, []))
    for turn in range(-1, turns):  # the first one warms up
        for _, take, seconds in rows[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            take(steps)
            seconds.append(time.perf_counter() - start)
    yardstick = {}
    for row, _, seconds in rows:
        del seconds[0]
        key = row["model"], row["batch_size"]
        plain = yardstick.setdefault(key, seconds)  # the plain loop is the first of its model
        ratios = sorted(a / b for a, b in zip(plain, seconds, strict=True))
        row["ms_per_step"] = 1e3 * median(seconds) / steps
        row["images_per_second"] = 1e3 * row["batch_size"] / row["ms_per_step"]
        row |= {"ratio": median(ratios), "ratio_low": ratios[0], "ratio_high": ratios[-1]}
    return [row for row, *_ in rows]


def markdown(rows: list[dict]) -> str:
    """benchmark_train.md."""
    about = (
        "{device}, torch {torch}, width {width}. Training steps: median of {turns} turns of "
        "{steps} steps; images/s relative to the plain loop: median of the ratios within each turn "
        "(lowest - highest)."
    )
    header = ["model", "batch", "mode", "precision", "ms/step", "images/s"]
    cells = "`{model}`|{batch_size}|{mode}|{precision}|{ms_per_step:#.3g}|{images_per_second:,.0f}"
    cells += "|{ratio:.2f} ({ratio_low:.2f} - {ratio_high:.2f})"
    lines = [cells.format(**row).split("|") for row in rows]
    lines.insert(0, [*header, "relative to the plain loop"])
    return f"{about.format(**rows[0])}\n\n{table(lines)}"
