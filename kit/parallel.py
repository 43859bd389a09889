"""One run on several GPUs: a process for each, and each batch shared out among them.

    torchrun --nproc-per-node=2 train.py --model se

Every process holds all images and draws the same batches; process r takes the r-th part of each.
The loss is the mean over the whole batch, BatchNorm's statistics are those of the whole batch, and
gradients are summed over the processes (DistributedDataParallel), so that n processes do the steps
that one would do, up to rounding. Only the first process writes and prints. Started without
torchrun, nothing here does anything.
"""

import contextlib
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn as nn

RANK, WORLD, LOCAL_RANK = 0, 1, 0
if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's; other launchers, too, set a WORLD_SIZE
    RANK, WORLD, LOCAL_RANK = (int(os.environ[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


@contextlib.contextmanager
def joined(device: torch.device):
    """Within the block the processes hear of each other; it begins when all are there."""
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        if WORLD > 1:
            dist.destroy_process_group()


def part_of(batch: torch.Tensor) -> torch.Tensor:
    """This process's part of the indices of a batch; parts differ by one in length at most."""
    return batch.tensor_split(WORLD)[RANK]


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """Over all processes."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def over_all(losses: torch.Tensor, correct: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of whole batches from those of their parts: (mean over processes, sum over them).

    The mean, for the losses were multiplied by WORLD (training_step.py), so that the mean that
    DistributedDataParallel takes of the gradients is their sum.
    """
    return summed(losses) / WORLD, summed(correct)


def any_of(flag: bool) -> bool:
    """Whether it is so in any process: all then leave after the same step. All have to ask."""
    if WORLD == 1:
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return bool(summed(torch.tensor(int(flag), device=device)))


def share(model: nn.Module) -> nn.Module:
    """`model` as every process runs it: gradients summed, BatchNorm over the whole batch."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm  # not a new module: Adam has its parameters
    on = [next(model.parameters()).device]
    devices = on if on[0].type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, devices, broadcast_buffers=False)


def of_the_first(value):
    """What the first process has: all then decide alike, whatever the last digits."""
    box = [value]
    if WORLD > 1:
        dist.broadcast_object_list(box)
    return box[0]


def by_the_first(function: Callable, *arguments):
    """What function(*arguments) returns in the first process, which alone calls it.

    What it raises there ends the others, too: without a word, for the first one says why.
    """
    value = failed = None
    try:
        if RANK == 0:
            value = function(*arguments)
    except BaseException:
        failed = True
        raise
    finally:
        value, failed = of_the_first((value, failed))
    if failed:
        sys.exit(1)
    return value


class SumOver(torch.autograd.Function):
    """The sum of a tensor over all processes. Each uses it, so that their gradients add up, too."""

    @staticmethod
    def forward(ctx, x):
        return summed(x.clone())

    @staticmethod
    def backward(ctx, gradient):
        return summed(gradient.clone())


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm with the mean and variance of the whole batch, of all processes.

    As torch.nn.SyncBatchNorm, which refuses to run on a CPU.
    """

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        count = torch.full((1,), x.numel() / x.shape[1], device=x.device)
        wide = x.float()
        sums = torch.cat([wide.sum((0, 2, 3)), count])
        sums = SumOver.apply(sums)
        n = sums[-1]
        mean = sums[:-1] / n
        centred = wide - mean[:, None, None]
        variance = SumOver.apply((centred * centred).sum((0, 2, 3))) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1).clamp(min=1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)
