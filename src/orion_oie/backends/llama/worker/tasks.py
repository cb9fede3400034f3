"""What the batcher works on: tasks, the slots they run in, and what a step says of them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from orion_oie.backends.llama.worker.sampling import (
    Sampler,
    free_sampler,
)
from orion_oie.backends.text import TextAssembler
from orion_oie.schemas.requests import GenerationOptions
from orion_oie.schemas.results import FinishReason


@dataclass(eq=False)
class Task:
    """One generation. `tokens` is the prompt and, growing, the answer.

    The first `prefix_tokens` of the prompt are what all requests of its agent begin with; when that
    `is_prefix_public`, its state may be kept on the disk.
    What is not streamed comes in two pieces, the first token and the rest.
    `bias` is (token, added logit) pairs. `grammar` is a grammar sampler of llama.cpp, which the
    task owns. Free it with `close`.
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
        self.parked: Any = None  # its state, while it waits to go on
        self.cached_tokens: int | None = None
        self.generated = 0
        self.unsent = 0
        self.held_text = ""
        self.logprobs: list[Any] = []
        self.started_at = self.first_token_at = self.last_token_at = 0.0

    @property
    def most_tokens(self) -> int:
        """Length of the prompt and the longest answer."""
        return self.prompt_tokens + self.limit

    def close(self) -> None:
        """Free what llama.cpp allocated for it. Idempotent."""
        if self.sampler is not None:
            self.sampler.close()
        else:
            free_sampler(self.grammar)
        self.sampler = self.grammar = None


@dataclass(eq=False)
class Slot:
    """One sequence of the context: the `tokens` whose state it holds, in these `cells`.

    A task that was given the slot has begun once it is known where its prompt starts from; until
    then it may wait for `awaited` tokens of another slot that computes them already. The first
    `rough_tokens` were computed in a batch that was too large to be exact.
    """

    index: int
    tokens: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)
    task: Task | None = None
    session_id: str | None = None
    last_used: int = 0
    has_begun: bool = False
    awaited: "Awaited | None" = None
    rough_tokens: int = 0

    @property
    def pending(self) -> int:
        """Tokens of the task that are not computed yet; 0 while it has not begun."""
        if self.task is None or not self.has_begun:
            return 0
        return len(self.task.tokens) - len(self.tokens)


@dataclass(frozen=True, slots=True)
class Awaited:
    """The first `length` tokens of what `slot` computes for `task`."""

    slot: Slot
    task: Task
    length: int

    @property
    def is_coming(self) -> bool:
        """True while they are being computed."""
        is_there = len(self.slot.tokens) >= self.length
        return self.slot.task is self.task and self.slot.has_begun and not is_there


@dataclass
class StepOutput:
    """What one step produced, in the words of `protocol`."""

    text: list[tuple[int, str, int]] = field(default_factory=list)
    done: list[dict[str, Any]] = field(default_factory=list)
    error: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.done or self.error)

    def add_text(self, task: Task, text: str) -> None:
        """A task goes on. What is not streamed is kept after the first piece, which tells of the
        time."""
        if not task.is_streamed and task.unsent < task.generated:
            task.held_text += text
            return
        self.text.append((task.id, text, task.unsent))
        task.unsent = 0

    def add_done(self, task: Task, reason: FinishReason) -> None:
        """A task ended with an answer."""
        rest = task.held_text + task.assembler.finish()
        if rest or task.unsent:
            self.text.append((task.id, rest, task.unsent))
        self.done.append(
            {
                "id": task.id,
                "finish_reason": reason,
                "usage": {
                    "prompt_tokens": task.prompt_tokens,
                    "completion_tokens": task.generated,
                    "cached_tokens": task.cached_tokens,
                },
                "wait_ms": (task.started_at - task.arrived_at) * 1e3,
                "prompt_ms": (task.first_token_at - task.started_at) * 1e3,
                "decode_ms": (task.last_token_at - task.first_token_at) * 1e3,
                "dropped_turns": task.dropped_turns,
                "logprobs": task.logprobs,
            }
        )
