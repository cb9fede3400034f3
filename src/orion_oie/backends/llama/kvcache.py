"""What the slots hold: sequences in the KV cache, and beside it those that left it.

Keeps llama.cpp's memory, the books of its cells and the slots in step. Decides nothing: what to
park and where to start is the batcher's choice.
"""

from collections.abc import Iterable, Sequence

from orion_oie.backends.llama.cells import Cells
from orion_oie.backends.llama.native import NativeModel
from orion_oie.backends.llama.parking import ParkedState, ParkingLot
from orion_oie.backends.llama.reuse import MIN_GAIN, Start, common_length
from orion_oie.backends.llama.tasks import Slot, Task

# Shorter states are computed again sooner than they are looked after.
MIN_PARKED = 32
MIN_PREFIX = MIN_GAIN

# Tokens that are moved at once: what is copied of them lies in memory twice for a moment.
MOVED_TOKENS = 128


class KVCache:
    """The sequences of a model, none at first. `parked_bytes` None: as much as the cache itself
    has."""

    def __init__(self, model: NativeModel, parked_bytes: int | None) -> None:
        self._model = model
        self._model.clear()
        self._parked_bytes = parked_bytes
        self.cells = Cells(model.context_length)
        self.lot = ParkingLot(parked_bytes or 0)

    def append(self, slot: Slot, tokens: Sequence[int]) -> None:
        """Note that the model computed more tokens of a slot."""
        slot.tokens += tokens
        self.cells.grow(slot.cells, len(tokens))

    def take(self, slot: Slot, start: Start) -> None:
        """Give a slot the state that its task starts from; nothing if that cannot be had."""
        if start.slot is slot:
            self.rewind(slot, start.length)
            return
        if start.parked is not None:
            with self.lot.pinned(start.parked):
                self.park(slot)
            self._restore(slot, start.parked)
            self.rewind(slot, start.length)
            return
        self.park(slot)
        if start.slot is not None and self._model.share(start.slot.index, slot.index, start.length):
            self.cells.share(start.slot.cells, slot.cells, start.length)
            slot.tokens[:] = start.slot.tokens[: start.length]

    def _restore(self, slot: Slot, state: ParkedState) -> None:
        if len(state.tokens) > self.cells.free - len(self.cells.retired):
            self.sweep()
        if not self._model.restore(slot.index, state.data):
            return
        self.append(slot, state.tokens)
        self.lot.touch(state)
        if state.is_preempted:
            self.lot.remove(state)

    def rewind(self, slot: Slot, length: int) -> None:
        """Cut a slot's state back; nothing is left of it when the model cannot."""
        if length >= len(slot.tokens):
            return
        if not self._model.can_move and not (length and self._model.rewind(slot.index, length)):
            length = 0
        self._give_up(slot, length)

    def clear(self, slot: Slot) -> None:
        """Forget what a slot holds."""
        self._give_up(slot, 0)

    def _give_up(self, slot: Slot, length: int) -> None:
        if self._model.can_move:
            self._model.retire(slot.index, length)
        elif length == 0:
            self._model.forget(slot.index)
        self.cells.retire(slot.cells, length)
        del slot.tokens[length:]
        if not self._model.can_move:
            self.cells.sweep()

    # -- the order of cells

    def sweep(self) -> None:
        """Free the cells that were given up."""
        if self.cells.retired:
            self._model.sweep()
            self.cells.sweep()

    def make_way(self, shares: Sequence[tuple[Slot, int]], slots: Iterable[Slot]) -> None:
        """Let the next cells of each sequence lie above those that it has: attention adds up in
        the order of the cells, and comes out otherwise in any other. `shares` is how many tokens
        which slots get, in the order of the batch; `slots` are all there are."""
        if not self._model.can_move:
            return
        wanted = sum(share for _, share in shares)
        if wanted > self.cells.free - len(self.cells.retired):
            self.sweep()
        new = iter(self.cells.next(wanted))
        for slot, share in shares:
            first = [next(new) for _ in range(share)][0]  # noqa: RUF015 (all are taken)
            if slot.cells and slot.cells[-1] > first:
                self._compact(list(slots))
                return

    def _compact(self, slots: Sequence[Slot]) -> None:
        """Move the sequences of all tasks to the lowest cells; silent ones stay where they are,
        but for what they have in common with others."""
        self.sweep()
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

    # -- states that leave and come back

    def is_new_prefix(self, task: Task) -> bool:
        """True when the state at the end of a task's prefix should be kept, and is not."""
        length = task.prefix_tokens
        return length >= MIN_PREFIX and not self.lot.has_prefix(task.tokens[:length])

    def keep_prefix(self, slot: Slot) -> None:
        """Copy a slot's state, which is a whole prefix, for other requests of the agent."""
        self._keep(slot, is_prefix=True)

    def park(self, slot: Slot, *, is_preempted: bool = False) -> None:
        """Move a slot's state to the host's memory."""
        is_kept = self.lot.has_state(slot.tokens, or_longer=self._model.saves_whole_states)
        if len(slot.tokens) >= MIN_PARKED and not is_kept:
            self._keep(slot, is_preempted=is_preempted)
        self.clear(slot)

    def _keep(self, slot: Slot, *, is_prefix: bool = False, is_preempted: bool = False) -> None:
        size = self._model.state_bytes(slot.index)
        if self._parked_bytes is None:
            self._parked_bytes = size * self.cells.capacity // len(slot.tokens)
            self.lot = ParkingLot(self._parked_bytes)
        buffer = self.lot.room_for(size, is_preempted=is_preempted)
        if buffer is None:
            return
        self._model.save(slot.index, buffer)
        if not is_prefix and self._model.saves_whole_states:
            self.lot.drop_beginnings_of(slot.tokens)  # the longer one can be cut back to them
        tokens = list(slot.tokens)
        self.lot.add(ParkedState(tokens, buffer, slot.session_id, is_prefix, is_preempted))
