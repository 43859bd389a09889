"""Checkpoints: last.pt, all that is needed to go on, and best.pt, the weights of the best epoch.

last.pt holds the state of model, optimizer, scheduler and random generators, the best weights, the
settings, the history of the run, and where in an epoch it was stopped. It is one file, so that
whenever the process is killed nothing in it can be of two moments; best.pt and metrics.jsonl are
written from it. The last.pt before it is kept as prev.pt until the run is complete.

Everything in it is a plain type or a tensor, loaded with `weights_only=True`, which cannot run
code, and on the CPU, from where each load_state_dict moves its part.
"""

import hashlib
import io
import os
import sys
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kit import run_folder
from kit.environment import is_out_of_memory
from kit.files import write_atomically
from kit.training_step import Average, load_adam

LENGTH = (64).to_bytes(2, "little")  # of the sha256 at the end of a file


@dataclass
class Parts:
    """What training changes."""

    model: torch.nn.Module
    optimizer: torch.optim.Adam
    scheduler: torch.optim.lr_scheduler.LRScheduler
    device: torch.device
    average: Average | None = None  # of the model


@dataclass
class Progress:
    """How far a run has come."""

    history: list[dict] = field(default_factory=list)  # a row of metrics.jsonl each epoch
    best: dict | None = None  # weights of the best epoch
    # Of an epoch that was stopped: step, losses (steps,), correct, seconds. None between epochs.
    begun: dict | None = None


def state_of(parts: Parts, progress: Progress, config: dict) -> dict:
    """What last.pt holds."""
    cuda = parts.device.type == "cuda"
    return {
        "model": parts.model.state_dict(),
        "optimizer": parts.optimizer.state_dict(),
        "scheduler": parts.scheduler.state_dict(),
        "average": parts.average.state_dict() if parts.average else None,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(parts.device) if cuda else None,
        "progress": vars(progress),
        "config": config,
        "torch": str(torch.__version__),
    }


def take_up(folder: Path, parts: Parts, config: dict) -> Progress:
    """Puts the state in the folder's last.pt back, or else that in prev.pt; says how far it is.

    A file that is damaged, or not this run's, is set aside as .corrupt and named on stderr; without
    a good one the run starts anew. best.pt and metrics.jsonl are written again from the state.
    """
    as_built = copied(state_of(parts, Progress(), config), torch.device("cpu"))
    for path in (folder / "last.pt", folder / "prev.pt"):
        if not path.is_file():
            continue
        try:
            state = load(path)
            progress = put_back(state, parts, config)
        except Exception as error:  # damaged files raise what they like
            if isinstance(error, OSError) or is_out_of_memory(error):
                raise
            put_back(as_built, parts, config)  # some of it may have been loaded
            aside = path.with_name(f"{path.name}.corrupt")
            os.replace(path, aside)
            reason = str(error).split("\n")[0] or type(error).__name__
            print(f"note: {path} is set aside as {aside.name}: {reason}", file=sys.stderr)
            continue
        # PyTorch would warn where no step but the scheduler's is left to this process.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        if state["torch"] != str(torch.__version__):
            print(
                f"note: {path} was written by PyTorch {state['torch']}, this is "
                f"{torch.__version__}: from here on the last digits may differ",
                file=sys.stderr,
            )
        if progress.best is not None:
            write_atomically(folder / "best.pt", serialized(progress.best))
        metrics = run_folder.metrics_text(progress.history)
        write_atomically(folder / "metrics.jsonl", metrics)
        return progress
    for name in ("best.pt", "metrics.jsonl"):
        (folder / name).unlink(missing_ok=True)  # of the state that was set aside
    return Progress()


def put_back(state: dict, parts: Parts, config: dict) -> Progress:
    """Loads the states into their objects. Raises some exception if they do not fit."""
    for key in sorted(config.keys() - run_folder.MAY_DIFFER):
        if state["config"].get(key) != config[key]:
            raise ValueError(f"it is of a run with {key} = {state['config'].get(key)}")
    progress = Progress(**state["progress"])
    if [row["epoch"] for row in progress.history] != list(range(1, len(progress.history) + 1)):
        raise ValueError("its epochs are not in order")
    if progress.begun and len(progress.begun["losses"]) != progress.begun["step"]:
        raise ValueError("it does not say how far its epoch is")
    if progress.best is not None:
        parts.model.load_state_dict(progress.best)  # do they fit?
    parts.model.load_state_dict(state["model"])
    if parts.average:
        parts.average.load_state_dict(state["average"])
    load_adam(parts.optimizer, state["optimizer"])
    has_stepped = progress.history or (progress.begun and progress.begun["step"])
    for parameter in parts.model.parameters() if has_stepped else ():  # Adam has none before
        moments = [parts.optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")]
        if any(moment.shape != parameter.shape for moment in moments):
            raise ValueError("Adam's state has other shapes than the weights")
    parts.scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["rng"])
    if parts.device.type == "cuda" and state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"], parts.device)
    return progress


def load(path: Path) -> dict:
    """What was saved in `path`, on the CPU. Raises some exception if it is not as it was saved."""
    body = path.read_bytes()
    if body[-64:] != digest_of(body[:-64]):
        raise ValueError("it is damaged or incomplete: its sha256 is not the one at its end")
    return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)


def load_weights(path: Path) -> dict:
    """A best.pt, or a state_dict that torch.save wrote, which does not end with its sha256."""
    if path.read_bytes()[-66:-64] == LENGTH:
        return load(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def serialized(state: dict) -> memoryview:
    """The bytes of a .pt file, which are a zip archive, with their sha256 as its comment.

    torch.load looks at no checksum, and those of the archive leave out its directory, where a
    single bit makes PyTorch take a tensor's record for a folder and not read it.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with buffer.getbuffer() as body:
        body[-2:] = LENGTH  # an archive ends with the length of its comment
        digest = digest_of(body)
    buffer.seek(0, io.SEEK_END)
    buffer.write(digest)
    return buffer.getbuffer()


def digest_of(body: bytes | memoryview) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()


class Saver:
    """Writes checkpoints while training goes on, for on a large GPU an epoch is soon over.

    with Saver(device) as save:
        save({path: state or text, ...})    # written in this order, by temporary file and rename

    The last.pt that is there is kept as prev.pt.

    A save first waits for the one before, and leaving the block waits for the last. What went wrong
    in writing, such as a full disk, is raised by the wait. `seconds`: what waiting and copying took
    so far, during which nothing is trained.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.pending: Future | None = None
        self.seconds = 0.0

    def __enter__(self):
        self.pool = ThreadPoolExecutor(max_workers=1)
        return self

    def __call__(self, files: dict[Path, dict | str]) -> None:
        start = time.perf_counter()
        self.wait()
        # The next step changes the originals. On a GPU first a quick copy there, while training
        # waits; write() then brings that to the CPU beside the training.
        copies = copied(files, self.device)
        cuda = self.device.type == "cuda"
        copies_made = torch.cuda.current_stream(self.device).record_event() if cuda else None
        self.pending = self.pool.submit(self.write, copies, copies_made)
        self.seconds += time.perf_counter() - start

    def write(self, files: dict[Path, dict | str], copies_made: torch.cuda.Event | None) -> None:
        if copies_made:
            stream = torch.cuda.Stream(self.device)
            stream.wait_event(copies_made)
            with torch.cuda.stream(stream):
                files = copied(files, torch.device("cpu"))
        for path, content in files.items():
            body = content if isinstance(content, str) else serialized(content)
            previous = path.with_name("prev.pt") if path.name == "last.pt" else None
            write_atomically(path, body, previous)

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
