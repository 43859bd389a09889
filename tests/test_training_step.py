"""The modes of a training step: the same step, the same state, whatever fails."""

import copy
import json
import math
import os

import pytest
import torch
from conftest import REPO, is_one_line, script, train_small

from kit import modes
from kit import self_check
import train
from kit import training_step
from models import build_model

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def small_step(mode="eager", steps_before=0):
    """(model, optimizer, step) of a narrow CBAM model on 40 random images, batches of 16."""
    torch.manual_seed(1)
    model = build_model("cbam_blocks", width=8, seed=0).to(memory_format=torch.channels_last)
    optimizer = training_step.adam(model, 1e-3)
    images = torch.randint(0, 256, (40, 1, 28, 28)).byte()
    labels = torch.randint(0, 10, (40,))
    what = (model, optimizer, images, labels)
    halves, no_rows = training_step.halves(CPU), torch.empty(16, 0)
    eager, *_ = training_step.make_step(*what, "eager", "fp32", 16, halves)
    model.train()
    for _ in range(steps_before):
        eager(torch.arange(16), no_rows)
    step, used, failures = training_step.make_step(*what, mode, "fp32", 16, halves)
    return model, optimizer, lambda idx: step(idx, no_rows), used, failures


def state_of(model, optimizer):
    return copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])


def assert_same_state(found, expected):
    (weights, state), (expected_weights, expected_state) = found, expected
    assert all(torch.equal(weights[key], value) for key, value in expected_weights.items())
    assert all(
        torch.equal(state[i][key], value)
        for i, values in expected_state.items()
        for key, value in values.items()
    )


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_snapshot_undoes_steps_bit_for_bit(steps_before):
    model, optimizer, step, *_ = small_step(steps_before=steps_before)
    before, rng = state_of(model, optimizer), torch.get_rng_state()
    restore = training_step.snapshot(model, optimizer)
    addresses = [tensor.data_ptr() for tensor in model.state_dict().values()]
    step(torch.arange(16))
    first = state_of(model, optimizer)
    step(torch.arange(24, 40))
    torch.rand(3)
    assert not torch.equal(model.conv1.weight, before[0]["conv1.weight"])

    restore()
    assert_same_state(state_of(model, optimizer), before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [tensor.data_ptr() for tensor in model.state_dict().values()] == addresses
    assert all(
        (value == 0).all()
        for values in optimizer.state.values()
        for value in values.values()
        if steps_before == 0
    )
    step(torch.arange(16))  # and it goes on as if nothing had been
    assert_same_state(state_of(model, optimizer), first)


def test_adam_is_adam():
    """Algorithm 1 of Kingma and Ba (arXiv 1412.6980), in float64."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(7, 5)
    weight, m, v = layer.weight.detach().double(), 0.0, 0.0
    optimizer = training_step.adam(layer, 1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    for t in range(1, 5):
        optimizer.zero_grad()
        layer(torch.rand(3, 7)).square().sum().backward()
        gradient = layer.weight.grad.double()
        optimizer.step()
        scheduler.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        lr = 1e-3 * (1 + math.cos(math.pi * (t - 1) / 4)) / 2
        weight -= lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        assert torch.allclose(layer.weight.double(), weight, rtol=1e-6, atol=1e-8)


def test_auto_takes_what_pays():
    assert training_step.choose_mode("auto", CPU, steps=30) == "eager"
    assert training_step.choose_mode("auto", CPU, steps=50 * 843) == "compile"
    cuda = torch.device("cuda")
    assert training_step.choose_mode("auto", cuda, steps=30) == "graph"
    assert training_step.choose_mode("auto", cuda, steps=50 * 843) == "compile+graph"
    assert training_step.choose_mode("eager", cuda, steps=50 * 843) == "eager"
    assert training_step.choose_precision("auto", CPU) == "fp32"
    assert training_step.choose_precision("bf16", CPU) == "bf16"


@pytest.mark.parametrize(
    "flags", [["--mode", "graph"], ["--mode", "compile+graph"], ["--precision", "tf32"]]
)
def test_what_a_cpu_cannot_do_is_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--model", "se", "--device", "cpu", *flags])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and is_one_line(error) and "needs a CUDA GPU" in error


def test_more_than_eight_functions_of_one_piece_of_code_are_all_compiled():
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    def times(factor):
        return modes.compiled(lambda x: x * factor, backend=backend)

    functions = [times(factor) for factor in range(12)]
    assert [f(torch.ones(1)).item() for f in functions] == list(range(12))
    assert len(compilations) == 12


# --- The self-check -------------------------------------------------------------------------------


def test_the_self_check_passes_and_names_what_it_skips(monkeypatch, capsys):
    if not torch.cuda.is_available():  # what compiles is for the slow test below
        compiling = {("compile", "fp32"), ("compile", "bf16")}
        monkeypatch.setattr(self_check, "VARIANTS", set(self_check.VARIANTS) - compiling)
    code = train.main(["--self-check", "--model", "baseline", "--width", "8"])
    lines = capsys.readouterr().out.splitlines()
    # once as published, once with all that a recipe may add
    assert code == 0 and len(lines) == 2 * len(self_check.VARIANTS)
    assert sum(" + all " in line for line in lines) == len(self_check.VARIANTS)
    if not torch.cuda.is_available():
        assert sum(" ok " in line for line in lines) == 2
        assert sum("skipped: " in line and "needs a CUDA GPU" in line for line in lines) == 16


@pytest.mark.slow
def test_the_self_check_passes_for_every_model(capsys):
    assert train.main(["--self-check", "--width", "8"]) == 0
    assert "FAILED" not in capsys.readouterr().out


def wrong_gradient(forward):
    def wrong(idx, rows):
        loss, hits = forward(idx, rows)
        return loss + 0.02 * (loss - loss.detach()), hits  # the same loss, gradients 2 % too large

    return wrong


def batch_baked_in(forward):
    return lambda idx, rows: forward(torch.arange(len(idx)), rows)


def fails_to_compile(forward):
    def failing(idx, rows):
        forward(idx, rows)[0].backward()  # BatchNorm's buffers and gradients are touched already
        raise NotImplementedError("no such compiler\nand a long trace")

    return failing


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (wrong_gradient, "beyond 0.005: gradient of"),
        (batch_baked_in, "loss of batch 2"),
        (fails_to_compile, "mode compile failed (NotImplementedError: no such compiler)"),
    ],
)
def test_the_self_check_finds_a_wrong_step(fault, named, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda forward, **options: fault(forward))
    monkeypatch.setattr(self_check, "VARIANTS", [("compile", "fp32")])
    flags = ["--self-check", "--model", "se", "--width", "8"]
    assert train.main([*flags, "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out and named in out


def test_the_self_check_finds_what_a_warm_up_left_behind(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)
    monkeypatch.setattr(self_check, "VARIANTS", [("compile", "fp32")])
    flags = ["--self-check", "--model", "se", "--width", "8"]
    assert train.main([*flags, "--device", "cpu"]) == 0
    monkeypatch.setattr(training_step, "snapshot", lambda *_: lambda: None)
    assert train.main([*flags, "--device", "cpu"]) == 1
    assert "step of" in capsys.readouterr().out


# --- Falling back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_failed_mode_leaves_no_trace(steps_before, monkeypatch):
    expected_model, expected_optimizer, *_ = small_step(steps_before=steps_before)
    monkeypatch.setattr(torch, "compile", lambda forward, **options: fails_to_compile(forward))
    model, optimizer, _step, used, failures = small_step("compile", steps_before)
    assert used == "eager" and len(failures) == 1 and "\n" not in failures[0]
    assert_same_state(state_of(model, optimizer), state_of(expected_model, expected_optimizer))


@pytest.mark.slow
def test_without_a_compiler_it_trains_eagerly_and_says_so(tmp_path):
    flags = ["--width", "8", "--limit-train", "160", "--limit-test", "100", "--epochs", "1"]
    flags += ["--device", "cpu", "--mode", "compile", "--runs", tmp_path / "runs"]
    environment = os.environ | {
        "CXX": "/bin/false",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    done = script("train.py", "--model", "baseline", *flags, env=environment)
    assert done.returncode == 0 and is_one_line(done.stderr)
    assert "mode compile failed" in done.stderr and "going on in mode eager" in done.stderr
    folder = tmp_path / "runs/fashion_mnist/published/baseline/seed0"
    result = json.loads((folder / "result.json").read_text())
    assert result["mode"] == "eager" and "mode compile failed" in result["fallback"]


def test_a_run_is_not_resumed_in_another_mode(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)
    flags = ["--epochs", "2", "--mode"]
    assert train_small("baseline", tmp_path, *flags, "compile") == 0
    folder = tmp_path / "fashion_mnist/published/baseline/seed0"
    (folder / "result.json").unlink()
    assert train_small("baseline", tmp_path, *flags, "eager") == 1
    error = capsys.readouterr().err
    assert is_one_line(error) and "mode = compile" in error
    assert train_small("baseline", tmp_path, *flags, "compile") == 0
    assert train_small("baseline", tmp_path, *flags, "auto") == 0  # complete, however it was run


def test_a_run_of_less_than_a_batch_is_eager(tmp_path):
    flags = ["--epochs", "1", "--batch-size", "200", "--mode", "compile"]
    assert train_small("baseline", tmp_path, *flags) == 0
    folder = tmp_path / "fashion_mnist/published/baseline/seed0"
    assert json.loads((folder / "result.json").read_text())["mode"] == "eager"


def test_compiled_training_is_repeatable_and_near_eager_training(tmp_path):
    losses = {}
    for name, mode in (("a", "compile"), ("b", "compile"), ("eager", "eager")):
        flags = ["--epochs", "2", "--mode", mode]
        assert train_small("baseline", tmp_path / name, *flags) == 0
        folder = tmp_path / name / "fashion_mnist/published/baseline/seed0"
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [row["train_loss"] for row in rows]
        result = json.loads((folder / "result.json").read_text())
        assert result["mode"] == mode and result["fallback"] is None
        assert result["overrides"].keys() == {"epochs", "limit_train", "limit_test", "width"}
    assert losses["a"] == losses["b"]
    assert losses["a"] == pytest.approx(losses["eager"], rel=1e-3)


# --- On a GPU -------------------------------------------------------------------------------------


@needs_gpu
def test_every_mode_of_the_gpu_is_the_same_step(capsys):
    assert train.main(["--self-check", "--model", "cbam_blocks"]) == 0
    assert "skipped" not in capsys.readouterr().out


@needs_gpu
def test_a_graphed_run_stopped_and_taken_up_again_ends_the_same(tmp_path):
    flags = ["--model", "se", "--limit-train", "1000", "--limit-test", "100", "--mode", "graph"]
    place = ["--keep-last", "--data-dir", REPO / "data", "--runs"]
    flags = [*map(str, [*flags, *place])]
    assert train.main([*flags, str(tmp_path / "whole"), "--epochs", "3", "--patience", "50"]) == 0
    whole = tmp_path / "whole/fashion_mnist/published/se/seed0"
    parts = tmp_path / "parts/fashion_mnist/published/se/seed0"
    raised = pytest.MonkeyPatch()
    with raised.context() as patch:
        patch.setattr(train, "log_epoch", lambda *_: (_ for _ in ()).throw(OSError("stop")))
        assert train.main([*flags, str(tmp_path / "parts"), "--epochs", "3", "--patience", "50"])
    assert train.main([*flags, str(tmp_path / "parts"), "--epochs", "3", "--patience", "50"]) == 0
    ends = [torch.load(path / "last.pt", weights_only=True)["model"] for path in (whole, parts)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@needs_gpu
def test_a_graph_trains_as_eager_mode_does(tmp_path):
    """The same kernels, so the same figures; 1,000 images leave a partial batch, run eagerly."""
    flags = ["--model", "se", "--limit-train", "1000", "--limit-test", "100", "--epochs", "2"]
    losses = []
    for mode in ("eager", "graph"):
        place = ["--data-dir", str(REPO / "data"), "--runs", str(tmp_path / mode), "--mode", mode]
        assert train.main([*flags, *place]) == 0
        rows = tmp_path / mode / "fashion_mnist/published/se/seed0/metrics.jsonl"
        losses.append([json.loads(row)["train_loss"] for row in rows.read_text().splitlines()])
    assert losses[0] == losses[1]
