"""Continuous batching: several sequences share every decode of one context.

    step:  tidy -> admit -> begin -> plan -> decode -> advance

Each step takes the next token of every running sequence and a piece of the prompts that are still
being read. What was computed once is not computed again: a prompt starts from the longest state
that a slot holds, that another slot is computing, or that was parked in the host's memory.
Owned by one thread. No I/O here.
"""

import time
from bisect import insort_left, insort_right

from orion_oie.backends.llama.protocol import error_to_wire
from orion_oie.backends.llama.worker.admission import Room
from orion_oie.backends.llama.worker.kv_cache import KVCache
from orion_oie.backends.llama.worker.native import (
    DECODE_ABORTED,
    DECODE_NO_SLOT,
    DECODE_OK,
    NativeModel,
    Row,
)
from orion_oie.backends.llama.worker.prefill_budget import Pacer
from orion_oie.backends.llama.worker.prefix_match import (
    MIN_GAIN,
    best_awaited,
    best_slot,
    best_start,
)
from orion_oie.backends.llama.worker.prefix_store import Snapshots
from orion_oie.backends.llama.worker.sampling import (
    Candidates,
    Logits,
    NoTokenAllowedError,
    Sampler,
    described,
)
from orion_oie.backends.llama.worker.tasks import (
    Slot,
    StepOutput,
    Task,
)
from orion_oie.errors import OrionError, WorkerError
from orion_oie.schemas.results import FinishReason

# With one row more, llama.cpp computes attention on a CPU with another kernel, which rounds
# otherwise. That kernel is a tenth faster for prompts of some hundred tokens, more for longer ones.
EXACT_ROWS = 63
LONG_PROMPT = 256

# After an aborted batch: else cancels that come fast enough would throw away all that is computed.
AFTER_ABORT_TOKENS = 32


class DecodeFailedError(Exception):
    """llama_decode failed in a way after which the context cannot be trusted."""


class Batcher:
    """Runs tasks in the slots of a model. `parked_bytes` None: as much as the KV cache has.
    `snapshots` keep the states of prefixes on the disk."""

    def __init__(
        self,
        model: NativeModel,
        parked_bytes: int | None = None,
        snapshots: Snapshots | None = None,
    ) -> None:
        self._model = model
        self._slots = [Slot(index) for index in range(model.slots)]
        self._kv = KVCache(model, parked_bytes, snapshots)
        self._room = Room(model, self._slots, self._kv)
        self._pacer = Pacer(model.batch_tokens)
        self._exact_rows = model.batch_tokens if model.is_on_gpu else EXACT_ROWS
        self._candidates = Candidates(model.vocabulary.size)
        self._waiting: list[Task] = []
        self._busy: list[Slot] = []  # in the order in which their tasks came
        self._uses = 0
        self._was_aborted = False

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._busy)

    def add(self, task: Task) -> None:
        """Queue a task whose prompt and at least one more token fit the context."""
        task.limit = min(task.limit, self._model.context_length - task.prompt_tokens)
        insort_right(self._waiting, task, key=_rank)

    def cancel(self, task_id: int) -> bool:
        """Drop a task; False when it is not here. Its slot is free at once."""
        for task in self._waiting:
            if task.id == task_id:
                self._waiting.remove(task)
                self._kv.unpin(task)
                task.close()
                return True
        for slot in self._busy:
            assert slot.task is not None
            if slot.task.id == task_id:
                self._release(slot)
                return True
        return False

    def move_to(self, model: NativeModel, snapshots: Snapshots | None) -> None:
        """Go on with another context of the same weights. Running tasks go on from where they are:
        their states are moved through the host's memory, a thousand times as fast as computing
        them again."""
        for slot in reversed(self._busy[:]):
            assert slot.task is not None
            task = slot.task
            self._preempt(slot)
            task.is_preempted = False  # nobody took its room
        for slot in self._room.silent():
            self._kv.park(slot)
        self._model = model
        self._kv.move_to(model, snapshots)
        self._room = Room(model, self._slots, self._kv)
        self._pacer = Pacer(model.batch_tokens)

    def occupancy(self) -> dict[str, int]:
        """The fields of `Occupancy`."""
        held = {cell for slot in self._busy for cell in slot.cells}
        return {
            "busy_slots": len(self._busy),
            "waiting": len(self._waiting),
            "cells": self._kv.cells.capacity,
            "held_cells": len(held),
            "silent_cells": self._kv.cells.used - len(held),
            "parked_bytes": self._kv.lot.used_bytes,
            "threads": self._model.threads,
        }

    def step(self) -> StepOutput:
        """Admit what fits, run one batch, choose tokens."""
        output = StepOutput()
        self._room.tidy(self._busy)
        self._admit()
        for slot in self._busy:
            if not slot.has_begun:
                self._begin(slot)
        rows, shares = self._planned_rows()
        if not rows:
            return output
        started = time.perf_counter()
        is_rough = self._model.is_arriving and len(rows) > self._exact_rows
        code = self._model.decode(rows)
        self._was_aborted = code == DECODE_ABORTED
        if code == DECODE_OK:
            running = sum(slot.pending == 1 for slot, _ in shares)
            self._pacer.note(running, len(rows) - running, time.perf_counter() - started)
            self._advance(shares, output, is_rough=is_rough)
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
            slot = best_slot(
                idle,
                task,
                self._slots,
                list(self._kv.lot),
                is_rewindable=self._model.is_rewindable,
                are_parked_rewindable=self._model.saves_whole_states,
            )
            if not self._room.reserve(slot, task, self._busy):
                return
            self._waiting.pop(0)
            self._uses += 1
            slot.task, slot.session_id, slot.last_used = task, task.session_id, self._uses
            self._busy.append(slot)
            task.started_at = task.started_at or time.perf_counter()
            self._begin(slot)

    # -- where a task starts

    def _begin(self, slot: Slot) -> None:
        """Let a task start from the best state there is, unless it waits for a better one."""
        task = slot.task
        assert task is not None
        if slot.awaited is not None and slot.awaited.is_coming:
            return
        slot.awaited = None
        self._kv.recall_prefix(task)
        is_rewindable = self._model.is_rewindable
        start = best_start(
            slot,
            task,
            self._slots,
            self._kv.lot,
            is_rewindable=is_rewindable,
            are_parked_rewindable=self._model.saves_whole_states,
            free_cells=self._kv.cells.free,
        )
        awaited = best_awaited(slot, task, self._slots, is_rewindable=is_rewindable)
        if awaited is not None and awaited.length >= start.length + MIN_GAIN:
            slot.awaited = awaited
            return
        self._kv.take(slot, start)
        self._kv.unpin(task)
        if self._kv.can_keep_prefix(slot, task):
            self._kv.keep_prefix(slot, task)
        if task.cached_tokens is None:
            task.cached_tokens = len(slot.tokens)
        if task.sampler is None:
            prompt = task.tokens[: task.prompt_tokens]
            task.sampler = Sampler(self._candidates, task.options, prompt, task.bias, task.grammar)
        slot.has_begun = True

    # -- one batch

    def _planned_rows(self) -> tuple[list[Row], list[tuple[Slot, int]]]:
        """The rows of the next batch, for which there are cells, and how many each slot has."""
        while True:
            shares = self._shares()
            total = sum(share for _, share in shares)
            if total <= self._kv.cells.free:
                break
            silent = self._room.silent()
            if silent:
                self._kv.park(silent[0])
            else:
                self._preempt(self._busy[-1])
        if total == 1 and self._room.is_split:
            self._room.tidy_for_one()
        self._kv.make_way(shares, self._slots)
        rows: list[Row] = []
        for slot, share in shares:
            assert slot.task is not None
            start = len(slot.tokens)
            is_complete = share == slot.pending
            new = slot.task.tokens[start : start + share]
            rows += [(token, start + i, slot.index, False) for i, token in enumerate(new)]
            if is_complete:
                rows[-1] = (*rows[-1][:3], True)
        return rows, shares

    def _shares(self) -> list[tuple[Slot, int]]:
        """How many tokens of which slots are computed next: those that need one come first, so
        that a long prompt never makes them wait. Where nobody watches their tokens arrive, prompts
        are read as fast as they can be.

        What a batch holds beside them must not change what they say: batches stay so small that
        llama.cpp computes each row as if it were alone. Only a long prompt gets a large batch, and
        has it to itself.
        """
        reading = [slot for slot in self._busy if slot.pending > 1]
        running = [slot for slot in self._busy if slot.pending == 1]
        shares = [(slot, 1) for slot in running]
        watched = [slot for slot in running if slot.task and slot.task.is_streamed]
        left = self._pacer.prompt_tokens(len(running)) if watched else self._model.batch_tokens
        if self._was_aborted:
            left = min(left, AFTER_ABORT_TOKENS)
        if self._model.is_arriving:
            return shares + self._filled(reading, self._model.batch_tokens - len(running))
        if not running and reading and self._share_of(reading[0]) > LONG_PROMPT:
            return [(reading[0], min(self._share_of(reading[0]), left))]
        if len(running) == 1 and self._room.is_split:
            left = max(left, 1)
        left = min(left, max(1, self._exact_rows - len(running)))
        return shares + self._filled(reading, left)

    def _filled(self, reading: list[Slot], left: int) -> list[tuple[Slot, int]]:
        """Shares of prompts, in turn, until `left` tokens are given out."""
        shares = []
        for slot in reading:
            share = min(self._share_of(slot), left)
            if share > 0:
                shares.append((slot, share))
                left -= share
        return shares

    def _share_of(self, slot: Slot) -> int:
        """How many tokens of a prompt one batch could take."""
        most = min(slot.pending, self._model.batch_tokens)
        # While the model arrives, each batch waits for all of it: none is worth splitting.
        return most if self._model.is_arriving else min(most, self._until_prefix_ends(slot))

    def _until_prefix_ends(self, slot: Slot) -> int:
        """Tokens up to the place where the state is worth keeping for other requests."""
        assert slot.task is not None
        left = slot.task.prefix_tokens - len(slot.tokens)
        if left <= 0 or not self._kv.is_new_prefix(slot.task):
            return self._model.batch_tokens
        return left

    def _advance(
        self, shares: list[tuple[Slot, int]], output: StepOutput, *, is_rough: bool
    ) -> None:
        complete = [share == slot.pending for slot, share in shares]
        count = sum(complete)
        logits = iter(self._model.logits(count) if count else ())
        for (slot, share), is_complete in zip(shares, complete, strict=True):
            task = slot.task
            assert task is not None
            start = len(slot.tokens)
            self._kv.append(slot, task.tokens[start : start + share])
            if is_rough:
                slot.rough_tokens = len(slot.tokens)
            if len(slot.tokens) == task.prefix_tokens and self._kv.can_keep_prefix(slot, task):
                self._kv.keep_prefix(slot, task)
            if is_complete:
                self._take_token(slot, task, next(logits), output)

    def _take_token(self, slot: Slot, task: Task, logits: Logits, output: StepOutput) -> None:
        assert task.sampler is not None
        try:
            token = task.sampler.sample(logits)
        except NoTokenAllowedError:
            self._fail(
                slot,
                WorkerError("the grammar allows nothing that the model's vocabulary can say"),
                output,
            )
            return
        task.last_token_at = time.perf_counter()
        task.first_token_at = task.first_token_at or task.last_token_at
        if self._model.vocabulary.is_end(token):
            self._finish(slot, task, "stop", output)
            return
        if task.options.logprobs is not None:
            piece = self._model.vocabulary.piece
            task.logprobs.append(described(logits, token, task.options.logprobs, piece))
        task.tokens.append(token)
        task.generated += 1
        task.unsent += 1
        text = task.assembler.push(self._model.vocabulary.piece(token))
        if text:
            output.add_text(task, text)
        if task.assembler.is_stopped:
            self._finish(slot, task, "stop", output)
        elif task.generated >= task.limit:
            self._finish(slot, task, "length", output)

    def _finish(self, slot: Slot, task: Task, reason: FinishReason, output: StepOutput) -> None:
        output.add_done(task, reason)
        self._release(slot)

    def _fail(self, slot: Slot, error: OrionError, output: StepOutput) -> None:
        assert slot.task is not None
        output.error.append({"id": slot.task.id, "error": error_to_wire(error)})
        self._release(slot)

    def _release(self, slot: Slot) -> None:
        """End a slot's task. What was computed stays, for whoever goes on from there."""
        if slot.task is not None:
            slot.task.close()
        self._vacate(slot)

    def _vacate(self, slot: Slot) -> None:
        slot.task, slot.has_begun, slot.awaited = None, False, None
        self._busy.remove(slot)

    # -- states that leave

    def _preempt(self, slot: Slot) -> None:
        """Take a running task out again: it goes on later, when all that it may need is free."""
        task = slot.task
        assert task is not None
        task.is_preempted = True
        self._vacate(slot)
        insort_left(self._waiting, task, key=_rank)
        task.parked = self._kv.park(slot, is_preempted=True)

    # -- when a batch did not run

    def _undo(self, shares: list[tuple[Slot, int]]) -> None:
        """Bring the sequences of a failed batch back to where they were before it."""
        for slot, _ in shares:
            if not self._model.rewind(slot.index, len(slot.tokens)):
                self._kv.clear(slot)

    def _make_room(self, output: StepOutput) -> None:
        """The KV cache has no room although there should be: give up what is silent, then a
        task."""
        silent = self._room.silent()
        for slot in silent:
            self._kv.park(slot)
        if silent:
            return
        largest = max(self._busy, key=lambda slot: len(slot.task.tokens) if slot.task else 0)
        limit = self._kv.cells.capacity
        error = WorkerError(f"the KV cache of {limit} tokens is full", limit=limit)
        self._fail(largest, error, output)
        self._kv.clear(largest)


def _rank(task: Task) -> int:
    """Tasks of higher priority run first."""
    return -task.priority
