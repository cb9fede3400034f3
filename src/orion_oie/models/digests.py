"""SHA-256 digests of local files, each computed once for every version of a file."""

import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from orion_oie.errors import DigestMismatchError

_HASH_BYTES = 1 << 20
_lock = threading.Lock()
_known: dict[tuple[Path, int, int], str] = {}


def check_digests(
    files: Sequence[Path], expected: Sequence[str], check: Callable[[], None] = lambda: None
) -> None:
    """Compare files with their digests; none are expected if `expected` is empty. `check` is called
    between blocks and may raise.

    Raises `DigestMismatchError`.
    """
    for path, digest in zip(files, expected, strict=False):
        found = _digest_of(path, check)
        if found != digest:
            raise DigestMismatchError(
                f"{path} has the SHA-256 {found}, but {digest} is expected: fetch the right file, "
                "or correct 'sha256'",
                path=str(path),
                found=found,
                expected=digest,
            )


def _digest_of(path: Path, check: Callable[[], None]) -> str:
    status = path.stat()
    version = (path, status.st_mtime_ns, status.st_size)
    with _lock:
        if version in _known:
            return _known[version]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BYTES):
            check()
            digest.update(block)
    with _lock:
        _known[version] = digest.hexdigest()
    return digest.hexdigest()
