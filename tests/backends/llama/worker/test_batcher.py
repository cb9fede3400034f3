"""Continuous batching on a tiny model, in this process: whatever happens around a task, its tokens
are those it would have alone, and the slots know what llama.cpp's memory holds."""

import ctypes
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import llama_cpp as lc
import numpy as np
import pytest
from tiny import write_tiny_llama, write_tiny_recurrent, write_tiny_windowed

from orion_oie.backends.llama.worker import native
from orion_oie.backends.llama.worker.batcher import Batcher
from orion_oie.backends.llama.worker.kv_cache import KVCache
from orion_oie.backends.llama.worker.native import (
    AbortFlag,
    NativeModel,
)
from orion_oie.backends.llama.worker.tasks import (
    Slot,
    StepOutput,
    Task,
)
from orion_oie.schemas.requests import GenerationOptions

CONTEXT = 512
NO_END = {"<|im_end|>": -40}
WRITERS = {
    "llama": write_tiny_llama,
    "mamba": write_tiny_recurrent,
    "gemma3": write_tiny_windowed,
}


def loaded(path: Path, slots: int, abort: AbortFlag) -> NativeModel:
    return NativeModel(
        [path],
        slots=slots,
        context_length=CONTEXT,
        threads=1,
        abort=abort,
        on_progress=lambda _fraction: None,
    )


def slots_of(batcher: Batcher) -> Sequence[Slot]:
    """The slots of a batcher: its books have to agree with llama.cpp's, and it shows sums only."""
    return batcher._slots


def kv_of(batcher: Batcher) -> KVCache:
    """The KV cache of a batcher, for the same reason."""
    return batcher._kv


def memory_of(model: NativeModel) -> object:
    """llama.cpp's own memory of a model: the other side of those books."""
    return model._memory


def logits_alone(model: NativeModel) -> Sequence[float]:
    """The last logits, read by llama.cpp's own call, so that the model's reading is tested, too."""
    return lc.llama_get_logits_ith(model._context, -1)[: model.vocabulary.size]


class Bench:
    """A model with its abort flag, and a second context of it that knows what is right."""

    def __init__(self, path: Path, slots: int = 3) -> None:
        self.abort = AbortFlag()
        self.model = loaded(path, slots, self.abort)
        self._alone = loaded(path, 1, AbortFlag())

    def batcher(self) -> Batcher:
        return Batcher(self.model)

    def check_memory(self, batcher: Batcher) -> None:
        """The slots say what llama.cpp says, and the books of the cells agree with them."""
        for slot in slots_of(batcher):
            end = lc.llama_memory_seq_pos_max(memory_of(self.model), slot.index)
            assert end == len(slot.tokens) - 1
            assert len(slot.cells) == len(slot.tokens)
            if slot.task is not None and slot.has_started:
                assert slot.tokens == slot.task.tokens[: len(slot.tokens)]
                assert slot.cells == sorted(slot.cells) or not self.model.can_move
        held = {cell for slot in slots_of(batcher) for cell in slot.cells}
        assert kv_of(batcher).cells.used == len(held) <= CONTEXT
        if self.model.can_move:
            retired = self.model.slots  # the sequence that holds them in llama.cpp
            is_any = lc.llama_memory_seq_pos_max(memory_of(self.model), retired) >= 0
            assert is_any == bool(kv_of(batcher).cells.retired)

    def check_answer(self, task: Task) -> None:
        """Each token of a greedy answer is the best one, or as good, for a context of its own."""
        model = self._alone
        model.forget(0)
        done = 0
        for end in range(task.prompt_tokens, len(task.tokens)):
            rows = [(task.tokens[at], at, 0, at == end - 1) for at in range(done, end)]
            assert model.decode(rows) == native.DECODE_OK
            logits = logits_alone(model)
            assert logits[task.tokens[end]] > max(logits) - 1e-2, f"token {end}"
            done = end


def task_of(
    task_id: int,
    prompt: str,
    session: str | None = None,
    prefix_tokens: int = 0,
    priority: int = 0,
    **options: object,
) -> Task:
    """A greedy task; the prompt has one token for each of its letters."""
    settings = {"temperature": 0.0, "max_tokens": 8, **options}
    tokens = [3 + ord(letter) - 0x21 for letter in prompt]
    return Task(
        task_id,
        tokens,
        GenerationOptions(**settings),
        session,
        prefix_tokens=prefix_tokens,
        priority=priority,
    )


def computed_rows(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Grows by (sequence, position) for every row that the model computes from now on."""
    rows: list[tuple[int, int]] = []
    decode = bench.model.decode

    def counting(batch: list[tuple[int, int, int, bool]]) -> int:
        rows.extend((sequence, position) for _, position, sequence, _ in batch)
        return decode(batch)

    monkeypatch.setattr(bench.model, "decode", counting)
    return rows


def moved_lengths(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of cells whenever some are moved."""
    lengths: list[int] = []
    move = bench.model.move

    def counting(sequences: Sequence[int], start: int, end: int) -> None:
        lengths.append(end - start)
        move(sequences, start, end)

    monkeypatch.setattr(bench.model, "move", counting)
    return lengths


def finish(batcher: Batcher, each: Callable[[], None] = lambda: None) -> list[StepOutput]:
    """Step until nothing is left to do."""
    outputs = []
    while batcher.has_work:
        outputs.append(batcher.step())
        each()
        assert len(outputs) < 10_000, "it does not end"
    return outputs


def ends(outputs: list[StepOutput]) -> dict[int, str]:
    """How each task ended."""
    reasons = {done.id: done.completion.finish_reason for out in outputs for done in out.done}
    return reasons | {ended.id: ended.error.message for out in outputs for ended in out.ended}


@pytest.fixture(scope="module", params=list(WRITERS))
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    path = tmp_path_factory.mktemp("batcher") / "tiny.gguf"
    return Bench(WRITERS[request.param](path, context_length=CONTEXT, token_bias=NO_END))


@pytest.fixture(autouse=True)
def no_sampler_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every sampler chain that a test makes is freed, once."""
    chains: set[int | None] = set()

    def init(params: object) -> object:
        chain = made(params)
        chains.add(ctypes.cast(chain, ctypes.c_void_p).value)
        return chain

    def free(chain: object) -> None:
        chains.remove(ctypes.cast(chain, ctypes.c_void_p).value)
        freed(chain)

    made, freed = lc.llama_sampler_chain_init, lc.llama_sampler_free
    monkeypatch.setattr(lc, "llama_sampler_chain_init", init)
    monkeypatch.setattr(lc, "llama_sampler_free", free)
    yield
    assert not chains


@pytest.mark.parametrize("seed", range(6))
def test_anything_may_happen_around_a_task(bench: Bench, seed: int) -> None:
    """Prefixes, sessions, stops, cancels and aborts in any order: who is left answers as if alone,
    in the order of arrival, and memory is as the slots say after every step."""
    chance = random.Random(seed)
    batcher = bench.batcher()
    prefixes = ["".join(chance.choices("abcdefgh", k=n)) for n in (3, 40, 120, 300)]
    tasks: dict[int, Task] = {}
    cancelled: set[int] = set()
    outputs: list[StepOutput] = []
    while len(tasks) < 40 or batcher.has_work:
        if len(tasks) < 40 and chance.random() < 0.3:
            prompt = chance.choice(prefixes) + "".join(
                chance.choices("ijklmnop", k=chance.randrange(1, 60))
            )
            task = task_of(
                len(tasks),
                prompt,
                chance.choice([None, "one", "two"]),
                max_tokens=chance.choice([1, 5, 30, 1000]),
                stop=chance.choice([[], ["a"], ["ld", "e"]]),
            )
            tasks[task.id] = task
            batcher.add(task)
        if chance.random() < 0.1 and tasks:
            victim = chance.choice(list(tasks))
            if batcher.cancel(victim):
                cancelled.add(victim)
        if chance.random() < 0.2:
            timer = threading.Timer(chance.random() * 2e-3, bench.abort.raise_)
            timer.start()
            outputs.append(batcher.step())
            timer.join()
            bench.abort.lower()
        else:
            outputs.append(batcher.step())
        bench.check_memory(batcher)
    assert not bench.abort.is_raised
    left = set(tasks) - cancelled
    assert set(ends(outputs)) == left
    assert set(ends(outputs).values()) <= {"stop", "length"}
    starts = [tasks[n].started_at for n in sorted(left)]
    assert starts == sorted(starts)
    for task_id in left:
        bench.check_answer(tasks[task_id])


def test_tasks_that_exceed_the_context_wait(bench: Bench) -> None:
    """Twelve tasks that each want most of the context all end, one after the other."""
    batcher = bench.batcher()
    tasks = [task_of(n, chr(97 + n) * 250, max_tokens=20 + n, stop=[]) for n in range(12)]
    for task in tasks:
        batcher.add(task)
    outputs = finish(batcher, lambda: bench.check_memory(batcher))
    assert ends(outputs) == dict.fromkeys(range(12), "length")
    assert [task.generated for task in tasks] == [20 + n for n in range(12)]


def test_a_crowd_changes_no_bit(shallow_smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes, goes, is shared, offloaded or moved around a task, wherever its cells lie:
    its probabilities are those that a model without anybody else gives, to the last bit."""
    bench, alone = Bench(shallow_smollm2, slots=6), Bench(shallow_smollm2, slots=1)
    moved = moved_lengths(bench, monkeypatch)

    def tasks() -> Iterator[Task]:
        chance = random.Random(1)
        prefixes = ["".join(chance.choices("abcdefgh", k=n)) for n in (3, 20, 40, 70)]
        for n in range(20):
            rest = "".join(chance.choices("ijklmnop", k=chance.randrange(1, 40)))
            session = chance.choice([None, "one", "two"])
            most = chance.choice([1, 5, 15, 30])
            prompt = chance.choice(prefixes) + rest
            yield task_of(n, prompt, session, max_tokens=most, logprobs=2)

    crowd, batcher = list(tasks()), bench.batcher()
    coming = crowd.copy()
    chance = random.Random(2)
    while coming or batcher.has_work:
        if coming and chance.random() < 0.2:
            batcher.add(coming.pop())
        if chance.random() < 0.02:
            batcher.cancel(chance.randrange(20))
        batcher.step()
        bench.check_memory(batcher)
    for task, single in zip(crowd, tasks(), strict=True):
        alone_batcher = alone.batcher()
        alone_batcher.add(single)
        finish(alone_batcher)
        assert task.logprobs == single.logprobs[: len(task.logprobs)]
    assert sum(len(task.logprobs) for task in crowd) > 100
    assert moved


def test_what_is_shared_is_moved_once_and_stays_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the cache is packed, three tasks of one agent still have one copy of its prefix."""
    path = write_tiny_llama(tmp_path / "t.gguf", context_length=CONTEXT, token_bias=NO_END)
    bench = Bench(path, slots=4)
    batcher = bench.batcher()
    moved = moved_lengths(bench, monkeypatch)
    batcher.add(task_of(0, "z" * 100, max_tokens=30))
    batcher.step()
    tasks = [task_of(n, "a" * 150 + chr(105 + n), max_tokens=60) for n in (1, 2, 3)]
    for task in tasks:
        batcher.add(task)
    finish(batcher, lambda: bench.check_memory(batcher))
    for task in tasks:
        bench.check_answer(task)
    assert sum(moved) < 150 + 3 * 61
    assert 128 in moved


def test_a_task_that_waits_for_room_costs_no_cached_state(bench: Bench) -> None:
    """What idle slots hold is given up only when that makes room for the task."""
    batcher = bench.batcher()
    batcher.add(task_of(1, "a" * 100, max_tokens=1))
    finish(batcher)
    batcher.add(task_of(2, "b" * 300, max_tokens=20))
    batcher.add(task_of(3, "c" * 300, max_tokens=1))
    batcher.step()
    assert [len(slot.cells) for slot in slots_of(batcher) if slot.task is None] == [100, 0]
    assert set(ends(finish(batcher))) == {2, 3}


def test_a_session_whose_state_is_gone_starts_where_others_are(bench: Bench) -> None:
    """A session's empty slot is no better than any other: the longest common prefix wins."""
    batcher = bench.batcher()
    batcher.add(task_of(1, "a" * 100, "mine", max_tokens=1))
    finish(batcher)
    batcher.add(task_of(2, "b" * 490, "another", max_tokens=1))  # needs the room of the first
    finish(batcher)
    again = task_of(3, "b" * 300, "mine", max_tokens=1)
    batcher.add(again)
    finish(batcher)
    assert again.cached_tokens == (299 if bench.model.is_rewindable else 0)


# -- beginnings that are shared


def test_a_prefix_is_computed_once_for_all(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve requests of two agents at once: each system prompt is computed by one of them, and
    cached_tokens of the others says so."""
    batcher = bench.batcher()
    rows = computed_rows(bench, monkeypatch)
    prefixes = ["abcdefgh" * 10, "hgfedcba" * 10]
    tasks = [
        task_of(n, prefixes[n % 2] + chr(65 + n) * 3, prefix_tokens=80, max_tokens=2)
        for n in range(12)
    ]
    for task in tasks:
        batcher.add(task)
    finish(batcher, lambda: bench.check_memory(batcher))
    if bench.model.saves_whole_states or not bench.model.is_rewindable:
        assert len(rows) == 2 * 80 + 12 * (3 + 1)
        assert [task.cached_tokens for task in tasks] == [0, 0] + [80] * 10
    else:  # a window may be gone when the neighbour wants to start from it
        assert [task.cached_tokens for task in tasks].count(0) <= 6
    for task in tasks:
        bench.check_answer(task)


def test_a_prefix_outlives_what_used_it(bench: Bench) -> None:
    """However many other conversations came in between, an agent's prompt is not computed again
    while there is memory for it."""
    batcher = bench.batcher()
    for n in range(20):
        prefix = "abcdefgh" * 10 if n in (0, 19) else chr(98 + n) * 300
        task = task_of(n, prefix + "x" * n, prefix_tokens=80 if n in (0, 19) else 0, max_tokens=1)
        batcher.add(task)
        finish(batcher, lambda: bench.check_memory(batcher))
    assert task.cached_tokens == 80
    bench.check_answer(task)


def test_who_waits_for_a_prefix_goes_on_when_its_maker_is_cancelled(bench: Bench) -> None:
    """A request that computes a prefix for others may go: the next one computes the rest."""
    batcher = bench.batcher()
    tasks = [task_of(n, "ab" * 200 + f"{n}", prefix_tokens=400) for n in range(3)]
    batcher.add(task_of(9, "z", max_tokens=40))  # makes prompts be read in pieces
    batcher.step()
    for task in tasks:
        batcher.add(task)
    batcher.step()
    batcher.step()
    assert batcher.cancel(0)
    outputs = finish(batcher, lambda: bench.check_memory(batcher))
    assert set(ends(outputs)) == {1, 2, 9}
    for task in tasks[1:]:
        bench.check_answer(task)


def test_conversations_stay_warm_with_others_in_between(bench: Bench) -> None:
    """Five conversations on three slots take turns: each goes on from its own last state."""
    bench.batcher()
    batcher = Batcher(bench.model, host_cache_bytes=2**24)
    texts = {name: chr(97 + n) * 60 for n, name in enumerate("vwxyz")}
    held: dict[str, int] = {}
    for turn in range(3):
        for name in texts:
            task = task_of(turn, texts[name], name, max_tokens=6)
            batcher.add(task)
            finish(batcher, lambda: bench.check_memory(batcher))
            bench.check_answer(task)
            if turn:
                assert task.cached_tokens == held[name]
            held[name] = len(task.tokens) - 1
            texts[name] = "".join(chr(token - 3 + 0x21) for token in task.tokens[:-1]) + "?!"


def test_silent_conversations_leave_the_cache_to_the_others(bench: Bench) -> None:
    """While somebody is answered, the cells of idle conversations are given back, and their
    state is kept."""
    batcher = bench.batcher()
    for n in range(3):
        batcher.add(task_of(n, chr(97 + n) * 130, max_tokens=1))
    finish(batcher)
    assert kv_of(batcher).cells.used == 390
    batcher.add(task_of(4, "z", max_tokens=8))
    finish(batcher)
    assert kv_of(batcher).cells.used <= 256 + 8
    assert len(kv_of(batcher).host_cache) >= 2
    back = task_of(5, "a" * 150, max_tokens=1)
    batcher.add(back)
    finish(batcher)
    assert back.cached_tokens == 130


def test_no_memory_for_silent_conversations_means_computing_again(bench: Bench) -> None:
    """With host_cache_bytes=0 nothing is kept outside the cache, and answers are the same."""
    for sequence in range(bench.model.slots):
        bench.model.forget(sequence)
    batcher = Batcher(bench.model, host_cache_bytes=0)
    for n in range(8):
        task = task_of(n, "abcd"[n % 4] * 200, prefix_tokens=100, max_tokens=4)
        batcher.add(task)
        finish(batcher, lambda: bench.check_memory(batcher))
        bench.check_answer(task)
    assert len(kv_of(batcher).host_cache) == 0


def saved(model: NativeModel, sequence: int) -> np.ndarray:
    """The state of a sequence."""
    buffer = np.empty(model.state_bytes(sequence), np.uint8)
    model.save(sequence, buffer)
    return buffer


def logits_after(model: NativeModel, sequence: int, tokens: list[int], start: int) -> np.ndarray:
    """The logits behind the last token, when only those from `start` on are computed."""
    end = len(tokens)
    rows = [(tokens[at], at, sequence, at == end - 1) for at in range(start, end)]
    assert model.decode(rows) == native.DECODE_OK
    return model.logits(1)[0].copy()


@pytest.mark.parametrize("kind", WRITERS)
def test_reuse_changes_no_logits(tmp_path: Path, kind: str) -> None:
    """Cut back in the middle, shared with a neighbour, or offloaded and restored: the logits of
    what follows are within 1e-3 of those of a sequence that was computed without any of it.

    The same pieces are computed in the same batches: how many rows a batch has chooses the kernels
    of llama.cpp, and with them the rounding.
    """
    path = WRITERS[kind](tmp_path / "m.gguf", context_length=CONTEXT)
    model = loaded(path, 4, AbortFlag())
    tokens = [3 + (n * 37) % 90 for n in range(250)]
    others = tokens[:150] + [3 + (n * 11) % 90 for n in range(70)]

    def fresh(whole: list[int]) -> np.ndarray:
        model.forget(3)
        logits_after(model, 3, whole[:150], 0)
        logits = logits_after(model, 3, whole, 150)
        model.forget(3)
        return logits

    def check(sequence: int, whole: list[int]) -> None:
        assert np.abs(logits_after(model, sequence, whole, 150) - expected[id(whole)]).max() < 1e-3

    expected = {id(tokens): fresh(tokens), id(others): fresh(others)}
    assert np.abs(expected[id(tokens)] - expected[id(others)]).max() > 0.1
    logits_after(model, 0, tokens[:150], 0)
    if model.is_rewindable:
        check(0, tokens)
        assert model.rewind(0, 150)
        check(0, others)
        assert model.rewind(0, 150)
        assert model.share(0, 1, 150)
        check(1, others)  # what one of the two does then is nothing to the other
        check(0, tokens)
        model.forget(1)
        assert model.rewind(0, 150)
    else:
        assert not model.rewind(0, 100)
        model.forget(0)
        logits_after(model, 0, tokens[:150], 0)
    state = saved(model, 0)
    model.forget(0)
    assert model.restore(2, state)
    check(2, tokens)
    assert model.restore(1, state)
    check(1, others)


def test_a_window_that_was_overwritten_is_computed_again(tmp_path: Path) -> None:
    """A model with a sliding window cannot go back to where its window is gone: it says so."""
    path = write_tiny_windowed(tmp_path / "w.gguf", context_length=CONTEXT, window=32)
    model = loaded(path, 2, AbortFlag())
    tokens = [3 + n % 90 for n in range(500)]
    logits_after(model, 0, tokens[:200], 0)
    state = saved(model, 0)
    assert model.rewind(0, 150)
    # as if the cells before position 140 had been taken by others
    assert lc.llama_memory_seq_rm(memory_of(model), 0, 0, 140)
    assert not model.rewind(0, 145)
    model.forget(0)
    assert model.restore(1, state)


# -- when the cells run short


def test_answers_that_outgrow_the_cache_are_all_given(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three answers of 300 tokens in a cache of 512: all run at first, some wait in between, none
    fails, and nothing is computed twice."""
    batcher = bench.batcher()
    rows = computed_rows(bench, monkeypatch)
    tasks = [task_of(n, "abc"[n] * 10, max_tokens=300) for n in range(3)]
    for task in tasks:
        batcher.add(task)
    batcher.step()
    assert all(slot.task for slot in slots_of(batcher))
    outputs = finish(batcher, lambda: bench.check_memory(batcher))
    assert ends(outputs) == dict.fromkeys(range(3), "length")
    assert any(task.is_preempted for task in tasks)
    assert len(rows) == 3 * (10 + 299)
    for task in tasks:
        assert task.generated == 300
        assert task.cached_tokens == 0
        bench.check_answer(task)


def test_a_higher_priority_runs_first(bench: Bench) -> None:
    """Among those that wait for a slot, priority decides, then arrival."""
    batcher = bench.batcher()
    priorities = [0, 0, 0, 0, 5, -5, 5, 0]
    tasks = [task_of(n, f"{n}" * 5, priority=p) for n, p in enumerate(priorities)]
    for task in tasks:
        batcher.add(task)
    finish(batcher)
    order = sorted(tasks, key=lambda task: task.started_at)
    assert [task.id for task in order] == [4, 6, 0, 1, 2, 3, 7, 5]


def decode_codes(bench: Bench, monkeypatch: pytest.MonkeyPatch, codes: list[int]) -> None:
    """The next decodes of the model do not run and return these codes."""
    decode = bench.model.decode

    def failing(rows: list[tuple[int, int, int, bool]]) -> int:
        return codes.pop(0) if codes else decode(rows)

    monkeypatch.setattr(bench.model, "decode", failing)


def test_cells_that_nobody_holds_cost_no_task(bench: Bench) -> None:
    """Cells are taken in llama.cpp's memory that are free in the books: every task is answered, and
    then they are free."""
    batcher = bench.batcher()
    tasks = [task_of(n, "ab"[n] * 20, max_tokens=180) for n in range(2)]
    for task in tasks:
        batcher.add(task)
    batcher.step()
    if bench.model.is_rewindable:  # otherwise a sequence takes no cells
        lost = [(3, at, 2, at == 249) for at in range(250)]
        assert bench.model.decode(lost) == native.DECODE_OK
    assert ends(finish(batcher)) == {0: "length", 1: "length"}
    bench.check_memory(batcher)
    for task in tasks:
        bench.check_answer(task)


def test_no_room_costs_no_task(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the cache has no room although it should, all states leave it, and come back."""
    batcher = bench.batcher()
    batcher.add(task_of(1, "a" * 100))
    finish(batcher)
    tasks = [task_of(2, "b" * 50), task_of(3, "c" * 50)]
    for task in tasks:
        batcher.add(task)
    decode_codes(bench, monkeypatch, [native.DECODE_NO_SLOT])
    outputs = finish(batcher, lambda: bench.check_memory(batcher))
    assert ends(outputs) == {2: "length", 3: "length"}
    for task in tasks:
        bench.check_answer(task)


def test_no_room_at_all_costs_the_largest_task(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If starting over does not help, the task that needs most fails, and its neighbours are
    answered."""
    batcher = bench.batcher()
    tasks = [task_of(n, "abc"[n] * 20 * (n + 1)) for n in range(3)]
    for task in tasks:
        batcher.add(task)
    batcher.step()
    decode_codes(bench, monkeypatch, [native.DECODE_NO_SLOT] * 2)
    outputs = finish(batcher, lambda: bench.check_memory(batcher))
    assert ends(outputs) == {
        0: "length",
        1: "length",
        2: f"llama.cpp has no cells for a batch that fits its KV cache of {CONTEXT} tokens",
    }
    for task in tasks[:2]:
        bench.check_answer(task)


def test_a_prompt_that_was_shared_and_cancelled_leaves_no_cell_behind(tmp_path: Path) -> None:
    """A task is cancelled when it has nothing but what it shares with another one. It lets go of
    that in the step in which the other one's cells are moved: they are free afterwards."""
    path = write_tiny_llama(tmp_path / "t.gguf", context_length=CONTEXT, token_bias=NO_END)
    bench = Bench(path)
    batcher = bench.batcher()
    batcher.add(task_of(0, "z" * 20, max_tokens=1))  # has the lowest cells
    first = task_of(1, "a" * 200 + "i", max_tokens=2)
    batcher.add(first)
    while not first.generated:
        batcher.step()
    batcher.add(task_of(2, "a" * 200 + "j"))
    bench.abort.raise_()
    batcher.step()
    bench.abort.lower()
    batcher.cancel(2)
    batcher.add(task_of(3, "y" * 5, max_tokens=1))  # takes the slot of the first
    finish(batcher)
    batcher.step()  # frees what nobody holds
    said = "".join(chr(token - 3 + 0x21) for token in first.tokens)
    tasks = [task_of(4, said, max_tokens=64)]
    tasks += [task_of(n, "by"[n - 5] * 20, max_tokens=64) for n in (5, 6)]
    for task in tasks:
        batcher.add(task)
    outputs = finish(batcher, lambda: bench.check_memory(batcher))
    assert ends(outputs) == dict.fromkeys((4, 5, 6), "length")
    for task in tasks:
        bench.check_answer(task)


def test_cancels_that_never_stop_do_not_starve_a_long_prompt(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If every long batch is aborted by somebody's cancel, prompts are read in short ones."""
    batcher = bench.batcher()
    decode = bench.model.decode
    monkeypatch.setattr(
        bench.model,
        "decode",
        lambda rows: native.DECODE_ABORTED if len(rows) > 40 else decode(rows),
    )
    batcher.add(task_of(1, "abcdefgh" * 50))
    steps = 0
    while batcher.has_work:
        batcher.step()
        steps += 1
        assert steps < 100, "the prompt is never read"


def test_a_seed_gives_the_same_tokens_in_a_crowd(tmp_path: Path) -> None:
    """On one slot, a sampled answer does not depend on how many others wait."""
    bench = Bench(
        write_tiny_llama(tmp_path / "one.gguf", context_length=CONTEXT, token_bias=NO_END), slots=1
    )

    def sampled(count: int) -> list[list[int]]:
        batcher = bench.batcher()
        tasks = [
            task_of(n, f"{n}" * 40, temperature=1.0, seed=n, max_tokens=16) for n in range(count)
        ]
        for task in tasks:
            batcher.add(task)
        finish(batcher)
        return [task.tokens for task in tasks]

    assert sampled(8)[0] == sampled(1)[0]
    assert sampled(8) == sampled(8)
    assert len({tuple(tokens[40:]) for tokens in sampled(8)}) == 8


EXTREMES = [
    {"temperature": 1e-6},
    {"temperature": 1e-38},
    {"temperature": 5e-324},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 5.0, "top_k": 1},
    {"temperature": 1.0, "min_p": 0.999},
]


@pytest.mark.parametrize("options", EXTREMES, ids=str)
def test_settings_that_leave_one_token_are_greedy(
    tmp_path: Path, options: dict[str, float]
) -> None:
    """Sampling settings so narrow that only the best token is left choose the best token."""
    bench = Bench(
        write_tiny_llama(tmp_path / "one.gguf", context_length=CONTEXT, token_bias=NO_END)
    )
    batcher = bench.batcher()
    task = task_of(1, "hello", max_tokens=24, **options)
    batcher.add(task)
    finish(batcher)
    assert task.generated == 24
    bench.check_answer(task)
