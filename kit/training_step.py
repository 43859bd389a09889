"""One training step: forward, loss, backward and Adam, in every mode of modes.py.

A step takes its images, by index, from those on the device, and augments and normalises them there.
self_check.py compares the modes.
"""

import copy
import math
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from kit import parallel
from kit.augment import Augmentation
from data import normalize
from kit.modes import Graphed, autocast, compiled, first_line

Moments = tuple[torch.Tensor, torch.Tensor]  # mean and standard deviation, each () or (C, 1, 1)
FALLBACK = {"compile+graph": "graph", "graph": "eager", "compile": "eager"}
# `auto` compiles runs of at least so many steps. On two CPU cores compiling took 50 s and saved
# about 10 ms a step of the baseline, which gains least. The figure for GPUs is a guess so far.
COMPILE_PAYS_FROM = {"cpu": 8_000, "cuda": 20_000}
NO_AUGMENTATION = Augmentation()


def choose_precision(name: str, device: torch.device) -> str:
    """`auto`: bf16 on GPUs that are made for it. Of CPUs only the latest gain by it: ask for it."""
    if name != "auto":
        return name
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if fast else "fp32"


def choose_mode(name: str, device: torch.device, steps: int) -> str:
    """`auto`: the mode in which a run of `steps` steps should take the least time in all."""
    if parallel.WORLD > 1:
        return "eager"  # the only one that several processes share
    if name != "auto":
        return name
    parts = ["compile"] * (steps >= COMPILE_PAYS_FROM[device.type])
    parts += ["graph"] * (device.type == "cuda")
    return "+".join(parts) or "eager"


def halves(device: torch.device) -> Moments:
    """Of the published recipe: pixels from 0 to 1 become values from -1 to 1, whatever the data."""
    return torch.full((), 0.5, device=device), torch.full((), 0.5, device=device)


def logits_of(
    model: nn.Module, images: torch.Tensor, precision: str, moments: Moments
) -> torch.Tensor:
    """uint8 images (N, C, H, W) -> float32 logits (N, num_classes), all on one device."""
    return run(model, normalize(images, *moments), precision)


def run(model: nn.Module, normalized: torch.Tensor, precision: str) -> torch.Tensor:
    with autocast(precision, normalized.device):
        return model(normalized).float()


def adam(model: nn.Module, lr: float, weight_decay: float | None = None) -> torch.optim.Adam:
    """Adam as one kernel; with a weight decay AdamW, which spares biases and BatchNorm.

    On a GPU the learning rate is a tensor, which a scheduler fills in place: a number would be
    baked into a graph.
    """
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    lr = torch.tensor(lr, device=device) if cuda else lr
    if not weight_decay:
        return torch.optim.Adam(model.parameters(), lr, fused=True, capturable=cuda)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr, fused=True, capturable=cuda)


def schedule(optimizer, epochs: int, warmup: int | None = None):
    """Cosine from the optimizer's learning rate to 0; with a warm-up of some epochs, linear."""
    if not warmup:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)

    def factor(epoch):
        if epoch < warmup:
            return (epoch + 1) / (warmup + 1)
        return (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup))) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Average:
    """The exponential moving average of a model: of its weights and BatchNorm's statistics.

    Of the first steps less is kept: 1 - decay, but at least 9 / (10 + steps), is new in each.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False)
        ours, theirs = (m.state_dict().values() for m in (self.model, model))
        pairs = list(zip(ours, theirs, strict=True))
        self.floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self.counts = [pair for pair in pairs if not pair[0].is_floating_point()]
        self.decay = decay
        self.steps = torch.zeros((), device=next(model.parameters()).device)

    @torch.no_grad()
    def update(self) -> None:
        """Takes in what the model is now."""
        new = (9 / (10 + self.steps)).clamp(min=1 - self.decay)
        ours, theirs = map(list, zip(*self.floats, strict=True))
        changes = torch._foreach_sub(theirs, ours)  # on a GPU a few kernels instead of hundreds
        torch._foreach_mul_(changes, new)
        torch._foreach_add_(ours, changes)
        for ours, theirs in self.counts:
            ours.copy_(theirs)
        self.steps += 1

    def tensors(self) -> list[torch.Tensor]:
        return [ours for ours, _ in self.floats + self.counts] + [self.steps]

    def state_dict(self) -> dict:
        return {"model": self.model.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.steps.copy_(state["steps"])


def load_adam(optimizer: torch.optim.Adam, state: dict) -> None:
    """load_state_dict of a state that was loaded on the CPU, perhaps saved on another device."""
    optimizer.load_state_dict(state)
    device = optimizer.param_groups[0]["params"][0].device
    cuda = device.type == "cuda"
    for group in optimizer.param_groups:
        lr = float(group["lr"])
        group |= {"lr": torch.tensor(lr, device=device) if cuda else lr, "capturable": cuda}


def loss_of(
    logits: torch.Tensor,
    own: torch.Tensor,
    others: torch.Tensor,
    share: torch.Tensor | None,
    label_smoothing: float,
    reduction: str = "mean",
) -> torch.Tensor:
    """Cross-entropy with the labels `own`; of mixed images with those of `others`, too."""
    if share is None:
        return F.cross_entropy(logits, own, reduction=reduction, label_smoothing=label_smoothing)
    of_own, of_others = (
        F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
        for labels in (own, others)
    )
    mixed = share * of_own + (1 - share) * of_others
    return mixed.mean() if reduction == "mean" else mixed.sum()


def make_step(
    model: nn.Module,
    optimizer: torch.optim.Adam,
    images: torch.Tensor,
    labels: torch.Tensor,
    mode: str,
    precision: str,
    batch_size: int,
    moments: Moments,
    augmentation: Augmentation = NO_AUGMENTATION,
    label_smoothing: float = 0.0,
    average: Average | None = None,
) -> tuple[Callable, str, list[str]]:
    """(step, the mode it runs in, why it runs in no faster one).

    step(idx, draws) trains on images[idx], idx int64 (n,), draws float32 (n, augmentation.columns),
    both on the device. It returns the mean loss and the number of predictions that are the image's
    own label, on the device and valid until the next call.

    Only batches of `batch_size` take the fast way, for compiled code and graphs are of one shape;
    the last, partial batch of an epoch is run eagerly. Where compiling or capturing fails, the next
    simpler mode is taken. When this returns, everything is compiled and captured, and weights,
    BatchNorm's buffers, Adam's state, the average and the random generators are as they were.
    """

    def batch_of(idx, draws):
        """(normalised images, share of their own label in the loss, None for all of it)."""
        batch = normalize(augmentation.of_pixels(images[idx], draws), *moments)
        return augmentation.of_normalized(batch, draws)

    def forward(idx, draws):
        batch, share = batch_of(idx, draws)
        own = labels[idx]
        logits = run(model, batch, precision)
        loss = loss_of(logits, own, own.roll(1), share, label_smoothing)
        return loss, (logits.argmax(1) == own).sum()

    def step_with(forward):
        def step(idx, draws):
            optimizer.zero_grad()
            loss, hits = forward(idx, draws)
            loss.backward()
            optimizer.step()
            if average:
                average.update()
            return loss.detach(), hits

        return step

    if parallel.WORLD > 1:
        shared = parallel.share(model)

        def forward_of_part(idx, draws):
            batch, share = batch_of(idx, draws)  # all of it, for images are mixed across parts
            own, part = labels[idx], parallel.part_of
            others, share = part(own.roll(1)), None if share is None else part(share)
            logits = run(shared, part(batch), precision)
            # Summed over the processes: the mean over the batch. Gradients will be averaged.
            loss = loss_of(logits, part(own), others, share, label_smoothing, "sum") / len(idx)
            return loss * parallel.WORLD, (logits.argmax(1) == part(own)).sum()

        return step_with(forward_of_part), "eager", []

    eager, failures = step_with(forward), []
    if mode == "eager":
        return eager, mode, failures
    restore = snapshot(model, optimizer, average)
    idx = torch.arange(batch_size, device=images.device) % len(images)
    draws = torch.full((batch_size, augmentation.columns), 0.5, device=images.device)
    model.train()
    while mode != "eager":
        try:
            step = step_with(compiled(forward) if "compile" in mode else forward)
            fast = Graphed(step, idx, draws) if "graph" in mode else step
            fast(idx, draws)  # torch.compile compiles when it is first called
            break
        except Exception as error:  # compilers, drivers and out of memory raise what they like
            failures.append(f"mode {mode} failed ({first_line(error)})")
            mode = FALLBACK[mode]
        finally:
            restore()
    if mode == "eager":
        return eager, mode, failures

    def fast_where_it_fits(idx, draws):
        return (fast if len(idx) == batch_size else eager)(idx, draws)

    return fast_where_it_fits, mode, failures


def snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None = None
) -> Callable[[], None]:
    """A function that puts everything a step changes back to what it is now, in place."""
    tensors = [*model.parameters(), *model.buffers()]
    if average:
        tensors += average.tensors()
    before = [tensor.detach().clone() for tensor in tensors]
    state = {
        parameter: {key: value.clone() for key, value in values.items()}
        for parameter, values in optimizer.state.items()
    }
    cpu_rng = torch.get_rng_state()
    cuda_rng = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    @torch.no_grad()
    def restore():
        if cuda_rng:
            torch.cuda.synchronize()  # the warm-up ran on a stream of its own
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                if parameter in state:
                    value.copy_(state[parameter][key])
                else:  # Adam makes its state in the first step, and all of it starts at zero
                    value.zero_()
        torch.set_rng_state(cpu_rng)
        if cuda_rng:
            torch.cuda.set_rng_state_all(cuda_rng)

    return restore
