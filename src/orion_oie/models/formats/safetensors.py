"""The weights in a safetensors file, as 32-bit floats. Reads 32-bit and 16-bit floats only;
writes nothing.

The format: eight bytes with the length of a JSON header, the header with the type, shape and
offsets of each tensor, the tensors. https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orion_oie.errors import ModelCorruptError, ModelError, ModelNotFoundError

_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000  # as in the original reader
_STORED: Mapping[str, Any] = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class Safetensors(Mapping[str, NDArray[np.float32]]):
    """The tensors of a file by name. A tensor is read on access.

    Raises `ModelNotFoundError`, `ModelCorruptError`; access raises `ModelError` for a tensor of
    other numbers than 32-bit and 16-bit floats.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._bytes: NDArray[np.uint8] = np.memmap(path, np.uint8, "r")
        except FileNotFoundError as error:
            raise ModelNotFoundError(f"there is no file {path}", path=str(path)) from error
        except ValueError as error:  # an empty file cannot be mapped
            raise self._corrupt("it is empty") from error
        self._start, self._header = self._read_header()

    def _read_header(self) -> tuple[int, dict[str, Any]]:
        length = int.from_bytes(self._bytes[:_LENGTH_BYTES].tobytes(), "little")
        start = _LENGTH_BYTES + length
        if len(self._bytes) < _LENGTH_BYTES or start > len(self._bytes):
            raise self._corrupt(f"it has {len(self._bytes)} bytes, its header would end at {start}")
        if length > _MOST_HEADER_BYTES:
            raise self._corrupt(f"its header has {length} bytes")
        try:
            header = json.loads(self._bytes[_LENGTH_BYTES:start].tobytes())
        except ValueError as error:
            raise self._corrupt(f"its header is not JSON: {error}") from error
        if not isinstance(header, dict):
            raise self._corrupt("its header is not a JSON object")
        header.pop("__metadata__", None)
        return start, header

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        entry = self._header[name]
        try:
            kind, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
            start, end = (self._start + int(offset) for offset in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._corrupt(f"its header says no place of {name}") from error
        if kind not in _STORED:
            raise ModelError(
                f"{self._path}: {name} is of type {kind}; {', '.join(_STORED)} can be read",
                path=str(self._path),
            )
        stored = np.dtype(_STORED[kind])
        is_inside = self._start <= start <= end <= len(self._bytes)
        is_right = min(shape, default=0) >= 0 and end - start == prod(shape) * stored.itemsize
        if not (is_inside and is_right):
            raise self._corrupt(
                f"{name}, {kind} of shape {shape}, lies in bytes {start} to {end} of "
                f"{len(self._bytes)}"
            )
        numbers = np.frombuffer(self._bytes, stored, prod(shape), start).reshape(shape)
        if kind == "BF16":  # the upper half of a float32
            return (numbers.astype(np.uint32) << 16).view(np.float32)
        return numbers.astype(np.float32, copy=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)

    def _corrupt(self, why: str) -> ModelCorruptError:
        return ModelCorruptError(
            f"{self._path} is no whole safetensors file: {why}", path=str(self._path)
        )
