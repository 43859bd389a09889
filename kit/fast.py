"""Modes and precisions in which the same training step or forward pass can run.

    eager           Python launches one kernel after the other
    compile         torch.compile fuses element-wise operations; compiling takes up to a minute
    graph           CUDA: all kernels are captured once, then replayed by a single launch
    compile+graph   both

    default         PyTorch's own flags: on CUDA, convolutions use TF32 and are not deterministic
    fp32            float32 throughout
    tf32            ... but convolutions and matrix multiplications with a 10-bit mantissa
    bf16            autocast: convolutions and matrix multiplications in bfloat16 (7-bit mantissa);
                    weights, BatchNorm's statistics, the loss and Adam stay in float32

tests/test_fast.py compares every mode with eager float32.
"""

import gc
import logging
import math
import os
import random
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic; read when CUDA starts
if ignored := os.environ.keys() & {
    "NVIDIA_TF32_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE",
}:  # fmt: skip
    for name in sorted(ignored):  # read when CUDA and oneDNN start
        print(f"note: {name}={os.environ.pop(name)} ignored: --precision decides", file=sys.stderr)

from kit.checkpoint import attributes
from kit.command_line import UserError, in_one_line

import numpy as np
import torch

MODES = ("eager", "compile", "graph", "compile+graph")
PRECISIONS = ("fp32", "tf32", "bf16")  # of a run
DEFAULT = "default"  # benchmark.py's reference on CUDA; on a CPU it is fp32
# `auto` compiles runs of at least this many steps. A guess: compiling takes 20 to 50 s.
COMPILE_PAYS_FROM = 8_000
# Relative error of all gradients together that rounding cannot explain.
WRONG = {"fp32": 0.05, "tf32": 0.05, "bf16": 0.4}
# The same for a single tensor in fp32: rounding reaches 0.08 for small gradients (CBAM on noise,
# width 16); half a gradient has 0.5.
WRONG_TENSOR = 0.25

# Silences torch.compile: no CUDA runtime on a CPU, advice to use TF32 on a GPU in fp32.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")


def choose_precision(name: str, device: torch.device) -> str:
    """`auto`: bf16 on GPUs that support it."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and not why_not("eager", "bf16", device) else "fp32"


def choose_mode(name: str, device: torch.device, steps: int) -> str:
    """`auto`: the mode in which a run of `steps` steps should take the least time."""
    if name != "auto":
        return name
    parts = ["compile"] * (steps >= COMPILE_PAYS_FROM) + ["graph"] * (device.type == "cuda")
    return "+".join(parts) or "eager"


def why_not(mode: str, precision: str, device: torch.device) -> str | None:
    """Why `device` cannot run a mode in a precision; None if it can."""
    is_cpu = device.type == "cpu"
    if is_cpu and "graph" in mode:
        return f"mode {mode} needs a CUDA GPU"
    if is_cpu and precision in ("tf32", DEFAULT):
        return f"precision {precision} needs a CUDA GPU: on a CPU use fp32"
    old = not is_cpu and torch.cuda.get_device_capability(device) < (8, 0)
    if old and precision in ("tf32", "bf16"):  # emulated, if at all
        return f"precision {precision} needs a GPU of compute capability 8.0 or more: use fp32"
    return None


def why_no_compiler(device: torch.device) -> str | None:
    """What torch.compile lacks here, and what to do. It compiles C++ for a CPU, C for a GPU."""
    for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE", "TORCH_COMPILE_OVERRIDE_BACKENDS"):
        if os.environ.get(name, "0") not in ("", "0"):  # it would silently be eager mode
            return f"torch.compile is switched off by {name}={os.environ[name]}: unset it"
    variable, usual = ("CC", ["gcc", "clang"]) if device.type == "cuda" else ("CXX", ["g++"])
    names = os.environ.get(variable, "").split()[:1] or usual
    if not any(map(shutil.which, names)):
        what = " or ".join(names)
        return f"torch.compile finds no {what}: apt-get install g++, or set {variable}"
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not headers.exists():
        return f"torch.compile finds no {headers}: apt-get install python3-dev"
    return None


def set_up_torch(precision: str) -> None:
    """Deterministic algorithms, and TF32 only on request; or PyTorch's defaults."""
    default = precision == DEFAULT
    torch.use_deterministic_algorithms(not default, warn_only=True)
    # Otherwise one more kernel fills every new tensor with NaN.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = default or precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    # A graph captured while the cache of cast weights is warm would lack the casts.
    bf16 = precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)


def channels_last(model: torch.nn.Module) -> torch.nn.Module:
    """Converts the model, in place, to the fastest layout for convolutions. Raises UserError for
    lazy layers, which have none yet and could not be trained.

    Not narrow models on a CPU: oneDNN's gradient of a strided 1x1 convolution with fewer than 16
    input channels writes out of bounds (uxlfoundation/oneDNN issue 6035).
    """
    if lazy := [k for k, p in model.named_parameters() if torch.nn.parameter.is_lazy(p)]:
        raise UserError(f"{lazy[0]} is of a lazy layer: give it its sizes in __init__")
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    strided = [m for m in convolutions if m.kernel_size == (1, 1) and m.stride != (1, 1)]
    if any(m.in_channels < 16 and m.weight.is_cpu for m in strided):
        return model
    for m in convolutions:
        if m.out_channels > 1:  # with one, cuDNN and the compiler disagree about the layout
            m.to(memory_format=torch.channels_last)
    return model


def compiled(function: Callable, device: torch.device, **options) -> Callable:
    """torch.compile for fixed shapes; raises an exception instead of falling back to eager."""
    if reason := why_no_compiler(device):
        raise RuntimeError(reason)
    # By default the ninth variant of a function runs in eager mode.
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.accumulated_recompile_limit = 1000
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.suppress_errors = False  # TORCHDYNAMO_SUPPRESS_ERRORS
    # Otherwise the gradient of a bf16 maximum searches unrounded values for the rounded one, finds
    # none, and divides 0 by 0.
    torch._inductor.config.emulate_precision_casts = True
    # Dropout draws the same numbers as in eager mode.
    torch._inductor.config.fallback_random = True
    # Otherwise PyTorch's cache may return code compiled for another number of threads.
    torch._inductor.config.cpp.threads = torch.get_num_threads()
    return torch.compile(function, dynamic=False, **options)


class CaptureFailed(RuntimeError):
    """Do not try another: PyTorch's allocator may still be in the state of a capture."""


class Graphed:
    """`function` of some tensors, captured as one CUDA graph and called like `function`.

    Capturing: the function runs a few times first, as libraries, the allocator and optimizers
    initialise themselves in their first call. The caller then restores what a training step
    changed, in place: a graph knows addresses, not variables.

    Replaying: the same kernels on the same addresses. So arguments are copied to where the graph
    reads them, and results are valid until the next call. Python's decisions while capturing are
    fixed: shapes, branches, every number that is not a tensor on the device.
    """

    def __init__(self, function: Callable, *examples: torch.Tensor):
        self.function = function  # keeps the weights alive: the graph has their addresses
        self.arguments = [example.clone() for example in examples]
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function(*self.arguments)
            gc.collect()  # freeing memory during a capture would end it
            gc.disable()
            try:
                with torch.cuda.graph(self.graph, stream=stream):
                    self.results = function(*self.arguments)
            except Exception as error:
                raise CaptureFailed(str(error.__context__ or error)) from error
            finally:
                gc.enable()
        torch.cuda.synchronize()  # the warm-up ran on a stream of its own

    def __call__(self, *arguments: torch.Tensor):
        for there, new in zip(self.arguments, arguments, strict=True):
            there.copy_(new)
        self.graph.replay()
        return self.results


def telling_weights(model: torch.nn.Module, gradients: Callable) -> list:
    """Weights for comparing gradients: few activations near 0, where rounding flips ReLUs, and no
    gradient hidden by a weight of 0, as of CBAM's convolution, or a dead unit."""
    weights = [p.detach().clone() for p in model.parameters()]
    own = {p: weight for p, weight in zip(model.parameters(), weights, strict=True)}
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and module.affine:
            own[module.weight].copy_(torch.linspace(0.25, 0.5, len(module.weight)))
            own[module.bias].fill_(1.0)
    for weight, gradient in zip(weights, gradients(weights), strict=True):
        if not gradient.any():
            other = torch.linspace(-0.1, 0.1, weight.numel(), device=weight.device)
            weight.copy_(other.view_as(weight) - weight)
    return weights


def gradient_error(found: list, expected: list, each: bool) -> float:
    """Relative error of all gradients together or, with `each`, the largest of a tensor; inf if
    NaN or inf are in other places."""
    if not all(map(torch.equal, map(torch.isfinite, found), map(torch.isfinite, expected))):
        return math.inf
    a, b = ([x.nan_to_num(0, 0, 0).double().flatten() for x in g] for g in (found, expected))
    least = 5e-6 * torch.cat(b).norm()  # below: rounding, as of a bias before BatchNorm
    if not each:
        a, b = [torch.cat(a)], [torch.cat(b)]
    errors = [(x - y).norm() / torch.maximum(y.norm(), least) for x, y in zip(a, b, strict=True)]
    return torch.stack(errors).nan_to_num(0).max().item()  # 0 / 0: all are 0


def python_state(model: torch.nn.Module, mode: str) -> tuple:
    """What changes in it from step to step would be fixed by compiling or by a graph."""
    on_cpu = torch.get_rng_state().tolist() if "graph" in mode else None
    return random.getstate(), str(np.random.get_state()), on_cpu, attributes(model)  # noqa: NPY002


def fast(step, forward, mode, precision, example: tuple, model, restore: Callable):
    """(step in `mode` or the next simpler one that works, that mode, why no faster one, relative
    error of its gradients compared with eager mode).

    step(*batch, forward=forward) is a training step, forward(*batch) its compilable part, and
    restore() undoes in place what steps changed. A mode works if its gradients are those of eager
    mode. Batches of another size than the example's run in eager mode.
    """

    def gradients(step, weights):  # of one step from these weights
        restore()
        with torch.no_grad():
            for p, weight in zip(model.parameters(), weights, strict=True):
                p.copy_(weight)
        step(*example)
        return [p.new_zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()]

    failures, size = [], len(example[0])
    if mode != "eager":
        weights = telling_weights(model, partial(gradients, step))
        before = python_state(model, mode)
        step(*example)
        if python_state(model, mode) != before:
            what = "a generator on the CPU, or count in an attribute (use a buffer),"
            failures.append(f"mode {mode} would draw from {what} only once")
            mode = "eager"
        expected = gradients(step, weights)
        restore()
    while mode != "eager":
        try:
            run = compiled(forward, example[0].device) if "compile" in mode else forward
            fast_step = partial(step, forward=run)
            fast_step = Graphed(fast_step, *example) if "graph" in mode else fast_step
            found = gradients(fast_step, weights)  # compiles in its first call
            error = gradient_error(found, expected, each=False)
            worst = gradient_error(found, expected, each=True) if precision == "fp32" else 0.0
            if error > WRONG[precision] or worst > WRONG_TENSOR:
                wrong = f"error {error:.2g}, at most {worst:.2g} of one tensor"
                raise RuntimeError(f"other gradients than in eager mode, {wrong}")

            def fast_where_it_fits(*batch, fast_step=fast_step):
                return (fast_step if len(batch[0]) == size else step)(*batch)

            return fast_where_it_fits, mode, failures, error
        except Exception as error:  # compilers, drivers and out of memory can raise anything
            failures.append(f"mode {mode} failed ({in_one_line(error)})")
            may_capture = mode == "compile+graph" and not isinstance(error, CaptureFailed)
            mode = "graph" if may_capture else "eager"
        finally:
            restore()
    return step, mode, failures, None
