"""Continuous batching: several sequences share every decode of one context.

    step:  admit -> begin -> plan -> decode -> advance -> park

Each step takes the next token of every running sequence and a piece of the prompts that are still
being read. What was computed once is not computed again: a prompt starts from the longest state
that a slot holds, that another slot is computing, or that was parked in the host's memory.
Owned by one thread. No I/O here.
"""

import time
from bisect import insort_left, insort_right

from orion_oie.backends.llama.cells import Cells
from orion_oie.backends.llama.native import (
    BATCH_TOKENS,
    DECODE_ABORTED,
    DECODE_NO_SLOT,
    DECODE_OK,
    NativeModel,
    Row,
)
from orion_oie.backends.llama.pacing import Pacer
from orion_oie.backends.llama.parking import ParkedState, ParkingLot
from orion_oie.backends.llama.protocol import error_to_wire
from orion_oie.backends.llama.reuse import (
    MIN_GAIN,
    Start,
    best_awaited,
    best_slot,
    best_start,
    reusable,
)
from orion_oie.backends.llama.sampling import (
    Candidates,
    Logits,
    NoTokenAllowedError,
    Sampler,
    log_probabilities,
)
from orion_oie.backends.llama.tasks import Slot, StepOutput, Task
from orion_oie.errors import OrionError, WorkerError
from orion_oie.schemas import FinishReason

# Room for this much of an answer is kept free when a task is admitted. Most answers are far
# shorter than what they may take; one that outgrows the room parks the youngest of its neighbours.
GROWTH = 64

# After an aborted batch: else cancels that come fast enough would throw away all that is computed.
AFTER_ABORT_TOKENS = 32

# Cells of silent sequences that may stay while others are answered. llama.cpp looks at cells in
# runs of this many, so fewer cost nothing.
IDLE_CELLS = 256

# Shorter states are computed again sooner than they are looked after.
MIN_PARKED = 32
MIN_PREFIX = 8


class DecodeFailedError(Exception):
    """llama_decode failed in a way after which the context cannot be trusted."""


class Batcher:
    """Runs tasks in the slots of a model. `parked_bytes` None: as much as the KV cache has."""

    def __init__(self, model: NativeModel, parked_bytes: int | None = None) -> None:
        self._model = model
        self._slots = [Slot(index) for index in range(model.slots)]
        self._cells = Cells(model.context_length)
        self._lot = ParkingLot(parked_bytes or 0)
        self._is_lot_sized = parked_bytes is not None
        self._pacer = Pacer(BATCH_TOKENS)
        self._candidates = Candidates(model.vocab_size)
        self._waiting: list[Task] = []
        self._uses = 0
        self._was_aborted = False

    @property
    def has_work(self) -> bool:
        return bool(self._waiting) or any(slot.task for slot in self._slots)

    def add(self, task: Task) -> None:
        """Queue a task whose prompt and at least one more token fit the context."""
        task.limit = min(task.limit, self._model.context_length - task.prompt_tokens)
        insort_right(self._waiting, task, key=_rank)

    def cancel(self, task_id: int) -> bool:
        """Drop a task; False when it is not here. Its slot is free at once."""
        for task in self._waiting:
            if task.id == task_id:
                self._waiting.remove(task)
                task.close()
                return True
        for slot in self._slots:
            if slot.task is not None and slot.task.id == task_id:
                self._release(slot)
                return True
        return False

    def step(self) -> StepOutput:
        """Admit what fits, run one batch, choose tokens."""
        output = StepOutput()
        self._admit()
        for slot in self._busy():
            if not slot.has_begun:
                self._begin(slot)
        rows, shares = self._planned_rows()
        if not rows:
            return output
        started = time.perf_counter()
        code = self._model.decode(rows)
        self._was_aborted = code == DECODE_ABORTED
        if code == DECODE_OK:
            running = sum(1 for _, share in shares if share == 1)
            self._pacer.note(running, len(rows) - running, time.perf_counter() - started)
            self._advance(shares, output)
            self._park_silent()
        elif code == DECODE_ABORTED:
            self._undo(shares)
        elif code == DECODE_NO_SLOT:
            self._undo(shares)
            self._make_room(output)
        else:
            raise DecodeFailedError(f"llama_decode returned {code}")
        return output

    def _busy(self) -> list[Slot]:
        """The slots with tasks, in the order in which these came."""
        busy = [slot for slot in self._slots if slot.task is not None]
        return sorted(busy, key=lambda slot: slot.last_used)

    def _silent(self) -> list[Slot]:
        """The slots that hold state for nobody, the longest unused first."""
        silent = [slot for slot in self._slots if slot.task is None and slot.tokens]
        return sorted(silent, key=lambda slot: slot.last_used)

    # -- admission

    def _admit(self) -> None:
        while self._waiting:
            idle = [slot for slot in self._slots if slot.task is None]
            if not idle:
                return
            task = self._waiting[0]
            slot = best_slot(
                idle, task, self._slots, list(self._lot), is_rewindable=self._model.is_rewindable
            )
            if not self._reserve(slot, task):
                return
            self._waiting.pop(0)
            self._uses += 1
            slot.task, slot.session_id, slot.last_used = task, task.session_id, self._uses
            task.started_at = task.started_at or time.perf_counter()
            self._begin(slot)

    def _reserve(self, chosen: Slot, task: Task) -> bool:
        """Make sure that there are cells for the task, parking silent sequences if that helps."""
        wanted = self._promised(task) - self._shareable(chosen, task)
        for slot in self._busy():
            assert slot.task is not None
            expected = slot.awaited.length if slot.awaited is not None else 0
            wanted += max(0, self._promised(slot.task) - max(len(slot.tokens), expected))
        if wanted <= self._cells.free:
            return True
        others = [slot for slot in self._silent() if slot is not chosen]
        kept = {cell for slot in self._busy() for cell in slot.cells}
        kept.update(chosen.cells[: reusable(chosen.tokens, task, is_rewindable=True)])
        is_alone = not any(slot.task for slot in self._slots)  # then it can always start
        if wanted > self._cells.capacity - len(kept) and not is_alone:
            return False
        for slot in others:
            if wanted <= self._cells.free:
                break
            self._park(slot)
        return True

    def _promised(self, task: Task) -> int:
        """Cells that a task is sure to get once it runs."""
        if task.is_preempted:
            return task.most_tokens
        return min(task.most_tokens, len(task.tokens) + GROWTH)

    def _shareable(self, chosen: Slot, task: Task) -> int:
        """How many cells the task will not need, because others hold or compute them."""
        if not self._model.is_rewindable:
            return reusable(chosen.tokens, task, is_rewindable=False)
        held = max(
            reusable(slot.tokens, task, is_rewindable=True)
            for slot in self._slots
            if slot.task or slot is chosen
        )
        awaited = best_awaited(chosen, task, self._slots, is_rewindable=True)
        return max(held, awaited.length if awaited else 0)

    # -- where a task starts

    def _begin(self, slot: Slot) -> None:
        """Let a task start from the best state there is, unless it waits for a better one."""
        task = slot.task
        assert task is not None
        if slot.awaited is not None and slot.awaited.is_coming:
            return
        slot.awaited = None
        is_rewindable = self._model.is_rewindable
        start = best_start(
            slot,
            task,
            self._slots,
            self._lot,
            is_rewindable=is_rewindable,
            are_parked_rewindable=self._model.saves_whole_states,
            free_cells=self._cells.free,
        )
        awaited = best_awaited(slot, task, self._slots, is_rewindable=is_rewindable)
        if awaited is not None and awaited.length >= start.length + MIN_GAIN:
            slot.awaited = awaited
            return
        self._take_state(slot, start)
        if task.cached_tokens is None:
            task.cached_tokens = len(slot.tokens)
        if task.sampler is None:
            prompt = task.tokens[: task.prompt_tokens]
            task.sampler = Sampler(
                self._candidates, task.options, prompt, task.bias, task.grammar
            )
        slot.has_begun = True

    def _take_state(self, slot: Slot, start: Start) -> None:
        if start.slot is slot:
            self._rewind(slot, start.length)
            return
        self._park(slot)
        if start.slot is not None:
            if self._model.share(start.slot.index, slot.index, start.length):
                self._cells.share(start.slot.cells, slot.cells, start.length)
                slot.tokens[:] = start.slot.tokens[: start.length]
        elif start.parked is not None and self._model.restore(slot.index, start.parked.data):
            self._lot.touch(start.parked)
            if start.parked.is_preempted:
                self._lot.remove(start.parked)
            self._cells.grow(slot.cells, len(start.parked.tokens))
            slot.tokens[:] = start.parked.tokens
            self._rewind(slot, start.length)

    def _rewind(self, slot: Slot, length: int) -> None:
        """Cut a slot's state back; nothing is left of it when the model cannot."""
        if length == len(slot.tokens):
            return
        if length == 0 or not self._model.rewind(slot.index, length):
            self._clear(slot)
            return
        self._cells.cut(slot.cells, length)
        del slot.tokens[length:]

    # -- one batch

    def _planned_rows(self) -> tuple[list[Row], list[tuple[Slot, int]]]:
        """The rows of the next batch, for which there are cells, and how many each slot has."""
        while True:
            shares = self._shares()
            total = sum(share for _, share in shares)
            if total <= self._cells.free:
                break
            silent = self._silent()
            if silent:
                self._park(silent[0])
            else:
                self._preempt(self._busy()[-1])
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
        that a long prompt never makes them wait."""
        active = sorted(self._busy(), key=lambda slot: slot.pending > 1)
        running = sum(1 for slot in active if slot.pending == 1)
        prompt_left = self._pacer.prompt_tokens(running)
        if self._was_aborted:
            prompt_left = min(prompt_left, AFTER_ABORT_TOKENS)
        prompt_left = min(prompt_left, BATCH_TOKENS - running)
        shares: list[tuple[Slot, int]] = []
        for slot in active:
            share = 1 if slot.pending == 1 else min(slot.pending, prompt_left)
            if slot.pending > 1:
                share = min(share, self._until_prefix_ends(slot))
                prompt_left -= share
            if share > 0:
                shares.append((slot, share))
        return shares

    def _until_prefix_ends(self, slot: Slot) -> int:
        """Tokens up to the place where the state is worth keeping for other requests."""
        assert slot.task is not None
        left = slot.task.prefix_tokens - len(slot.tokens)
        if left <= 0 or not self._is_new_prefix(slot.task):
            return BATCH_TOKENS
        return left

    def _is_new_prefix(self, task: Task) -> bool:
        length = task.prefix_tokens
        return length >= MIN_PREFIX and not self._lot.has_prefix(task.tokens[:length])

    def _advance(self, shares: list[tuple[Slot, int]], output: StepOutput) -> None:
        complete = [share == slot.pending for slot, share in shares]
        count = sum(complete)
        logits = iter(self._model.logits(count) if count else ())
        for (slot, share), is_complete in zip(shares, complete, strict=True):
            task = slot.task
            assert task is not None
            start = len(slot.tokens)
            slot.tokens += task.tokens[start : start + share]
            self._cells.grow(slot.cells, share)
            if len(slot.tokens) == task.prefix_tokens and self._is_new_prefix(task):
                self._keep(slot, is_prefix=True)
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
        if self._model.is_end(token):
            self._finish(slot, task, "stop", output)
            return
        if task.options.logprobs is not None:
            self._note_logprobs(task, logits, token)
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

    def _note_logprobs(self, task: Task, logits: Logits, token: int) -> None:
        own, best = log_probabilities(logits, token, task.options.logprobs or 0)

        def described(token: int, logprob: float) -> tuple[str, int, float]:
            return self._model.piece(token).decode("utf-8", "replace"), token, logprob

        task.logprobs.append((*described(token, own), [described(*item) for item in best]))

    def _finish(self, slot: Slot, task: Task, reason: FinishReason, output: StepOutput) -> None:
        rest = task.assembler.finish()
        if rest or task.unsent:
            output.text.append((task.id, rest, task.unsent))
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
        slot.task, slot.has_begun, slot.awaited = None, False, None

    # -- states that leave

    def _park_silent(self) -> None:
        """Take one silent sequence out of the way of the running ones; none while a prompt is
        read, which has waited long enough."""
        busy = self._busy()
        silent = self._silent()
        is_reading = any(slot.pending != 1 for slot in busy)
        if not busy or is_reading or sum(len(slot.cells) for slot in silent) <= IDLE_CELLS:
            return
        self._park(silent[0])

    def _park(self, slot: Slot, *, is_preempted: bool = False) -> None:
        """Move a slot's state to the host's memory."""
        is_kept = self._lot.has_state(slot.tokens, or_longer=self._model.saves_whole_states)
        if len(slot.tokens) >= MIN_PARKED and not is_kept:
            self._keep(slot, is_preempted=is_preempted)
        self._clear(slot)

    def _keep(self, slot: Slot, *, is_prefix: bool = False, is_preempted: bool = False) -> None:
        data = self._model.save(slot.index)
        if not self._is_lot_sized:
            per_token = data.nbytes / len(slot.tokens)
            self._lot.limit_bytes = int(per_token * self._cells.capacity)
            self._is_lot_sized = True
        if not is_prefix:
            self._lot.drop_beginnings_of(slot.tokens)
        tokens = list(slot.tokens)
        self._lot.add(ParkedState(tokens, data, slot.session_id, is_prefix, is_preempted))

    def _preempt(self, slot: Slot) -> None:
        """Take a running task out again: it goes on later, when all that it may need is free."""
        task = slot.task
        assert task is not None
        task.is_preempted = True
        slot.task, slot.has_begun, slot.awaited = None, False, None
        insort_left(self._waiting, task, key=_rank)
        self._park(slot, is_preempted=True)

    # -- when a batch did not run

    def _undo(self, shares: list[tuple[Slot, int]]) -> None:
        """Bring the sequences of a failed batch back to where they were before it."""
        for slot, _ in shares:
            if not self._model.rewind(slot.index, len(slot.tokens)):
                self._clear(slot)

    def _make_room(self, output: StepOutput) -> None:
        """The KV cache has no room although there should be: give up what is silent, then a
        task."""
        silent = self._silent()
        for slot in silent:
            self._park(slot)
        if silent:
            return
        largest = max(self._busy(), key=lambda slot: len(slot.tokens))
        limit = self._cells.capacity
        error = WorkerError(f"the KV cache of {limit} tokens is full", limit=limit)
        self._fail(largest, error, output)
        self._clear(largest)

    def _clear(self, slot: Slot) -> None:
        self._model.forget(slot.index)
        self._cells.cut(slot.cells, 0)
        slot.tokens.clear()


def _rank(task: Task) -> int:
    """Tasks of higher priority run first."""
    return -task.priority
