"""Where a prompt starts from: the longest state that is there or coming, unless a nearer one is
nearly as good; and in which slot it runs."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from orion_oie.backends.llama.worker.host_cache import OffloadedState
from orion_oie.backends.llama.worker.prefix_match import (
    MIN_GAIN,
    Start,
    best_awaited,
    best_slot,
    best_start,
    common_length,
    reusable,
)
from orion_oie.backends.llama.worker.tasks import (
    Slot,
    Task,
)
from orion_oie.schemas.requests import GenerationOptions

ROOMY = 10_000
OPTIONS = GenerationOptions()
BLOCK_LENGTHS = (0, 1, 2, 254, 255, 256, 257, 258, 511, 512, 513, 768, 800)

lengths = st.one_of(st.sampled_from(BLOCK_LENGTHS), st.integers(0, 800))
tails = st.lists(st.integers(0, 1), max_size=3)
rewindable_or_not = pytest.mark.parametrize("is_rewindable", [True, False])


def text(shared: int, own: str = "", count: int = 1) -> list[int]:
    """The first `shared` tokens of a beginning that is the same for all, then letters."""
    return list(range(shared)) + [-ord(letter) for letter in own * count]


def task_of(tokens: Sequence[int], session: str | None = None, prefix_tokens: int = 0) -> Task:
    return Task(1, list(tokens), OPTIONS, session, prefix_tokens=prefix_tokens)


def slots_with(*tokens: Sequence[int]) -> list[Slot]:
    """Idle slots that hold these tokens, the longest unused first."""
    return [Slot(index, list(held), last_used=index + 1) for index, held in enumerate(tokens)]


def offloaded_with(*tokens: Sequence[int]) -> list[OffloadedState]:
    return [OffloadedState(list(held), np.zeros(1, np.uint8)) for held in tokens]


# -- common_length


def plain_common_length(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    for same in range(limit):
        if same >= len(a) or same >= len(b) or a[same] != b[same]:
            return same
    return limit


@given(shared=lengths, tail_a=tails, tail_b=tails, limit=st.one_of(lengths, st.just(2000)))
def test_common_length(shared: int, tail_a: list[int], tail_b: list[int], limit: int) -> None:
    """It is what a loop over the tokens finds, also around whole blocks, and either way round."""
    a, b = [*range(shared), *tail_a], [*range(shared), *tail_b]
    expected = plain_common_length(a, b, limit)
    assert common_length(a, b, limit) == common_length(b, a, limit) == expected
    assert common_length(a, a, limit) == min(limit, len(a))


@given(length=lengths, place=st.integers(0, 799), limit=st.just(800))
def test_one_other_token_ends_what_is_common(length: int, place: int, limit: int) -> None:
    """Wherever two sequences of one length differ, exactly what is before is common to them."""
    assume(place < length)
    a = list(range(length))
    b = [*a[:place], -1, *a[place + 1 :]]
    assert common_length(a, b, limit) == place


# -- reusable


@given(held=lengths, prompt=st.integers(1, 800), tail=tails)
def test_reusable(held: int, prompt: int, tail: list[int]) -> None:
    """A state that can be cut is used as far as it goes, another one wholly or not at all; the
    last token of the prompt is computed again in any case."""
    tokens = [*range(held), *tail]
    task = task_of(text(prompt))
    length = plain_common_length(tokens, task.tokens, prompt - 1)
    assert reusable(tokens, task, is_rewindable=True) == length
    whole = length if length == len(tokens) else 0
    assert reusable(tokens, task, is_rewindable=False) == whole


def test_the_last_token_is_always_computed() -> None:
    """A state of the very prompt, or of more, lacks its last token: without one, nothing starts."""
    task = task_of(text(20))
    assert reusable(text(20), task, is_rewindable=True) == 19
    assert reusable(text(20), task, is_rewindable=False) == 0
    assert reusable(text(19), task, is_rewindable=False) == 19
    assert reusable(text(50), task_of([0]), is_rewindable=True) == 0


# -- best_start


def start_of(
    task: Task,
    slots: Sequence[Slot],
    offloaded: Sequence[OffloadedState] = (),
    *,
    is_rewindable: bool = True,
    are_offloaded_rewindable: bool | None = None,
    free_cells: int = ROOMY,
) -> Start:
    """Where the task starts in the first of the slots."""
    if are_offloaded_rewindable is None:
        are_offloaded_rewindable = is_rewindable
    return best_start(
        slots[0],
        task,
        slots,
        offloaded,
        is_rewindable=is_rewindable,
        are_offloaded_rewindable=are_offloaded_rewindable,
        free_cells=free_cells,
    )


@rewindable_or_not
def test_nothing_to_start_from(is_rewindable: bool) -> None:
    """A prompt that nobody knows starts at its beginning, in no state at all."""
    slots = slots_with(text(0, "a", 50), text(0, "b", 50), [])
    offloaded = offloaded_with(text(0, "c", 50), [])
    task = task_of(text(100))
    assert start_of(task, slots, offloaded, is_rewindable=is_rewindable) == Start()
    assert start_of(task, slots_with([]), is_rewindable=is_rewindable) == Start()


def test_the_own_slot_is_enough() -> None:
    """What the slot holds itself is taken, however little, when others have no more."""
    slots = slots_with(text(3), text(3, "a"), text(3, "b"))
    assert start_of(task_of(text(100)), slots, offloaded_with(text(3))) == Start(3, slots[0])


def test_another_slot_must_be_worth_it() -> None:
    """Another slot is copied only when that saves enough tokens; then the one that has most."""
    task = task_of(text(200))
    near = slots_with(text(50), text(50 + MIN_GAIN - 1))
    assert start_of(task, near) == Start(50, near[0])
    far = slots_with(text(50), text(50 + MIN_GAIN))
    assert start_of(task, far) == Start(50 + MIN_GAIN, far[1])
    best = slots_with(text(50), text(90), text(150), text(120))
    assert start_of(task, best) == Start(150, best[2])


def test_a_parked_state_must_be_worth_it() -> None:
    """A offloaded state is fetched only when it saves enough over what slots hold."""
    task = task_of(text(300))
    slots = slots_with(text(50), text(100))
    offloaded = offloaded_with(text(100 + MIN_GAIN - 1))
    assert start_of(task, slots, offloaded) == Start(100, slots[1])
    offloaded = offloaded_with(text(100 + MIN_GAIN))
    assert start_of(task, slots, offloaded) == Start(100 + MIN_GAIN, None, offloaded[0])
    offloaded = offloaded_with(text(150), text(250), text(200))
    assert start_of(task, slots, offloaded) == Start(250, None, offloaded[1])


def test_the_shortest_parked_state_among_equals() -> None:
    """Where several offloaded states serve equally far, the one with least beyond that is fetched;
    what a slot holds as far is nearer than all of them."""
    task = task_of(text(100, "x"))
    offloaded = offloaded_with(*(text(100, "a", count) for count in (30, 5, 40, 5)))
    assert start_of(task, slots_with([]), offloaded) == Start(100, None, offloaded[1])
    slots = slots_with(text(100, "b", 60))
    assert start_of(task, slots, offloaded) == Start(100, slots[0])


def test_a_parked_state_needs_cells() -> None:
    """All tokens of a offloaded state need cells, also those that are cut off again."""
    task = task_of(text(100, "x"))
    slots = slots_with(text(10))
    offloaded = offloaded_with(text(100, "a", 50), text(80))
    for free_cells, expected in [
        (150, Start(100, None, offloaded[0])),
        (149, Start(80, None, offloaded[1])),
        (80, Start(80, None, offloaded[1])),
        (79, Start(10, slots[0])),
    ]:
        assert start_of(task, slots, offloaded, free_cells=free_cells) == expected


def test_slots_need_no_cells() -> None:
    """A full cache is no reason against state that is in it."""
    task = task_of(text(200))
    for held in ((text(100), []), ([], text(100))):
        slots = slots_with(*held)
        start = start_of(task, slots, offloaded_with(text(150)), free_cells=0)
        assert start.length == 100
        assert start.offloaded is None


def test_states_that_cannot_be_cut_are_used_whole() -> None:
    """Of a slot's own state all or nothing, of another slot's nothing, of offloaded ones those that
    the prompt goes on from."""
    slots = slots_with(text(50, "a"), text(150))
    offloaded = offloaded_with(text(180, "b"), text(100), text(60))
    task = task_of(text(200))
    assert start_of(task, slots, offloaded, is_rewindable=False) == Start(100, None, offloaded[1])
    assert start_of(task, slots, offloaded[:1], is_rewindable=False) == Start()
    slots = slots_with(text(90), text(150))
    assert start_of(task, slots, offloaded, is_rewindable=False) == Start(90, slots[0])


def test_states_that_can_be_cut_in_the_cache_only() -> None:
    """Slots serve as far as they go, also other ones; offloaded states wholly or not at all."""
    slots = slots_with(text(50, "a"), text(100, "a"))
    offloaded = offloaded_with(text(180, "b"), text(140), text(300))
    task = task_of(text(200))
    start = start_of(task, slots, offloaded, are_offloaded_rewindable=False)
    assert start == Start(140, None, offloaded[1])
    offloaded = offloaded_with(text(180, "b"))
    assert start_of(task, slots, offloaded, are_offloaded_rewindable=False) == Start(100, slots[1])


texts = st.builds(
    text, st.integers(0, 12).map(lambda n: 8 * n), st.sampled_from("xyz"), st.integers(0, 30)
)


@pytest.mark.parametrize(
    ("is_rewindable", "are_offloaded_rewindable"), [(True, True), (True, False), (False, False)]
)
@settings(max_examples=60)
@given(
    prompt=texts,
    held=st.lists(texts, min_size=1, max_size=4),
    kept=st.lists(texts, max_size=4),
    free_cells=st.integers(0, 120),
)
def test_no_start_is_much_better_than_the_best(
    is_rewindable: bool,
    are_offloaded_rewindable: bool,
    prompt: list[int],
    held: list[list[int]],
    kept: list[list[int]],
    free_cells: int,
) -> None:
    """The start is what its place really holds, and nothing that can be had saves much more."""
    task = task_of([*prompt, 7])
    slots, offloaded = slots_with(*held), offloaded_with(*kept)
    start = start_of(
        task,
        slots,
        offloaded,
        is_rewindable=is_rewindable,
        are_offloaded_rewindable=are_offloaded_rewindable,
        free_cells=free_cells,
    )
    own = reusable(held[0], task, is_rewindable=is_rewindable)
    others = [
        reusable(state.tokens, task, is_rewindable=are_offloaded_rewindable)
        for state in offloaded
        if len(state.tokens) <= free_cells
    ]
    if is_rewindable:
        others += [reusable(slot.tokens, task, is_rewindable=True) for slot in slots[1:]]
    if start.length == 0:
        assert start == Start()
    else:
        assert (start.slot is None) != (start.offloaded is None)
        if start.slot is not None:
            length = reusable(start.slot.tokens, task, is_rewindable=is_rewindable)
        else:
            length = reusable(start.offloaded.tokens, task, is_rewindable=are_offloaded_rewindable)
            assert len(start.offloaded.tokens) <= free_cells
        assert start.length == length
    assert start.length >= own
    assert start.slot is slots[0] or start.length >= own + MIN_GAIN or start == Start()
    assert start.length > max([0, *others]) - MIN_GAIN


# -- best_awaited


def reading(
    index: int,
    tokens: Sequence[int],
    done: int,
    prefix_tokens: int = 0,
    *,
    has_started: bool = True,
) -> Slot:
    """A slot that has computed the first `done` tokens of its task's prompt."""
    task = task_of(tokens, prefix_tokens=prefix_tokens)
    return Slot(index, list(tokens[:done]), task=task, has_started=has_started)


def awaited_length(task: Task, *others: Slot, is_rewindable: bool = True) -> int | None:
    """How much a task in a slot of its own waits for; None when it waits for nothing."""
    slot = Slot(99, task=task)
    awaited = best_awaited(slot, task, [slot, *others], is_rewindable=is_rewindable)
    if awaited is None:
        return None
    assert awaited.slot in others
    assert awaited.task is awaited.slot.task
    return awaited.length


def test_the_longest_that_is_coming_is_awaited() -> None:
    """Of slots that read the same beginning, the one that will have most of it."""
    task = task_of(text(200, "x"))
    others = [reading(n, text(count, "y", 50), 10) for n, count in enumerate((100, 150, 120))]
    slot = Slot(99)
    awaited = best_awaited(slot, task, [*others, slot], is_rewindable=True)
    assert awaited is not None
    assert awaited.slot is others[1]
    assert awaited.task is others[1].task
    assert awaited.length == 150
    assert awaited.is_coming


def test_at_most_the_prompt_without_its_last_token_is_awaited() -> None:
    """The last token is computed in any case, also when another slot reads the very same."""
    task = task_of(text(100))
    assert awaited_length(task, reading(0, text(100), 10)) == 99
    assert awaited_length(task, reading(0, text(300), 10)) == 99


def test_only_what_is_being_read_is_awaited() -> None:
    """Not: idle slots, tasks that wait themselves or answer already, what is there already, the
    slot's own task."""
    task = task_of(text(100, "x"))
    idle = Slot(0, text(10))
    waiting = reading(0, text(150), 10, has_started=False)
    answering = reading(0, text(150), 149)
    past_it = reading(0, text(100, "y", 60), 100)
    another = reading(0, text(0, "z", 60), 10)
    for other in (idle, waiting, answering, past_it, another):
        assert awaited_length(task, other) is None
    longer = task_of(text(200))
    assert awaited_length(longer, reading(0, text(150), 148)) == 150
    assert awaited_length(longer, answering) is None
    assert awaited_length(task, reading(0, text(100, "y", 60), 99)) == 100
    own = reading(0, text(150), 10)
    assert own.task is not None
    assert best_awaited(own, own.task, [own], is_rewindable=True) is None


def test_what_is_past_does_not_hide_what_is_coming() -> None:
    """A slot that is past the common part is passed over for one that is still to get there."""
    task = task_of(text(100, "x"))
    past_it = reading(0, text(100, "y", 60), 130)
    coming = reading(1, text(80, "z", 60), 20)
    assert awaited_length(task, past_it, coming) == 80
    assert awaited_length(task, coming, past_it) == 80


def test_states_that_cannot_be_cut_are_awaited_at_the_end_of_the_prefix() -> None:
    """There the state is kept for others; the rest of a common beginning is of no use."""
    task = task_of(text(100, "x"), prefix_tokens=60)
    coming = reading(0, text(100, "y", 50), 20, prefix_tokens=60)
    assert awaited_length(task, coming, is_rewindable=False) == 60
    past_it = reading(0, text(100, "y", 50), 60, prefix_tokens=60)
    assert awaited_length(task, past_it, is_rewindable=False) is None
    another = reading(0, text(59, "y", 50), 20, prefix_tokens=60)
    assert awaited_length(task, another, is_rewindable=False) is None
    without = task_of(text(100, "x"))
    assert awaited_length(without, coming, is_rewindable=False) is None


# -- best_slot


def chosen(
    task: Task,
    slots: Sequence[Slot],
    offloaded: Sequence[OffloadedState] = (),
    *,
    is_rewindable: bool = True,
) -> int:
    """The index of the slot that is chosen among those without a task."""
    idle = [slot for slot in slots if slot.task is None]
    return best_slot(
        idle,
        task,
        slots,
        offloaded,
        is_rewindable=is_rewindable,
        are_offloaded_rewindable=is_rewindable,
    ).index


def test_a_session_goes_back_to_its_slot() -> None:
    """Whatever else holds more, is empty, or was used longer ago."""
    slots = slots_with([], text(0, "b", 50), text(90), text(20, "a", 60))
    slots[3].session_id = "mine"
    slots[1].session_id = "another"
    assert chosen(task_of(text(100), "mine"), slots) == 3
    assert chosen(task_of(text(100), "another"), slots) != 1  # nothing of it is of use
    assert chosen(task_of(text(100)), slots) == 2


def test_no_session_is_nobodys_slot() -> None:
    """That a task and a slot both have no session says nothing."""
    slots = slots_with(text(5, "a", 80), text(95))
    assert chosen(task_of(text(100)), slots) == 1
    slots = slots_with(text(5, "a", 80), [])
    assert chosen(task_of(text(100)), slots) == 1


def test_a_state_that_is_continued_keeps_its_slot() -> None:
    """The next turn of a conversation goes where the last one was; among several, to the one that
    has most of it."""
    slots = slots_with([], text(60), text(90, "a"), text(0, "b", 50))
    assert chosen(task_of(text(100)), slots) == 2


def test_most_of_a_continued_state_must_be_wanted() -> None:
    """A slot of which less than half is wanted belongs to somebody else."""
    for foreign, expected in [(50, 0), (51, 1)]:
        slots = slots_with(text(50, "a", foreign), [])
        assert chosen(task_of(text(100)), slots) == expected


def test_what_is_elsewhere_too_is_no_reason_for_a_slot() -> None:
    """A beginning that another slot holds as well, busy or not, does not take over a conversation
    that has gone on from there."""
    task = task_of(text(50, "x"))
    for is_busy in (False, True):
        slots = slots_with(text(50, "a", 5), text(50, "b", 5), [])
        if is_busy:
            slots[1].task = task_of(text(50, "b", 20))
        assert chosen(task, slots) == 2
    assert chosen(task, slots_with(text(50), text(50), [])) == 2


def test_what_only_this_slot_holds_decides() -> None:
    """The rest beyond the common beginning is what is weighed, not the length of it all."""
    beginning = text(100)
    for own, foreign, expected in [(10, 10, 0), (10, 11, 2)]:
        talk = [*text(100, "a", own), *text(0, "b", foreign)]
        slots = slots_with(talk, beginning, [])
        assert chosen(task_of(text(100, "a", 50)), slots) == expected


def test_a_parked_prefix_spares_the_conversation_that_began_with_it() -> None:
    """A request of the same agent does not take over another conversation's slot when the part
    that both share is offloaded; the conversation itself goes on in its slot."""
    prefix = text(80)
    talk = [*prefix, *text(0, "a", 20)]
    slots = slots_with(talk, text(0, "b", 30))
    stranger = task_of([*prefix, *text(0, "x", 10)])
    assert chosen(stranger, slots) == 0
    slots[0].last_used = 9
    assert chosen(stranger, slots) == 0
    assert chosen(stranger, slots, offloaded_with(prefix)) == 1
    assert chosen(task_of([*talk, 5]), slots, offloaded_with(prefix)) == 0
    assert chosen(stranger, slots_with(talk), offloaded_with(prefix)) == 0  # there is no other


def test_an_empty_slot_before_anybodys_state() -> None:
    """State that is of no use here may be of use to somebody else."""
    slots = slots_with(text(0, "a", 50), text(0, "b", 50), [], text(0, "c", 50))
    assert chosen(task_of(text(100)), slots) == 2


def test_the_longest_unused_slot_is_the_last_resort() -> None:
    """Where every slot holds what the task cannot use, the oldest state goes; of empty slots,
    too, the longest unused is taken."""
    slots = slots_with(*(text(0, letter, 50) for letter in "abc"))
    for slot, last_used in zip(slots, (5, 2, 9), strict=True):
        slot.last_used = last_used
    assert chosen(task_of(text(100)), slots) == 1
    for slot in slots:
        slot.tokens.clear()
    assert chosen(task_of(text(100)), slots) == 1


def test_busy_slots_are_not_chosen() -> None:
    """Not even the one of the session that holds it all."""
    slots = slots_with(text(99), text(0, "a", 50))
    slots[0].session_id = "mine"
    slots[0].task = task_of(text(150))
    assert chosen(task_of(text(100), "mine"), slots) == 1


def test_states_that_cannot_be_cut_are_continued_or_nothing() -> None:
    """A state that has gone on elsewhere is of no use, however much of it is shared, and not even
    to its session."""
    slots = slots_with(text(90, "a", 2), text(60), text(0, "b"))
    slots[0].session_id = "mine"
    slots[0].last_used = 9
    assert chosen(task_of(text(100), "mine"), slots, is_rewindable=False) == 1
    assert chosen(task_of(text(100), "mine"), slots, is_rewindable=True) == 0
