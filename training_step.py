"""One training step: forward, loss, backward and Adam, in every mode of modes.py.

A step takes its images, by index, from those on the device and normalises them there.
self_check.py compares the modes.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

import parallel
from data import normalize
from modes import Graphed, autocast, compiled, first_line

NORMALIZE = (0.5, 0.5)  # mean and standard deviation taken for all data, pixels in [0, 1]
FALLBACK = {"compile+graph": "graph", "graph": "eager", "compile": "eager"}
# `auto` compiles runs of at least so many steps. On two CPU cores compiling took 50 s and saved
# about 10 ms a step of the baseline, which gains least. The figure for GPUs is a guess so far.
COMPILE_PAYS_FROM = {"cpu": 8_000, "cuda": 20_000}


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


def logits_of(model: nn.Module, images: torch.Tensor, precision: str) -> torch.Tensor:
    """uint8 images (N, C, H, W) -> float32 logits (N, num_classes), all on one device."""
    mean, std = (torch.full((), value, device=images.device) for value in NORMALIZE)
    with autocast(precision, images.device):
        return model(normalize(images, mean, std)).float()


def adam(model: nn.Module, lr: float) -> torch.optim.Adam:
    """Adam as one kernel. On a GPU its learning rate is a tensor, which a scheduler fills in place:
    a number would be baked into a graph."""
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    lr = torch.tensor(lr, device=device) if cuda else lr
    return torch.optim.Adam(model.parameters(), lr, fused=True, capturable=cuda)


def load_adam(optimizer: torch.optim.Adam, state: dict) -> None:
    """load_state_dict of a state that was loaded on the CPU, perhaps saved on another device."""
    optimizer.load_state_dict(state)
    device = optimizer.param_groups[0]["params"][0].device
    cuda = device.type == "cuda"
    for group in optimizer.param_groups:
        lr = float(group["lr"])
        group |= {"lr": torch.tensor(lr, device=device) if cuda else lr, "capturable": cuda}


def make_step(
    model: nn.Module,
    optimizer: torch.optim.Adam,
    images: torch.Tensor,
    labels: torch.Tensor,
    mode: str,
    precision: str,
    batch_size: int,
) -> tuple[Callable, str, list[str]]:
    """(step, the mode it runs in, why it runs in no faster one).

    step(idx) trains on images[idx], idx int64 (n,) on the device, and returns the mean loss and the
    number of correct predictions, on the device and valid until the next call. Only batches of
    `batch_size` take the fast way, for compiled code and graphs are of one shape; the last, partial
    batch of an epoch is run eagerly. Where compiling or capturing fails, the next simpler mode is
    taken. When this returns, everything is compiled and captured, and weights, BatchNorm's buffers,
    Adam's state and the random generators are as they were.
    """

    def forward(idx):
        logits = logits_of(model, images[idx], precision)
        loss = F.cross_entropy(logits, labels[idx])
        return loss, (logits.argmax(1) == labels[idx]).sum()

    def step_with(forward):
        def step(idx):
            optimizer.zero_grad()
            loss, hits = forward(idx)
            loss.backward()
            optimizer.step()
            return loss.detach(), hits

        return step

    if parallel.WORLD > 1:
        shared = parallel.share(model)

        def forward_of_part(idx):
            part = parallel.part_of(idx)
            logits = logits_of(shared, images[part], precision)
            # Summed over the processes: the mean over the batch. Gradients will be averaged.
            loss = F.cross_entropy(logits, labels[part], reduction="sum") / len(idx)
            return loss * parallel.WORLD, (logits.argmax(1) == labels[part]).sum()

        return step_with(forward_of_part), "eager", []

    eager, failures = step_with(forward), []
    if mode == "eager":
        return eager, mode, failures
    restore = snapshot(model, optimizer)
    idx = torch.arange(batch_size, device=images.device) % len(images)
    model.train()
    while mode != "eager":
        try:
            step = step_with(compiled(forward) if "compile" in mode else forward)
            fast = Graphed(step, idx) if "graph" in mode else step
            fast(idx)  # torch.compile compiles when it is first called
            break
        except Exception as error:  # compilers, drivers and out of memory raise what they like
            failures.append(f"mode {mode} failed ({first_line(error)})")
            mode = FALLBACK[mode]
        finally:
            restore()
    if mode == "eager":
        return eager, mode, failures
    return lambda idx: (fast if len(idx) == batch_size else eager)(idx), mode, failures


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """A function that puts everything a step changes back to what it is now, in place."""
    tensors = [*model.parameters(), *model.buffers()]
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
