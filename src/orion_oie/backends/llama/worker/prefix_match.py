"""From which state a prompt starts: the longest that is there, or one that is about to be.

Pure: looks at slots and parked states, changes nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orion_oie.backends.llama.worker.host_cache import ParkedState
from orion_oie.backends.llama.worker.tasks import (
    Awaited,
    Slot,
    Task,
)

# What a state in another place must save over a nearer one, in tokens, to be fetched.
MIN_GAIN = 16

_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Start:
    """The first `length` tokens of a state: of a slot, of a parked state, or of neither."""

    length: int = 0
    slot: Slot | None = None
    parked: ParkedState | None = None


def common_length(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """How many tokens two sequences have in common at their beginning, at most `limit`."""
    limit = min(limit, len(a), len(b))
    same = 0
    while same < limit and a[same : same + _BLOCK] == b[same : same + _BLOCK]:
        same += _BLOCK
    while same < limit and a[same] == b[same]:
        same += 1
    return min(same, limit)


def reusable(held: Sequence[int], task: Task, *, is_rewindable: bool) -> int:
    """How many tokens of a state the task can start from."""
    # The last token is always computed: its logits choose the next one.
    length = common_length(held, task.tokens, len(task.tokens) - 1)
    return length if is_rewindable or length == len(held) else 0


def best_start(
    slot: Slot,
    task: Task,
    slots: Iterable[Slot],
    parked: Iterable[ParkedState],
    *,
    is_rewindable: bool,
    are_parked_rewindable: bool,
    free_cells: int,
) -> Start:
    """Where a task in `slot` starts best: from what the slot holds, else from what another slot
    holds, else from a parked state for which there are cells."""
    best = Start(reusable(slot.tokens, task, is_rewindable=is_rewindable), slot)
    if is_rewindable:  # else what others hold is shared by nobody
        for other in slots:
            length = reusable(other.tokens, task, is_rewindable=True)
            if length >= best.length + MIN_GAIN:
                best = Start(length, other)
    for state in parked:
        length = reusable(state.tokens, task, is_rewindable=are_parked_rewindable)
        gain = length - best.length
        if best.parked is None:
            is_better = gain >= MIN_GAIN
        else:
            is_better = gain > 0 or (gain == 0 and len(state.tokens) < len(best.parked.tokens))
        if is_better and len(state.tokens) <= free_cells:
            best = Start(length, None, state)
    return best if best.length else Start()


def best_awaited(
    slot: Slot, task: Task, slots: Iterable[Slot], *, is_rewindable: bool
) -> Awaited | None:
    """The longest beginning of the task's prompt that another slot computes at this time."""
    best: Awaited | None = None
    for other in slots:
        if other is slot or other.task is None or not other.has_begun or other.pending <= 1:
            continue
        if is_rewindable:
            length = common_length(other.task.tokens, task.tokens, len(task.tokens) - 1)
        else:  # what can be shared is the state at the end of the prefix, once it is parked
            length = task.prefix_tokens
            is_same = other.task.prefix_tokens == length
            if not is_same or other.task.tokens[:length] != task.tokens[:length]:
                continue
        awaited = Awaited(other, other.task, length)
        if awaited.is_coming and (best is None or length > best.length):
            best = awaited
    return best


def best_slot(
    idle: Sequence[Slot],
    task: Task,
    slots: Sequence[Slot],
    parked: Sequence[ParkedState],
    *,
    is_rewindable: bool,
    are_parked_rewindable: bool,
) -> Slot:
    """The idle slot for a task: the one of its session, one whose state it continues, an empty
    one, or the one that was not used for longest."""

    in_slots = {s: reusable(s.tokens, task, is_rewindable=is_rewindable) for s in slots}
    in_parked = max(
        (reusable(p.tokens, task, is_rewindable=are_parked_rewindable) for p in parked), default=0
    )

    def rank(slot: Slot) -> tuple[bool, int, bool, int]:
        own = in_slots[slot]
        others = (length for other, length in in_slots.items() if other is not slot)
        elsewhere = max(in_parked, *others) if len(slots) > 1 else in_parked
        # What only this slot holds should be wanted, most of it; the rest is there without it.
        is_continued = own > elsewhere and 2 * (own - elsewhere) >= len(slot.tokens) - elsewhere
        is_own = own > 0 and slot.session_id is not None and slot.session_id == task.session_id
        return is_own, own if is_continued else 0, not slot.tokens, -slot.last_used

    return max(idle, key=rank)
