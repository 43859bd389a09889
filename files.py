"""Writing files so that a reader finds the whole of a file or none of it.

`torch.save` or `write_text` straight onto the final name leaves half a file behind when the process
is killed or the disk is full. Everything this project writes, TensorBoard's event files aside,
goes through `write_atomically`.
"""

import os
import tempfile
from pathlib import Path


def write_atomically(path: Path | str, body: bytes | str) -> None:
    """Write `body` (text as UTF-8) to `path` by temporary file, fsync and rename.

    Missing folders are made. Raises OSError (disk full, no permission, ...); the previous content
    of `path` is then untouched and no temporary file is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"
    )
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(body.encode() if isinstance(body, str) else body)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp gives 0600: results are for others to read too
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
