"""Atomic writes: a reader finds a whole file or none.

`torch.save` or `write_text` to the final name leaves half a file if the process is killed or the
disk is full. All files but TensorBoard's event files are written by `write_atomically`.
"""

import errno
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kit.command_line import in_one_line

SMALL = 2**26  # bytes, far above any small file of a run
# The errors of network and shared folders without locks. EBADF: NFS only locks what is open for
# writing, which a folder cannot be.
NO_LOCKS = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EBADF)


def write_atomically(path: Path, body: bytes | str, previous: Path | None = None) -> None:
    """Write `body` (text as UTF-8) to `path` by temporary file, fsync and rename.

    previous: where to keep the old content of `path`. Missing folders are created. Raises OSError
    (disk full, no permission, ...), with `path` untouched and no temporary file left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(body.encode(errors="backslashreplace") if isinstance(body, str) else body)
            if path.exists():
                before = path.stat()
                with suppress(OSError):  # some shares have no modes; only root changes owners
                    os.fchmod(file.fileno(), before.st_mode)
                    os.fchown(file.fileno(), before.st_uid, before.st_gid)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk names no file
        raise
    with suppress(OSError):  # some file systems lack this; the rename is what counts
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # file names, too, need an fsync
        finally:
            os.close(folder)


def remove(folder: Path, *patterns: str) -> None:
    """Deletes the files in `folder` that match, one pattern after the other."""
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        if not path.is_dir():
            path.unlink(missing_ok=True)


def read_small(path: Path) -> bytes:
    """A small file's bytes. Raises OSError, also if it is too large, or a pipe (which blocks)."""
    if (size := path.stat().st_size) > SMALL:
        raise OSError(f"{path} has {size:,} bytes")
    if not path.is_file():
        raise OSError(f"{path} is no file")
    return path.read_bytes()


def fits(value, kind) -> bool:
    """kind: a type, (min, max) of a number, a range of integers, [kind] of a list's items,
    {str: kind} of a dict's values, or a predicate."""
    if isinstance(kind, tuple):
        return type(value) in (int, float) and kind[0] <= value <= kind[1]  # not NaN or inf
    if isinstance(kind, range):
        return type(value) is int and value in kind
    if isinstance(kind, list):
        return type(value) is list and all(fits(each, kind[0]) for each in value)
    if isinstance(kind, dict):
        return type(value) is dict and all(fits(each, kind[str]) for each in value.values())
    return type(value) is kind if isinstance(kind, type) else kind(value)


def maybe(kind):
    """A kind that may be absent or null."""
    return lambda value: value is None or fits(value, kind)


def check(content: dict, kinds: dict) -> dict:
    """Returns `content`, or raises an exception that names a missing or invalid value."""
    for key, kind in kinds.items():
        if not fits(content.get(key), kind):
            raise ValueError(f"{key} is {content.get(key)}")
    return content


def read_json(path: Path, kinds: dict | None = None):
    """The object in a .json file, or the list of objects in a .jsonl file. Raises ValueError with
    the file's name if a key of `kinds` is missing or invalid."""
    try:
        body = read_small(path)
        lines = body.splitlines() if path.suffix == ".jsonl" else [body]
        found = [check(json.loads(line), kinds or {}) for line in lines]
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{path.name}: {in_one_line(error)}") from error
    return found if path.suffix == ".jsonl" else found[0]


def write_json(path: Path, content) -> None:
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def check_writable(folder: Path, advice: str = "choose another --out") -> None:
    """Creates the folder if needed. Raises OSError: before long work, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError
    except OSError as error:
        reason = f" ({error.strerror})" if error.strerror else ""
        raise PermissionError(f"{folder} cannot be written{reason}: {advice}") from None


def say_no_locks(folder: Path, error: OSError) -> None:
    """Prints a note if the file system has no locks; raises any other error."""
    if error.errno not in NO_LOCKS:
        raise error
    print(f"note: {folder} has no locks: let no other process write there", file=sys.stderr)


@contextmanager
def locked(folder: Path, *names: str) -> Iterator[None]:
    """Locks the folder for this process; waits while another one has the lock.

    names: patterns of the files to write; temporary files of a killed process are deleted.
    The folder itself is locked, so nothing is left in it, however the process ends.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting: another process is at work on {folder}", file=sys.stderr, flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            say_no_locks(folder, error)
        remove(folder, *(f".{name}.tmp*" for name in names))
        yield
    finally:
        os.close(descriptor)
