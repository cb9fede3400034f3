"""Files that are replaced as a whole: a reader sees the old content or the new one, never a part.

The new content is written to a file in the same folder, which then takes the name of the old one.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

TEMPORARY_SUFFIX = ".new"


@contextlib.contextmanager
def replacing(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """Yield the path of a temporary file; it replaces `path` when the block succeeds.

    The block creates that file, and after an exception it is removed. `sync` writes the content to
    the disk before the file gets its name, so that it survives a power failure.
    """
    # A random name: other threads and processes may be replacing the same file.
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        yield fresh
        if sync:
            with fresh.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one that counts
            fresh.unlink(missing_ok=True)
        raise


def atomic_write(path: Path, data: str | bytes, *, sync: bool = False) -> None:
    """Replace the content of a file, as in `replacing`. Text is written as UTF-8."""
    content = data.encode() if isinstance(data, str) else data
    with replacing(path, sync=sync) as fresh:
        fresh.write_bytes(content)
