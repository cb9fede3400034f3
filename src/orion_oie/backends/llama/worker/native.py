"""A thin, typed layer over the llama.cpp calls that a worker needs. Runs in a worker only.

One `NativeModel` is weights plus one context. One thread owns it and makes all calls, except those
of the vocabulary. This module knows nothing of requests.
"""

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import llama_cpp as lc
import numpy as np
from numpy.typing import NDArray

from orion_oie.backends.llama.worker.gate import Gate
from orion_oie.backends.llama.worker.vocabulary import Vocabulary
from orion_oie.errors import ModelCorruptError, ModelError, OrionError
from orion_oie.models.downloads.parts import Run

DECODE_OK, DECODE_NO_SLOT, DECODE_ABORTED = 0, 1, 2
BATCH_TOKENS = 512

# While a model arrives, each batch waits for all missing weights: one large batch is best.
ARRIVING_BATCH_TOKENS = 2048

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_LARGE_BLOCK_BYTES = 1 << 20

_LOG_LEVELS = {1: "debug", 2: "info", 3: "warning", 4: "error"}

Row = tuple[int, int, int, bool]
"""One row of a batch: token, position, sequence, and True if its logits are wanted."""


def capture_logs(sink: Callable[[str, str], None]) -> None:
    """Send llama.cpp's log to `sink(level, line)` instead of stderr, from now on."""
    level_of_line = "info"
    pending = ""

    def on_log(level: int, text: bytes, _data: object) -> None:
        # Level 5 continues the previous line.
        nonlocal level_of_line, pending
        level_of_line = _LOG_LEVELS.get(level, level_of_line)
        pending += text.decode("utf-8", "replace")
        while "\n" in pending:
            line, pending = pending.split("\n", 1)
            if line.strip():
                sink(level_of_line, line.rstrip())

    capture_logs.callback = lc.llama_log_callback(on_log)  # type: ignore[attr-defined]
    lc.llama_log_set(capture_logs.callback, ctypes.c_void_p(0))  # type: ignore[attr-defined]


def initialize() -> None:
    """Initialize llama.cpp; call it once per process, before anything else."""
    lc.llama_backend_init()


def build() -> str:
    """The version of llama.cpp, and the CPU features that it computes with."""
    return f"{lc.__version__} {lc.llama_print_system_info().decode()}"


def device() -> str:
    """The device for layers: "gpu" when llama.cpp can offload them to one, else "cpu"."""
    return "gpu" if lc.llama_supports_gpu_offload() else "cpu"


class AbortFlag:
    """Ends a running decode early, so that a cancel takes effect at once.

    llama.cpp calls its abort callback between the nodes of the graph, 515 times per token of
    SmolLM2. A Python callback would need the interpreter's lock each time, and wait for the other
    threads of the process. So the callback is libc's `strlen`, applied to a one-byte string:
    length 0 means "go on", length 1 "abort".

    The thread that reads a cancel calls `raise_` before it passes the cancel on; the thread that
    owns the model calls `lower` once per cancel that it has handled.
    """

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(2)
        self._lock = threading.Lock()
        self._raised = 0

    @property
    def address(self) -> int:
        return ctypes.addressof(self._buffer)

    @property
    def is_raised(self) -> bool:
        return self._raised > 0

    def raise_(self) -> None:
        with self._lock:
            self._raised += 1
            self._buffer[0] = b"\x01"

    def lower(self) -> None:
        with self._lock:
            self._raised -= 1
            self._buffer[0] = b"\x01" if self._raised else b"\x00"


def load_weights(
    files: Sequence[Path], on_progress: Callable[[float], None], gpu_layers: int = 0
) -> Any:
    """Load a model's weights, with the last `gpu_layers` layers on GPUs; returns llama.cpp's
    handle. Raises `ModelCorruptError`."""

    def report(fraction: float, _data: object) -> bool:
        on_progress(fraction)
        return True

    params = lc.llama_model_default_params()
    params.n_gpu_layers = gpu_layers
    params.progress_callback = lc.llama_progress_callback(report)
    if len(files) == 1:
        model = lc.llama_model_load_from_file(str(files[0]).encode(), params)
    else:
        names = (ctypes.c_char_p * len(files))(*(str(file).encode() for file in files))
        model = lc.llama_model_load_from_splits(names, len(files), params)
    if not model:
        raise ModelCorruptError(
            f"llama.cpp cannot load {files[0]}; its reasons are in the worker's log"
        )
    return model


def return_large_blocks() -> None:
    """Return large blocks of memory to the system when they are freed, from now on.

    By default, glibc keeps blocks of a size that was freed before, up to 32 MiB each. Does nothing
    with a C library that has no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)


def release_pages(files: Sequence[Path], runs: Sequence[Run]) -> None:
    """Release mapped pages of loaded files that are not read any more; a later read loads them
    again.

    The system would take the pages back when memory is short, but until then they count as memory
    of this process. Works on Linux only: other systems do not show where a file is mapped.
    """
    if not runs:
        return
    try:
        mappings = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return
    places: dict[str, list[tuple[int, int, int]]] = {}
    for line in mappings.splitlines():
        span, _, offset, _, _, *name = line.split(maxsplit=5)
        if name:
            first, last = (int(part, 16) for part in span.split("-"))
            places.setdefault(name[0], []).append((first, last, int(offset, 16)))
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for number, start, end in runs:
        for first, last, at in places.get(os.path.realpath(files[number]), []):
            low, high = max(start, at), min(end, at + last - first)
            if low < high:
                madvise(first + low - at, high - low, mmap.MADV_DONTNEED)


class NativeModel:
    """Loaded weights and one context with `slots` sequences over one shared KV cache.

    `abort` ends a running decode early. `on_progress` gets the fraction that is loaded. With a
    `gate`, the files are still arriving: a decode waits for the weights it needs. The last
    `gpu_layers` layers are computed on GPUs, if there are any.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        slots: int,
        context_length: int,
        threads: int,
        abort: "AbortFlag",
        on_progress: Callable[[float], None],
        gate: Gate | None = None,
        gpu_layers: int = 0,
    ) -> None:
        lc.llama_backend_init()
        self.is_on_gpu = gpu_layers > 0 and device() == "gpu"
        self._logits: NDArray[np.float32]
        self._natively_used: list[Any] = []
        self.slots = slots
        self._gate = gate
        self._model = load_weights(files, on_progress, gpu_layers)
        self.vocabulary = Vocabulary(self._model)
        self.batch_tokens = BATCH_TOKENS
        if gate is not None:
            trained = int(lc.llama_model_n_ctx_train(self._model))
            self.batch_tokens = max(1, min(ARRIVING_BATCH_TOKENS, context_length, trained))
        self._window = int(lc.llama_model_n_swa(self._model))
        # Two more sequences than slots: for retired cells, and for cells that are being moved.
        self._retired, self._moving = slots, slots + 1
        self._settings = context_length, abort
        self.threads = threads
        self._make_context()
        if gate is not None and self.can_generate:
            gate.start(self._probe_graph)

    def _probe_graph(self) -> None:
        """Make llama.cpp show the nodes of a graph to the gate, without computing them."""
        abort = self._settings[1]
        abort.raise_()
        self._decode([(0, 0, 0, True)])
        abort.lower()
        self.clear()

    def without_gate(self) -> "NativeModel":
        """The same weights with a new context that has no gate, once all of them have arrived.

        May be called on another thread. Raises `ModelError` when the download failed.
        """
        if self._gate is not None and not self._gate.wait_until_open(heeds_abort=False):
            raise ModelError("the download of the model ended before it was complete")
        model = copy(self)
        model._gate = None
        model._natively_used = []
        model.batch_tokens = BATCH_TOKENS
        model._make_context()
        return model

    def _make_context(self) -> None:
        context_length, abort = self._settings
        params = lc.llama_context_default_params()
        params.n_ctx = context_length
        params.n_batch = params.n_ubatch = self.batch_tokens
        params.n_seq_max = self.slots + 2 if self.can_move else self.slots
        # Logits are only read for one row of each sequence: reserve no more.
        params.n_outputs_max = params.n_seq_max
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = self.threads
        if self._gate is not None:
            params.cb_eval = self._kept(self._gate.callback)
        context = lc.llama_init_from_model(self._model, params)
        if not context:
            raise OrionError(
                f"llama.cpp cannot make a context of {context_length} tokens with "
                f"{self.slots} slots; its reasons are in the worker's log"
            )
        strlen = ctypes.cast(ctypes.CDLL(None).strlen, lc.ggml_abort_callback)
        lc.llama_set_abort_callback(context, strlen, self._kept(abort).address)
        self._context: Any = context
        self._memory: Any = lc.llama_get_memory(context)
        self.context_length = int(lc.llama_n_ctx(context))
        self._batch = _Batch(self.batch_tokens)
        self._logits_address = 0

    def use_threads(self, threads: int) -> None:
        """Use this many threads from the next batch on."""
        if threads != self.threads:
            self.threads = threads
            lc.llama_set_n_threads(self._context, threads, threads)

    @property
    def is_arriving(self) -> bool:
        """True while a decode may have to wait for weights."""
        return self._gate is not None and not self._gate.is_open

    def close_context(self) -> None:
        """Free the context with all its sequences; the weights and the vocabulary stay."""
        lc.llama_free(self._context)
        self._context = self._memory = None

    def _kept(self, thing: Any) -> Any:
        """The same object, kept alive for as long as native code may use it."""
        self._natively_used.append(thing)
        return thing

    # -- properties of the model

    @cached_property
    def is_rewindable(self) -> bool:
        """False when a sequence's state cannot be cut back to an earlier position."""
        return not (
            lc.llama_model_is_recurrent(self._model) or lc.llama_model_is_hybrid(self._model)
        )

    @property
    def saves_whole_states(self) -> bool:
        """False when a saved state can only be continued, not cut back: because the model cannot
        rewind, or because the state lacks the tokens before a sliding window."""
        return self.is_rewindable and self._window == 0

    @cached_property
    def can_move(self) -> bool:
        """True when cells can be retired and moved, and when that is useful: llama.cpp's kernels
        for CPUs add up attention in the order of the cells, and round after each step."""
        return self.saves_whole_states and not self.is_on_gpu

    @cached_property
    def can_generate(self) -> bool:
        """False for encoders: llama.cpp gives them no memory, or reports an encoder."""
        return bool(self._memory) and not lc.llama_model_has_encoder(self._model)

    @cached_property
    def chat_template(self) -> str | None:
        """The default chat template of the GGUF, or None."""
        text = lc.llama_model_chat_template(self._model, None)
        return text.decode("utf-8", "replace") if text else None

    # -- computing

    def decode(self, rows: Sequence[Row]) -> int:
        """Run one batch of rows.

        Returns llama_decode's code: 0 done, 1 no cells in the KV cache, 2 aborted, others fatal.
        """
        code = self._decode(rows)
        if self._gate is not None and code == DECODE_OK and not self._gate.wait_until_open():
            return DECODE_ABORTED
        return code

    def _decode(self, rows: Sequence[Row]) -> int:
        self._batch.fill(rows)
        return int(lc.llama_decode(self._context, self._batch.native))

    def logits(self, count: int) -> NDArray[np.float32]:
        """The logits of the last batch: one row of vocabulary size for each of the `count` rows
        that wanted them, in their order. The next batch overwrites this view."""
        address = _get_logits(self._context)
        if address != self._logits_address:
            count_all = self.slots * self.vocabulary.size
            array: Any = (ctypes.c_float * count_all).from_address(address)
            self._logits = np.frombuffer(array, np.float32).reshape(self.slots, -1)
            self._logits_address = address
        return self._logits[:count]

    # -- the state of a sequence

    def rewind(self, sequence: int, position: int) -> bool:
        """Forget a sequence from `position` on; False when the model's memory refuses, or has
        overwritten tokens that the next one would attend to."""
        if not lc.llama_memory_seq_rm(self._memory, sequence, position, -1):
            return False
        return self._holds_window(sequence, position)

    def clear(self) -> None:
        """Forget all sequences."""
        if self._memory:
            lc.llama_memory_clear(self._memory, False)

    def forget(self, sequence: int) -> None:
        """Forget a whole sequence."""
        lc.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def retire(self, sequence: int, position: int, retired_from: int) -> None:
        """Forget a sequence from `position` on, but keep its cells from `retired_from` on taken
        until `free_retired`. Those before have other holders: taken twice, they would stay where
        they are when the others are moved."""
        lc.llama_memory_seq_cp(self._memory, sequence, self._retired, retired_from, -1)
        lc.llama_memory_seq_rm(self._memory, sequence, position, -1)

    def free_retired(self) -> None:
        """Free the retired cells."""
        self.forget(self._retired)

    def move(self, sequences: Sequence[int], start: int, end: int) -> None:
        """Move tokens that these sequences share, and no other sequence holds, to the lowest free
        cells."""
        lc.llama_memory_seq_cp(self._memory, sequences[0], self._moving, start, end)
        for sequence in sequences:
            lc.llama_memory_seq_rm(self._memory, sequence, start, end)
        state = np.empty(self.state_bytes(self._moving), np.uint8)
        self.save(self._moving, state)
        if not self.restore(self._moving, state):
            raise RuntimeError("llama.cpp did not restore a state that it had just saved")
        for sequence in sequences:
            lc.llama_memory_seq_cp(self._memory, self._moving, sequence, start, end)
        self.forget(self._moving)

    def share(self, source: int, target: int, length: int) -> bool:
        """Let the empty sequence `target` begin with the first `length` tokens of `source`. Both
        then use the same cells. False when the source does not hold enough."""
        lc.llama_memory_seq_cp(self._memory, source, target, 0, length)
        if self._holds_window(target, length):
            return True
        self.forget(target)
        return False

    @contextmanager
    def beginning(self, sequence: int, length: int, held: int) -> Iterator[int]:
        """A temporary sequence of the first `length` of the `held` tokens of another one. Raises
        `ValueError` for a part of a sequence that cannot be moved."""
        if length == held:
            yield sequence
            return
        if not self.can_move:
            raise ValueError("only the whole sequence can be had of this model")
        lc.llama_memory_seq_cp(self._memory, sequence, self._moving, 0, length)
        try:
            yield self._moving
        finally:
            self.forget(self._moving)

    def state_bytes(self, sequence: int) -> int:
        """The number of bytes that `save` writes."""
        return int(lc.llama_state_seq_get_size(self._context, sequence))

    def save(self, sequence: int, buffer: NDArray[np.uint8]) -> None:
        """Copy the state of a sequence to a buffer of its size. Raises `RuntimeError` for a buffer
        of another size."""
        size = len(buffer)
        written = lc.llama_state_seq_get_data(self._context, _bytes_of(buffer), size, sequence)
        if written != size:
            raise RuntimeError(f"llama.cpp wrote {written} bytes of a state of {size} bytes")

    def restore(self, sequence: int, state: NDArray[np.uint8]) -> bool:
        """Give the empty sequence a saved state; False, and still empty, without enough cells."""
        done = lc.llama_state_seq_set_data(self._context, _bytes_of(state), len(state), sequence)
        if done != len(state):
            self.forget(sequence)
        return bool(done == len(state))

    def _holds_window(self, sequence: int, length: int) -> bool:
        # Models with a sliding window may have overwritten the tokens before the window.
        if not self._window or length == 0:
            return True
        first = lc.llama_memory_seq_pos_min(self._memory, sequence)
        return bool(0 <= first <= max(0, length - self._window))


# Returns the address as a number: a pointer object would cost time in every step.
_get_logits = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(
    ctypes.cast(lc.llama_get_logits, ctypes.c_void_p).value or 0
)


class _Batch:
    """The arrays of a llama_batch, filled in a few calls for any number of rows."""

    def __init__(self, capacity: int) -> None:
        self._tokens = np.zeros(capacity, np.int32)
        self._positions = np.zeros(capacity, np.int32)
        self._sequences = np.zeros(capacity, np.int32)
        self._wants = np.zeros(capacity, np.int8)
        self._counts = np.ones(capacity, np.int32)
        self._pointers = (
            self._sequences.ctypes.data + np.arange(capacity, dtype=np.uint64) * 4
        ).astype(np.uint64)
        self.native = lc.llama_batch()
        self.native.token = _pointer(self._tokens, ctypes.c_int32)
        self.native.pos = _pointer(self._positions, ctypes.c_int32)
        self.native.n_seq_id = _pointer(self._counts, ctypes.c_int32)
        self.native.seq_id = _pointer(self._pointers, ctypes.POINTER(ctypes.c_int32))
        self.native.logits = _pointer(self._wants, ctypes.c_int8)

    def fill(self, rows: Sequence[Row]) -> None:
        count = len(rows)
        self.native.n_tokens = count
        if count == 1:
            self._tokens[0], self._positions[0], self._sequences[0], self._wants[0] = rows[0]
            return
        table = np.array(rows, np.int32)
        self._tokens[:count] = table[:, 0]
        self._positions[:count] = table[:, 1]
        self._sequences[:count] = table[:, 2]
        self._wants[:count] = table[:, 3]


def _pointer(array: NDArray[Any], kind: Any) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))


def _bytes_of(state: NDArray[np.uint8]) -> Any:
    return _pointer(state, ctypes.c_uint8)
