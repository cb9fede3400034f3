"""The states of sequences: in the KV cache, in the host cache, and on the way between them.

Keeps llama.cpp's memory, the allocation of its cells and the slots consistent. Decides nothing: the
batcher chooses which states to offload and where a task starts.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from orion_oie.backends.llama.worker.host_cache import (
    HostCache,
    OffloadedState,
)
from orion_oie.backends.llama.worker.kv_cells import Cells
from orion_oie.backends.llama.worker.native import NativeModel
from orion_oie.backends.llama.worker.prefix_match import (
    MIN_GAIN,
    Start,
    common_length,
)
from orion_oie.backends.llama.worker.prefix_store import PrefixStore
from orion_oie.backends.llama.worker.tasks import (
    Scheduled,
    Slot,
    Task,
)

# It takes longer to look after a shorter state than to compute it again.
MIN_OFFLOADED = 32
MIN_PREFIX = MIN_GAIN

# The number of tokens that are moved at once: for a moment they are in memory twice.
MOVED_TOKENS = 128


class KVCache:
    """The sequences of a model, all empty at first.

    `host_cache_bytes` None makes the host cache as large as the KV cache. `prefix_store` keeps
    prefixes beyond the life of the process.
    """

    def __init__(
        self,
        model: NativeModel,
        host_cache_bytes: int | None,
        prefix_store: PrefixStore | None = None,
    ) -> None:
        self._model = model
        self._host_cache_bytes = host_cache_bytes
        self._prefix_store = prefix_store
        self.host_cache = HostCache(host_cache_bytes or 0)
        self.start_over()

    def move_to(self, model: NativeModel, prefix_store: PrefixStore | None) -> None:
        """Go on with the empty cache of another context; the slots must be empty. Offloaded states
        stay valid: they fit any context of the same model."""
        self._model = model
        self._prefix_store = prefix_store
        self.start_over()

    def start_over(self) -> None:
        """Empty llama.cpp's memory and the books of its cells; the slots must be empty."""
        self._model.clear()
        self.cells = Cells(self._model.context_length)

    def append(self, slot: Slot, tokens: Sequence[int]) -> None:
        """Note that the model computed more tokens of a slot."""
        slot.tokens += tokens
        self.cells.grow(slot.cells, len(tokens))

    def take(self, slot: Slot, start: Start) -> None:
        """Give a slot the state that its task starts from; it ends empty if that fails."""
        if start.slot is slot:
            self.rewind(slot, start.length)
            return
        if start.offloaded is not None:
            with self.host_cache.pinned(start.offloaded):
                self.offload(slot)
            self._restore(slot, start.offloaded)
            self.rewind(slot, start.length)
            return
        self.offload(slot)
        if start.slot is not None and self._model.share(start.slot.index, slot.index, start.length):
            self.cells.share(start.slot.cells, slot.cells, start.length)
            slot.tokens[:] = start.slot.tokens[: start.length]
            slot.inexact_tokens = min(start.slot.inexact_tokens, start.length)

    def _restore(self, slot: Slot, state: OffloadedState) -> None:
        if len(state.tokens) > self.cells.free - len(self.cells.retired):
            self.free_retired()
        if not self._model.restore(slot.index, state.data):
            return
        self.append(slot, state.tokens)
        slot.inexact_tokens = state.inexact_tokens
        self.host_cache.touch(state)
        if state.is_preempted:
            self.host_cache.remove(state)

    def rewind(self, slot: Slot, length: int) -> None:
        """Cut a slot's state back to `length` tokens, or to none when the model cannot do that."""
        if length >= len(slot.tokens):
            return
        if not self._model.can_move and not (length and self._model.rewind(slot.index, length)):
            length = 0
        self._truncate(slot, length)

    def clear(self, slot: Slot) -> None:
        """Forget the state of a slot."""
        self._truncate(slot, 0)

    def _truncate(self, slot: Slot, length: int) -> None:
        retired_from = self.cells.retire(slot.cells, length)
        if self._model.can_move:
            self._model.retire(slot.index, length, retired_from)
        elif length == 0:
            self._model.forget(slot.index)
        del slot.tokens[length:]
        slot.inexact_tokens = min(slot.inexact_tokens, length)
        if not self._model.can_move:
            self.cells.free_retired()

    # -- the order of cells

    def free_retired(self) -> None:
        """Free the retired cells."""
        if self.cells.retired:
            self._model.free_retired()
            self.cells.free_retired()

    def keep_cells_ordered(self, scheduled: Sequence[Scheduled], slots: Iterable[Slot]) -> None:
        """Make the next cells of each sequence lie above those that it has.

        Attention adds up in the order of the cells, and any other order gives another rounding.
        `scheduled` is in the order of the batch; `slots` are all slots.
        """
        if not self._model.can_move:
            return
        wanted = sum(part.tokens for part in scheduled)
        if wanted > self.cells.free - len(self.cells.retired):
            self.free_retired()
        new = iter(self.cells.next(wanted))
        for part in scheduled:
            first = [next(new) for _ in range(part.tokens)][0]  # noqa: RUF015 (all are taken)
            if part.slot.cells and part.slot.cells[-1] > first:
                self._compact(list(slots))
                return

    def _compact(self, slots: Sequence[Slot]) -> None:
        """Move the sequences of all tasks to the lowest cells. Idle sequences stay where they are,
        except for the cells that they share with running ones."""
        self.free_retired()
        done = dict.fromkeys(slots, 0)
        for slot in slots:
            while slot.task is not None and done[slot] < len(slot.cells):
                start = done[slot]
                holders = [s for s in slots if s.cells[start : start + 1] == [slot.cells[start]]]
                limit = start + MOVED_TOKENS
                end = min(common_length(slot.cells, s.cells, limit) for s in holders)
                if slot.cells[end - 1] > self.cells.lowest_free:
                    self._model.move([s.index for s in holders], start, end)
                    self.cells.move([s.cells for s in holders], start, end)
                done.update(dict.fromkeys(holders, end))

    # -- offloading and prefixes

    def is_new_prefix(self, task: Task) -> bool:
        """True when the state after a task's prefix is worth keeping and not kept yet."""
        length = task.prefix_tokens
        return length >= MIN_PREFIX and not self.host_cache.has_prefix(task.tokens[:length])

    def recall_prefix(self, task: Task) -> None:
        """Read the state of a task's prefix from the disk into the host cache, if it is not there
        yet."""
        if self._prefix_store is None or not self.is_new_prefix(task):
            return
        tokens = task.tokens[: task.prefix_tokens]
        state = self._prefix_store.find(tokens)
        if state is None:
            return
        buffer = self._buffer_for(len(state), len(tokens))
        if buffer is not None:
            buffer[:] = state
            self.host_cache.add(OffloadedState(tokens, buffer, is_prefix=True))

    def keep_prefix(self, slot: Slot, task: Task) -> None:
        """Copy the state of a task's prefix, which the slot holds, to the host cache, for other
        requests of the agent."""
        length = task.prefix_tokens
        tokens = slot.tokens[:length]
        with self._model.beginning(slot.index, length, len(slot.tokens)) as sequence:
            state = self._save(sequence, OffloadedState(tokens, is_prefix=True))
        if state is not None and self._prefix_store is not None and task.is_prefix_public:
            self._prefix_store.save(tokens, state.data)

    def can_keep_prefix(self, slot: Slot, task: Task) -> bool:
        """True when the slot contains the state of the task's prefix, and it is not kept yet. An
        inexact state is not kept: it serves its own conversation only."""
        held, length = len(slot.tokens), task.prefix_tokens
        is_contained = held == length or (held > length and self._model.can_move)
        return is_contained and not slot.inexact_tokens and self.is_new_prefix(task)

    def offload(self, slot: Slot, *, is_preempted: bool = False) -> OffloadedState | None:
        """Move a slot's state to the host cache; None when it is not kept there, or was there
        already."""
        is_kept = self.host_cache.has_state(slot.tokens, or_longer=self._model.saves_whole_states)
        state = None
        if len(slot.tokens) >= MIN_OFFLOADED and not is_kept:
            state = OffloadedState(
                list(slot.tokens),
                session_id=slot.session_id,
                is_preempted=is_preempted,
                inexact_tokens=slot.inexact_tokens,
            )
            state = self._save(slot.index, state)
        self.clear(slot)
        return state

    def unpin(self, task: Task) -> None:
        """Let the state of a preempted task be evicted again: the task goes on, or was dropped."""
        if task.offloaded is not None:
            task.offloaded.is_preempted = False
            task.offloaded = None

    def _save(self, sequence: int, state: OffloadedState) -> OffloadedState | None:
        """Copy the data of a sequence into `state`, and keep that; None without space for it."""
        size = self._model.state_bytes(sequence)
        buffer = self._buffer_for(size, len(state.tokens), is_preempted=state.is_preempted)
        if buffer is None:
            return None
        state.data = buffer
        self._model.save(sequence, buffer)
        if not state.is_prefix and self._model.saves_whole_states:
            # The longer state can be cut back to them.
            self.host_cache.drop_beginnings_of(state.tokens)
        self.host_cache.add(state)
        return state

    def _buffer_for(
        self, size: int, tokens: int, *, is_preempted: bool = False
    ) -> NDArray[np.uint8] | None:
        if self._host_cache_bytes is None:
            self._host_cache_bytes = size * self.cells.capacity // tokens
            self.host_cache = HostCache(self._host_cache_bytes)
        return self.host_cache.allocate(size, is_preempted=is_preempted)
