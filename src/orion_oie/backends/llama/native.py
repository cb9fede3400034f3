"""A thin, typed cover over the llama.cpp calls that a worker needs. Runs in a worker only.

One `NativeModel` is weights plus one context. All calls but `tokenize` and `piece` belong to
the one thread that owns it. Nothing here knows of requests.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import llama_cpp as lc

from orion_oie.errors import ModelCorruptError, OrionError
from orion_oie.schemas import GenerationOptions

DECODE_OK, DECODE_NO_SLOT, DECODE_ABORTED = 0, 1, 2
BATCH_TOKENS = 512

_LOG_LEVELS = {1: "debug", 2: "info", 3: "warning", 4: "error"}
_PENALTY_WINDOW = 64
_COLDEST = 1e-6  # below it, logits divided by the temperature leave the range of floats


def capture_logs(sink: Callable[[str, str], None]) -> None:
    """Send llama.cpp's log to `sink(level, line)` instead of to stderr, for good."""
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


class AbortFlag:
    """Ends a running decode early, so that a cancel is seen at once.

    llama.cpp asks between the nodes of the graph, 515 times per token of SmolLM2. A Python
    callback would want the interpreter's lock each time, and wait for whatever else runs here.
    So it asks libc's `strlen` about a one-byte string: length 0 is "go on", length 1 "abort".

    `raise_` is called by the thread that hears of a cancel, before it passes the cancel on;
    `lower` by the thread that owns the model, once per cancel that it has dealt with.
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


class NativeModel:
    """Loaded weights and one context with `slots` sequences over one shared KV cache.

    `abort` ends a running decode early. `on_progress` gets the fraction that is loaded.
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
    ) -> None:
        lc.llama_backend_init()
        self._natively_used: list[Any] = []
        self.slots = slots
        self._model = self._load(files, on_progress)
        self._vocab = lc.llama_model_get_vocab(self._model)
        self.vocab_size = lc.llama_vocab_n_tokens(self._vocab)
        self._context = self._make_context(context_length, threads, abort)
        self._memory = lc.llama_get_memory(self._context)
        self._batch = lc.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._pieces: dict[int, bytes] = {}

    def _load(self, files: Sequence[Path], on_progress: Callable[[float], None]) -> Any:
        def report(fraction: float, _data: object) -> bool:
            on_progress(fraction)
            return True

        params = lc.llama_model_default_params()
        params.progress_callback = self._kept(lc.llama_progress_callback(report))
        if len(files) == 1:
            model = lc.llama_model_load_from_file(str(files[0]).encode(), params)
        else:
            names = (ctypes.c_char_p * len(files))(*(str(f).encode() for f in files))
            model = lc.llama_model_load_from_splits(names, len(files), params)
        if not model:
            raise ModelCorruptError(
                f"llama.cpp cannot load {files[0]}; its reasons are in the worker's log"
            )
        return model

    def _make_context(self, context_length: int, threads: int, abort: "AbortFlag") -> Any:
        params = lc.llama_context_default_params()
        params.n_ctx = context_length
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_seq_max = self.slots
        # Logits are only ever read for one row of each sequence: reserve no more.
        params.n_outputs_max = self.slots
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = threads
        context = lc.llama_init_from_model(self._model, params)
        if not context:
            raise OrionError(
                f"llama.cpp cannot make a context of {context_length} tokens with "
                f"{self.slots} slots; its reasons are in the worker's log"
            )
        strlen = ctypes.cast(ctypes.CDLL(None).strlen, lc.ggml_abort_callback)
        lc.llama_set_abort_callback(context, strlen, self._kept(abort).address)
        return context

    def _kept(self, thing: Any) -> Any:
        """The same, kept for as long as native code may look at it."""
        self._natively_used.append(thing)
        return thing

    # -- what the model says of itself

    @cached_property
    def is_rewindable(self) -> bool:
        """False when a sequence's state cannot be cut back to an earlier position."""
        return not (
            lc.llama_model_is_recurrent(self._model) or lc.llama_model_is_hybrid(self._model)
        )

    @cached_property
    def can_generate(self) -> bool:
        """False for encoders and embedding models."""
        return bool(lc.llama_model_has_decoder(self._model)) and not lc.llama_model_has_encoder(
            self._model
        )

    @property
    def device(self) -> str:
        """Where the layers run: "gpu" when llama.cpp can offload here, else "cpu"."""
        return "gpu" if lc.llama_supports_gpu_offload() else "cpu"

    @property
    def context_length(self) -> int:
        return int(lc.llama_n_ctx(self._context))

    @cached_property
    def chat_template(self) -> str | None:
        """The default chat template of the GGUF, or None."""
        text = lc.llama_model_chat_template(self._model, None)
        return text.decode("utf-8", "replace") if text else None

    def special_text(self, token: int) -> str:
        """The written form of a control token; empty for token -1."""
        return self._piece_of(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    @property
    def bos(self) -> int:
        return int(lc.llama_vocab_bos(self._vocab))

    @property
    def eos(self) -> int:
        return int(lc.llama_vocab_eos(self._vocab))

    @cached_property
    def _adds_bos(self) -> bool:
        return bool(lc.llama_vocab_get_add_bos(self._vocab))

    @cached_property
    def _is_sentencepiece(self) -> bool:
        return int(lc.llama_vocab_type(self._vocab)) == lc.LLAMA_VOCAB_TYPE_SPM

    def is_end(self, token: int) -> bool:
        """True for the tokens that end a generation."""
        return bool(lc.llama_vocab_is_eog(self._vocab, token))

    # -- text and tokens

    def tokenize(self, segments: Sequence[tuple[str, bool]]) -> list[int]:
        """Tokens of (text, is_control) segments; only control segments yield control tokens."""
        tokens: list[int] = []
        for text, is_control in segments:
            tokens += self._tokens_of(text, parse_special=is_control)
        if self._adds_bos and self.bos >= 0 and tokens[:1] != [self.bos]:
            tokens.insert(0, self.bos)
        return tokens

    def _tokens_of(self, text: str, *, parse_special: bool) -> list[int]:
        if not self._is_sentencepiece:
            return self._raw_tokens(text, parse_special)
        # SentencePiece puts a space before every text that it is given; a line break in front
        # takes it, and is cut off again.
        lead = self._raw_tokens("\n", parse_special)
        tokens = self._raw_tokens("\n" + text, parse_special)
        if tokens[: len(lead)] != lead:
            return self._raw_tokens(text, parse_special)
        return tokens[len(lead) :]

    def _raw_tokens(self, text: str, parse_special: bool) -> list[int]:
        data = text.encode()
        capacity = len(data) + 8
        while True:
            buffer = (lc.llama_token * capacity)()
            count = lc.llama_tokenize(
                self._vocab, data, len(data), buffer, capacity, False, parse_special
            )
            if count >= 0:
                return list(buffer[:count])
            capacity = -count

    def piece(self, token: int) -> bytes:
        """The bytes of a token's text; empty for control tokens."""
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = self._piece_of(token, special=False)
        return known

    def _piece_of(self, token: int, *, special: bool) -> bytes:
        capacity = 64
        while True:
            buffer = ctypes.create_string_buffer(capacity)
            length = lc.llama_token_to_piece(self._vocab, token, buffer, capacity, 0, special)
            if length >= 0:
                return buffer.raw[:length]
            capacity = -length

    # -- computing

    def decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> int:
        """Run one batch of (token, position, sequence, wants logits) rows.

        Returns llama_decode's code: 0 done, 1 no room in the KV cache, 2 aborted, others fatal.
        """
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wants_logits) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wants_logits
        return int(lc.llama_decode(self._context, batch))

    def rewind(self, sequence: int, position: int) -> bool:
        """Forget a sequence from `position` on; False when the model's memory refuses."""
        return bool(lc.llama_memory_seq_rm(self._memory, sequence, position, -1))

    def forget(self, sequence: int) -> None:
        """Forget a whole sequence."""
        lc.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def sampler(self, options: GenerationOptions, prompt: Sequence[int]) -> "Sampler":
        """A fresh sampler chain that has seen the end of the prompt."""
        return Sampler(self._context, self.vocab_size, options, prompt)


class Sampler:
    """The sampler chain of one sequence, in llama.cpp's own order. Free it with `close`."""

    def __init__(
        self, context: Any, vocab_size: int, options: GenerationOptions, prompt: Sequence[int]
    ) -> None:
        self._context = context
        self._chain = lc.llama_sampler_chain_init(lc.llama_sampler_chain_default_params())
        for stage in _stages(options, vocab_size):
            lc.llama_sampler_chain_add(self._chain, stage)
        if options.repeat_penalty != 1.0:
            for token in prompt[-_PENALTY_WINDOW:]:
                lc.llama_sampler_accept(self._chain, token)

    def sample(self, row: int) -> int:
        """Choose the next token from the logits of a row of the last batch."""
        return int(lc.llama_sampler_sample(self._chain, self._context, row))

    def close(self) -> None:
        """Free the chain."""
        if self._chain:
            lc.llama_sampler_free(self._chain)
            self._chain = None


def _stages(options: GenerationOptions, vocab_size: int) -> list[Any]:
    stages = []
    if options.repeat_penalty != 1.0:
        stages.append(
            lc.llama_sampler_init_penalties(
                vocab_size, _PENALTY_WINDOW, options.repeat_penalty, 0.0, 0.0
            )
        )
    if options.temperature < _COLDEST:
        return [*stages, lc.llama_sampler_init_greedy()]
    if options.top_k > 0:
        stages.append(lc.llama_sampler_init_top_k(options.top_k))
    if options.top_p < 1:
        stages.append(lc.llama_sampler_init_top_p(options.top_p, 1))
    if options.min_p > 0:
        stages.append(lc.llama_sampler_init_min_p(options.min_p, 1))
    stages.append(lc.llama_sampler_init_temp(options.temperature))
    stages.append(lc.llama_sampler_init_dist(options.seed))
    return stages
