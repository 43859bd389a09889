"""A run's folder: is it this run's, and what is saved in it.

    RUNS/<dataset>/<recipe>/<model>/seed<k>/
        config.json env.json metrics.jsonl best.pt last.pt test_predictions.npy test_labels.npy
        result.json

Every file is written by temporary file and rename, `result.json` last: its presence means that the
run is complete. The .pt files are the business of checkpoint.py.
"""

import io
import json
from pathlib import Path

import numpy as np
import torch

from files import write_atomically

# These settings may differ when a run is taken up again; any other makes it another run.
MAY_DIFFER = {
    "command", "data_dir", "runs", "device", "target_acc", "overwrite", "dry_run",
    "self_check",
}  # fmt: skip


class RunError(RuntimeError):
    """The run cannot go on. The message says in one line why and what to do."""


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
    """Deletes what a killed process left behind of a file it was writing."""
    for path in folder.glob(".*.tmp"):
        path.unlink()


def clear(folder: Path) -> None:
    """Deletes the files in `folder`, if it exists; the mark of completion goes first."""
    (folder / "result.json").unlink(missing_ok=True)
    for path in folder.glob("*"):
        if not path.is_dir():  # a folder there is not a run's
            path.unlink()


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
