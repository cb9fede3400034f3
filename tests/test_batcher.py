"""Continuous batching on a tiny model, in this process: whatever happens around a task, its tokens
are those it would have alone, and the slots know what llama.cpp's memory holds."""

import ctypes
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import llama_cpp as lc
import pytest
from tiny import write_tiny_llama, write_tiny_recurrent

from orion_oie.backends.llama import native
from orion_oie.backends.llama.batcher import Batcher, StepOutput, Task
from orion_oie.backends.llama.native import AbortFlag, NativeModel
from orion_oie.schemas import GenerationOptions

CONTEXT = 512
NO_END = {"<|im_end|>": -40}
WRITERS = {"llama": write_tiny_llama, "mamba": write_tiny_recurrent}


class Bench:
    """A model with its abort flag, and a second context of it that knows what is right."""

    def __init__(self, path: Path, slots: int = 3) -> None:
        self.abort = AbortFlag()
        self.model = self._loaded(path, slots, self.abort)
        self._alone = self._loaded(path, 1, AbortFlag())

    @staticmethod
    def _loaded(path: Path, slots: int, abort: AbortFlag) -> NativeModel:
        return NativeModel(
            [path],
            slots=slots,
            context_length=CONTEXT,
            threads=1,
            abort=abort,
            on_progress=lambda _fraction: None,
        )

    def batcher(self) -> Batcher:
        for sequence in range(self.model.slots):
            self.model.forget(sequence)
        return Batcher(self.model)

    def check_memory(self, batcher: Batcher) -> None:
        """The slots say what llama.cpp says, and promise no more than there is."""
        for slot in batcher._slots:
            end = lc.llama_memory_seq_pos_max(self.model._memory, slot.index)
            assert end == len(slot.cells) - 1
            if slot.task is not None:
                assert slot.cells == slot.task.tokens[: len(slot.cells)]
        assert sum(slot.reserved_cells for slot in batcher._slots) <= CONTEXT

    def check_answer(self, task: Task) -> None:
        """Each token of a greedy answer is the best one, or as good, for a context of its own."""
        model = self._alone
        model.forget(0)
        done = 0
        for end in range(task.prompt_tokens, len(task.tokens)):
            rows = [(task.tokens[at], at, 0, at == end - 1) for at in range(done, end)]
            assert model.decode(rows) == native.DECODE_OK
            logits = lc.llama_get_logits_ith(model._context, -1)[: model.vocab_size]
            assert logits[task.tokens[end]] > max(logits) - 1e-2, f"token {end}"
            done = end


def task_of(task_id: int, prompt: str, session: str | None = None, **options: object) -> Task:
    """A greedy task; the prompt has one token for each of its letters."""
    settings = {"temperature": 0.0, "max_tokens": 8, **options}
    tokens = [3 + ord(letter) - 0x21 for letter in prompt]
    return Task(task_id, tokens, GenerationOptions(**settings), session)


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
    return {done["id"]: done["finish_reason"] for output in outputs for done in output.done} | {
        failed["id"]: failed["error"]["message"] for output in outputs for failed in output.error
    }


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
    monkeypatch.setattr(native.lc, "llama_sampler_chain_init", init)
    monkeypatch.setattr(native.lc, "llama_sampler_free", free)
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


def test_a_task_that_waits_for_room_costs_no_cached_state(bench: Bench) -> None:
    """What idle slots hold is given up only when that makes room for the task."""
    batcher = bench.batcher()
    batcher.add(task_of(1, "a" * 100, max_tokens=1))
    finish(batcher)
    batcher.add(task_of(2, "b" * 300, max_tokens=20))
    batcher.add(task_of(3, "c" * 300, max_tokens=1))
    batcher.step()
    assert [len(slot.cells) for slot in batcher._slots if slot.task is None] == [100, 0]
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


def decode_codes(bench: Bench, monkeypatch: pytest.MonkeyPatch, codes: list[int]) -> None:
    """The next decodes of the model do not run and return these codes."""
    decode = bench.model.decode

    def failing(rows: list[tuple[int, int, int, bool]]) -> int:
        return codes.pop(0) if codes else decode(rows)

    monkeypatch.setattr(bench.model, "decode", failing)


def test_no_room_costs_cached_state_first(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the cache has no room although it should, idle state goes; every task is answered."""
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
    """Without idle state the task that needs most fails, and its neighbours are answered."""
    batcher = bench.batcher()
    tasks = [task_of(n, "abc"[n] * 20 * (n + 1)) for n in range(3)]
    for task in tasks:
        batcher.add(task)
    batcher.step()
    decode_codes(bench, monkeypatch, [native.DECODE_NO_SLOT])
    outputs = finish(batcher, lambda: bench.check_memory(batcher))
    assert ends(outputs) == {
        0: "length",
        1: "length",
        2: f"the KV cache of {CONTEXT} tokens is full",
    }
    for task in tasks[:2]:
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
