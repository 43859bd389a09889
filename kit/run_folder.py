"""The files of a run: whose they are, whether they are whole, and which of them may go.

    RUNS/<dataset>/<recipe>/<model>/seed<k>/
        config.json env.json metrics.jsonl best.pt test_predictions.npy test_labels.npy result.json
        last.pt prev.pt .lock                   while it runs

Every file is written by temporary file and rename, `result.json` last: its presence means that the
run is complete.
"""

import io
import json
import os
from contextlib import ExitStack, suppress
from pathlib import Path

from kit.command_line import UserError
from kit.files import read_small, say_no_locks, write_atomically
from kit.identity import edited

import numpy as np
from filelock import FileLock, Timeout


def lock(folder: Path, stack: ExitStack) -> None:
    """Until `stack` is closed no other process trains in `folder`, which is made if need be.

    The lock ends with the process, whatever ends that. Folders made for it go again if they stay
    empty. Raises UserError if another process has the lock; under run_all.sh waits for it instead.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)

    def remove_empty():
        with suppress(OSError):  # rmdir raises at the first that is not empty
            for path in made:
                path.rmdir()

    stack.callback(remove_empty)
    if os.environ.get("WAIT_FOR_RUNS") and is_locked(folder):
        print(f"waiting: another process is training in {folder}", flush=True)
        while True:
            with suppress(FileNotFoundError):  # a process that has written nothing takes it along
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(folder / ".lock"))
                break
    else:
        try:
            stack.enter_context(FileLock(folder / ".lock", timeout=1))
        except Timeout:
            advice = "wait for it, or use another --runs folder"
            raise UserError(f"another process is training in {folder}: {advice}") from None
        except OSError as error:
            say_no_locks(folder, error)
    stack.callback((folder / ".lock").unlink, missing_ok=True)  # while it is still held


def is_locked(folder: Path) -> bool:
    """Whether another process is training in it."""
    if not (folder / ".lock").exists():
        return False
    try:
        FileLock(folder / ".lock").acquire(timeout=0).lock.release()
    except Timeout:
        return True
    except OSError:
        pass  # whoever locks it will say what is wrong
    return False


def changes_since(folder: Path, env: dict) -> list[str]:
    """In what `env` (scripts, device, torch, variables) differs from env.json, in words."""
    try:
        then = json.loads(read_small(folder / "env.json"))
        changes = list(map(str, then.get("changes") or []))  # of earlier resumptions
        hashes = then.get("sha256") or {}
        if scripts := edited(hashes, env["sha256"]):
            changes.append(f"{', '.join(scripts)} edited since" if hashes else "by unknown code")
        for key in ("device", "torch", "numpy"):
            if then.get(key) and env.get(key, then[key]) != then[key]:
                changes.append(f"{key} {then[key]} before, {env[key]} since")
        there = then.get("variables") or {}
        for key, now in (env.get("variables") or {}).items():
            if key in there and there[key] != now:
                changes.append(f"{key} {there[key] or 'unset'} before, {now or 'unset'} since")
        return changes
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        return [f"its env.json is damaged: {error}"]


def write_env(folder: Path, env: dict, mode: str) -> None:
    """env.json, and in it the mode of the steps; of a resumed run, whether that has changed."""
    if "changes" in env:
        with suppress(UserError):  # a damaged one is among the changes
            there = read_json(folder / "env.json")
            env |= {"shared_gpu": True} if there.get("shared_gpu") else {}  # at any time
            before = there.get("mode", mode)
            env["changes"] += [f"mode {before} before, {mode} since"] * (before != mode)
    write_json(folder / "env.json", env | {"mode": mode})


def in_brackets(changes: list[str]) -> str:
    return f" ({'; '.join(changes)}; --overwrite starts from scratch)" if changes else ""


def read_json(path: Path, advice: str = "use --overwrite to start from scratch", **kinds) -> dict:
    """The object in `path`. Raises UserError unless it has a value of its kind under each key."""
    try:
        content = json.loads(read_small(path))
        for key, kind in kinds.items():
            if not isinstance(content[key], kind):
                raise TypeError(f"{key} is {content[key]}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): {advice}") from error
    return content


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def write_array(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_atomically(path, buffer.getbuffer())


def remove_strays(folder: Path) -> None:
    """What a killed process left of a file it was writing, and its curves, which may lack the last
    epochs: they are drawn again from the history."""
    for path in [*folder.glob(".*.tmp*"), *folder.glob("events.out.tfevents.*")]:
        path.unlink()


def clear(folder: Path) -> None:
    """Deletes the files in `folder`; the mark of completion goes first."""
    (folder / "result.json").unlink(missing_ok=True)
    for path in folder.iterdir():
        if not path.is_dir() and path.name != ".lock":  # a folder there is not a run's
            path.unlink()


def discard_states(folder: Path, keep_last: bool) -> None:
    """Deletes what only an unfinished run needs."""
    unneeded = [folder / "prev.pt", *folder.glob("*.pt.corrupt")]
    for path in unneeded if keep_last else [*unneeded, folder / "last.pt"]:
        path.unlink(missing_ok=True)
