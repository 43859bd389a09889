"""A run's folder: is it this run's, and what is saved in it.

    RUNS/<dataset>/<recipe>/<model>/seed<k>/
        config.json env.json metrics.jsonl best.pt test_predictions.npy test_labels.npy result.json
        last.pt prev.pt .lock                   while it runs

Every file is written by temporary file and rename, `result.json` last: its presence means that the
run is complete. The .pt files are the business of checkpoint.py.
"""

import contextlib
import fcntl
import io
import json
import os
import socket
from pathlib import Path

import numpy as np
import torch

from files import write_atomically

# These settings may differ when a run is taken up again; any other makes it another run.
MAY_DIFFER = {
    "command", "data_dir", "runs", "device", "target_acc", "overwrite", "keep_last", "dry_run",
    "self_check",
}  # fmt: skip


class RunError(RuntimeError):
    """The run cannot go on. The message says in one line why and what to do."""


@contextlib.contextmanager
def locked(folder: Path):
    """Within the block no other process gets to be at work in `folder`; it is made if need be.

    The lock is the system's, on the file .lock: it ends with the process, whatever ends that.
    Folders made for it go again if nothing was put in. Raises RunError if another process has it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise BlockingIOError  # its holder has just left and taken the file along
        except BlockingIOError:
            file.seek(0)
            raise RunError(
                f"another process is at work in {folder} ({file.read() or 'just now'}): wait for "
                "it, or use another --runs folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # until one that is not empty
                for empty in made:
                    empty.rmdir()


def check_same_run(folder: Path, config: dict, there: dict) -> None:
    """Raises RunError unless `there`, the settings of the epochs in `folder`, are `config`."""
    for key in sorted(config.keys() - MAY_DIFFER):
        if there.get(key) != config[key]:
            raise RunError(
                f"{folder} holds a run with {key} = {there.get(key)}, this one has {config[key]}: "
                "use --overwrite to discard that run, or another --runs folder"
            )


def note_on_edits(folder: Path, sha256: dict[str, str]) -> str:
    """Words on the source files that are no longer those of the folder's env.json, if any."""
    then = read_json(folder / "env.json", "sha256")["sha256"]
    edited = [name for name in sha256 if sha256[name] != then.get(name)]
    return f" ({', '.join(edited)} edited since; --overwrite starts anew)" if edited else ""


def remove_strays(folder: Path) -> None:
    """Deletes what a killed process left behind of a file it was writing, and its curves, which
    may lack the last epochs: they are drawn anew from the history."""
    for path in [*folder.glob(".*.tmp"), *folder.glob("events.out.tfevents.*")]:
        path.unlink()


def clear(folder: Path) -> None:
    """Deletes the files in `folder`, if it exists; the mark of completion goes first."""
    (folder / "result.json").unlink(missing_ok=True)
    for path in folder.glob("*"):
        if not path.is_dir() and path.name != ".lock":  # a folder there is not a run's
            path.unlink()


def discard_states(folder: Path, keep_last: bool) -> None:
    """Deletes what only an unfinished run needs."""
    (folder / "prev.pt").unlink(missing_ok=True)
    if not keep_last:
        (folder / "last.pt").unlink(missing_ok=True)


def read_json(path: Path, *keys: str) -> dict:
    """The object in `path`. Raises RunError if it is none or lacks one of `keys`."""
    try:
        content = json.loads(path.read_text())
        for key in keys:
            content[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}): use --overwrite to start anew") from error
    return content


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def metrics_text(history: list[dict]) -> str:
    """metrics.jsonl: one JSON object a line."""
    return "".join(json.dumps(row) + "\n" for row in history)


def write_classes(path: Path, classes: torch.Tensor) -> None:
    buffer = io.BytesIO()
    np.save(buffer, classes.cpu().numpy().astype(np.uint8))
    write_atomically(path, buffer.getbuffer())
