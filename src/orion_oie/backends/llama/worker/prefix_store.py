"""A store of prefix states on the disk, so that a new worker does not compute them again.

A stored state is an optimization: an untrusted one counts as missing, and no failure in this module
fails a request. The checksum protects against accidents, not against someone with write access to
the folder; nothing is encrypted. Several processes may use one folder. Nothing native happens in
this module. Needs POSIX.
"""

import errno
import hashlib
import os
import re
import stat
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orion_oie.models.files import TEMPORARY_SUFFIX, replacing

_MAGIC = b"ORIONKV1"  # the last byte is the version of the format
_HEADER = struct.Struct("<8sQQ16s")  # magic, number of tokens, bytes of the state, checksum
_STATE_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{32}\.kv")
_FRESH_NAME = re.compile(rf"\.{_STATE_NAME.pattern}\.\w+{re.escape(TEMPORARY_SUFFIX)}")
_FRESH_AGE_S = 3600
_MAX_PENDING = 4
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # not the fault of the file


def file_identity(paths: Sequence[Path]) -> str:
    """A digest of files, in this order, that does not read gigabytes: it covers the size of each,
    the time of modification, the first MiB, and 64 samples of 4 KiB spread evenly up to the end.

    It misses a change between the samples that keeps the size, if the time is reset or the clock
    of the file system is too coarse. A copy with another time counts as another file. Raises
    `OSError` when a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            digest.update(struct.pack("<Qq", status.st_size, status.st_mtime_ns))
            digest.update(os.pread(file.fileno(), 1 << 20, 0))
            for number in range(1, 65):
                offset = max(status.st_size - 4096, 0) * number // 64
                digest.update(os.pread(file.fileno(), 4096, offset))
    return digest.hexdigest()


class _RefusedError(Exception):
    """The reason why a state is not used, or not written."""


class PrefixStore:
    """The stored states of one model under one set of context parameters.

    `folder` is shared by all models and processes. `identity` names everything that a state depends
    on (files of the model, context parameters, build of llama.cpp): a state is only returned under
    the same identity. `limit_bytes` applies to the whole folder: after each write, the least
    recently used files are removed; with 0, no file is written, read or touched. `on_problem` gets
    a line of text, also on the writer's thread, and must not raise.
    """

    def __init__(
        self,
        folder: Path,
        identity: str,
        limit_bytes: int,
        on_problem: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self._folder = folder
        self._identity = _digest(32, identity.encode())
        self._limit_bytes = limit_bytes
        self._on_problem = on_problem
        self._changed = threading.Condition()
        self._pending: dict[bytes, NDArray[np.uint8]] = {}  # by tokens; the first is being written
        self._writer: threading.Thread | None = None

    def find(self, tokens: Sequence[int]) -> NDArray[np.uint8] | None:
        """The state after exactly these tokens; None when there is none, or none that can be
        trusted: such a file is removed. States that `save` has not written yet are not found."""
        packed = _pack(tokens)
        return self._read(packed, with_state=True) if self._limit_bytes > 0 else None

    def save(self, tokens: Sequence[int], state: NDArray[np.uint8]) -> None:
        """Write a state in the background, unless it is stored already; the bytes are copied before
        this returns. Dropped when it is larger than the limit or too many wait to be written."""
        packed = _pack(tokens)
        if self._limit_bytes > 0 and self._read(packed, with_state=False) is None:
            try:
                self._enqueue(packed, state)
            except (_RefusedError, MemoryError, RuntimeError) as error:  # RuntimeError: no thread
                self._report(packed, f"not written: {error}")

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until nothing is left to write; False when something is after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending, timeout_s)

    def _path(self, packed: bytes) -> Path:
        state_digest = _digest(16, self._identity, packed).hex()
        return self._folder / f"{_digest(8, self._identity).hex()}-{state_digest}.kv"

    def _report(self, packed: bytes, problem: str) -> None:
        self._on_problem(f"stored prefix {self._path(packed)}: {problem}")

    def _read(self, packed: bytes, *, with_state: bool) -> NDArray[np.uint8] | None:
        """The state; without `with_state` an empty one in its place, and its bytes unchecked."""
        path = self._path(packed)
        try:
            with open(path, "rb", opener=_open_safely) as file:
                size, checksum = self._check_header(file, packed)
                state = np.empty(size if with_state else 0, np.uint8)
                if with_state:
                    file.readinto(state.data)
                    if _digest(16, self._identity, packed, state.data) != checksum:
                        raise _RefusedError("its checksum is wrong")
                with suppress(OSError):
                    os.utime(file.fileno())
                return state
        except FileNotFoundError:
            return None
        except (OSError, MemoryError, _RefusedError) as error:
            self._report(packed, f"not used: {error}")
            if not isinstance(error, MemoryError) and getattr(error, "errno", 0) not in _PASSING:
                with suppress(OSError):
                    path.unlink()
                with suppress(OSError):
                    path.rmdir()
            return None

    def _check_header(self, file: BufferedReader, packed: bytes) -> tuple[int, bytes]:
        """Read the header and the tokens; returns the size of the state and its checksum."""
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise _RefusedError("not a regular file")
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or status.st_size > self._limit_bytes:
            raise _RefusedError(f"its size is {status.st_size} bytes")
        magic, token_count, size, checksum = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise _RefusedError("of another format")
        if status.st_size != _HEADER.size + 4 * token_count + size:
            raise _RefusedError(f"its size is {status.st_size} bytes, unlike its header says")
        if 4 * token_count != len(packed) or file.read(len(packed)) != packed:
            raise _RefusedError("of other tokens")
        return size, checksum

    def _enqueue(self, packed: bytes, state: NDArray[np.uint8]) -> None:
        size = _HEADER.size + len(packed) + state.nbytes
        if size > self._limit_bytes:
            raise _RefusedError(f"{size} bytes are more than the limit of {self._limit_bytes}")
        with self._changed:
            if packed in self._pending:
                return
            if len(self._pending) >= _MAX_PENDING:
                raise _RefusedError(f"{_MAX_PENDING} others wait already")
            copy = state.copy()
            if self._writer is None or not self._writer.is_alive():
                self._writer = threading.Thread(
                    target=self._write_all, name="prefix-store", daemon=True
                )
                self._writer.start()
            self._pending[packed] = copy

    def _write_all(self) -> None:
        while True:
            with self._changed:
                if not self._pending:
                    self._writer = None
                    return
                packed, state = next(iter(self._pending.items()))
            try:
                self._write(packed, state)
            except (OSError, MemoryError) as error:
                self._report(packed, f"not written: {error}")
            finally:
                self._trim(self._path(packed).name)
                with self._changed:
                    del self._pending[packed]
                    self._changed.notify_all()

    def _write(self, packed: bytes, state: NDArray[np.uint8]) -> None:
        path = self._path(packed)
        checksum = _digest(16, self._identity, packed, state.data)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(path) as fresh, open(fresh, "xb", opener=_open_private) as file:
            file.write(_HEADER.pack(_MAGIC, len(packed) // 4, state.nbytes, checksum))
            file.write(packed)
            file.write(state.data)

    def _trim(self, kept_name: str) -> None:
        """Reduce the folder to the limit, and remove partial files of writers that were killed."""
        files = []
        with suppress(OSError), os.scandir(self._folder) as entries:
            for entry in entries:
                with suppress(OSError):  # files may vanish at any moment
                    status = entry.stat(follow_symlinks=False)
                    if _STATE_NAME.fullmatch(entry.name) and stat.S_ISREG(status.st_mode):
                        files.append((status.st_mtime_ns, entry.name, status.st_size))
                    age_s = time.time() - status.st_mtime
                    if _FRESH_NAME.fullmatch(entry.name) and age_s > _FRESH_AGE_S:
                        os.unlink(entry.path)
        surplus = sum(size for _, _, size in files) - self._limit_bytes
        for _, name, size in sorted(files):
            if surplus > 0 and name != kept_name:
                with suppress(OSError):
                    (self._folder / name).unlink(missing_ok=True)
                    surplus -= size


def _open_safely(path: str, _flags: int) -> int:
    # Neither through a link, nor waiting for the other end of a pipe.
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)  # a state is a conversation, for its owner alone


def _pack(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, "<i4").tobytes()


def _digest(size: int, *parts: bytes | memoryview) -> bytes:
    digest = hashlib.blake2b(digest_size=size)
    for part in parts:
        digest.update(part)
    return digest.digest()
