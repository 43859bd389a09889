"""Checkpoints: best.pt, the weights of the best epoch, and last.pt, all that is needed to go on.

last.pt holds the state of model, optimizer, scheduler and random generators, the settings, and the
history of the run. Everything is a plain type or a tensor, loaded with `weights_only=True`, which
cannot run code, and on the CPU, from where each load_state_dict moves its part.
"""

import io
import pickle
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

import run_folder
from files import write_atomically
from run_folder import RunError
from training_step import load_adam

WRONG_CONTENT = (LookupError, ValueError, TypeError, AttributeError)


def state_of(model, optimizer, scheduler, device: torch.device, history, config) -> dict:
    """What last.pt holds after an epoch."""
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "history": history,
        "config": config,
    }


def take_up(folder: Path, model, optimizer, scheduler, device: torch.device, config) -> list[dict]:
    """Puts the state in the folder's last.pt back; returns the history, empty if there is none.

    Raises RunError if the checkpoint is that of another run, of another model, or damaged.
    """
    path = folder / "last.pt"
    if not path.exists():
        return []
    state = load(path)
    try:
        run_folder.check_same_run(folder, config, state["config"])
        model.load_state_dict(state["model"])
        load_adam(optimizer, state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        if device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], device)
        return state["history"]
    except RunError:
        raise
    except (*WRONG_CONTENT, RuntimeError) as error:
        raise RunError(
            f"{path} does not fit this model (was models.py edited?): use --overwrite to start anew"
        ) from error


def load(path: Path) -> dict:
    """What was saved in `path`, on the CPU. Raises RunError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (*WRONG_CONTENT, RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
        name = type(error).__name__
        raise RunError(f"{path} is no readable checkpoint ({name}): use --overwrite") from error


class Saver:
    """Writes checkpoints while training goes on, for on a large GPU an epoch is soon over.

    with Saver(device) as save:
        save({path: state or text, ...})    # written in this order, by temporary file and rename

    A save first waits for the one before, and leaving the block waits for the last. What went wrong
    in writing, such as a full disk, is raised by the wait.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.pending: Future | None = None

    def __enter__(self):
        self.pool = ThreadPoolExecutor(max_workers=1)
        return self

    def __call__(self, files: dict[Path, dict | str]) -> None:
        self.wait()
        copies = copied(files, self.device)  # the next step changes the originals
        cuda = self.device.type == "cuda"
        copies_made = torch.cuda.current_stream(self.device).record_event() if cuda else None
        self.pending = self.pool.submit(self.write, copies, copies_made)

    def write(self, files: dict[Path, dict | str], copies_made: torch.cuda.Event | None) -> None:
        if copies_made:  # from the GPU beside the training, on a stream of its own
            stream = torch.cuda.Stream(self.device)
            stream.wait_event(copies_made)
            with torch.cuda.stream(stream):
                files = copied(files, torch.device("cpu"))
        for path, content in files.items():
            if isinstance(content, str):
                write_atomically(path, content)
            else:
                buffer = io.BytesIO()
                torch.save(content, buffer)
                write_atomically(path, buffer.getbuffer())

    def wait(self) -> None:
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def __exit__(self, *exception):
        self.pool.shutdown()
        self.wait()


def copied(state, device: torch.device):
    """A copy of all that `state` holds; tensors of a GPU go to `device`, those of the CPU stay."""
    if isinstance(state, torch.Tensor):
        return state.detach().to(device if state.is_cuda else "cpu", copy=True)
    if isinstance(state, dict):
        return {key: copied(value, device) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(copied(value, device) for value in state)
    return state
