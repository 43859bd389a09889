"""Before any work: chooses the device, checks GPU, memory and disk space."""

import functools
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

from kit.command_line import UserError, in_one_line
from kit.environment import device_name, driver_version

import torch

DRIVERS = {"12": 525, "13": 580}  # CUDA's major version -> oldest Linux driver
# GB. A full-width run took 1.0 on an H100; last.pt has 0.18, and there are up to three.
LITTLE_MEMORY, LITTLE_SPACE = 2, 0.6
# PyTorch says in ten lines what why_unusable says in one.
warnings.filterwarnings("ignore", r"(?s).*(compute capability \(CC\)|CUDA capability sm_)")


def choose_device(name: str) -> torch.device:
    """`auto`: the first CUDA GPU that PyTorch can use, or else the CPU. Raises ValueError."""
    if not (found := re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", name, re.ASCII)):
        raise ValueError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N")
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not n_gpus):
        return torch.device("cpu")
    if not n_gpus:
        raise ValueError(f"--device {name}: {why_no_gpu()}; use --device cpu")
    if (index := int(found[1] or 0)) >= n_gpus:
        raise ValueError(f"--device {name}: this machine has {n_gpus} CUDA GPU(s)")
    for i in range(n_gpus) if name == "auto" else [index]:
        if not (reason := why_unusable(i)):
            torch.cuda.set_device(i)  # for streams and graphs
            return torch.device("cuda", i)
        if name != "auto":
            raise ValueError(f"--device {name}: {reason}; use --device cpu")
    note_once(f"{reason}: running on the CPU")
    return torch.device("cpu")


@functools.cache
def note_once(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


def why_unusable(index: int) -> str | None:
    """Why PyTorch cannot use a GPU (it has no code for it); None if it can."""
    own, names = torch.cuda.get_device_capability(index), torch.cuda.get_arch_list()
    known = re.findall(r"\b(sm|compute)_(\d+)(\d)", " ".join(names))  # none: not NVIDIA
    fits = [  # sm: machine code, for one major version
        (int(major), int(minor)) <= own and (kind == "compute" or int(major) == own[0])
        for kind, major, minor in known
    ]
    if any(fits) or not known:
        return None
    gpu = f"GPU {index}, {torch.cuda.get_device_name(index)} (compute capability {own[0]}.{own[1]}"
    return f"PyTorch {torch.__version__} has no code for {gpu}, it has {' '.join(names)})"


def visible_gpus() -> tuple[list[str], str]:
    """(usable GPUs as in CUDA_VISIBLE_DEVICES; the first one's name, or why there is none)."""
    if not torch.cuda.is_available():
        return [], why_no_gpu()
    count = torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    names = names.replace(" ", "").split(",")[:count]
    reasons = list(map(why_unusable, range(count)))
    usable = [name for name, reason in zip(names, reasons, strict=True) if not reason]
    return usable, device_name(torch.device("cuda", reasons.index(None))) if usable else reasons[0]


def why_no_gpu() -> str:
    """Why PyTorch sees no CUDA GPU, and what to do."""
    cuda, driver = torch.version.cuda, driver_version()
    nothing = f"PyTorch {torch.__version__} sees no CUDA GPU"
    if cuda is None:
        return f"{nothing}, it is a build for CPUs alone"
    if driver is None:
        return f"{nothing}, nor is there an NVIDIA driver (in a container: docker run --gpus all)"
    needed = DRIVERS.get(cuda.split(".")[0], 0)
    if int(driver.split(".")[0]) < needed:
        old = f"the NVIDIA driver {driver} is too old for PyTorch {torch.__version__} with CUDA"
        return f"{old} {cuda}: update it to {needed} or newer"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = "see nvidia-smi" if hidden is None else f"CUDA_VISIBLE_DEVICES is '{hidden}': unset it"
    return f"{nothing}, though there is an NVIDIA driver {driver} ({why})"


def preflight(device: torch.device, folder: Path | None = None) -> None:
    """Warns if memory or disk space is low. Raises UserError if GPU or folder is unusable."""
    if device.type == "cuda":
        try:
            free, total = (n / 1e9 for n in torch.cuda.mem_get_info(device))
        except RuntimeError as error:  # another process has it exclusively
            advice = "choose another --device (see nvidia-smi)"
            raise UserError(f"{device} cannot be used ({in_one_line(error)}): {advice}") from None
        if free < LITTLE_MEMORY:
            others = "others use it (see nvidia-smi), a run may end out of memory"
            note_once(f"{free:.1f} of {total:.1f} GB are free on {device}: {others}")
    if folder:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if (free := shutil.disk_usage(existing).free / 1e9) < LITTLE_SPACE:
            needed = f"a run may need {LITTLE_SPACE} GB while it trains"
            note_once(f"{free:.1f} GB are free in {folder}: {needed}")
        if not os.access(existing, os.W_OK):
            raise UserError(f"{folder} cannot be written: choose another folder")
