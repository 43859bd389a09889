"""The modes of a training step: which one is taken, and that a mode that fails leaves no trace.

That each of them is the same step: test_fast.py.
"""

import contextlib
import gc
import json
import os
import time
from copy import deepcopy
from unittest.mock import MagicMock

import benchmark
import data
import explain
import train
from kit import checkpoint, command_line, fast
from kit.ema import EMA
from models import MODELS, build_model

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    REPO,
    HostWatch,
    assert_same,
    is_one_line,
    metrics_of,
    script,
    state_at,
    train_small,
)
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

CPU = torch.device("cpu")
FOLDER = "fashion_mnist/published/baseline/seed0"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def result_of(runs):
    return json.loads((runs / FOLDER / "result.json").read_text())


def losses_of(folder):
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["train_loss"] for row in rows]


# --- Which mode -----------------------------------------------------------------------------------


def test_auto_takes_what_pays():
    cuda = torch.device("cuda")
    assert fast.choose_mode("auto", CPU, steps=30) == "eager"
    assert fast.choose_mode("auto", CPU, steps=50 * 843) == "compile"
    assert fast.choose_mode("auto", cuda, steps=30) == "graph"
    assert fast.choose_mode("auto", cuda, steps=50 * 843) == "compile+graph"
    assert fast.choose_mode("eager", cuda, steps=50 * 843) == "eager"
    assert fast.choose_precision("auto", CPU) == "fp32"
    assert fast.choose_precision("bf16", CPU) == "bf16"


@pytest.mark.parametrize(
    "flags", [["--mode", "graph"], ["--mode", "compile+graph"], ["--precision", "tf32"]]
)
def test_what_a_cpu_cannot_do_is_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--model", "se", "--device", "cpu", *flags])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and is_one_line(error) and "needs a CUDA GPU" in error


def test_a_run_of_less_than_a_batch_is_eager(tmp_path):
    flags = ["--epochs", "1", "--batch-size", "200", "--mode", "compile"]
    assert train_small("baseline", tmp_path, *flags) == 0
    assert result_of(tmp_path)["mode"] == "eager"


def test_a_run_is_not_resumed_in_another_mode(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)
    flags = ["--epochs", "2", "--mode"]
    assert train_small("baseline", tmp_path, *flags, "compile") == 0
    (tmp_path / FOLDER / "result.json").unlink()
    assert train_small("baseline", tmp_path, *flags, "eager") == 1
    error = capsys.readouterr().err
    assert is_one_line(error) and "mode compile instead of" in error
    assert "resume it with --mode compile --precision fp32, use --overwrite" in error
    assert train_small("baseline", tmp_path, *flags, "compile") == 0
    assert train_small("baseline", tmp_path, *flags, "auto") == 0  # complete, in whatever mode
    assert train_small("baseline", tmp_path, *flags, "auto", "--lr", "0.1") == 1
    assert "lr 0.001 instead of 0.1: use --overwrite" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_training_is_repeatable_and_near_eager_training(tmp_path):
    losses = {}
    for name, mode in (("a", "compile"), ("b", "compile"), ("eager", "eager")):
        flags = ["--epochs", "2", "--mode", mode]
        assert train_small("baseline", tmp_path / name, *flags) == 0
        losses[name] = losses_of(tmp_path / name / FOLDER)
        result = result_of(tmp_path / name)
        assert result["mode"] == mode and result["fallback"] is None
        assert result["overrides"].keys() == {"epochs", "limit_train", "limit_test", "width"}
    assert losses["a"] == losses["b"]
    assert losses["a"] == pytest.approx(losses["eager"], rel=1e-3)


def test_default_is_pytorch_as_it_comes():
    flags = """
import torch
def flags():
    b = torch.backends
    deterministic = torch.are_deterministic_algorithms_enabled()
    return deterministic, b.cudnn.benchmark, b.cudnn.allow_tf32, b.cuda.matmul.allow_tf32
"""
    change = "from kit.fast import set_up_torch\nset_up_torch('fp32')\nset_up_torch('default')\n"
    fresh, set_up = (script("-c", flags + each + "print(flags())") for each in ("", change))
    assert fresh.stdout == set_up.stdout == "(False, False, True, False)\n"
    for precision, tf32 in {"fp32": False, "tf32": True, "bf16": False}.items():
        fast.set_up_torch(precision)
        b = torch.backends
        assert torch.are_deterministic_algorithms_enabled() and not b.cudnn.benchmark
        assert (b.cudnn.allow_tf32, b.cuda.matmul.allow_tf32) == (tf32, tf32)


def test_more_than_eight_functions_of_one_piece_of_code_are_all_compiled():
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    def times(factor):
        return fast.compiled(lambda x: x * factor, CPU, backend=backend)

    functions = [times(factor) for factor in range(12)]
    assert [f(torch.ones(1)).item() for f in functions] == list(range(12))
    assert len(compilations) == 12


@pytest.mark.slow
def test_compiled_code_is_found_again_for_its_own_number_of_threads_alone(monkeypatch):
    """PyTorch 2.11 by itself would run with two threads what it had compiled for one."""
    n_threads, counters = torch.get_num_threads(), torch._dynamo.utils.counters
    monkeypatch.setattr(torch._inductor.config.cpp, "threads", -1)  # afterwards as it was
    never_seen, hits = time.time_ns(), []
    for threads in (1, 2, 1):
        torch._dynamo.reset()
        torch.set_num_threads(threads)
        counters.clear()
        fast.compiled(lambda x: x + never_seen, CPU)(torch.ones(300, 300))
        hits.append(counters["inductor"]["fxgraph_cache_hit"])
    torch.set_num_threads(n_threads)
    assert hits == [0, 0, 1]


# --- Falling back ---------------------------------------------------------------------------------


class Small:
    """A narrow CBAM model on 40 random images, as train.py would set it up, and its step."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(40, 1, 28, 28, generator=generator)
        self.labels = torch.randint(0, 10, (40,), generator=generator)
        self.model = build_model("cbam_blocks", width=8, seed=0)
        fast.channels_last(self.model).train()
        self.optimizer, self.ema = train.adam(self.model, 1e-3), EMA(self.model, 0.9)
        self.parts = dict(model=self.model, optimizer=self.optimizer, ema=self.ema)

    def forward(self, idx):
        logits = self.model(self.images[idx])
        return F.cross_entropy(logits, self.labels[idx]), (logits.argmax(1) == self.labels[idx])

    def step(self, idx, forward=None):
        self.optimizer.zero_grad()
        loss, correct = (forward or self.forward)(idx)
        loss.backward()
        self.optimizer.step()
        self.ema.update()
        return loss.detach(), correct

    @property
    def state(self):
        return deepcopy(checkpoint.get_state(self.parts, CPU))

    def fast(self, mode, precision="fp32"):
        """What Run.speed_up does."""
        before = self.state
        return fast.fast(
            self.step, self.forward, mode, precision, (torch.arange(16),), self.model,
            lambda: checkpoint.load_state(before, self.parts, CPU),
        )  # fmt: skip


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("fails", [True, False])
def test_neither_a_failed_mode_nor_a_warm_up_leaves_a_trace(steps_before, fails, monkeypatch):
    def compile_or_fail(forward, **options):
        def failing(idx):
            forward(idx)[0].backward()  # BatchNorm's buffers and gradients are changed by now
            torch.rand(3)
            raise NotImplementedError("no such compiler\nand a long trace")

        return failing if fails else forward

    monkeypatch.setattr(torch, "compile", compile_or_fail)
    batches = torch.arange(16), torch.arange(16, 32), torch.arange(32, 40)
    expected, small = Small(), Small()
    for each in (expected, small):
        for _ in range(steps_before):
            each.step(torch.arange(8, 24))
    before, addresses = small.state, [v.data_ptr() for v in small.model.state_dict().values()]
    step, mode, failures, _ = small.fast("compile")
    assert mode == ("eager" if fails else "compile") and len(failures) == fails
    assert all("NotImplementedError: no such" in f and "\n" not in f for f in failures)
    found = small.state
    if not steps_before:  # Adam makes its state in its first step: all of it is 0 until then
        assert all((v == 0).all() for s in small.optimizer.state.values() for v in s.values())
        found["optimizer"]["state"] = {}
    assert_same(found, before)
    assert [v.data_ptr() for v in small.model.state_dict().values()] == addresses
    for batch in batches:  # the last one is partial
        assert_same(step(batch), expected.step(batch))
    assert_same(small.state | {"rng": None}, expected.state | {"rng": None})


def test_a_convolution_with_one_output_channel_keeps_its_layout():
    """On an H100 its gradient came in another one than torch 2.11 had compiled for."""
    model = fast.channels_last(build_model("cbam_classifier", width=16))
    weights = {name: p for name, p in model.named_parameters() if p.dim() == 4}
    one = weights.pop("attention.spatial.conv.weight")
    assert one.is_contiguous() and one.stride() == (98, 49, 7, 1)
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights.values())


@pytest.mark.parametrize("factor", [0.0, 2.0, float("nan"), float("inf")])
def test_a_mode_with_other_gradients_is_not_used(factor, monkeypatch):
    """As torch 2.11 gave for CBAM in bf16, on an H100: the right loss, and gradients of NaN."""

    def compile_wrongly(forward, **options):
        def wrong(idx):
            loss, correct = forward(idx)
            return loss.detach() + factor * (loss - loss.detach()), correct

        return wrong

    monkeypatch.setattr(torch, "compile", compile_wrongly)
    small = Small()
    before = small.state
    step, mode, (failure,), _ = small.fast("compile")
    assert mode == "eager" and "other gradients than in eager mode" in failure
    assert_same(small.state["model"], before["model"])
    assert_same(step(torch.arange(16)), Small().step(torch.arange(16)))


def compiles_with(fault, patch, parameters):
    """torch.compile that does nothing but turn these gradients into fault(gradient)."""

    def compile_wrongly(forward, **options):
        for parameter in parameters:
            parameter.register_hook(fault)
        return forward

    patch.setattr(torch, "compile", compile_wrongly)


@pytest.mark.parametrize("fault", [lambda g: g / 2, torch.zeros_like], ids=["halved", "zeroed"])
@pytest.mark.parametrize("name", ["fc.bias", "layer1.0.conv1.weight", "layer3.0.bn1.bias",
                                  "layer2.1.attention.channel.mlp.0.weight",
                                  "layer4.0.attention.spatial.conv.weight"])  # fmt: skip
def test_one_wrong_gradient_is_found(name, fault, monkeypatch):
    """The last is exactly 0 at the start. Gradients that are not finite hide no other."""
    for not_finite in (False, True):
        small = Small()
        if not_finite:
            small.model.conv1.weight.register_hook(lambda g: g * float("nan"))
        compiles_with(fault, monkeypatch, [small.model.get_parameter(name)])
        before = small.state
        _, mode, (failure,), _ = small.fast("compile")
        assert mode == "eager" and "other gradients than in eager mode" in failure
        assert_same(small.state["model"], before["model"])


def test_in_bf16_gradients_are_judged_together(monkeypatch):
    for fault, mode in ((lambda g: 0.7 * g, "compile"), (lambda g: 0.5 * g, "eager")):
        small = Small()
        compiles_with(fault, monkeypatch, list(small.model.parameters()))
        assert small.fast("compile", "bf16")[1] == mode


def test_a_loss_that_is_nan_anyway_is_not_the_modes_fault(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)
    small = Small()
    small.images *= float("nan")
    assert small.fast("compile")[1:] == ("compile", [], 0.0)


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
    assert "mode compile failed" in done.stderr and "training in mode eager" in done.stderr
    result = result_of(tmp_path / "runs")
    assert result["mode"] == "eager" and "mode compile failed" in result["fallback"]


class Capture:
    """In place of torch.cuda.graph: fails as a driver does, unless it has no words."""

    words, garbage = "", []

    def __init__(self, graph, stream):
        pass

    def __enter__(self):
        self.garbage.append(gc.isenabled())

    def __exit__(self, *_):
        if self.words:
            raise RuntimeError(self.words)


@pytest.fixture
def captures(monkeypatch):
    for name in ("CUDAGraph", "Stream", "current_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)
    monkeypatch.setattr(Capture, "garbage", [])


def test_no_garbage_is_collected_during_a_capture(captures, monkeypatch):
    collected = []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(list(Capture.garbage)))
    fast.Graphed(lambda x: 2 * x, torch.ones(2))
    assert (collected, Capture.garbage, gc.isenabled()) == ([[]], [False], True)


def test_what_the_cpu_s_generator_decides_is_not_fixed_by_a_graph(captures, monkeypatch):
    """Stochastic depth often asks it, on a GPU too. A compiled step asks it each time."""
    small, forward = Small(), Small.forward
    monkeypatch.setattr(Small, "forward", lambda self, idx: [torch.rand(()), forward(self, idx)][1])
    _, mode, (failure,), _ = small.fast("graph")
    assert mode == "eager" and "a generator on the CPU" in failure and "only once" in failure
    assert small.fast("compile")[1:3] == ("compile", [])


@pytest.mark.parametrize("words", ["operation not permitted when stream is capturing",
                                   "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"])  # fmt: skip
def test_after_a_failed_capture_no_other_is_tried(captures, monkeypatch, words):
    monkeypatch.setattr(Capture, "words", f"{words}\nand a long trace")
    small = Small()
    before = small.state
    _, mode, (failure,), _ = small.fast("compile+graph")
    assert mode == "eager" and len(Capture.garbage) == 1 and gc.isenabled()
    assert failure.startswith("mode compile+graph failed (CaptureFailed: ") and words in failure
    assert ("out of memory" in failure) == ("ALLOC" in words) and "\n" not in failure
    assert_same(small.state["model"], before["model"])


@pytest.mark.parametrize("words", [
    "CUDA out of memory. Tried to allocate 2.00 GiB", "CUDA error: out of memory\nCUDA kernel",
    "CUDA driver error: out of memory", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", "CUDA_ERROR_OUT_OF_MEMORY",
    "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried",
    "Triton Error [CUDA]: out of memory",
])  # fmt: skip
def test_whatever_means_out_of_memory_is_called_that(words, capsys):
    @command_line.exit_code
    def main(argv):
        raise RuntimeError(words)

    assert command_line.is_out_of_memory(RuntimeError(words))
    for parse, flags in ((train.parse, "--batch-size or --width"),
                         (explain.parse, "--limit-test"),
                         (benchmark.parse, "--batch-sizes or --width")):  # fmt: skip
        with pytest.raises(SystemExit):
            parse(["--help"])
        capsys.readouterr()
        assert main([]) == 1
        assert capsys.readouterr().err == f"error: out of memory: try a smaller {flags}\n"
    assert command_line.is_out_of_memory(MemoryError())
    assert not command_line.is_out_of_memory(RuntimeError("CUDNN_STATUS_NOT_SUPPORTED"))


def waits(model, device):
    """For what the host has to wait in the forward pass of fake tensors, which need no device; on a
    CPU also in the backward pass, which PyTorch does not run on a GPU that is not there."""
    with FakeTensorMode(), torch.device(device):
        model = build_model(model).train()
        images = torch.zeros(64, 1, 28, 28, dtype=torch.uint8)
        labels, mean = torch.zeros(64, dtype=torch.int64), torch.zeros(1, 1, 1)
        with HostWatch() as watch:
            logits = model(data.normalize(images, mean, mean))
            loss = train.cross_entropy(logits, labels, None, 0.0)
            (logits.argmax(1) == labels).sum()
            if device == "cpu":
                loss.backward()
    return watch.found


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_in_a_step_the_host_never_waits(model):
    assert waits(model, "cuda") == waits(model, "cpu") == []


def test_what_makes_the_host_wait_is_found():
    with FakeTensorMode(), HostWatch() as watch:
        torch.ones(3, device="cuda").cpu()
        with pytest.raises(DataDependentOutputException):
            torch.ones((), device="cuda").item()
    assert watch.found[0] == "aten._to_copy.default"


# --- On a GPU -------------------------------------------------------------------------------------

ON_GPU = ["--model", "baseline", "--limit-train", "1000", "--limit-test", "100"]
ON_GPU += ["--data-dir", str(REPO / "data"), "--patience", "50"]


@needs_gpu
def test_a_graphed_run_stopped_and_resumed_ends_the_same(tmp_path):
    """1,000 images are 15 steps of 64 and one of 40: it stops within the second epoch. Compared
    are the states in the last validation."""
    flags = [*ON_GPU, "--epochs", "3", "--mode", "graph"]
    state_at(25, tmp_path / "parts", flags)
    ends = [state_at(n, tmp_path / runs, flags) for n, runs in ((51, "whole"), (27, "parts"))]
    for part in ("model", "optimizer"):
        assert_same(*(end[part] for end in ends))
    assert ends[0]["config"]["mode"] == "graph"
    for runs in ("whole", "parts"):
        assert train.main([*flags, "--runs", str(tmp_path / runs)]) == 0
    assert metrics_of(tmp_path / "whole" / FOLDER) == metrics_of(tmp_path / "parts" / FOLDER)


@needs_gpu
def test_a_graph_trains_as_eager_mode_does(tmp_path):
    """The same kernels, so the same figures; the partial batch is run in eager mode."""
    losses = []
    for mode in ("eager", "graph"):
        flags = [*ON_GPU, "--epochs", "2", "--mode", mode, "--runs", str(tmp_path / mode)]
        assert train.main(flags) == 0
        assert result_of(tmp_path / mode)["fallback"] is None
        losses.append(losses_of(tmp_path / mode / FOLDER))
    assert losses[0] == losses[1]
