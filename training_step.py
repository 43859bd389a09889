"""One training step, and the ways to run it faster: compiled, and recorded as one CUDA graph.

    python train.py --model se --mode compile     # auto takes what is fastest and safe
    python train.py --self-check                  # every mode against eager mode: self_check.py

A step gathers its images on the device, normalises them, and does forward, loss, backward and
Adam. The mathematics are the same in every mode:

    eager           as it stands: Python launches one kernel after the other
    compile         torch.compile fuses what is element-wise; compiling takes up to a minute once
    graph           CUDA: all kernels of a step are recorded once, then replayed by one launch
    compile+graph   both

At batch 64 a large GPU is done with a step sooner than Python has launched its kernels, about a
thousand for CBAM. That is what a graph is for.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import normalize

MODES = ("eager", "compile", "graph", "compile+graph")
PRECISIONS = ("fp32", "tf32", "bf16")
FALLBACK = {"compile+graph": "graph", "graph": "eager", "compile": "eager"}
NORMALIZE = (0.5, 0.5)  # mean and standard deviation taken for all data, pixels in [0, 1]
# Runs of at least so many steps are compiled. On two CPU cores compiling takes about 50 s and then
# saves 6 ms a step of the baseline, which gains least; on a GPU it is not measured yet.
COMPILE_PAYS_FROM = {"cpu": 8_000, "cuda": 20_000}


def choose_precision(name: str, device: torch.device) -> str:
    """`auto`: bf16 on GPUs that are made for it. On CPUs it was slower than fp32."""
    if name != "auto":
        return name
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if fast else "fp32"


def choose_mode(name: str, device: torch.device, steps: int) -> str:
    """`auto`: the mode in which a run of `steps` steps should take the least time in all."""
    if name != "auto":
        return name
    parts = ["compile"] * (steps >= COMPILE_PAYS_FROM[device.type])
    parts += ["graph"] * (device.type == "cuda")
    return "+".join(parts) or "eager"


def set_up_torch(precision: str) -> None:
    """Deterministic algorithms, and float32 products in TF32 only where that is asked for."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Otherwise every new tensor is first filled with NaN: a help in debugging, and a kernel each.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def logits_of(model: nn.Module, images: torch.Tensor, precision: str) -> torch.Tensor:
    """uint8 images (N, C, H, W) -> float32 logits (N, num_classes), all on one device."""
    mean, std = (torch.full((), value, device=images.device) for value in NORMALIZE)
    # No cache of cast weights: a graph that found one filled would replay without the casts.
    bf16 = precision == "bf16"
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
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
    number of hits of the batch, on the device and valid until the next call. Only batches of
    `batch_size` take the fast way, for compiled code and graphs are of one shape; the last, partial
    batch of an epoch is run eagerly. Where compiling or capturing fails, the next simpler mode is
    taken. When this returns, everything is compiled and captured, and model, optimizer, gradients
    and random states are as they were.
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

    eager, failures = step_with(forward), []
    restore = snapshot(model, optimizer)
    model.train()
    while mode != "eager":
        try:
            compiled = torch.compile(forward, dynamic=False) if "compile" in mode else forward
            fast = step_with(compiled)
            idx = torch.arange(batch_size, device=images.device) % len(images)
            fast = GraphedStep(fast, optimizer, idx) if "graph" in mode else fast
            fast(idx)  # this is when torch.compile compiles
            break
        except Exception as error:  # compilers, drivers and out of memory raise what they like
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            failures.append(f"mode {mode} failed ({type(error).__name__}: {reason})")
            mode = FALLBACK[mode]
        finally:
            restore()
    if mode == "eager":
        return eager, mode, failures
    return lambda idx: (fast if len(idx) == batch_size else eager)(idx), mode, failures


class GraphedStep:
    """A training step recorded as one CUDA graph: called like the step, one launch a call.

    Recording: CUDA libraries, the allocator and Adam set themselves up in the first steps, which a
    graph cannot record. So a few steps are run to warm up, on the stream that then records one more
    without running it. They change weights, BatchNorm statistics and Adam's state, which the caller
    restores in place: a graph knows addresses, not variables.

    Replaying: the same kernels on the same addresses. Hence the batch's indices are copied into
    `idx`, and loss and hits are read from where the graph leaves them. Whatever Python decided
    while it was recorded is fixed: shapes, branches, every number that is not a tensor.
    """

    def __init__(self, step: Callable, optimizer: torch.optim.Optimizer, idx: torch.Tensor):
        self.idx = idx.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(self.idx)
        optimizer.zero_grad()  # the graph then makes gradients of its own, in its own memory
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.loss, self.hits = step(self.idx)

    def __call__(self, idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.idx.copy_(idx)
        self.graph.replay()
        return self.loss, self.hits


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
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                # Adam makes its state in the first step, and all of it starts at zero.
                value.copy_(state[parameter][key]) if parameter in state else value.zero_()
        torch.set_rng_state(cpu_rng)
        if cuda_rng:
            torch.cuda.set_rng_state_all(cuda_rng)

    return restore
