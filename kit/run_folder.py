"""The files of a run: whose they are, whether they are whole, and which of them may go.

    RUNS/<dataset>/<recipe>/<model>/seed<k>/
        config.json env.json metrics.jsonl best.pt test_predictions.npy test_labels.npy result.json
        last.pt prev.pt .lock                   while it runs

Every file is written by temporary file and rename, `result.json` last: its presence means that the
run is complete.
"""

import io
import json
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from kit.command_line import UserError
from kit.files import write_atomically

# These settings may differ when a run is resumed; any other makes it another run.
MAY_DIFFER = {
    "command", "data_dir", "runs", "device", "target_acc", "overwrite", "keep_last", "dry_run",
    "overrides", "quick", "base_model", "dataset_name",  # these follow from others
}  # fmt: skip
NOT_USED = (None, 0, False, "half")  # how config.json says so


def lock(folder: Path, stack: ExitStack) -> None:
    """Until `stack` is closed no other process trains in `folder`, which is made if need be.

    The lock ends with the process, whatever ends that. Folders made for it go again if they stay
    empty. Raises UserError if another process has the lock.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)

    def remove_empty():
        with suppress(OSError):  # rmdir raises at the first that is not empty
            for path in made:
                path.rmdir()

    stack.callback(remove_empty)
    try:
        stack.enter_context(FileLock(folder / ".lock", timeout=0))
    except Timeout:
        raise UserError(
            f"another process is training in {folder}: wait for it, or use another --runs folder"
        ) from None
    stack.callback((folder / ".lock").unlink, missing_ok=True)  # while it is still held


def differing_setting(there: dict, config: dict, ignore: set[str] = frozenset()) -> str | None:
    """The first setting that makes `config` another run than `there`, in words; None: the same."""
    for key in sorted(config.keys() - MAY_DIFFER - ignore):
        before, now = there.get(key), config[key]
        if before != now and not (before in NOT_USED and now in NOT_USED):
            return f"{key} = {before}, this one has {now}"
    return None


def refuse_another_run(folder: Path, there: dict, config: dict, ignore=frozenset()) -> None:
    """Raises UserError unless `there`, the settings in `folder`, are those of this run."""
    if different := differing_setting(there, config, ignore):
        raise UserError(
            f"{folder} holds a run with {different}: use --overwrite to discard that run, or "
            "another --runs folder"
        )


def changes_since(folder: Path, env: dict) -> list[str]:
    """In what `env` (the sha256 of scripts, device, torch) differs from env.json, in words."""
    try:
        then = json.loads((folder / "env.json").read_text())
        changes = list(map(str, then.get("changes") or []))  # of earlier resumptions
        hashes = env["sha256"]
        edited = [name for name in hashes if hashes[name] != then["sha256"].get(name)]
        changes += [f"{', '.join(edited)} edited since"] if edited else []
        for key in ("device", "torch"):
            if env.get(key, then[key]) != then[key]:
                changes.append(f"{key} {then[key]} before, {env[key]} since")
        return changes
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return [f"its env.json is damaged: {error}"]


def in_brackets(changes: list[str]) -> str:
    return f" ({'; '.join(changes)}; --overwrite starts from scratch)" if changes else ""


def read_json(path: Path, advice: str = "use --overwrite to start from scratch", **kinds) -> dict:
    """The object in `path`. Raises UserError unless it has a value of its kind under each key."""
    try:
        content = json.loads(path.read_text())
        for key, kind in kinds.items():
            if not isinstance(content[key], kind):
                raise TypeError(f"{key} is {content[key]}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): {advice}") from error
    return content


def print_result(result: dict) -> None:
    print(
        f"test accuracy {result['test_acc']:.2f}% with the best weights (epoch "
        f"{result['best_epoch']}, validation {result['val_acc']:.2f}%), "
        f"{result['test_acc_last']:.2f}% with the last; epochs: {result['epochs_run']}, training: "
        f"{result['train_seconds']:.0f} s{'; a smoke test, not a result' * result['quick']}"
    )


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def write_array(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_atomically(path, buffer.getbuffer())


def remove_strays(folder: Path) -> None:
    """What a killed process left of a file it was writing, and its curves, which may lack the last
    epochs: they are drawn again from the history."""
    for path in [*folder.glob(".*.tmp"), *folder.glob("events.out.tfevents.*")]:
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
