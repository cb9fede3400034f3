"""Continuous batching: several sequences share every decode of one context.

    step:  reclaim -> admit -> start -> schedule -> decode -> advance

Each step computes the next token of every decoding task and a piece of the prompts that are still
in prefill. Nothing is computed twice: a prompt starts from the longest state that a slot holds,
that another slot is computing, or that was offloaded to the host cache. Owned by one thread. No I/O
happens in this module.
"""

import time
from bisect import insort_left, insort_right

from orion_oie.backends.base import Occupancy
from orion_oie.backends.llama.protocol import Ended, error_to_wire
from orion_oie.backends.llama.worker.admission import Admission
from orion_oie.backends.llama.worker.kv_cache import KVCache
from orion_oie.backends.llama.worker.native import (
    DECODE_ABORTED,
    DECODE_NO_SLOT,
    DECODE_OK,
    NativeModel,
    Row,
)
from orion_oie.backends.llama.worker.prefill_budget import PrefillBudget
from orion_oie.backends.llama.worker.prefix_match import (
    MIN_GAIN,
    best_awaited,
    best_slot,
    best_start,
)
from orion_oie.backends.llama.worker.prefix_store import PrefixStore
from orion_oie.backends.llama.worker.sampling import (
    Candidates,
    Logits,
    NoTokenAllowedError,
    Sampler,
    described,
)
from orion_oie.backends.llama.worker.tasks import (
    Running,
    Scheduled,
    Slot,
    StepOutput,
    Task,
)
from orion_oie.backends.llama.worker.thread_choice import StepKind, ThreadChoice
from orion_oie.errors import OrionError, WorkerError
from orion_oie.schemas.results import FinishReason

# With one row more, llama.cpp computes attention on a CPU with another kernel, which rounds
# differently. That kernel is a tenth faster for prompts of some hundred tokens, more for longer
# ones.
EXACT_ROWS = 63
LONG_PROMPT = 256

# After an aborted batch: otherwise frequent cancels could throw away everything that is computed.
AFTER_ABORT_TOKENS = 32


class DecodeFailedError(Exception):
    """llama_decode failed in a way after which the context cannot be trusted."""


class Batcher:
    """Runs tasks in the slots of a model.

    `threads` chooses the number of threads for each step. `host_cache_bytes` None makes the host
    cache as large as the KV cache. `prefix_store` keeps the states of prefixes on the disk.
    """

    def __init__(
        self,
        model: NativeModel,
        host_cache_bytes: int | None = None,
        prefix_store: PrefixStore | None = None,
        threads: ThreadChoice | None = None,
    ) -> None:
        self._model = model
        self.threads = threads or ThreadChoice(model.threads)
        self._slots = [Slot(index) for index in range(model.slots)]
        self._kv = KVCache(model, host_cache_bytes, prefix_store)
        self._admission = Admission(model, self._slots, self._kv)
        self._prefill_budget = PrefillBudget(model.batch_tokens)
        self._exact_rows = model.batch_tokens if model.is_on_gpu else EXACT_ROWS
        self._candidates = Candidates(model.vocabulary.size)
        self._waiting: list[Task] = []
        self._running: list[Running] = []  # in the order in which the tasks were admitted
        self._uses = 0
        self._was_aborted = False
        self._has_started_over = False  # since the last task that was answered

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, task: Task) -> None:
        """Queue a task whose prompt and at least one more token fit the context."""
        task.limit = min(task.limit, self._model.context_length - task.prompt_tokens)
        insort_right(self._waiting, task, key=_rank)

    def cancel(self, task_id: int) -> bool:
        """Drop a task and free its slot at once; False when there is no such task."""
        for task in self._waiting:
            if task.id == task_id:
                self._waiting.remove(task)
                self._kv.unpin(task)
                task.close()
                return True
        for run in self._running:
            if run.task.id == task_id:
                self._release(run)
                return True
        return False

    def move_to(self, model: NativeModel, prefix_store: PrefixStore | None) -> None:
        """Go on with another context of the same weights. The states of running tasks are moved
        through the host cache, which is a thousand times as fast as computing them again."""
        self._offload_all()
        self._model = model
        self._kv.move_to(model, prefix_store)
        self._admission = Admission(model, self._slots, self._kv)
        self._prefill_budget = PrefillBudget(model.batch_tokens)

    def occupancy(self) -> Occupancy:
        """The current load."""
        held = {cell for run in self._running for cell in run.slot.cells}
        return Occupancy(
            busy_slots=len(self._running),
            waiting=len(self._waiting),
            cells=self._kv.cells.capacity,
            held_cells=len(held),
            silent_cells=self._kv.cells.used - len(held),
            host_cache_bytes=self._kv.host_cache.used_bytes,
            threads=self.threads.number("decode", max(1, len(self._running))),
        )

    def step(self) -> StepOutput:
        """Run one batch.

        1. Reclaim cells that are in the way of the running tasks.
        2. Admit waiting tasks for which there are a slot and cells.
        3. Start the prefill of tasks whose starting state is settled.
        4. Schedule rows; without any, return.
        5. Decode the batch. Then, by its outcome:
           ok:       advance the tasks by their new tokens;
           aborted:  undo the batch (a cancel arrived; the batch is computed again);
           no cells: undo the batch, and start over with an empty cache;
           else:     raise `DecodeFailedError`.
        """
        output = StepOutput()
        self._admission.reclaim(self._running)
        self._admit()
        for run in self._running:
            if not run.slot.has_started:
                self._start(run)
        scheduled, rows = self._schedule()
        if not rows:
            return output
        is_arriving = self._model.is_arriving
        is_inexact = is_arriving and len(rows) > self._exact_rows
        decoding = sum(part.slot.pending == 1 for part in scheduled)
        kind: StepKind = "decode" if decoding == len(rows) else "prefill"
        self._model.use_threads(self.threads.number(kind, len(rows)))
        started = time.perf_counter()
        code = self._model.decode(rows)
        self._was_aborted = code == DECODE_ABORTED
        if code == DECODE_OK:
            seconds = time.perf_counter() - started
            self._prefill_budget.note(decoding, len(rows) - decoding, seconds)
            if not is_arriving:  # such a step may have waited for weights
                self.threads.note(kind, len(rows), seconds)
            self._advance(scheduled, output, is_inexact=is_inexact)
        elif code == DECODE_ABORTED:
            self._undo(scheduled)
        elif code == DECODE_NO_SLOT:
            self._undo(scheduled)
            self._start_over(output)
        else:
            raise DecodeFailedError(f"llama_decode returned {code}")
        return output

    # -- admission

    def _admit(self) -> None:
        while self._waiting:
            free = [slot for slot in self._slots if slot.task is None]
            if not free:
                return
            task = self._waiting[0]
            slot = best_slot(
                free,
                task,
                self._slots,
                list(self._kv.host_cache),
                is_rewindable=self._model.is_rewindable,
                are_offloaded_rewindable=self._model.saves_whole_states,
            )
            if not self._admission.reserve(slot, task, self._running):
                return
            self._waiting.pop(0)
            self._uses += 1
            slot.task, slot.session_id, slot.last_used = task, task.session_id, self._uses
            run = Running(slot, task)
            self._running.append(run)
            task.started_at = task.started_at or time.perf_counter()
            self._start(run)

    # -- the starting state of a task

    def _start(self, run: Running) -> None:
        """Start the prefill of a task from the best state there is.

        1. It waits for tokens that another slot is still computing: go on waiting.
        2. Another slot is computing a longer beginning than any state has: wait for that one.
        3. Otherwise take the best state over: of this slot, of another one, or an offloaded one.
        """
        slot, task = run.slot, run.task
        if slot.awaited is not None and slot.awaited.is_coming:
            return
        slot.awaited = None
        self._kv.recall_prefix(task)
        is_rewindable = self._model.is_rewindable
        start = best_start(
            slot,
            task,
            self._slots,
            self._kv.host_cache,
            is_rewindable=is_rewindable,
            are_offloaded_rewindable=self._model.saves_whole_states,
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
        slot.has_started = True

    # -- one batch

    def _schedule(self) -> tuple[list[Scheduled], list[Row]]:
        """The tokens of the next batch, for which there are cells, and the rows for llama.cpp."""
        while True:
            scheduled = self._scheduled_tokens()
            total = sum(part.tokens for part in scheduled)
            if total <= self._kv.cells.free:
                break
            idle = self._admission.idle_slots()
            if idle:
                self._kv.offload(idle[0])
            else:
                self._preempt(self._running[-1])
        if total == 1 and self._admission.splits_lone_row:
            self._admission.reclaim_for_lone_row()
        self._kv.keep_cells_ordered(scheduled, self._slots)
        rows: list[Row] = []
        for part in scheduled:
            start = len(part.slot.tokens)
            is_complete = part.tokens == part.slot.pending
            new = part.task.tokens[start : start + part.tokens]
            rows += [(token, start + i, part.slot.index, False) for i, token in enumerate(new)]
            if is_complete:
                rows[-1] = (*rows[-1][:3], True)
        return scheduled, rows

    def _scheduled_tokens(self) -> list[Scheduled]:
        """The number of tokens that each running task gets in the next batch.

        1. Every decoding task gets one token, so that a long prompt never holds it up.
        2. The rest of the batch goes to prompts, in the order of admission, up to a budget: if
           someone watches a decoding task, the prefill budget, otherwise a whole batch; after an
           abort, `AFTER_ABORT_TOKENS` at most.
        3. While the model arrives, the batch is filled completely: each batch waits for all
           weights that are still to come.
        4. A long prompt gets a large batch only if nothing decodes, and has the batch to itself.
        5. A lone row that llama.cpp would compute in two parts gets a prompt token beside it.
        6. All other batches stay small enough for llama.cpp to compute each row as if it were
           alone: the other rows of a batch must not change what a task says.
        """
        prefilling = [run for run in self._running if run.pending > 1]
        decoding = [run for run in self._running if run.pending == 1]
        scheduled = [Scheduled(run.slot, run.task, 1) for run in decoding]
        is_watched = any(run.task.is_streamed for run in decoding)
        batch_tokens = self._model.batch_tokens
        left = self._prefill_budget.tokens(len(decoding)) if is_watched else batch_tokens
        if self._was_aborted:
            left = min(left, AFTER_ABORT_TOKENS)
        if self._model.is_arriving:
            return scheduled + self._prefill_parts(prefilling, batch_tokens - len(decoding))
        if not decoding and prefilling and self._prefill_tokens(prefilling[0]) > LONG_PROMPT:
            return self._prefill_parts(prefilling[:1], left)
        if len(decoding) == 1 and self._admission.splits_lone_row:
            left = max(left, 1)
        left = min(left, max(1, self._exact_rows - len(decoding)))
        return scheduled + self._prefill_parts(prefilling, left)

    def _prefill_parts(self, prefilling: list[Running], left: int) -> list[Scheduled]:
        """Parts of prompts, in turn, until `left` tokens are given out."""
        parts = []
        for run in prefilling:
            tokens = min(self._prefill_tokens(run), left)
            if tokens > 0:
                parts.append(Scheduled(run.slot, run.task, tokens))
                left -= tokens
        return parts

    def _prefill_tokens(self, run: Running) -> int:
        """The tokens of a prompt that one batch could take."""
        most = min(run.pending, self._model.batch_tokens)
        # While the model arrives, each batch waits for all of it: no prompt is worth splitting.
        return most if self._model.is_arriving else min(most, self._until_prefix_ends(run))

    def _until_prefix_ends(self, run: Running) -> int:
        """The tokens up to the position whose state is worth keeping for other requests."""
        left = run.task.prefix_tokens - len(run.slot.tokens)
        if left <= 0 or not self._kv.is_new_prefix(run.task):
            return self._model.batch_tokens
        return left

    def _advance(self, scheduled: list[Scheduled], output: StepOutput, *, is_inexact: bool) -> None:
        complete = [part.tokens == part.slot.pending for part in scheduled]
        count = sum(complete)
        logits = iter(self._model.logits(count) if count else ())
        for part, is_complete in zip(scheduled, complete, strict=True):
            slot, task = part.slot, part.task
            start = len(slot.tokens)
            self._kv.append(slot, task.tokens[start : start + part.tokens])
            if is_inexact:
                slot.inexact_tokens = len(slot.tokens)
            if len(slot.tokens) == task.prefix_tokens and self._kv.can_keep_prefix(slot, task):
                self._kv.keep_prefix(slot, task)
            if is_complete:
                self._take_token(Running(slot, task), next(logits), output)

    def _take_token(self, run: Running, logits: Logits, output: StepOutput) -> None:
        task = run.task
        if task.sampler is None:
            raise RuntimeError(f"task {task.id} was computed before it had started")
        try:
            token = task.sampler.sample(logits)
        except NoTokenAllowedError:
            error = WorkerError("the grammar allows nothing that the model's vocabulary can say")
            self._fail(run, error, output)
            return
        task.last_token_at = time.perf_counter()
        task.first_token_at = task.first_token_at or task.last_token_at
        if self._model.vocabulary.is_end(token):
            self._finish(run, "stop", output)
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
            self._finish(run, "stop", output)
        elif task.generated >= task.limit:
            self._finish(run, "length", output)

    def _finish(self, run: Running, reason: FinishReason, output: StepOutput) -> None:
        output.add_done(run.task, reason)
        self._has_started_over = False
        self._release(run)

    def _fail(self, run: Running, error: OrionError, output: StepOutput) -> None:
        output.ended.append(Ended(run.task.id, error_to_wire(error)))
        self._release(run)

    def _release(self, run: Running) -> None:
        """End a running task. The state stays in the slot for requests that continue it."""
        run.task.close()
        self._vacate(run)

    def _vacate(self, run: Running) -> None:
        run.slot.task, run.slot.has_started, run.slot.awaited = None, False, None
        self._running.remove(run)

    # -- preemption

    def _preempt(self, run: Running) -> None:
        """Put a running task back into the queue, to resume when all cells it may need are
        free."""
        run.task.is_preempted = True
        self._vacate(run)
        insort_left(self._waiting, run.task, key=_rank)
        run.task.offloaded = self._kv.offload(run.slot, is_preempted=True)

    def _offload_all(self) -> None:
        """Empty all slots. Running tasks go back into the queue, to resume as soon as they can."""
        for run in reversed(self._running[:]):
            self._preempt(run)
            run.task.is_preempted = False  # no other task took its cells
        for slot in self._admission.idle_slots():
            self._kv.offload(slot)

    # -- batches that did not run

    def _undo(self, scheduled: list[Scheduled]) -> None:
        """Restore the sequences of a failed batch to their state before it."""
        for part in scheduled:
            if not self._model.rewind(part.slot.index, len(part.slot.tokens)):
                self._kv.clear(part.slot)

    def _start_over(self, output: StepOutput) -> None:
        """llama.cpp has fewer cells than the books say, which no task can help: empty its memory
        and the books, and go on from the host cache. If it had too few right after that, fail the
        longest task."""
        if self._has_started_over:
            longest = max(self._running, key=lambda run: len(run.task.tokens))
            limit = self._kv.cells.capacity
            reason = f"llama.cpp has no cells for a batch that fits its KV cache of {limit} tokens"
            self._fail(longest, WorkerError(reason, limit=limit), output)
        self._has_started_over = True
        self._offload_all()
        self._kv.start_over()


def _rank(task: Task) -> int:
    """Sort key: tasks of higher priority run first."""
    return -task.priority
