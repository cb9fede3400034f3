"""The contract of a backend, in two layers.

`Model` is what every backend offers: answer messages under a cancel scope, hand out text as it
comes, and account for the tokens. `LocalModel` and `LocalBackend` add what only models in this
machine's memory have: a load, a footprint, a process, an end.

The packages above import this module alone; `engine/build.py` picks the concrete backend. Every
backend passes the suite in tests/contracts.py.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from orion_oie.cancellation import CancelScope
from orion_oie.config import ShardingConfig
from orion_oie.models.keys import ModelKey
from orion_oie.models.specs import (
    PromptFormat,
    SourceSpec,
)
from orion_oie.schemas.loading import LoadProgress, OnProgress
from orion_oie.schemas.requests import (
    GenerationOptions,
    Message,
)
from orion_oie.schemas.results import (
    FinishReason,
    ModelInfo,
    TokenLogprob,
    Usage,
)

if TYPE_CHECKING:  # only embedding needs it
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """A model to load, and the settings to load it with.

    `info` is what the registry states about the model; the backend checks and completes it. A model
    with `is_plain` gets all its jobs as plain text. `context_length` is
    in tokens and shared by all `slots`; None takes the model's own, at most
    `DEFAULT_CONTEXT_LENGTH`. `threads` None takes the usable cores. `host_cache_bytes` is for the
    states of idle conversations outside the KV cache; None takes as much as the cache itself.
    `is_embedding` loads a model for `embed` instead of `generate`. Files that are not on this
    machine come from `source`, split as `sharding` says; None takes the backend's settings.
    `expected_bytes` is their size, as far as the registry knows it. With `is_progressive` the model
    computes while they arrive; None takes the backend's setting. `gpu_layers` of its layers go to
    GPUs, the output layer first; None puts as many there as fit. `sha256` are the digests that
    local files must have, one for each; empty checks none.
    """

    info: ModelInfo
    files: tuple[Path, ...]
    slots: int = 4
    context_length: int | None = None
    threads: int | None = None
    host_cache_bytes: int | None = None
    prompt_format: PromptFormat | None = None
    is_plain: bool = False
    is_embedding: bool = False
    source: SourceSpec | None = None
    sharding: ShardingConfig | None = None
    expected_bytes: int | None = None
    is_progressive: bool | None = None
    gpu_layers: int | None = None
    sha256: tuple[str, ...] = ()
    key: ModelKey = field(init=False, compare=False, repr=False)
    """The identity of what is loaded: two specs with one key share a worker."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", ModelKey(self.info.model_id, self.info.variant))


DEFAULT_CONTEXT_LENGTH = 4096


def usable_context(asked: int | None, trained: int | None) -> int:
    """Tokens of context to allocate: what was asked, never more than the model was trained on."""
    return min(asked or DEFAULT_CONTEXT_LENGTH, trained or DEFAULT_CONTEXT_LENGTH)


@dataclass(frozen=True, slots=True)
class Footprint:
    """The memory that a model takes in its process, in bytes.

    `weights_bytes`: the weights, in the layout that is computed with. `mapped_bytes` of them are
    pages of the files, which the system may take back and read again; `repacked_bytes` are copies
    in the process's own memory. `kv_bytes`: the KV cache and the recurrent state. `compute_bytes`:
    the buffers of a step, and the logits. `process_bytes`: the interpreter, the libraries, the
    vocabulary. `growth_bytes`: what it may take later, above all the states of idle conversations.
    `is_measured`: it was measured; if not, it is an estimate.
    """

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    process_bytes: int
    growth_bytes: int = 0
    mapped_bytes: int = 0
    repacked_bytes: int = 0
    is_measured: bool = False

    @property
    def total_bytes(self) -> int:
        """The memory once it is loaded and has answered."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.process_bytes

    @property
    def max_bytes(self) -> int:
        """The memory with all that it may take later."""
        return self.total_bytes + self.growth_bytes


@dataclass(frozen=True, slots=True)
class GenerationJob:
    """One conversation to continue; the last message is the one to answer.

    Among jobs that wait for a slot, a higher `priority` is served first. When nobody reads an
    answer before it is complete (`is_streamed` False), its text may come in a few large pieces. The
    state of a system prompt from the registry (`is_prefix_public`) may be kept on disk. With
    `is_plain` the model continues the texts of the messages, joined by blank lines, without a chat
    template.
    """

    messages: tuple[Message, ...]
    options: GenerationOptions = field(default_factory=GenerationOptions)
    session_id: str | None = None
    priority: int = 0
    is_streamed: bool = True
    is_prefix_public: bool = False
    is_plain: bool = False


@dataclass(frozen=True, slots=True)
class Completion:
    """The end of a generation. Times are in milliseconds, measured next to the model.

    `wait_ms`: the wait for a free slot. `prompt_ms`: from there to the first token.
    `decode_ms`: from the first token to the last.
    """

    finish_reason: FinishReason
    usage: Usage
    wait_ms: float = 0.0
    prompt_ms: float = 0.0
    decode_ms: float = 0.0
    dropped_turns: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of the decode phase: tokens after the first, over the time after the first."""
        if self.usage.completion_tokens < 2 or self.decode_ms <= 0:
            return None
        return (self.usage.completion_tokens - 1) / self.decode_ms * 1e3


@dataclass(frozen=True, slots=True)
class Occupancy:
    """The load of a model in memory, and the states that it keeps.

    `busy_slots` and `waiting` count requests. They hold `held_cells` of the `cells` in the KV
    cache; `silent_cells` belong to idle conversations, and are freed when they are needed.
    `host_cache_bytes` is the size of the states outside the cache. The next step is computed with
    `threads` threads.
    """

    busy_slots: int
    waiting: int
    cells: int
    held_cells: int
    silent_cells: int
    host_cache_bytes: int
    threads: int


OnText = Callable[[str, int], None]
"""Called with a piece of text and the number of tokens behind it; must return quickly."""


class Model(Protocol):
    """Answers messages. Several `generate` calls may run at once, on different threads."""

    @property
    def info(self) -> ModelInfo: ...

    def generate(self, job: GenerationJob, scope: CancelScope, on_text: OnText) -> Completion:
        """Answer a job. All `on_text` calls happen before this returns or raises.

        Every call ends with a `Completion` or an `OrionError`: `ContextOverflowError`,
        `InvalidRequestError`, `WorkerCrashedError`, `WorkerTimeoutError`, `ProviderError`, or the
        error that `scope` was cancelled with. The calling process never dies of it.
        """
        ...


class LocalModel(Model, Protocol):
    """A model in this machine's memory."""

    @property
    def pid(self) -> int | None:
        """The process that holds the model; None when there is none of its own."""
        ...

    @property
    def load_progress(self) -> LoadProgress:
        """The progress of its load; it can answer before that is complete."""
        ...

    @property
    def completion(self) -> Future[ModelInfo]:
        """Done when nothing of its load goes on in the background any more."""
        ...

    def is_alive(self) -> bool:
        """False once it crashed or was closed: load it again."""
        ...

    def close(self, timeout_s: float = 10.0) -> None:
        """Free the model; what still runs fails with `EngineClosedError`. Idempotent."""
        ...


class EmbeddingModel(Protocol):
    """A local model that was loaded with `LoadSpec.is_embedding`."""

    def embed(self, texts: Sequence[str], scope: CancelScope) -> "NDArray[np.float32]":
        """Unit vectors of texts, shape (texts, dimensions), in their order.

        Raises `ContextOverflowError` for a text that the model cannot read whole,
        `InvalidRequestError`, `WorkerCrashedError`, or the error that `scope` was cancelled with.
        """
        ...


class LocalBackend(Protocol):
    """Loads models into this machine's memory."""

    def load(self, spec: LoadSpec, scope: CancelScope, on_progress: OnProgress) -> LocalModel:
        """Load a model, fetching the files that are missing; blocks until it takes questions.

        That may be before all of it is in memory: `on_progress` is called until it is complete.
        Raises `ModelNotFoundError`, `ModelCorruptError`, `DownloadError`, `DigestMismatchError`,
        `WorkerCrashedError`, `WorkerTimeoutError`, or the error that `scope` was cancelled with.
        """
        ...

    def footprint(self, spec: LoadSpec) -> Footprint:
        """The memory that a model would take, from its headers; quick, and nothing is loaded.

        For files that are not on this machine it is estimated from `spec.expected_bytes`. Raises
        `ModelNotFoundError` (also without an expected size) and `ModelCorruptError`.
        """
        ...

    def warm_up(self) -> None:
        """Prepare for a load that may come soon; returns at once."""
        ...

    def kill_all(self) -> None:
        """End everything that was loaded, at once, without waiting and without taking locks."""
        ...
