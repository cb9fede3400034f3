"""The choice of the state that a prompt starts from, and of the slot that a task gets.

A prompt starts from the state with the longest common prefix. Pure: reads slots and offloaded
states, changes nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orion_oie.backends.llama.worker.host_cache import OffloadedState
from orion_oie.backends.llama.worker.tasks import (
    Awaited,
    Slot,
    Task,
)

# A state of another slot or of the host cache must save this many tokens more than the slot's own.
MIN_GAIN = 16

_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Start:
    """The first `length` tokens of a state: of `slot`, of an `offloaded` one, or of neither."""

    length: int = 0
    slot: Slot | None = None
    offloaded: OffloadedState | None = None


def common_length(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """The length of the common prefix of two sequences, at most `limit`."""
    limit = min(limit, len(a), len(b))
    same = 0
    while same < limit and a[same : same + _BLOCK] == b[same : same + _BLOCK]:
        same += _BLOCK
    while same < limit and a[same] == b[same]:
        same += 1
    return min(same, limit)


def reusable(held: Sequence[int], task: Task, *, is_rewindable: bool) -> int:
    """The number of tokens of a state that the task can start from."""
    # The last token is always computed: its logits choose the next one.
    length = common_length(held, task.tokens, len(task.tokens) - 1)
    return length if is_rewindable or length == len(held) else 0


def best_start(
    slot: Slot,
    task: Task,
    slots: Iterable[Slot],
    offloaded: Iterable[OffloadedState],
    *,
    is_rewindable: bool,
    are_offloaded_rewindable: bool,
    free_cells: int,
) -> Start:
    """The best state for a task in `slot` to start from.

    1. The slot's own state, as far as it fits.
    2. The state of another slot, if it saves at least `MIN_GAIN` tokens more and the model can
       rewind: states that cannot be cut back are not shared.
    3. An offloaded state for which there are cells, if it saves at least `MIN_GAIN` tokens more;
       of those that save equally many, the shortest.
    """
    best = Start(reusable(slot.tokens, task, is_rewindable=is_rewindable), slot)
    if is_rewindable:
        for other in slots:
            length = reusable(other.tokens, task, is_rewindable=True)
            if length >= best.length + MIN_GAIN:
                best = Start(length, other)
    for state in offloaded:
        length = reusable(state.tokens, task, is_rewindable=are_offloaded_rewindable)
        gain = length - best.length
        if best.offloaded is None:
            is_better = gain >= MIN_GAIN
        else:
            is_better = gain > 0 or (gain == 0 and len(state.tokens) < len(best.offloaded.tokens))
        if is_better and len(state.tokens) <= free_cells:
            best = Start(length, None, state)
    return best if best.length else Start()


def best_awaited(
    slot: Slot, task: Task, slots: Iterable[Slot], *, is_rewindable: bool
) -> Awaited | None:
    """The longest prefix of the task's prompt that another slot is computing."""
    best: Awaited | None = None
    for other in slots:
        if other is slot or other.task is None or not other.has_started or other.pending <= 1:
            continue
        if is_rewindable:
            length = common_length(other.task.tokens, task.tokens, len(task.tokens) - 1)
        else:  # only the state after the agent's prefix can be shared, once it is offloaded
            length = task.prefix_tokens
            is_same = other.task.prefix_tokens == length
            if not is_same or other.task.tokens[:length] != task.tokens[:length]:
                continue
        awaited = Awaited(other, other.task, length)
        if awaited.is_coming and (best is None or length > best.length):
            best = awaited
    return best


def best_slot(
    free: Sequence[Slot],
    task: Task,
    slots: Sequence[Slot],
    offloaded: Sequence[OffloadedState],
    *,
    is_rewindable: bool,
    are_offloaded_rewindable: bool,
) -> Slot:
    """The free slot for a task, by these preferences:

    1. the slot of its session;
    2. the slot whose state it continues, the longest first;
    3. an empty slot;
    4. the least recently used slot.
    """
    in_slots = {s: reusable(s.tokens, task, is_rewindable=is_rewindable) for s in slots}
    in_host_cache = max(
        (reusable(s.tokens, task, is_rewindable=are_offloaded_rewindable) for s in offloaded),
        default=0,
    )

    def rank(slot: Slot) -> tuple[bool, int, bool, int]:
        own = in_slots[slot]
        others = (length for other, length in in_slots.items() if other is not slot)
        elsewhere = max(in_host_cache, *others) if len(slots) > 1 else in_host_cache
        # Most of what only this slot holds must be wanted; the rest can be had without it.
        is_continued = own > elsewhere and 2 * (own - elsewhere) >= len(slot.tokens) - elsewhere
        is_own = own > 0 and slot.session_id is not None and slot.session_id == task.session_id
        return is_own, own if is_continued else 0, not slot.tokens, -slot.last_used

    return max(free, key=rank)
