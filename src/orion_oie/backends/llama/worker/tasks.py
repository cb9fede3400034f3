"""The batcher's data: tasks, the slots they run in, and the output of a step."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from orion_oie.backends.base import Completion
from orion_oie.backends.llama.protocol import Done, Ended, Logprob, StepReport, TextPiece
from orion_oie.backends.llama.worker.host_cache import OffloadedState
from orion_oie.backends.llama.worker.sampling import (
    Sampler,
    free_sampler,
)
from orion_oie.backends.text import TextAssembler
from orion_oie.schemas.requests import GenerationOptions
from orion_oie.schemas.results import FinishReason, Usage


@dataclass(eq=False)
class Task:
    """One generation. `tokens` is the prompt, followed by the answer as it grows.

    The first `prefix_tokens` of the prompt are common to all requests of an agent; if
    `is_prefix_public`, their state may be stored on the disk. The text of a task that is not
    streamed comes in two pieces: the first token and the rest. `bias` is (token, added logit)
    pairs. `grammar` is a grammar sampler of llama.cpp, which the task owns: free it with `close`.
    """

    id: int
    tokens: list[int]
    options: GenerationOptions
    session_id: str | None = None
    dropped_turns: int = 0
    prefix_tokens: int = 0
    is_prefix_public: bool = False
    priority: int = 0
    is_streamed: bool = True
    bias: Sequence[tuple[int, float]] = ()
    grammar: Any = None
    arrived_at: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)
        self.limit = self.options.max_tokens
        self.assembler = TextAssembler(self.options.stop)
        self.sampler: Sampler | None = None
        self.is_preempted = False
        self.offloaded: OffloadedState | None = None  # its state, while it is preempted
        self.cached_tokens: int | None = None
        self.generated = 0
        self.unsent = 0
        self.held_text = ""
        self.logprobs: list[Logprob] = []
        self.started_at = self.first_token_at = self.last_token_at = 0.0

    @property
    def max_length(self) -> int:
        """The length of the prompt and the longest possible answer, in tokens."""
        return self.prompt_tokens + self.limit

    def close(self) -> None:
        """Free what llama.cpp allocated for the task. Idempotent."""
        if self.sampler is not None:
            self.sampler.close()
        else:
            free_sampler(self.grammar)
        self.sampler = self.grammar = None


@dataclass(eq=False)
class Slot:
    """One sequence of the context: it holds the state of `tokens`, in `cells` of the KV cache.

    A slot without a task is free; a free slot that holds tokens is idle. The task of a slot has
    started once its starting state is chosen; until then it may wait for `awaited` tokens that
    another slot is computing. The first `inexact_tokens` were computed in a batch that was too
    large to be exact.
    """

    index: int
    tokens: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)
    task: Task | None = None
    session_id: str | None = None
    last_used: int = 0
    has_started: bool = False
    awaited: "Awaited | None" = None
    inexact_tokens: int = 0

    @property
    def pending(self) -> int:
        """The tokens of the task that are not computed yet; 0 while it has not started."""
        if self.task is None or not self.has_started:
            return 0
        return len(self.task.tokens) - len(self.tokens)


@dataclass(frozen=True, slots=True)
class Running:
    """A task and the slot it runs in."""

    slot: Slot
    task: Task

    @property
    def pending(self) -> int:
        """See `Slot.pending`: 1 while the task decodes, more during its prefill."""
        return self.slot.pending


@dataclass(frozen=True, slots=True)
class Scheduled:
    """The next `tokens` tokens of a running task, computed in one batch."""

    slot: Slot
    task: Task
    tokens: int


@dataclass(frozen=True, slots=True)
class Awaited:
    """The first `length` tokens of what `slot` computes for `task`."""

    slot: Slot
    task: Task
    length: int

    @property
    def is_coming(self) -> bool:
        """True while they are being computed."""
        is_computed = len(self.slot.tokens) >= self.length
        return self.slot.task is self.task and self.slot.has_started and not is_computed


@dataclass
class StepOutput:
    """The output of one step, collected piece by piece."""

    texts: list[TextPiece] = field(default_factory=list)
    done: list[Done] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.texts or self.done or self.ended)

    def report(self) -> StepReport:
        """The message for the host."""
        return StepReport(tuple(self.texts), tuple(self.done), tuple(self.ended))

    def add_text(self, task: Task, text: str) -> None:
        """Send text of a task that goes on. Text that is not streamed is held back after the first
        piece, which marks the time to the first token."""
        if not task.is_streamed and task.unsent < task.generated:
            task.held_text += text
            return
        self.texts.append((task.id, text, task.unsent))
        task.unsent = 0

    def add_done(self, task: Task, reason: FinishReason) -> None:
        """End a task with an answer."""
        rest = task.held_text + task.assembler.finish()
        if rest or task.unsent:
            self.texts.append((task.id, rest, task.unsent))
        completion = Completion(
            finish_reason=reason,
            usage=Usage(
                prompt_tokens=task.prompt_tokens,
                completion_tokens=task.generated,
                cached_tokens=task.cached_tokens or 0,
            ),
            wait_ms=(task.started_at - task.arrived_at) * 1e3,
            prompt_ms=(task.first_token_at - task.started_at) * 1e3,
            decode_ms=(task.last_token_at - task.first_token_at) * 1e3,
            dropped_turns=task.dropped_turns,
        )
        self.done.append(Done(task.id, completion, tuple(task.logprobs)))
