"""What the slots hold: sequences in the KV cache, and beside it those that left it.

Keeps llama.cpp's memory, the books of its cells and the slots in step. Decides nothing: what to
park and where to start is the batcher's choice.
"""

from collections.abc import Sequence

from orion_oie.backends.llama.cells import Cells
from orion_oie.backends.llama.native import NativeModel
from orion_oie.backends.llama.parking import ParkedState, ParkingLot
from orion_oie.backends.llama.reuse import MIN_GAIN, Start
from orion_oie.backends.llama.tasks import Slot, Task

# Shorter states are computed again sooner than they are looked after.
MIN_PARKED = 32
MIN_PREFIX = MIN_GAIN


class KVCache:
    """The sequences of a model. `parked_bytes` None: as much as the cache itself has."""

    def __init__(self, model: NativeModel, parked_bytes: int | None) -> None:
        self._model = model
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
        if length == 0 or not self._model.rewind(slot.index, length):
            self.clear(slot)
            return
        self.cells.cut(slot.cells, length)
        del slot.tokens[length:]

    def clear(self, slot: Slot) -> None:
        """Forget what a slot holds."""
        self._model.forget(slot.index)
        self.cells.cut(slot.cells, 0)
        slot.tokens.clear()

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
