"""Continuous batching: several sequences share every decode of one context.

Each step takes the next token of every running sequence and a piece of the prompts that are
still being read. A slot keeps what it computed after its task ended, so that the next task with
the same beginning starts there. Owned by one thread. No I/O here.
"""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from orion_oie.backends.llama.native import (
    BATCH_TOKENS,
    DECODE_ABORTED,
    DECODE_NO_SLOT,
    DECODE_OK,
    NativeModel,
    Sampler,
)
from orion_oie.backends.llama.protocol import error_to_wire
from orion_oie.backends.text import TextAssembler
from orion_oie.errors import WorkerError
from orion_oie.schemas import GenerationOptions

# A slot is chosen for what it holds only if that is this part of the prompt at least: a few
# template tokens in common are not worth another conversation's state.
MIN_REUSE = 0.2

# While others are being answered, a prompt is read in pieces of this many tokens per step.
SHARED_PREFILL_TOKENS = 32


class DecodeFailedError(Exception):
    """llama_decode failed in a way after which the context cannot be trusted."""


@dataclass(eq=False)
class Task:
    """One generation. `tokens` is the prompt and, growing, the answer."""

    id: int
    tokens: list[int]
    options: GenerationOptions
    session_id: str | None = None
    dropped_turns: int = 0
    arrived_at: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)
        self.limit = self.options.max_tokens
        self.assembler = TextAssembler(self.options.stop)
        self.sampler: Sampler | None = None
        self.cached_tokens = 0
        self.generated = 0
        self.unsent = 0
        self.started_at = self.first_token_at = self.last_token_at = 0.0


@dataclass(eq=False)
class Slot:
    """One sequence of the context. `cells` are the tokens whose state it holds, in order."""

    index: int
    cells: list[int] = field(default_factory=list)
    task: Task | None = None
    session_id: str | None = None
    last_used: int = 0

    @property
    def reserved_cells(self) -> int:
        """KV cells that this slot holds or may still need."""
        if self.task is None:
            return len(self.cells)
        return self.task.prompt_tokens + self.task.limit


@dataclass
class StepOutput:
    """What one step produced, in the words of `protocol`."""

    text: list[tuple[int, str, int]] = field(default_factory=list)
    done: list[dict[str, Any]] = field(default_factory=list)
    error: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.done or self.error)


class Batcher:
    """Runs tasks in the slots of a model."""

    def __init__(self, model: NativeModel) -> None:
        self._model = model
        self._slots = [Slot(index) for index in range(model.slots)]
        self._waiting: deque[Task] = deque()
        self._uses = 0
        self._was_aborted = False

    @property
    def has_work(self) -> bool:
        return bool(self._waiting) or any(slot.task for slot in self._slots)

    def add(self, task: Task) -> None:
        """Queue a task whose prompt and at least one more token fit the context."""
        task.limit = min(task.limit, self._model.context_length - task.prompt_tokens)
        self._waiting.append(task)

    def cancel(self, task_id: int) -> bool:
        """Drop a task; False when it is not here. Its slot is free at once."""
        for task in self._waiting:
            if task.id == task_id:
                self._waiting.remove(task)
                return True
        for slot in self._slots:
            if slot.task is not None and slot.task.id == task_id:
                self._release(slot)
                return True
        return False

    def step(self) -> StepOutput:
        """Admit what fits, run one batch, sample."""
        self._admit()
        rows, shares = self._plan_rows()
        output = StepOutput()
        if not rows:
            return output
        code = self._model.decode(rows)
        self._was_aborted = code == DECODE_ABORTED
        if code == DECODE_OK:
            self._advance(shares, output)
        elif code == DECODE_ABORTED:
            self._undo(shares)
        elif code == DECODE_NO_SLOT:
            self._undo(shares)
            self._make_room(output)
        else:
            raise DecodeFailedError(f"llama_decode returned {code}")
        return output

    # -- admission

    def _admit(self) -> None:
        while self._waiting:
            idle = [slot for slot in self._slots if slot.task is None]
            if not idle:
                return
            task = self._waiting[0]
            slot = max(idle, key=lambda s: self._fitness(s, task))
            if not self._reserve(slot, task):
                return
            self._waiting.popleft()
            self._start(slot, task)

    def _fitness(self, slot: Slot, task: Task) -> tuple[bool, int, int]:
        reusable = self._reusable(slot, task)
        is_own = reusable > 0 and slot.session_id is not None and slot.session_id == task.session_id
        worth = reusable if reusable >= MIN_REUSE * task.prompt_tokens else 0
        return is_own, worth, -slot.last_used

    def _reusable(self, slot: Slot, task: Task) -> int:
        """How many tokens of the slot's state the task can start from."""
        # The last prompt token is always computed: its logits choose the first token.
        limit = min(len(slot.cells), task.prompt_tokens - 1)
        same = 0
        while same < limit and slot.cells[same] == task.tokens[same]:
            same += 1
        if not self._model.is_rewindable and same < len(slot.cells):
            return 0
        return same

    def _reserve(self, chosen: Slot, task: Task) -> bool:
        """Make sure that the task's cells are free, forgetting idle slots if that helps."""
        needed = task.prompt_tokens + task.limit
        others = [slot for slot in self._slots if slot is not chosen]
        taken = sum(slot.reserved_cells for slot in others)
        idle = sorted((s for s in others if s.task is None), key=lambda s: s.last_used)
        busy = taken - sum(len(slot.cells) for slot in idle)
        if busy + needed > self._model.context_length:
            return False
        while taken + needed > self._model.context_length:
            slot = idle.pop(0)
            taken -= len(slot.cells)
            self._clear(slot)
        return True

    def _start(self, slot: Slot, task: Task) -> None:
        keep = self._reusable(slot, task)
        if keep == 0 or (keep < len(slot.cells) and not self._model.rewind(slot.index, keep)):
            self._clear(slot)
            keep = 0
        del slot.cells[keep:]
        self._uses += 1
        slot.task, slot.session_id, slot.last_used = task, task.session_id, self._uses
        task.cached_tokens = keep
        task.sampler = self._model.sampler(task.options, task.tokens)
        task.started_at = time.perf_counter()

    # -- one batch

    def _plan_rows(self) -> tuple[list[tuple[int, int, int, bool]], list[tuple[Slot, int]]]:
        """The rows of the next batch, and how many of them each slot has.

        Slots that need one token come first: a long prompt never makes them wait.
        """
        active = [slot for slot in self._slots if slot.task is not None]
        active.sort(key=lambda slot: (_pending(slot) > 1, slot.last_used))
        # After an abort the batch is small too: else cancels that come fast enough would throw
        # away everything that their neighbours compute.
        is_small = self._was_aborted or any(_pending(slot) == 1 for slot in active)
        rows: list[tuple[int, int, int, bool]] = []
        shares: list[tuple[Slot, int]] = []
        prefill_left = SHARED_PREFILL_TOKENS if is_small else BATCH_TOKENS
        for slot in active:
            assert slot.task is not None
            pending = _pending(slot)
            share = 1 if pending == 1 else min(pending, prefill_left, BATCH_TOKENS - len(rows))
            if share <= 0:
                continue
            if pending > 1:
                prefill_left -= share
            start = len(slot.cells)
            for offset in range(share):
                position = start + offset
                is_last = offset == share - 1 and share == pending
                rows.append((slot.task.tokens[position], position, slot.index, is_last))
            shares.append((slot, share))
        return rows, shares

    def _advance(self, shares: list[tuple[Slot, int]], output: StepOutput) -> None:
        row = -1
        for slot, share in shares:
            task = slot.task
            assert task is not None
            assert task.sampler is not None
            row += share
            start = len(slot.cells)
            slot.cells += task.tokens[start : start + share]
            if len(slot.cells) == len(task.tokens):
                self._take_token(slot, task, task.sampler.sample(row), output)

    def _take_token(self, slot: Slot, task: Task, token: int, output: StepOutput) -> None:
        task.last_token_at = time.perf_counter()
        if not task.first_token_at:
            task.first_token_at = task.last_token_at
        if self._model.is_end(token):
            self._finish(slot, task, "stop", output)
            return
        task.tokens.append(token)
        task.generated += 1
        task.unsent += 1
        text = task.assembler.push(self._model.piece(token))
        if text:
            output.text.append((task.id, text, task.unsent))
            task.unsent = 0
        if task.assembler.is_stopped:
            self._finish(slot, task, "stop", output)
        elif task.generated >= task.limit:
            self._finish(slot, task, "length", output)

    def _finish(self, slot: Slot, task: Task, reason: str, output: StepOutput) -> None:
        rest = task.assembler.finish()
        if rest or task.unsent:
            output.text.append((task.id, rest, task.unsent))
        output.done.append(
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
            }
        )
        self._release(slot)

    def _release(self, slot: Slot) -> None:
        if slot.task is not None and slot.task.sampler is not None:
            slot.task.sampler.close()
        slot.task = None

    # -- when a batch did not run

    def _undo(self, shares: list[tuple[Slot, int]]) -> None:
        """Bring the sequences of a failed batch back to where they were before it."""
        for slot, _ in shares:
            if not self._model.rewind(slot.index, len(slot.cells)):
                self._clear(slot)

    def _make_room(self, output: StepOutput) -> None:
        """The KV cache has no room although it was reserved: give up cached state, then a task."""
        cached = [slot for slot in self._slots if slot.task is None and slot.cells]
        for slot in cached:
            self._clear(slot)
        if cached:
            return
        largest = max((s for s in self._slots if s.task), key=lambda s: s.reserved_cells)
        assert largest.task is not None
        error = WorkerError(
            f"the KV cache of {self._model.context_length} tokens is full",
            limit=self._model.context_length,
        )
        output.error.append({"id": largest.task.id, "error": error_to_wire(error)})
        self._release(largest)
        self._clear(largest)

    def _clear(self, slot: Slot) -> None:
        self._model.forget(slot.index)
        slot.cells.clear()


def _pending(slot: Slot) -> int:
    """Tokens of the slot's task that are not computed yet."""
    return len(slot.task.tokens) - len(slot.cells) if slot.task is not None else 0
