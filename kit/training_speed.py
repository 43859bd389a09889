"""How long a training step takes: train.py's in every mode and precision, against a plain loop's.

`python benchmark.py --train` runs this. The plain loop is the one most people write: PIL transforms
in a DataLoader without workers, PyTorch's default flags and layout, eager, an unfused optimizer,
`.item()` in every step. The same loop on images resident on the device shows how much of its time
goes into decoding. All train the same models on the same random images in one process and take
turns, so a slowdown of the machine affects them all. Each turn starts with untimed steps. Ratios
are taken within each turn; the table gives their median and range.
"""

import io
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from statistics import median

import train
from kit.command_line import table
from kit.datasets import ImageData
from kit.fast import DEFAULT, set_up_torch
from kit.run import Run
from models import build_model

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

PLAIN, RESIDENT = "plain loop", "plain loop, resident data"
STEPS = {"cuda": (100, 20), "cpu": (3, 1)}  # per turn: timed; untimed before them


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
    """One epoch of the plain loop; yields each step's loss and number of images."""
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
    """(turn(steps), its run): train.py's training step with these flags."""
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


def plain_turn(model, dataset: ImageData, batch_size: int, device, resident=False) -> Callable:
    """turn(steps) of the plain loop. resident: batches normalised on the device, none decoded."""
    model, images, labels = model.to(device), dataset.train_images, dataset.train_labels
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    if resident:
        images, labels = images.to(device), labels.to(device)

    def turn(steps):
        set_up_torch(DEFAULT)
        n = steps * batch_size
        if resident:
            order = torch.randperm(n, device=device).split(batch_size)
            loader = ((images[idx].float() / 127.5 - 1, labels[idx]) for idx in order)
        else:
            pin, plain = device.type == "cuda", PilImages(images[:n], labels[:n])
            loader = DataLoader(plain, batch_size, shuffle=True, pin_memory=pin)
        for _ in plain_steps(model, loader, optimizer, device):
            pass

    return turn


def random_images(n: int) -> ImageData:
    """Fashion-MNIST-sized; their content does not affect the time."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 1, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.arange(n) % 10
    return ImageData(images, labels, images[:100], labels[:100], list("0123456789"), "random")


def measure(args, common: dict) -> Iterator[list[dict]]:
    """Yields the rows of benchmark_train.json after each turn; common: what all share."""
    steps, untimed = STEPS[args.device.type]
    cases, device = [], args.device
    for size, model in itertools.product(args.batch_sizes, args.models):
        dataset = random_images(max(2, steps) * size)
        row = common | {"model": model, "batch_size": size, "steps": steps}
        for mode, resident in ((PLAIN, False), (RESIDENT, True)):
            plain = build_model(model, width=args.width, seed=0)
            turn = plain_turn(plain, dataset, size, device, resident)
            cases.append((row | {"mode": mode, "precision": DEFAULT}, turn, []))
        for precision, mode in itertools.product(args.precisions, args.modes):
            flags = ["--model", model, "--mode", mode, "--precision", precision, "--dry-run"]
            flags += ["--batch-size", size, "--width", args.width, "--device", device]
            turn, run = our_turn(dataset, flags)
            case = {"mode": mode, "precision": precision, "set_up_seconds": run.set_up_seconds}
            if run.mode != mode:
                case |= {"ran_in": run.mode, "fallback": "; ".join(run.failures)}
            cases.append((row | case, turn, []))
    for turn in range(args.repeats or 7):
        for _, take, seconds in cases[:: 1 if turn % 2 else -1]:
            take(untimed)  # bring clocks and caches to a steady state
            start = time.perf_counter()
            take(steps)
            seconds.append(time.perf_counter() - start)
        yield summarized(cases)


def summarized(cases: list[tuple[dict, Callable, list[float]]]) -> list[dict]:
    """The rows with the results of all turns so far."""
    rows, yardstick = [], {}
    for row, _, seconds in cases:
        plain = yardstick.setdefault((row["model"], row["batch_size"]), seconds)  # the first
        ratios = sorted(a / b for a, b in zip(plain, seconds, strict=True))
        s = median(seconds) / row["steps"]
        rows.append(row | {
            "turns": len(seconds), "ms_per_step": 1e3 * s,
            "images_per_second": row["batch_size"] / s,
            "ratio": median(ratios), "ratio_low": ratios[0], "ratio_high": ratios[-1],
        })  # fmt: skip
    return rows


def markdown(rows: list[dict]) -> str:
    """benchmark_train.md."""
    about = (
        "{device}, torch {torch}, width {width}. Training steps: median of {turns} turns of "
        "{steps} steps; images/s relative to the plain loop: median of the ratios within each turn "
        "(lowest - highest).\n\n"
    )
    head = ["model", "batch", "mode", "precision", "ms/step", "images/s"]
    lines, notes = [[*head, "relative to the plain loop"]], ""
    for row in rows:
        mode, name = row["mode"], f"`{row['model']}`"
        if "fallback" in row:
            notes += f"\n{name}, {mode} could not be used: {row['fallback']}\n"
            mode += f" (ran in {row['ran_in']})"
        speed = f"{row['ms_per_step']:#.3g}", f"{row['images_per_second']:,.0f}"
        ratio = "{ratio:.2f} ({ratio_low:.2f} - {ratio_high:.2f})".format(**row)
        lines.append([name, row["batch_size"], mode, row["precision"], *speed, ratio])
    return about.format(**rows[0]) + table(lines) + notes
