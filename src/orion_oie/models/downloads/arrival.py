"""The map of a file's blocks that have arrived, shared by its writer and its readers.

A file that is being fetched has its full size under the name `NAME.part`. Beside it lies
`NAME.part.map`, with one byte for each block. The map is mapped into memory: it survives when its
process is killed, and a worker in another process sees a block the moment it is marked. The map
knows blocks and bytes, not their source.
"""

import enum
import json
import mmap
from pathlib import Path
from struct import Struct
from typing import Any

from orion_oie.models.files import atomic_write

BLOCK_BYTES = 256 << 10

_HEADER = Struct("<8sIIQB")
_MAGIC = b"ORIONMAP"
_VERSION = 1
_STATE_AT = _HEADER.size - 1
_FACTS_AT = 32
_HEADER_BYTES = 4096


class ArrivalState(enum.IntEnum):
    """The state of a file that is fetched."""

    ARRIVING = 0  # blocks are missing, or not checked yet
    COMPLETE = 1  # all bytes have arrived, and their digest is right
    FAILED = 2  # the download has ended without all bytes


class ArrivalMap:
    """The blocks of a file of `size` bytes that have arrived. `facts` identify the content.

    One process marks blocks, any number of processes read. Make one by `create` or `open`.
    """

    def __init__(self, path: Path, file: Any, *, is_writable: bool) -> None:
        access = mmap.ACCESS_WRITE if is_writable else mmap.ACCESS_READ
        self.path = path
        self._map = mmap.mmap(file.fileno(), 0, access=access)
        self.block_bytes: int
        self.size: int
        if len(self._map) < _HEADER_BYTES:
            raise ValueError("shorter than its header")
        magic, version, self.block_bytes, self.size, state = _HEADER.unpack_from(self._map)
        if magic != _MAGIC or version != _VERSION or self.block_bytes <= 0:
            raise ValueError("not a map of this version")
        self.blocks: int = -(-self.size // self.block_bytes)
        if len(self._map) != _HEADER_BYTES + self.blocks:
            raise ValueError("not as long as its file needs")
        ArrivalState(state)  # raises `ValueError` for any other number
        if self._map[_HEADER_BYTES:].strip(b"\0\1"):
            raise ValueError("marks that are none")
        facts = self._map[_FACTS_AT:_HEADER_BYTES].split(b"\0", 1)[0]
        self.facts: dict[str, Any] = json.loads(facts)
        if not isinstance(self.facts, dict):
            raise ValueError("facts without names")

    @classmethod
    def create(
        cls, path: Path, size: int, facts: dict[str, Any], block_bytes: int = BLOCK_BYTES
    ) -> "ArrivalMap":
        """A new map without any block. Replaces an existing one."""
        said = json.dumps(facts).encode()
        if len(said) >= _HEADER_BYTES - _FACTS_AT:
            raise ValueError(f"facts of {len(said)} bytes do not fit into a map")
        header = _HEADER.pack(_MAGIC, _VERSION, block_bytes, size, ArrivalState.ARRIVING)
        content = header.ljust(_FACTS_AT, b"\0") + said.ljust(_HEADER_BYTES - _FACTS_AT, b"\0")
        atomic_write(path, content + bytes(-(-size // block_bytes)))
        return cls.open(path, is_writable=True)

    @classmethod
    def open(cls, path: Path, *, is_writable: bool = False) -> "ArrivalMap":
        """The existing map of a file. Raises `OSError` when there is none, `ValueError` when it
        is damaged."""
        with path.open("r+b" if is_writable else "rb") as file:
            return cls(path, file, is_writable=is_writable)

    @property
    def state(self) -> ArrivalState:
        return ArrivalState(self._map[_STATE_AT])

    @state.setter
    def state(self, state: ArrivalState) -> None:
        self._map[_STATE_AT] = state

    def mark(self, block: int) -> None:
        """Record that a block is in the file."""
        self._map[_HEADER_BYTES + block] = 1

    def has_block(self, block: int) -> bool:
        return bool(self._map[_HEADER_BYTES + block] == 1)

    def has(self, start: int, end: int) -> bool:
        """True when all bytes from `start` to `end` have arrived."""
        if start >= end:
            return True
        first, last = start // self.block_bytes, (end - 1) // self.block_bytes
        return self._map.find(b"\0", _HEADER_BYTES + first, _HEADER_BYTES + last + 1) < 0

    def contiguous(self, start: int) -> int:
        """The end of the bytes that have arrived without a gap from `start` on."""
        first = _HEADER_BYTES + start // self.block_bytes
        gap = self._map.find(b"\0", first)
        return self.size if gap < 0 else max(start, (gap - _HEADER_BYTES) * self.block_bytes)

    def bounds(self, block: int) -> tuple[int, int]:
        """The offset of a block's first byte, and the one after its last byte."""
        return block * self.block_bytes, min((block + 1) * self.block_bytes, self.size)

    @property
    def arrived_bytes(self) -> int:
        """The number of bytes that have arrived."""
        marks = self._map[_HEADER_BYTES:]
        there = marks.count(1) * self.block_bytes
        if marks and marks[-1] == 1:
            there -= self.blocks * self.block_bytes - self.size
        return there
