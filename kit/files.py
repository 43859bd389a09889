"""Writing files so that a reader finds the whole of a file or none of it.

`torch.save` or `write_text` straight onto the final name leaves half a file behind when the process
is killed or the disk is full. Everything this project writes, TensorBoard's event files aside, goes
through `write_atomically`.
"""

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SMALL = 2**26  # bytes, far above what a small file of a run has
_only_read: list[Path] = []


@contextmanager
def only_read(*folders: Path) -> Iterator[None]:
    """Until its end nothing is written below these folders: a PermissionError says so."""
    _only_read.extend(folders)
    try:
        yield
    finally:
        _only_read.clear()


def is_only_read(path: Path) -> bool:
    return any(path.is_relative_to(folder) for folder in _only_read)


def check_allowed(path: Path) -> None:
    if is_only_read(path):
        raise PermissionError(f"nothing is fetched or kept in {path} unless --data-dir names it")


def write_atomically(path: Path | str, body: bytes | str, previous: Path | None = None) -> None:
    """Write `body` (text as UTF-8) to `path` by temporary file, fsync and rename.

    previous: where the content that `path` had is kept. Missing folders are made. Raises OSError
    (disk full, no permission, ...); the content of `path` is then untouched and no temporary file
    is left.
    """
    path = Path(path)
    check_allowed(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(body.encode(errors="backslashreplace") if isinstance(body, str) else body)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say whose
        raise
    with suppress(OSError):  # some file systems lack this; the rename is what counts
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # names of files, too, are on disk only after an fsync
        finally:
            os.close(folder)


def read_small(path: Path) -> bytes:
    """The bytes of one of a run's small files. Raises OSError, also for a pipe, which would be
    waited for, and for what is too large to be one."""
    if (size := path.stat().st_size) > SMALL:
        raise OSError(f"{path} has {size:,} bytes")
    if not path.is_file():
        raise OSError(f"{path} is no file")
    return path.read_bytes()


def check_writable(folder: Path, advice: str = "choose another --out") -> None:
    """Makes the folder where there is none. Raises OSError: before long work, not after."""
    check_allowed(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError
    except OSError as error:
        reason = f" ({error.strerror})" if error.strerror else ""
        raise PermissionError(f"{folder} cannot be written{reason}: {advice}") from None


def say_no_locks(folder: Path, error: OSError) -> None:
    """Raises the error if it is another than that the file system lacks locks."""
    if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
        raise error
    print(f"note: {folder} has no locks: let no other process write there", file=sys.stderr)


@contextmanager
def locked(folder: Path, *names: str) -> Iterator[None]:
    """Until its end no other process is in one of these for the folder; waits for one that is.

    names: patterns of the files that are written now. What a killed process left of them goes.

    It is the folder itself that is locked, so nothing is left in it, whatever ends the process.
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
        for left in (path for name in names for path in folder.glob(f".{name}.tmp*")):
            left.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)
