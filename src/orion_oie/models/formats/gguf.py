"""The header of a GGUF file, read strictly and without llama.cpp.

llama.cpp may abort the process on a damaged file, so nothing is handed to it before this reader
has accepted the header: every count, length and offset is checked against the size of the file
before it is used, and every fault is a `ModelCorruptError` that names the number. Ranged reads
are all it needs, so a file that is still remote can be read too.

It deliberately does not read tensor data (only a digest can vouch for that) and does not decode
arrays such as the vocabulary: it steps over them and remembers where they are.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import os
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from struct import Struct

from orion_oie.errors import ModelCorruptError, ModelNotFoundError
from orion_oie.models.formats.cursor import (
    U32,
    U64,
    Cursor,
    ReadAt,
    quoted,
)
from orion_oie.models.formats.ggml_types import (
    FILE_TYPES,
    TENSOR_TYPES,
)
from orion_oie.models.formats.impostors import (
    SNIFFED_BYTES,
    impostor,
)

_MIN_FILE_BYTES = 24
_MIN_KEY_VALUE_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_ENTRY_BYTES = 8 + 4 + 4 + 8
_MAX_TENSOR_NAME_BYTES = 63
_MAX_DIMENSIONS = 4
_MAX_ELEMENTS = 2**63 - 1
_DEFAULT_ALIGNMENT = 32
_FILE_TYPE_GUESSED = 1024

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {
    0: ("uint8", Struct("<B")),
    1: ("int8", Struct("<b")),
    2: ("uint16", Struct("<H")),
    3: ("int16", Struct("<h")),
    4: ("uint32", U32),
    5: ("int32", Struct("<i")),
    6: ("float32", Struct("<f")),
    _BOOL: ("bool", Struct("<B")),
    10: ("uint64", U64),
    11: ("int64", Struct("<q")),
    12: ("float64", Struct("<d")),
}

_EMBEDDING_ARCHITECTURES = ("gemma-embedding", "llama-embed", "t5encoder")


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """An array in the metadata, not decoded; `offset` is that of its first element."""

    type: str
    count: int
    offset: int


MetadataValue = int | float | bool | str | ArrayInfo


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor. `shape` is in ggml's order, the fastest dimension first; `offset` is absolute."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    type_name: str
    offset: int
    n_bytes: int

    @property
    def n_elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class GGUFHeader:
    """The header of a GGUF file; `version` is that of the format.

    A missing text is "", a missing number 0. Of a split model only the first file has the metadata
    of the model, and `tensors` are those of this file alone.
    """

    version: int
    file_size: int
    data_offset: int
    alignment: int
    metadata: Mapping[str, MetadataValue]
    tensors: tuple[TensorInfo, ...]

    @property
    def architecture(self) -> str:
        return self._text("general.architecture")

    @property
    def name(self) -> str:
        return self._text("general.name")

    @property
    def model_version(self) -> str:
        return self._text("general.version")

    @property
    def license(self) -> str:
        return self._text("general.license")

    @property
    def block_count(self) -> int:
        return self._number(f"{self.architecture}.block_count")

    @property
    def context_length(self) -> int:
        return self._number(f"{self.architecture}.context_length")

    @property
    def embedding_length(self) -> int:
        return self._number(f"{self.architecture}.embedding_length")

    @property
    def vocabulary_size(self) -> int:
        """The number of tokens in the tokenizer's list."""
        return self.array_length("tokenizer.ggml.tokens")

    @property
    def chat_template(self) -> str | None:
        return self._text("tokenizer.chat_template") or None

    @property
    def stated_quantization(self) -> str:
        """The file type, such as "Q4_K_M"; empty if the header does not state one."""
        file_type = self._number("general.file_type", default=-1)
        return FILE_TYPES.get(file_type & ~_FILE_TYPE_GUESSED, "") if file_type >= 0 else ""

    @property
    def quantization(self) -> str:
        """The file type, such as "Q4_K_M", else the type of most tensors."""
        if self.stated_quantization:
            return self.stated_quantization
        common = Counter(tensor.type_name for tensor in self.tensors).most_common(1)
        return common[0][0] if common else ""

    @property
    def parameter_count(self) -> int:
        return sum(tensor.n_elements for tensor in self.tensors)

    @property
    def split_no(self) -> int:
        """The index of this file among the splits of its model, from 0."""
        return self._number("split.no")

    @property
    def split_count(self) -> int:
        return self._number("split.count", default=1)

    @property
    def is_split(self) -> bool:
        return self.split_count > 1

    @property
    def role(self) -> str:
        """What the file is for: "model", or one of "mmproj", "adapter", "imatrix",
        "control vector" and "vocabulary", none of which can answer."""
        kind = self._text("general.type").lower()
        if kind in ("mmproj", "adapter", "imatrix"):
            return kind
        if self.architecture == "clip":
            return "mmproj"
        if self.architecture == "controlvector":
            return "control vector"
        # The first file of a split model may hold nothing but the metadata.
        return "vocabulary" if not self.tensors and not self.is_split else "model"

    @property
    def is_embedding_model(self) -> bool:
        return (
            "bert" in self.architecture
            or self.architecture in _EMBEDDING_ARCHITECTURES
            or self._number(f"{self.architecture}.pooling_type") > 0
        )

    def number(self, name: str) -> int:
        """The number under `name` in the metadata of the architecture; 0 if there is none."""
        return self._number(f"{self.architecture}.{name}")

    def array_length(self, key: str) -> int:
        """The number of elements of the array under `key`; 0 if there is none."""
        value = self.metadata.get(key)
        return value.count if isinstance(value, ArrayInfo) else 0

    def _text(self, key: str) -> str:
        value = self.metadata.get(key)
        return value if isinstance(value, str) else ""

    def _number(self, key: str, default: int = 0) -> int:
        value = self.metadata.get(key)
        return value if type(value) is int and value >= 0 else default


def read_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """Read the header of a local file.

    Raises `ModelNotFoundError` when the file is missing or cannot be read, `ModelCorruptError`
    when it is there but is no sound GGUF file.
    """
    name = os.fspath(path)
    try:
        # Opening a pipe would block, so the kind is looked at first.
        mode = os.stat(name).st_mode
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "no regular file"
            raise ModelCorruptError(
                f"{name}: it is {kind}, not a GGUF file: give the path of the .gguf file",
                path=name,
            )
        with open(name, "rb") as file:

            def read_at(offset: int, length: int) -> bytes:
                file.seek(offset)
                return file.read(length)

            return parse_header(read_at, os.fstat(file.fileno()).st_size, name)
    except FileNotFoundError as error:
        raise ModelNotFoundError(
            f"{name}: there is no such file: check the path, or fetch the model", path=name
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelNotFoundError(
            f"{name}: it cannot be read ({reason}): check the path and the permissions",
            path=name,
        ) from error


def parse_header(read_at: ReadAt, file_size: int, name: str) -> GGUFHeader:
    """Parse a header through ranged reads; `name` is the path or address that errors mention.

    Raises `ModelCorruptError` for any content that is not a sound GGUF file. What `read_at`
    raises passes through.
    """
    cursor = Cursor(read_at, file_size, name)
    version = _parse_version(cursor)
    n_tensors = cursor.count("tensors", _MIN_TENSOR_ENTRY_BYTES)
    n_keys = cursor.count("metadata keys", _MIN_KEY_VALUE_BYTES)
    metadata = _parse_metadata(cursor, n_keys)
    alignment = _parse_alignment(cursor, metadata)
    entries = _parse_tensor_table(cursor, n_tensors)
    # Without tensors there is no data section, and the padding before it may be missing.
    data_offset = cursor.pos + (-cursor.pos % alignment if entries else 0)
    tensors = tuple(_place_tensor(cursor, entry, data_offset, alignment) for entry in entries)
    _check_end(cursor, tensors)
    _check_overlap(cursor, tensors)
    return GGUFHeader(version, file_size, data_offset, alignment, metadata, tensors)


def _parse_version(cursor: Cursor) -> int:
    if cursor.size == 0:
        cursor.fail("the file is empty", "download it again")
    start = cursor.take(min(4, cursor.size), "the magic number")
    if start != b"GGUF":
        rest = min(SNIFFED_BYTES, cursor.size) - len(start)
        found = impostor(start + cursor.take(rest, "the start of the file"))
        if found is not None:
            cursor.fail(f"this is {found.what}", found.advice, offset=0)
        cursor.fail(f"it starts with {start!r}, not with b'GGUF'", offset=0)
    if cursor.size < _MIN_FILE_BYTES:
        cursor.fail(
            f"the file has {cursor.size} bytes; a GGUF header needs at least {_MIN_FILE_BYTES}",
            "download it again",
        )
    start = cursor.take(4, "the version")
    version, swapped = (int.from_bytes(start, order) for order in ("little", "big"))
    if swapped in (1, 2, 3):
        cursor.fail(
            f"this is a big-endian GGUF file of version {swapped}",
            "convert the model again as little-endian",
            version=swapped,
        )
    if version not in (2, 3):
        cursor.fail(
            f"GGUF version {version} is not supported, only 2 and 3 are",
            "convert the model with a current llama.cpp",
            version=version,
        )
    return version


def _parse_metadata(cursor: Cursor, n_keys: int) -> dict[str, MetadataValue]:
    metadata: dict[str, MetadataValue] = {}
    for index in range(n_keys):
        start = cursor.pos
        key = cursor.string(f"metadata key {index}")
        if not key:
            cursor.fail(f"metadata key {index} is empty", offset=start)
        if key in metadata:
            cursor.fail(f"metadata key {index} repeats {quoted(key)}", offset=start)
        metadata[key] = _parse_value(cursor, f"the value of {quoted(key)}")
    return metadata


def _parse_value(cursor: Cursor, what: str) -> MetadataValue:
    start = cursor.pos
    kind = cursor.number(U32, f"the type of {what}")
    if kind == _STRING:
        return cursor.string(what)
    if kind == _ARRAY:
        return _skip_array(cursor, what)
    if kind not in _SCALARS:
        cursor.fail(f"{what} has the unknown type {kind}", offset=start)
    value: int | float = cursor.number(_SCALARS[kind][1], what)
    if kind != _BOOL:
        return value
    if value > 1:
        cursor.fail(f"{what} is a bool stored as {value}, not as 0 or 1", offset=start)
    return bool(value)


def _skip_array(cursor: Cursor, what: str) -> ArrayInfo:
    start = cursor.pos
    kind = cursor.number(U32, f"the element type of {what}")
    if kind == _STRING:
        count = cursor.count(f"strings in {what}", item_bytes=8)
        info = ArrayInfo("string", count, cursor.pos)
        cursor.skip_strings(count, what)
        return info
    if kind == _ARRAY:
        cursor.fail(f"{what} is an array of arrays, which llama.cpp does not read", offset=start)
    if kind not in _SCALARS:
        cursor.fail(f"{what} is an array of the unknown type {kind}", offset=start)
    name, layout = _SCALARS[kind]
    count = cursor.count(f"elements in {what}", layout.size)
    info = ArrayInfo(name, count, cursor.pos)
    cursor.skip(count * layout.size, what)
    return info


def _parse_alignment(cursor: Cursor, metadata: dict[str, MetadataValue]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        cursor.fail(f"general.alignment is {quoted(alignment)}, not a power of two")
    return alignment


def _parse_tensor_table(cursor: Cursor, n_tensors: int) -> list[TensorInfo]:
    """Read the table; the offsets are still relative to the data section."""
    entries: dict[str, TensorInfo] = {}
    for index in range(n_tensors):
        start = cursor.pos
        name = cursor.string(f"the name of tensor {index}", limit=_MAX_TENSOR_NAME_BYTES)
        if name in entries:
            cursor.fail(f"tensor {index} repeats the name {quoted(name)}", offset=start)
        entries[name] = _parse_tensor(cursor, name)
    return list(entries.values())


def _parse_tensor(cursor: Cursor, name: str) -> TensorInfo:
    start = cursor.pos
    what = f"tensor {quoted(name)}"
    rank = cursor.number(U32, f"the rank of {what}")
    if rank > _MAX_DIMENSIONS:
        cursor.fail(f"{what} has {rank} dimensions; {_MAX_DIMENSIONS} is the most", offset=start)
    shape = tuple(cursor.number(U64, f"the shape of {what}") for _ in range(rank))
    if max(shape, default=1) > _MAX_ELEMENTS or prod(shape) > _MAX_ELEMENTS:
        cursor.fail(f"{what} of shape {list(shape)} has 2**63 elements or more", offset=start)
    type_id = cursor.number(U32, f"the type of {what}")
    if type_id not in TENSOR_TYPES:
        cursor.fail(
            f"{what} has the unknown type {type_id}",
            "the file is damaged or newer than this reader; try another quantization",
            offset=start,
        )
    type_name, block_size, type_size = TENSOR_TYPES[type_id]
    row = shape[0] if shape else 1
    if row % block_size:
        cursor.fail(
            f"{what} has rows of {row} elements; {type_name} needs a multiple of {block_size}",
            offset=start,
        )
    offset = cursor.number(U64, f"the offset of {what}")
    n_bytes = prod(shape) // block_size * type_size
    return TensorInfo(name, shape, type_id, type_name, offset, n_bytes)


def _place_tensor(
    cursor: Cursor, entry: TensorInfo, data_offset: int, alignment: int
) -> TensorInfo:
    what = f"tensor {quoted(entry.name)}"
    if entry.offset % alignment:
        cursor.fail(f"{what} has the offset {entry.offset}, not a multiple of {alignment}")
    start = data_offset + entry.offset
    return replace(entry, offset=start)


def _check_end(cursor: Cursor, tensors: tuple[TensorInfo, ...]) -> None:
    end = max((tensor.offset + tensor.n_bytes for tensor in tensors), default=0)
    missing = end - cursor.size
    if missing > 0:
        cursor.fail(
            f"the file is cut off: by its header it needs {end} bytes, but it has "
            f"{cursor.size}: {missing} are missing",
            "download it again",
            offset=cursor.size,
            missing=missing,
        )


def _check_overlap(cursor: Cursor, tensors: tuple[TensorInfo, ...]) -> None:
    stored = sorted((t for t in tensors if t.n_bytes), key=lambda tensor: tensor.offset)
    for before, after in pairwise(stored):
        if after.offset < before.offset + before.n_bytes:
            cursor.fail(
                f"tensor {quoted(after.name)} at offset {after.offset} overlaps "
                f"{quoted(before.name)}, which ends at {before.offset + before.n_bytes}",
                offset=after.offset,
            )
