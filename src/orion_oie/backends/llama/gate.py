"""Lets a graph be computed while the weights it needs are still arriving. Runs in a worker only.

llama.cpp asks before each node of a graph, and the gate holds it up until the weights among the
node's sources are in the file. It asks for several nodes before it computes any of them: so the
gate ends a group at the end of each layer's halves, and what came before is computed while it
waits. Which bytes arrive when is not its business.
"""

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from struct import Struct
from typing import Any, Protocol

import llama_cpp as lc

from orion_oie.backends.llama.gguf import read_header
from orion_oie.downloads.arrival import ArrivalMap, ArrivalState

_POLL_S = 0.001

# Where struct ggml_tensor keeps its sources and its name: `is_supported` checks that it is so.
_SOURCES_AT, _MAX_SOURCES = 152, 10
_NAME_AT, _NAME_BYTES = 256, 64
_SOURCES = Struct(f"{_MAX_SOURCES}Q")

# The last node of a layer's first half, and of its second.
_ENDS_OF_GROUPS = (b"ffn_inp-", b"l_out-")


class Abortable(Protocol):
    """What tells the gate to stop waiting."""

    @property
    def is_raised(self) -> bool: ...


class Gate:
    """The gate of a model whose `files` arrive as their `maps` say; a file without is here.

    `callback` goes into the parameters of the context. Once all is here and checked, it holds up
    nothing; `is_open` is then True.
    """

    def __init__(
        self, files: Sequence[Path], maps: Sequence[ArrivalMap | None], abort: Abortable
    ) -> None:
        self._maps = [arrival for arrival in maps if arrival is not None]
        self._abort = abort
        self._ranges: dict[bytes, tuple[ArrivalMap, int, int]] = {}
        for file, arrival in zip(files, maps, strict=True):
            if arrival is None:
                continue
            for tensor in read_header(file).tensors:
                end = tensor.offset + tensor.n_bytes
                self._ranges[tensor.name.encode()] = (arrival, tensor.offset, end)
        self.is_open = False
        self.waited_s = 0.0
        self.callback = lc.ggml_backend_sched_eval_callback(self._on_node)

    @staticmethod
    def is_supported() -> bool:
        """True when nodes can be looked into: their layout in memory is the one known here."""
        return _name_offset() == _NAME_AT

    def wait_until_checked(self) -> bool:
        """Wait until all files are here and are what they should be; False when aborted."""
        while not self.is_open:
            if self._is_over():
                return False
            self.is_open = all(arrival.state is ArrivalState.COMPLETE for arrival in self._maps)
            if not self.is_open:
                time.sleep(_POLL_S)
        return True

    def _is_over(self) -> bool:
        return self._abort.is_raised or any(
            arrival.state is ArrivalState.FAILED for arrival in self._maps
        )

    def _on_node(self, node: int, is_asked: bool, _data: object) -> bool:
        if not is_asked:
            return True
        if self.is_open:
            return False
        for source in _SOURCES.unpack(ctypes.string_at(node + _SOURCES_AT, _SOURCES.size)):
            if source:
                self._await(_name(source))
        return _name(node).startswith(_ENDS_OF_GROUPS)

    def _await(self, name: bytes) -> None:
        """Wait for the tensor of this name; at once when it is no weight, or on an abort: the node
        after it then ends the computation."""
        wanted = self._ranges.get(name)
        if wanted is None:
            return
        arrival, start, end = wanted
        began = time.perf_counter()
        while not arrival.has(start, end):
            if self._is_over():
                return
            time.sleep(_POLL_S)
        self.waited_s += time.perf_counter() - began
        if not self._is_over():
            del self._ranges[name]  # it stays here


def _name(tensor: int) -> bytes:
    return ctypes.string_at(tensor + _NAME_AT, _NAME_BYTES).split(b"\0", 1)[0]


def _name_offset() -> int:
    """Where a tensor of this llama.cpp keeps its name; 0 when it cannot be found out."""
    library: Any = _ggml_library()
    if library is None:
        return 0
    library.ggml_tensor_overhead.restype = ctypes.c_size_t
    library.ggml_init.restype = ctypes.c_void_p
    library.ggml_init.argtypes = [_InitParams]
    library.ggml_new_tensor_1d.restype = ctypes.c_void_p
    library.ggml_new_tensor_1d.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
    library.ggml_set_name.restype = ctypes.c_void_p
    library.ggml_set_name.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    library.ggml_get_name.restype = ctypes.c_void_p
    library.ggml_get_name.argtypes = [ctypes.c_void_p]
    library.ggml_add.restype = ctypes.c_void_p
    library.ggml_add.argtypes = [ctypes.c_void_p] * 3
    library.ggml_free.argtypes = [ctypes.c_void_p]
    context = library.ggml_init(_InitParams(8 * library.ggml_tensor_overhead(), None, True))
    if not context:
        return 0
    try:
        a = library.ggml_new_tensor_1d(context, 0, 4)
        b = library.ggml_new_tensor_1d(context, 0, 4)
        library.ggml_set_name(a, b"probe")
        both = library.ggml_add(context, a, b)
        raw = ctypes.string_at(both + _SOURCES_AT, _SOURCES.size)
        if _SOURCES.unpack(raw) != (a, b, *[0] * (_MAX_SOURCES - 2)):
            return 0
        return int(library.ggml_get_name(a) - a) if _name(a) == b"probe" else 0
    finally:
        library.ggml_free(context)


class _InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


def _ggml_library() -> Any:
    """The library that knows tensors. It is loaded already, beside llama.cpp's own."""
    folder = Path(lc.__file__).parent / "lib"
    for file in sorted(folder.glob("*ggml-base.*")):
        try:
            return ctypes.CDLL(str(file))
        except OSError:
            continue
    return None
