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

from kit.files import write_atomically

# These settings may differ when a run is taken up again; any other makes it another run.
MAY_DIFFER = {
    "command", "data_dir", "runs", "device", "target_acc", "overwrite", "keep_last", "dry_run",
    "self_check",
    "overrides", "quick", "base_model",  # these follow from others
}  # fmt: skip


class RunError(RuntimeError):
    """The run cannot go on. The message says in one line why and what to do."""


@contextlib.contextmanager
def locked(folder: Path):
    """Within the block no other process gets to be at work in `folder`; it is made if need be.

    The lock is the system's, on the file .lock: it ends with the process, whatever ends that.
    Folders made for it go again if nothing was put in. Raises RunError if another process has it.
    The file goes with its holder, so a process may get the lock on one that is no longer there,
    while a third has made, and locked, a new one.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise BlockingIOError
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
            with contextlib.suppress(OSError):  # rmdir raises at the first that is not empty
                for empty in made:
                    empty.rmdir()


def check_in_place(folder: Path, inode: int) -> None:
    """Raises RunError unless `folder` is still the one that had `inode`."""
    if not folder.exists() or folder.stat().st_ino != inode:
        raise RunError(
            f"{folder} was moved or deleted while its run was at work: the same command goes on "
            "with what there is of it, or starts anew"
        )


def check_same_run(folder: Path, config: dict, there: dict) -> None:
    """Raises RunError unless `there`, the settings of the epochs in `folder`, are `config`."""
    for key in sorted(config.keys() - MAY_DIFFER):
        if there.get(key) != config[key]:
            raise RunError(
                f"{folder} holds a run with {key} = {there.get(key)}, this one has {config[key]}: "
                "use --overwrite to discard that run, or another --runs folder"
            )


def changes_since(folder: Path, sha256: dict[str, str], device: str | None = None) -> list[str]:
    """What is no longer as in the folder's env.json, in words, after what it tells itself."""
    try:
        then = read_json(folder / "env.json", sha256=dict, device=str)
    except RunError as error:
        return [f"its env.json is damaged: {error.__cause__}"]
    edited = [name for name in sha256 if sha256[name] != then["sha256"].get(name)]
    changes = list(map(str, then.get("changes") or []))
    if edited:
        changes.append(f"{', '.join(edited)} edited since")
    if device not in (None, then["device"]):
        changes.append(f"{then['device']} before, {device} since")
    return changes


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
    unneeded = [folder / "prev.pt", *folder.glob("*.pt.corrupt")]
    if not keep_last:
        unneeded.append(folder / "last.pt")
    for path in unneeded:
        if path.exists():  # on a read-only disk even what is not there cannot be deleted
            path.unlink()


def read_json(path: Path, advice: str = "use --overwrite to start anew", **kinds: type) -> dict:
    """The object in `path`. Raises RunError unless it has a value of its kind under each key."""
    try:
        content = json.loads(path.read_text())
        for key, kind in kinds.items():
            if not isinstance(content[key], kind):
                raise TypeError(f"{key} is {content[key]}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{path} is damaged ({error}): {advice}") from error
    return content


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def metrics_text(history: list[dict]) -> str:
    """metrics.jsonl: one JSON object a line."""
    return "".join(json.dumps(row) + "\n" for row in history)


def write_classes(path: Path, classes: torch.Tensor, n_classes: int) -> None:
    buffer = io.BytesIO()
    kind = np.uint8 if n_classes <= 256 else np.uint16
    np.save(buffer, classes.cpu().numpy().astype(kind))
    write_atomically(path, buffer.getbuffer())
