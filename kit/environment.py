"""The machine of a run: its name, and the record in env.json."""

import ast
import hashlib
import os
import platform
import re
import resource
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent.parent
LOCK = Path("/opt/requirements.lock")  # the Dockerfile puts it there, and sets IMAGE_REVISION
# They affect threads, speed, and instructions and kernels (which round differently).
VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "CUDA_LAUNCH_BLOCKING",
    "PYTORCH_NO_CUDA_MEMORY_CACHING", "PYTORCH_TUNABLEOP_ENABLED", "TORCHINDUCTOR_MAX_AUTOTUNE",
    "CUBLAS_WORKSPACE_CONFIG",
)  # fmt: skip
# The code that results depend on: an edit here makes another experiment.
SOURCES = (
    "train.py", "models.py", "data.py", "kit/attention.py", "kit/augment.py", "kit/datasets.py",
    "kit/image_folder.py", "kit/decoding.py", "kit/fast.py", "kit/ema.py", "kit/checkpoint.py",
    "kit/run.py", "kit/settings.py",
)  # fmt: skip
# The running code, even if a file is edited meanwhile.
AT_START = {path: (HERE / path).read_bytes() for path in (*SOURCES, "benchmark.py")
            if (HERE / path).is_file()}  # fmt: skip


def driver_version() -> str | None:
    found = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or ""
    version = re.match(r"[0-9][0-9.]*$", found, re.MULTILINE)
    return version and version[0]


def shared_gpu(device: torch.device) -> bool | None:
    """Whether other processes compute on the same GPU now; None if unknown."""
    if device.type != "cuda":
        return None
    found = output_of("nvidia-smi", "--query-compute-apps=gpu_uuid", "--format=csv,noheader") or ""
    n_processes = found.count(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    return n_processes > 1 if n_processes else None  # containers do not even list this one


def device_name(device: torch.device) -> str:
    """The hardware's name, for example "NVIDIA GeForce RTX 4070"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cpu = found[1].strip() if found else platform.processor() or platform.machine()
    return f"CPU {cpu}, {torch.get_num_threads()} threads"


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far in MB (10^6 bytes); on a CPU it includes PyTorch itself."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # Linux counts in KiB


def describe_environment(device: torch.device) -> dict:
    """Everything outside the settings that a result may depend on; None where unknown."""
    diff = code_diff()
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "numpy": np.__version__,  # draws split and order
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": driver_version(),
        "device": device_name(device),
        "shared_gpu": shared_gpu(device),
        "cpu_cores": len(os.sched_getaffinity(0)),  # available to this process
        "threads": torch.get_num_threads(),
        "variables": {name: os.environ.get(name) for name in VARIABLES},
        "git_commit": git_commit(),
        "git_dirty": None if diff is None else bool(diff),
        "image": image(),
        "sha256": source_hashes(),
    }


def image() -> dict | None:
    """The container image: its commit and the sha256 of its requirements."""
    if "IMAGE_REVISION" not in os.environ or not LOCK.exists():
        return None
    return {
        # None: a checkout is mounted over the image's scripts.
        "revision": None if HERE.is_mount() else os.environ["IMAGE_REVISION"],
        "requirements_sha256": hashlib.sha256(LOCK.read_bytes()).hexdigest(),
    }


def source_hashes(names=SOURCES) -> dict[str, str]:
    """sha256 of these scripts when this process started, and of each top-level definition:
    functions, classes, constants, entries of dicts."""
    found = {}
    for name in names:
        found[name] = hashlib.sha256(AT_START[name]).hexdigest()
        for node in ast.parse(AT_START[name]).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                parts = {node.name: node}
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                entries = zip(node.value.keys, node.value.values, strict=True)
                parts = {f"{ast.unparse(node.targets[0])}[{ast.unparse(key)}]": value
                         for key, value in entries if key}  # fmt: skip
            elif isinstance(node, (ast.Assign, ast.AugAssign)):
                parts = {ast.unparse(getattr(node, "target", None) or node.targets[0]): node}
            else:
                continue
            for part, value in parts.items():
                digest = hashlib.sha256(ast.dump(value).encode()).hexdigest()
                found[f"{name}: {part}"] = digest[:12]
    return found


def output_of(*command) -> str | None:
    """A command's output; None if it is missing, fails or prints nothing."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}  # another repository's
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, env=env)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def git_commit() -> str | None:
    """The commit; None outside a git checkout, and inside another project's."""
    tracked = output_of("git", "-C", HERE, "ls-files", "train.py")
    return output_of("git", "-C", HERE, "rev-parse", "HEAD") if tracked else None


def code_diff() -> str | None:
    """Uncommitted changes to scripts and requirements; None without a commit."""
    if git_commit() is None:
        return None
    files = "*.py", "*.sh", "requirements.*"
    return output_of("git", "-C", HERE, "diff", "HEAD", "--", *files) or ""
