"""Computing with a model whose weights are still arriving. Runs in a worker only.

The model is loaded from files that have their full size but are still empty. llama.cpp calls the
gate before each node of a graph, and the gate blocks until the weights among the node's sources
have arrived. llama.cpp asks for several nodes before it computes any of them: so the gate ends a
group after each half of a layer, and the nodes before it are computed while the gate waits.

Weights that are used in the layout of the file are complete when their bytes have arrived. Others
were copied during the load, into a layout that is faster to compute with: a separate thread sets
those again, one after another. The order in which bytes arrive is decided elsewhere.
"""

import ctypes
import mmap
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from struct import Struct
from typing import Any, Protocol

import llama_cpp as lc
import numpy as np

from orion_oie.models.downloads.arrival import (
    ArrivalMap,
    ArrivalState,
)
from orion_oie.models.formats.gguf import read_header

_POLL_S = 0.001
_LONGEST_IDLE_S = 0.5

# Offsets in struct ggml_tensor of its buffer, sources and name: `is_supported` checks them.
_BUFFER_AT = 8
_SOURCES_AT, _MAX_SOURCES = 152, 10
_NAME_AT, _NAME_BYTES = 256, 64
_SOURCES = Struct(f"{_MAX_SOURCES}Q")

# The last node of a layer's first half, and of its second.
_ENDS_OF_GROUPS = (b"ffn_inp-", b"l_out-")


class Abortable(Protocol):
    """A flag that makes the gate stop waiting."""

    @property
    def is_raised(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class _Place:
    """The location of a tensor: its file, its bytes in there, and its address in memory."""

    arrival: ArrivalMap
    start: int
    end: int
    address: int


class Gate:
    """The gate of a model whose `files` are arriving, as their `maps` show; a file without a map is
    complete.

    `callback` goes into the parameters of the context; call `start` once after the context was
    made. When everything has arrived and is verified, the gate blocks nothing any more, and
    `is_open` is True.
    """

    def __init__(
        self, files: Sequence[Path], maps: Sequence[ArrivalMap | None], abort: Abortable
    ) -> None:
        self._maps = [arrival for arrival in maps if arrival is not None]
        self._abort = abort
        self._places: dict[bytes, _Place] = {}
        self._mappings: list[Any] = []
        for file, arrival in zip(files, maps, strict=True):
            if arrival is not None:
                self._add_places(file, arrival)
        self._is_probing = False
        self._weights: dict[int, _Place] = {}  # of the graph, by address
        self._copied: set[int] = set()  # weights that must be set again
        self._to_set: queue.SimpleQueue[int] = queue.SimpleQueue()  # the same, in order
        self._present: set[int] = set()
        self._failed = False
        self.is_open = False
        self.callback = lc.ggml_backend_sched_eval_callback(self._on_node)

    def _add_places(self, file: Path, arrival: ArrivalMap) -> None:
        with file.open("rb") as opened:
            mapping = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        content = np.frombuffer(mapping, np.uint8)
        self._mappings.append((mapping, content))
        for tensor in read_header(file).tensors:
            end = tensor.offset + tensor.n_bytes
            address = content.ctypes.data + tensor.offset
            self._places[tensor.name.encode()] = _Place(arrival, tensor.offset, end, address)

    @staticmethod
    def is_supported() -> bool:
        """True when this build of llama.cpp lays out tensors in memory as expected."""
        return _is_layout_known()

    def start(self, probe_graph: Callable[[], object]) -> None:
        """Find the weights that a graph needs, and start to set those that were copied.

        `probe_graph` makes llama.cpp ask for the nodes of a graph; it need not compute them.
        Weights that only later graphs need are found when they are asked for.
        """
        self._is_probing = True
        probe_graph()
        self._is_probing = False
        threading.Thread(target=self._set_copied, name="weights", daemon=True).start()

    def wait_until_open(self, *, heeds_abort: bool = True) -> bool:
        """Wait until all files have arrived and are verified, and every copied weight is set; False
        when aborted, or when the download failed."""
        while not self.is_open:
            if self._has_failed() or (heeds_abort and self._abort.is_raised):
                return False
            is_checked = all(arrival.state is ArrivalState.COMPLETE for arrival in self._maps)
            self.is_open = is_checked and self._copied <= self._present
            if not self.is_open:
                time.sleep(_POLL_S)
        return True

    def _is_over(self) -> bool:
        return self._abort.is_raised or self._has_failed()

    def _has_failed(self) -> bool:
        # For good: results computed since then are wrong, even if the download is resumed.
        self._failed = self._failed or any(
            arrival.state is ArrivalState.FAILED for arrival in self._maps
        )
        return self._failed

    # -- the model's thread

    def _on_node(self, node: int, is_asked: bool, _data: object) -> bool:
        if not is_asked:
            return True
        if self.is_open:
            return False
        for source in _SOURCES.unpack(ctypes.string_at(node + _SOURCES_AT, _SOURCES.size)):
            is_missing = source and source not in self._present and self._is_weight(source)
            if is_missing and not self._is_probing:
                self._await(source, self._weights[source])
        return not self._is_probing and _name(node).startswith(_ENDS_OF_GROUPS)

    def _is_weight(self, source: int) -> bool:
        """True for tensors of the file. Notes new ones, and queues them to be set if copied."""
        if source in self._weights:
            return True
        place = self._places.get(_name(source))
        if place is None:
            return False
        self._weights[source] = place
        buffer = ctypes.c_void_p.from_address(source + _BUFFER_AT).value
        if b"Mapped" not in _ggml().ggml_backend_buffer_name(buffer):
            self._copied.add(source)
            self._to_set.put(source)
        return True

    def _await(self, source: int, place: _Place) -> None:
        """Wait for a weight. Returns early on an abort: the next node then ends the computation."""
        while not self._is_over():
            if source in self._copied:
                if source in self._present:
                    return
            elif place.arrival.has(place.start, place.end):
                self._present.add(source)
                return
            time.sleep(_POLL_S)

    # -- the thread that sets copied weights

    def _set_copied(self) -> None:
        while not self.is_open and not self._has_failed():
            try:
                weight = self._to_set.get(timeout=_LONGEST_IDLE_S)
            except queue.Empty:
                continue
            place = self._weights[weight]
            while not place.arrival.has(place.start, place.end):
                if self._has_failed():
                    return
                time.sleep(_POLL_S)
            size = place.end - place.start
            _ggml().ggml_backend_tensor_set(weight, place.address, 0, size)
            self._present.add(weight)


def _name(tensor: int) -> bytes:
    return ctypes.string_at(tensor + _NAME_AT, _NAME_BYTES).split(b"\0", 1)[0]


@cache
def _is_layout_known() -> bool:
    ggml = _ggml()
    if ggml is None:
        return False
    context = ggml.ggml_init(_InitParams(8 * ggml.ggml_tensor_overhead(), None, True))
    if not context:
        return False
    try:
        a = ggml.ggml_new_tensor_1d(context, 0, 4)
        b = ggml.ggml_new_tensor_1d(context, 0, 4)
        ggml.ggml_set_name(a, b"probe")
        both = ggml.ggml_add(context, a, b)
        raw = ctypes.string_at(both + _SOURCES_AT, _SOURCES.size)
        are_sources = _SOURCES.unpack(raw) == (a, b, *[0] * (_MAX_SOURCES - 2))
        is_name = ggml.ggml_get_name(a) - a == _NAME_AT and _name(a) == b"probe"
        return are_sources and is_name
    finally:
        ggml.ggml_free(context)


class _InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


@cache
def _ggml() -> Any:
    """The ggml library, which is loaded already and lies beside llama.cpp's own; None when it is
    not where it is expected."""
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    functions: dict[str, tuple[Any, list[Any]]] = {
        "ggml_tensor_overhead": (size, []),
        "ggml_init": (pointer, [_InitParams]),
        "ggml_free": (None, [pointer]),
        "ggml_new_tensor_1d": (pointer, [pointer, ctypes.c_int, ctypes.c_int64]),
        "ggml_add": (pointer, [pointer, pointer, pointer]),
        "ggml_set_name": (pointer, [pointer, ctypes.c_char_p]),
        "ggml_get_name": (pointer, [pointer]),
        "ggml_backend_buffer_name": (ctypes.c_char_p, [pointer]),
        "ggml_backend_tensor_set": (None, [pointer, pointer, size, size]),
    }
    for file in sorted((Path(lc.__file__).parent / "lib").glob("*ggml-base.*")):
        try:
            library = ctypes.CDLL(str(file))
            for name, (result, arguments) in functions.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError):
            continue
        return library
    return None
