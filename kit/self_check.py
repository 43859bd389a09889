"""Do all modes do the same training step? Each mode and precision against eager fp32.

    python train.py --self-check                  # all models, a minute each on a CPU
    python train.py --self-check --model se
    python train.py --self-check --model se --mode compile --precision fp32   # one of them alone

One line for each, with the largest relative error found in the loss, in any gradient, in the
BatchNorm buffers, in Adam's state and in the size of the update. Exit code 1 if one is beyond
TOLERANCE, or if a mode fails that the device should be able to run; those that need a GPU are
skipped, visibly, without one.
"""

import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from kit.augment import Augmentation
from models import build_model
from kit.modes import MODES, PRECISIONS, set_up_torch, why_not
from kit.training_step import Average, adam, halves, make_step

# In fp32 every tensor is judged by itself. In TF32 and bf16 rounding alone makes gradients that are
# sums of cancelling terms wrong by their own size, so all tensors of a kind are judged together.
# Seen on a CPU: 1e-3 in fp32; 4e-3 in bf16, but 0.2 for cbam_classifier, where the maximum over the
# channels of a 1x1 map picks another one now and then. A real fault is an error of about 1.
TOLERANCE = {"fp32": 5e-3, "tf32": 1e-1, "bf16": 3e-1}
BATCH_SIZE = 64
VARIANTS = [(mode, precision) for precision in PRECISIONS for mode in MODES]
VARIANTS.remove(("eager", "fp32"))  # with which the others are compared
EVERYTHING = Augmentation(crop=2, flip=True, randaugment=1, erase=0.25, cutmix=1.0, mixup=0.2)


def self_check(
    names: list[str], device: torch.device, width: int, mode: str = "auto", precision: str = "auto"
) -> bool:
    """Prints a line for each model, mode and precision; True if all errors are within tolerance.

    mode, precision: this one alone; auto: every one.
    """
    variants = [v for v in VARIANTS if mode in ("auto", v[0]) and precision in ("auto", v[1])]
    good = True
    models = [(name, False) for name in names]
    if "baseline" in names:
        models.append(("baseline", True))  # once more, with all that a recipe may add to a step
    for name, everything in models:
        expected = three_steps(name, "eager", "fp32", device, width, everything)
        for mode, precision in variants:
            label = f"{name:18s} {'+ all' if everything else '     '} {mode:14s} {precision:5s}"
            if impossible := why_not(mode, precision, device):
                print(f"{label} skipped: {impossible}")
                continue
            start = time.perf_counter()
            try:
                found = three_steps(name, mode, precision, device, width, everything)
            except ModeFailed as error:
                print(f"{label} FAILED  {error}", flush=True)
                good = False
                continue
            judge = largest_error if precision == "fp32" else joint_error
            worst = {what: judge(found[what], expected[what]) for what in expected}
            beyond = [
                f"{what} of {where}"
                for what, (error, where) in worst.items()
                if not error <= TOLERANCE[precision]  # so that nan is beyond, too
            ]
            good = good and not beyond
            print(
                f"{label} {'FAILED' if beyond else 'ok    '} "
                + " ".join(f" {what} {error:.1e}" for what, (error, _) in worst.items())
                + f"  ({time.perf_counter() - start:.0f} s)"
                + (f"  beyond {TOLERANCE[precision]:g}: {', '.join(beyond)}" if beyond else ""),
                flush=True,
            )
    return good


class ModeFailed(RuntimeError):
    """A mode that this device should be able to run fails, for lack of a compiler for example."""


def three_steps(
    name: str, mode: str, precision: str, device: torch.device, width: int, everything: bool
) -> dict[str, dict[str, torch.Tensor]]:
    """{what: {whose: value}} after two steps without a learning rate and one with it.

    Two batches, for a graph may have one baked in; learning rate 0, then 1e-3, for the same reason.
    What the warm-up of a mode may have left behind shows in the buffers and in Adam's state.
    everything: with augmentation, mixed and smoothed labels, weight decay and the weights' average.
    """
    set_up_torch(precision)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (2 * BATCH_SIZE,), generator=generator)
    shapes = F.interpolate(torch.rand(10, 1, 7, 7, generator=generator), 28, mode="bilinear")
    noise = torch.rand(2 * BATCH_SIZE, 1, 28, 28, generator=generator)
    images = (200 * shapes[labels] + 55 * noise).byte()  # a shape a class: gradients have a sense
    model = build_model(name, width=width, seed=0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Shifted, so that few values lie where a rounding error switches a ReLU. And not 0, as
            # CBAM's start: that would hide the gradients behind it.
            nn.init.uniform_(module.weight, 0.25, 0.5, generator=generator)
            nn.init.constant_(module.bias, 1.0)
    for parameter in model.parameters():
        if not parameter.any():  # likewise the last layer of GC
            nn.init.normal_(parameter, std=0.1, generator=generator)
    model = model.to(device, memory_format=torch.channels_last)
    augmentation = EVERYTHING if everything else Augmentation()
    average = Average(model, decay=0.5) if everything else None
    optimizer = adam(model, lr=1e-3, weight_decay=0.1 if everything else None)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: min(epoch, 1))
    step, used, failures = make_step(
        model, optimizer, images.to(device), labels.to(device), mode, precision, BATCH_SIZE,
        halves(device), augmentation, 0.1 if everything else 0.0, average,
    )  # fmt: skip
    if used != mode:
        raise ModeFailed("; ".join(failures))

    start = [parameter.detach().clone() for parameter in model.parameters()]
    batches = torch.arange(2 * BATCH_SIZE, device=device).split(BATCH_SIZE)
    draws = augmentation.draw(2 * BATCH_SIZE, seed=0, epoch=1).to(device).split(BATCH_SIZE)
    losses = [step(*batch)[0].clone() for batch in zip(batches, draws, strict=True)]
    found = {
        "loss": {f"batch {i + 1}": loss for i, loss in enumerate(losses)},
        "gradient": {key: parameter.grad.clone() for key, parameter in model.named_parameters()},
        "BatchNorm": {key: buffer.clone() for key, buffer in model.named_buffers()},
    }
    for part in ("exp_avg", "exp_avg_sq", "step"):
        found[part] = {
            key: optimizer.state[parameter][part].clone()
            for key, parameter in model.named_parameters()
        }
    if average:
        found["average"] = {key: v.clone() for key, v in average.model.named_buffers()}
    unmoved = all(map(torch.equal, start, model.parameters()))
    scheduler.step()
    step(batches[0], draws[0])
    moved_by = sum(
        (after - before).square().sum()
        for before, after in zip(start, model.parameters(), strict=True)
    ).sqrt()
    # nan, which is within no tolerance, if something moved while the learning rate was 0.
    found["update"] = {"all": moved_by.detach() if unmoved else torch.tensor(float("nan"))}
    return found


def largest_error(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> tuple[float, str]:
    """(the largest relative error, whose it is): |found - expected| / |expected| of each tensor.

    The divisor is at least what a tensor of that size typically has: of some gradients, such as
    that of a bias before another BatchNorm, nothing remains but rounding.
    """
    typical = {}
    for matrix in (False, True):  # biases and BatchNorm are of another size than weights
        values = [t.double().flatten() for t in expected.values() if (t.dim() > 1) == matrix]
        typical[matrix] = torch.cat(values).square().mean().sqrt() if values else 0.0
    errors = []
    for key, value in expected.items():
        scale = max(value.double().norm(), typical[value.dim() > 1] * value.numel() ** 0.5)
        error = (found[key].to(value.device).double() - value.double()).norm() / scale
        errors.append((error.item(), key))
    return max(errors, key=lambda item: (item[0] != item[0], item[0]))  # nan above all


def joint_error(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> tuple[float, str]:
    """(the relative error of all tensors together, "all")."""
    a, b = (
        torch.cat([tensors[key].cpu().double().flatten() for key in expected])
        for tensors in (found, expected)
    )
    return ((a - b).norm() / b.norm()).item(), "all"
