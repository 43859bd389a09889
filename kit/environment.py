"""The machine of a run: its name, and the record in env.json."""

import ast
import hashlib
import os
import platform
import re
import resource
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent.parent
LOCK = Path("/opt/requirements.lock")  # the Dockerfile puts it there, and sets IMAGE_REVISION
# They affect threads, speed, and instructions and kernels (which round differently).
VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "CUDA_LAUNCH_BLOCKING",
    "OMP_THREAD_LIMIT", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "PYTORCH_TUNABLEOP_ENABLED", "TORCHINDUCTOR_MAX_AUTOTUNE",
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
OURS = {"kit", "tests", "report.py", "explain.py", *AT_START}


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


def own_modules() -> list[str]:
    """Imported files of this folder that are not the project's: a module of your own, say."""
    root = Path(__file__).parent.parent  # as sys.path has it, links included
    modules = [module for name, module in [*sys.modules.items()] if name != "__main__"]
    files = {Path(getattr(module, "__file__", None) or "") for module in modules}
    installed = {Path(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib", "platlib")}
    found = {path.relative_to(root) for path in files
             if root in path.parents and installed.isdisjoint(path.parents)}  # fmt: skip
    return sorted(str(path) for path in found
                  if path.suffix == ".py" and path.parts[0] not in OURS)  # fmt: skip


def source_hashes(names: Iterable[str] = ()) -> dict[str, str]:
    """sha256 of these scripts (by default those that results depend on) when this process started,
    and of each top-level definition without docstrings: functions, classes, constants, entries of
    dicts. Other files are read at the first call."""
    found = {}
    for name in names or (*SOURCES, *own_modules()):
        if name not in AT_START:
            AT_START[name] = (HERE / name).read_bytes()
        body = AT_START[name]
        found[name] = hashlib.sha256(body).hexdigest()
        tree = ast.parse(body)
        for node in ast.walk(tree):
            documented = isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))
            if documented and ast.get_docstring(node) is not None:
                node.body.pop(0)
        for node in tree.body:
            for part, value in parts_of(node).items():
                key = f"{name}: {part}"  # of the same name, all together
                content = found.get(key, "") + ast.dump(value)
                found[key] = hashlib.sha256(content.encode()).hexdigest()[:12]
    return found


def parts_of(node: ast.stmt) -> dict[str, ast.AST]:
    """{name: definition} of a top-level statement; an `if` or loop is named by its first line.
    Imports have none."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name: node}
    if not isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
        if hasattr(node, "body"):
            return {ast.unparse(node).partition("\n")[0]: node}
        return {"calls": node} if isinstance(node, ast.Expr) else {}
    target = ast.unparse(getattr(node, "target", None) or node.targets[0])
    if not isinstance(node.value, ast.Dict):
        return {target: node}
    entries = zip(node.value.keys, node.value.values, strict=True)
    return {f"{target}[{ast.unparse(key) if key else '**'}]": value for key, value in entries}


def output_of(*command) -> str | None:
    """A command's output; None if it is missing or fails."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}  # another repository's
    try:
        how = dict(capture_output=True, text=True, errors="replace", timeout=20, env=env)
        done = subprocess.run(command, **how)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def git_commit() -> str | None:
    """The commit; None outside a git checkout, and inside another project's."""
    tracked = output_of("git", "-C", HERE, "ls-files", "train.py")
    commit = tracked and output_of("git", "-C", HERE, "rev-parse", "HEAD")
    return commit.strip() if commit else None


def code_diff() -> str | None:
    """Uncommitted changes to scripts and requirements; None without a commit."""
    if git_commit() is None:
        return None
    own, plain = own_modules(), ("--no-ext-diff", "--no-textconv", "--no-color")
    untracked = output_of("git", "-C", HERE, "ls-files", "--others", "--", *own) if own else ""
    files = "*.py", "*.sh", "requirements.*"
    diff = output_of("git", "-C", HERE, "diff", *plain, "HEAD", "--", *files)
    if untracked is None or diff is None:
        return None
    return "".join(f"untracked: {name}\n" for name in untracked.splitlines()) + diff
