"""The machine a run uses: which device, what it is called, and the record kept in env.json."""

import hashlib
import platform
import resource
import subprocess
import time
from pathlib import Path

import torch

import parallel

HERE = Path(__file__).resolve().parent
SOURCES = (
    "models.py", "attention.py", "data.py", "fashion_mnist.py", "image_data.py", "image_folder.py",
    "augment.py", "settings.py", "train.py", "training_step.py", "modes.py", "parallel.py",
)  # fmt: skip


def choose_device(name: str) -> torch.device:
    """`auto`: a CUDA GPU, or the CPU where there is none. A GPU becomes the current one.

    Raises ValueError with one line.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device {name}: PyTorch {torch.__version__} sees no CUDA GPU (is the driver recent "
            "enough? in a container, was it started with --gpus all?); use --device cpu"
        )
    needed = device.index if device.index is not None else parallel.LOCAL_RANK
    if device.type == "cuda" and needed >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA GPU(s)"
        )
    if device.type == "cuda":
        device = torch.device("cuda", needed)
        torch.cuda.set_device(device)  # streams and graphs are made on the current one
    return device


def device_name(device: torch.device) -> str:
    """What the hardware is called, for example "NVIDIA GeForce RTX 4070"."""
    processes = f"{parallel.WORLD} x " if parallel.WORLD > 1 else ""
    if device.type == "cuda":
        return processes + torch.cuda.get_device_name(device)
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return f"{processes}CPU {cpu}, {torch.get_num_threads()} threads"


def peak_memory_mb(device: torch.device) -> float:
    """The most memory that this process has held so far, in MB (10^6 bytes).

    On a GPU what PyTorch's allocator gave out; on a CPU all that was resident, PyTorch included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # Linux counts in KiB


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether PyTorch could not get memory, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def describe_environment(device: torch.device) -> dict:
    """Everything outside the settings that a result may depend on; None where it cannot be had."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "git_commit": output_of("git", "-C", HERE, "rev-parse", "HEAD"),
        "git_dirty": is_dirty(),
        "sha256": source_hashes(),
    }


def source_hashes() -> dict[str, str]:
    """sha256 of the files that a result depends on most."""
    return {name: hashlib.sha256((HERE / name).read_bytes()).hexdigest() for name in SOURCES}


def output_of(*command) -> str | None:
    """The first line a command prints, or None if it is missing, fails or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return lines[0] if lines else None


def is_dirty() -> bool | None:
    """Whether git-tracked files differ from the commit; None outside a git checkout."""
    if output_of("git", "-C", HERE, "rev-parse", "HEAD") is None:
        return None
    command = ("git", "-C", HERE, "status", "--porcelain", "--untracked-files=no")
    return output_of(*command) is not None
