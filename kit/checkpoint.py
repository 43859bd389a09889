"""last.pt: everything needed to resume bit for bit, in one file that is written atomically.

prev.pt is the previous one, kept until the run is complete. Both hold only plain types, NumPy's
numbers and tensors, which are loaded on the CPU with `weights_only=True` and copied into place.
"""

import io
import pickle
import random
import sys
import warnings
import zipfile
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

from kit.command_line import UserError, in_one_line, is_out_of_memory
from kit.runs import different

import numpy as np
import torch

# A schedule may compute learning rates with NumPy.
NUMPY_NUMBERS = [np.float64().__reduce__()[0], np.dtype, *(type(np.dtype(k)) for k in "?ilfd")]


@dataclass
class Progress:
    """A run's progress: consistent between any two steps, and saved as it is."""

    history: list[dict] = field(default_factory=list)  # a row of metrics.jsonl per epoch
    best: dict | None = None  # the weights to test, so far: see end_epoch
    # State of the partial epoch:
    step: int = 0
    losses: torch.Tensor | None = None  # (steps,), on the device
    correct: torch.Tensor | None = None  # number of correct predictions, on the device
    seconds: float = 0.0

    @property
    def epochs(self) -> int:
        return len(self.history)

    @property
    def best_epoch(self) -> int:
        """The first with the highest validation accuracy."""
        return max(self.history, key=lambda row: row["val_acc"])["epoch"] if self.history else 0

    def begin_epoch(self, steps: int, device: torch.device) -> None:
        """Starts an epoch unless there is a partial one."""
        if self.step == 0:
            self.losses, self.seconds = torch.zeros(steps, device=device), 0.0
            self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.losses, self.correct = self.losses.to(device), self.correct.to(device)

    def end_epoch(self, row: dict, model: torch.nn.Module, tested: str) -> None:
        """Appends the epoch's row, and copies the weights if they are the ones to test so far."""
        self.history.append(row)
        self.step = 0
        if tested == "last" or self.best_epoch == self.epochs:
            self.best = {key: value.clone() for key, value in model.state_dict().items()}


def attributes(model: torch.nn.Module) -> dict[str, dict]:
    """{module: its numbers and flags in Python}, such as a counter of steps."""
    kinds = (bool, int, float)
    return {
        name: {k: v for k, v in vars(module).items() if type(v) in kinds and k != "training"}
        for name, module in model.named_modules()
    }


def get_state(parts: dict, device: torch.device) -> dict:
    """The states of parts (None is skipped) and random generators."""
    state = {name: part.state_dict() for name, part in parts.items() if part}
    state["attributes"] = attributes(parts["model"])
    cuda_rng = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    state |= {"rng": torch.get_rng_state(), "cuda_rng": cuda_rng, "python_rng": random.getstate()}
    name, numbers, *rest = np.random.get_state()  # noqa: NPY002
    return state | {"numpy_rng": (name, numbers.tolist(), *rest)}


def seed_generators(seed: int) -> None:
    """All that a module may use: dropout uses torch's, stochastic depth often Python's."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def load_state(state: dict, parts: dict, device: torch.device) -> None:
    """Copies the states into the parts, in place. Raises an exception if they do not fit."""
    for name, part in parts.items():
        if isinstance(part, torch.optim.Optimizer):
            load_optimizer(part, state[name])
        elif part:
            part.load_state_dict(state[name])
    for name, module in parts["model"].named_modules():
        vars(module).update(state["attributes"].get(name, {}))
    torch.set_rng_state(state["rng"])
    random.setstate(state["python_rng"])
    np.random.set_state(state["numpy_rng"])  # noqa: NPY002
    if device.type == "cuda" and state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"], device)


def starts_at_zero(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's state is all 0 before its first step."""
    # SGD dampens every step but its first.
    dampened = any(group.get("dampening") for group in optimizer.param_groups)
    return isinstance(optimizer, (torch.optim.Adam, torch.optim.SGD)) and not dampened


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """load_state_dict that keeps the optimizer's tensors in place: a CUDA graph knows addresses.

    Device-dependent options stay unchanged, so a run may resume on another device.
    """
    own_groups, own_state = optimizer.param_groups, optimizer.state
    groups = [
        group | {key: own[key] for key in ("fused", "capturable") if key in own}
        for own, group in zip(own_groups, saved["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    for own, group in zip(own_groups, optimizer.param_groups, strict=True):
        for key, value in group.items():  # the learning rate: a tensor on a GPU, else a number
            if isinstance(own.get(key), torch.Tensor):
                group[key] = own[key].fill_(float(value))
            elif isinstance(value, torch.Tensor):
                group[key] = float(value)
    if saved["state"] or starts_at_zero(optimizer):
        for parameter, tensors in own_state.items():
            state = optimizer.state[parameter]
            for key, value in tensors.items():
                if isinstance(value, torch.Tensor):
                    new = state.get(key)  # None: before the first step
                    state[key] = value.zero_() if new is None else value.copy_(new)


def resume(folder: Path, parts: dict, device: torch.device, config: dict) -> Progress:
    """Loads last.pt, or else prev.pt, into the parts. Returns its progress.

    A damaged file, or another run's, is renamed. With none left, the run starts from scratch.
    Raises UserError, and renames nothing, if an undamaged file does not fit the parts, and no other
    file does.
    """
    as_built = deepcopy(get_state(parts, device))
    bad, misfits, progress = {}, [], None
    for path in (folder / "last.pt", folder / "prev.pt"):
        if progress or not path.is_file():
            continue
        try:
            state = load(path)
            if other := different(state["config"], config):
                raise ValueError(f"it is of a run with {'; '.join(other)}")
            found = Progress(**state["progress"])
            if [row["epoch"] for row in found.history] != list(range(1, found.epochs + 1)):
                raise ValueError("its epochs are not in order")
            misfits.append(path)  # unless it loads
            load_state(state, parts, device)
            progress = found
        except Exception as error:  # a damaged file can raise anything
            if isinstance(error, OSError) or is_out_of_memory(error):
                raise
            load_state(as_built, parts, device)  # it may have been loaded in part
            bad[path] = in_one_line(error)
    if misfits and not progress:
        raise UserError(
            f"{misfits[0]} does not fit the model or the optimizer ({bad[misfits[0]]}): restore "
            "the code that it was trained with, or use --overwrite or another --runs folder"
        )
    for path, why in bad.items():
        path.rename(path.with_name(f"{path.name}.corrupt"))
        print(f"note: {path} renamed to {path.name}.corrupt: {why}", file=sys.stderr)
    if progress:  # PyTorch would warn if only the scheduler's step is left to do
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
    return progress or Progress()


def why_no_graph(optimizer: torch.optim.Optimizer) -> str | None:
    """Why its steps cannot be captured in a CUDA graph; None if they can."""
    if not all(isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups):
        return "no CUDA graph: its learning rate would be fixed, for it is no tensor on the GPU"
    if not starts_at_zero(optimizer):
        return f"no CUDA graph: the state of {type(optimizer).__name__} cannot be reset in place"
    return None


def load(path: Path) -> dict:
    """Loads a torch.save file on the CPU. Raises an exception if it is damaged.

    The file is a zip archive with a checksum per member; torch.load verifies none of them.
    """
    if path.exists() and not path.is_file():  # a pipe would block
        raise ValueError("it is no file")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        # 0x10 is a folder, which PyTorch does not read; testzip cannot seek before the file.
        impossible = any(m.external_attr & 0x10 or m.header_offset < 0 for m in members)
        if impossible or archive.testzip():
            raise ValueError("it is damaged")
    warnings.filterwarnings("ignore", "'torch.load' received a zip file")  # a TorchScript warning
    try:
        with torch.serialization.safe_globals(NUMPY_NUMBERS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        if "weights_only" not in str(error):
            raise
        raise ValueError(  # PyTorch's own message advises weights_only=False
            "it holds a pickled model or no model, and code could run as it loads: save weights "
            "alone, torch.save(model.state_dict(), FILE)"
        ) from None


def serialized(state: dict) -> bytes:
    """A .pt file's bytes. (On a full disk torch.save raises no OSError.)"""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
