"""Is the fast training step the same step? train.py's own, in every mode, against eager float32.

    ./run_all.sh test tests/test_fast.py                    # what takes seconds
    ./run_all.sh test -m '' tests/test_fast.py              # every model, mode and precision
    ./run_all.sh test -m '' tests/test_fast.py -k cbam_blocks-compile-fp32

Each prints a line with the largest relative error found in the loss, in any gradient, in
BatchNorm's buffers, in Adam's state, in the EMA and in the size of the update. Modes that need a
GPU are skipped without one; with one, nothing is slow.
"""

import data
import train
from kit.fast import MODES, PRECISIONS, why_not
from kit.run import Run
from models import MODELS

import pytest
import torch
import torch.nn as nn
from conftest import REPO, settings_of

# In fp32 every tensor is judged by itself. In TF32 and bf16 rounding alone makes gradients that are
# sums of cancelling terms wrong by their own size, so all tensors of a kind are judged together.
# Seen on a CPU: 1e-3 in fp32; 4e-3 in bf16, but 0.2 for cbam_classifier, where the maximum over the
# channels of a 1x1 map picks another one now and then. A real fault is an error of about 1.
TOLERANCE = {"fp32": 5e-3, "tf32": 1e-1, "bf16": 3e-1}
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ALL = ["--crop", "2", "--flip", "--randaugment", "1", "--erase", "0.25", "--cutmix", "1"]
ALL += ["--label-smoothing", "0.1", "--weight-decay", "0.1", "--ema", "0.5"]


def shift(model):
    """Other weights where those at the start would hide a fault."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Shifted, so that few values lie where a rounding error switches a ReLU. And not 0, as
            # CBAM's start: that would hide the gradients behind it.
            weight = torch.rand(module.weight.shape, generator=generator) / 4 + 0.25
            module.weight.data.copy_(weight)
            nn.init.constant_(module.bias, 1.0)
    for parameter in model.parameters():
        if not parameter.any():  # likewise the last layer of GC
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 10)


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def three_steps(step, model, optimizer, loader, ema):
    """{what: {whose: value}} after two steps without a learning rate and one with it.

    Two batches, for a graph may have one baked in; learning rate 0, then 1e-3, for the same reason.
    What the warm-up of a mode may have left behind shows in the buffers and in Adam's state.
    """
    start = [parameter.detach().clone() for parameter in model.parameters()]
    batches = loader.epoch(1)
    losses = [step(*batch)[0].clone() for batch in batches]
    named = dict(model.named_parameters())
    found = {
        "loss": {f"batch {i + 1}": loss for i, loss in enumerate(losses)},
        "gradient": {key: parameter.grad.clone() for key, parameter in named.items()},
        "BatchNorm": {key: buffer.clone() for key, buffer in model.named_buffers()},
    }
    for part in ("exp_avg", "exp_avg_sq", "step"):
        found[part] = {key: optimizer.state[p][part].clone() for key, p in named.items()}
    if ema:
        found["EMA"] = {key: buffer.clone() for key, buffer in ema.model.named_buffers()}
    unmoved = all(map(torch.equal, start, model.parameters()))
    set_lr(optimizer, 1e-3)
    step(*batches[0])
    changes = [after - before for before, after in zip(start, model.parameters())]
    moved_by = sum(change.square().sum() for change in changes).sqrt().detach()
    # nan, which is within no tolerance, if something moved while the learning rate was 0.
    found["update"] = {"all": moved_by if unmoved else moved_by * float("nan")}
    return found


def steps_of(model, mode, precision, runs, *flags):
    """What three steps of train.py change; the mode that they ran in; why in no faster one."""
    argv = ["--model", model, "--mode", mode, "--precision", precision, "--device", DEVICE, *flags]
    argv += ["--width", "8", "--limit-train", "128", "--limit-test", "64", "--runs", str(runs)]
    argv += ["--data-dir", str(REPO / "data"), "--overwrite"]
    settings = settings_of(*argv)
    dataset = data.load_dataset(settings.dataset, settings.data_dir)
    loader, model, optimizer, scheduler, ema, forward, step = train.prepare(settings, dataset)
    shift(model)
    set_lr(optimizer, 0.0)
    with Run(settings, dataset.digest) as run:
        run.restore(loader, model, optimizer, scheduler, ema)
        step = run.speed_up(step, forward)
    return three_steps(step, model, optimizer, loader, ema), run.mode, run.failures


def largest_error(found, expected):
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
        error = (found[key].double() - value.double()).norm() / scale
        errors.append((error.item(), key))
    return max(errors, key=lambda item: (item[0] != item[0], item[0]))  # nan above all


def joint_error(found, expected):
    """(the relative error of all tensors together, "all")."""
    a, b = (torch.cat([t[key].double().flatten() for key in expected]) for t in (found, expected))
    return ((a - b).norm() / b.norm()).item(), "all"


def errors_of(model, mode, precision, tmp_path, *flags):
    """{what: (error, whose)} of a mode that has to run."""
    expected, *_ = steps_of(model, "eager", "fp32", tmp_path, *flags)
    found, used, failures = steps_of(model, mode, precision, tmp_path, *flags)
    assert used == mode, failures
    judge = largest_error if precision == "fp32" else joint_error
    return {what: judge(found[what], expected[what]) for what in expected}


def beyond(errors, precision):
    return [f"{what} of {whose}" for what, (error, whose) in errors.items()
            if not error <= TOLERANCE[precision]]  # fmt: skip


def cases():
    for model in [*MODELS, "everything"]:  # the baseline with all that a recipe may add to a step
        for precision in PRECISIONS:
            for mode in MODES:
                quick = mode == "eager" and model in ("baseline", "cbam_blocks", "everything")
                marks = [] if CUDA or quick else [pytest.mark.slow]
                if impossible := why_not(mode, precision, torch.device(DEVICE)):
                    marks.append(pytest.mark.skip(reason=impossible))
                if (mode, precision) != ("eager", "fp32"):
                    name = f"{model}-{mode}-{precision}"
                    yield pytest.param(model, mode, precision, marks=marks, id=name)


@pytest.mark.parametrize(("model", "mode", "precision"), list(cases()))
def test_every_mode_takes_the_same_step(model, mode, precision, tmp_path, capsys):
    flags = ALL if model == "everything" else []
    errors = errors_of(model.replace("everything", "baseline"), mode, precision, tmp_path, *flags)
    with capsys.disabled():
        words = "  ".join(f"{what} {error:.1e}" for what, (error, _) in errors.items())
        print(f"\n{model:18s} {mode:13s} {precision:4s}  {words}", end=" ")
    assert not beyond(errors, precision)


def wrong_gradient(forward):
    def wrong(*batch):
        loss, correct = forward(*batch)
        return loss + 0.02 * (
            loss - loss.detach()
        ), correct  # the same loss, gradients 2% too large

    return wrong


def baked_in(forward):
    first = []

    def baked(*batch):
        first.append(batch)
        return forward(*first[0])

    return baked


@pytest.mark.parametrize(
    ("fault", "named"), [(wrong_gradient, "gradient of"), (baked_in, "loss of batch 2")]
)
def test_a_wrong_step_is_found(fault, named, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda forward, **options: fault(forward))
    errors = errors_of("se", "compile", "fp32", tmp_path)
    assert any(words.startswith(named) for words in beyond(errors, "fp32"))


def test_what_a_warm_up_leaves_behind_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)
    assert not beyond(errors_of("se", "compile", "fp32", tmp_path), "fp32")
    monkeypatch.setattr("kit.checkpoint.load_state", lambda *_: None)
    assert "step of" in " ".join(beyond(errors_of("se", "compile", "fp32", tmp_path), "fp32"))
