"""Several models under one budget: they take turns, nothing fails, and the books are right."""

import json
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import worker_processes
from engines import TEXT, MakeEngine, ended, names, parts, settle
from helpers import BOUND_S, Held, Running, config_with, run_all, wait_until
from internals import models_of
from pools import Holder, World, waiting_for_memory
from tiny import write_tiny_llama

from orion_oie import (
    Event,
    ModelCorruptError,
    ModelRegistry,
    OrionError,
    OrionInferenceEngine,
    QueueFullError,
    RequestHandle,
    UnknownAgentError,
    WorkerError,
)
from orion_oie.backends.base import GenerationJob, LoadSpec
from orion_oie.backends.fake import FakeAnswer, FakeBackend, FakeModel
from orion_oie.hardware import probe
from orion_oie.pool.pool import ModelPool
from orion_oie.schemas.availability import ModelState

MIB = 2**20
AGENTS = {"A": ["a"], "B": ["b"], "C": ["c"]}
SIZES = dict.fromkeys("abc", 60 * MIB)


def engine_of(make_engine: MakeEngine, scripts: Any = None, **config: Any) -> OrionInferenceEngine:
    """By default there is room for one model of three."""
    backend = FakeBackend(scripts or {"*": FakeAnswer(TEXT)}, footprints=SIZES)
    settings = {"budget": 100 * MIB, "slots": 1, **config}
    return make_engine(backend, AGENTS, **settings)


def loads(engine: OrionInferenceEngine) -> list[str]:
    return list(parts(engine).backend.loaded)  # type: ignore[attr-defined]


def here(engine: OrionInferenceEngine) -> set[str]:
    return {stats.model.model_id for stats in engine.stats().models.values()}


def set_queue_clock(engine: OrionInferenceEngine, clock: Callable[[], float]) -> None:
    """Have the queue alone go by another clock: the engine's own clock moves its breakers, too."""
    parts(engine).queue._clock = clock


# -- taking turns


def test_models_take_turns(make_engine: MakeEngine) -> None:
    """Thirty requests for three models in turn, where one has room: all are answered, and each
    model is loaded once or twice instead of ten times."""
    held = Held(FakeAnswer(TEXT))
    engine = engine_of(make_engine, {"a": held, "*": FakeAnswer(TEXT)})
    handles = [engine.submit("Hello?", agent="ABC"[n % 3]) for n in range(30)]
    held.wait_for()
    held.let_go.set()
    results = [handle.result(10) for handle in handles]
    assert [result.agent_id for result in results] == list("ABC") * 10
    assert all(result.content == TEXT for result in results)
    assert len(loads(engine)) <= 6
    cold = [result.receipt for result in results if result.receipt.cold_load]
    assert {"a@q4", "b@q4"} <= {key for receipt in cold for key in receipt.evicted}
    for result in results:
        assert bool(result.receipt.evicted) <= result.receipt.cold_load
    settle(engine)
    assert engine.stats().requests.failed == 0
    assert engine.stats().memory.reserved_bytes == 60 * MIB


def test_nobody_waits_for_more_than_the_turns_before_him(make_engine: MakeEngine) -> None:
    """By the queue's clock, on which each answer takes a second and a turn ten: however much one
    model is asked, the next one has its turn after that, then the third."""
    now = [0.0]
    gate = threading.Event()
    served: list[tuple[str, float]] = []

    def answer(job: GenerationJob) -> FakeAnswer:
        assert gate.wait(BOUND_S)
        name = job.messages[-1].content
        served.append((name, now[0]))
        now[0] += 1.0
        return FakeAnswer(name)

    engine = engine_of(make_engine, {"*": answer}, predictive=False)
    set_queue_clock(engine, lambda: now[0])
    wanted = ["A"] * 20 + ["B"] * 5 + ["C"] * 5
    handles = [engine.submit(name, agent=name) for name in wanted]
    gate.set()
    assert [handle.result(10).content for handle in handles] == wanted
    began = {name: [at for who, at in served if who == name] for name in "ABC"}
    assert began["B"][0] <= 11.0
    assert began["C"][0] <= 21.0
    gaps = [late - early for early, late in zip(began["A"], began["A"][1:], strict=False)]
    assert max(gaps) <= 21.0  # the turns of the two others
    assert len(loads(engine)) <= 6


def test_an_urgent_request_has_its_model_loaded(make_engine: MakeEngine) -> None:
    """A higher priority comes first also when that costs a load."""
    held = Held(FakeAnswer(TEXT))
    engine = engine_of(make_engine, {"a": held, "*": FakeAnswer(TEXT)}, predictive=False)
    first = engine.submit("Hello?", agent="A")
    held.wait_for()
    later = [engine.submit("Hello?", agent="A") for _ in range(3)]
    urgent = engine.submit("Hello?", agent="B", priority=5)
    held.let_go.set()
    for handle in (first, urgent, *later):
        handle.result(10)
    assert loads(engine) == ["a@q4", "b@q4", "a@q4"]
    assert urgent.result().timings.queue_ms <= min(h.result().timings.queue_ms for h in later)


def test_nobody_waits_for_the_room_of_a_paused_model(make_engine: MakeEngine) -> None:
    """A request whose first model is paused is answered by the next one at once, though the first
    one would have to wait for room."""
    asked: list[GenerationJob] = []
    let_go = threading.Event()

    def answer(job: GenerationJob) -> FakeAnswer:
        asked.append(job)
        assert asked[0] is not job or let_go.wait(BOUND_S)
        return FakeAnswer(TEXT)

    errors = {"b": [WorkerError("no luck") for _ in range(3)]}
    backend = FakeBackend({"a": answer}, footprints=SIZES, load_errors=errors)
    agents = {"A": ["a"], "B": ["b", "a"]}
    engine = make_engine(backend, agents, budget=100 * MIB, slots=2, predictive=False)
    for _ in range(3):
        with pytest.raises(WorkerError):
            engine.preload("B")
    running = engine.submit("Hello?", agent="A")
    wait_until(lambda: asked)
    result = engine.infer("Hello?", agent="B")
    assert result.model_id == "a"
    assert not running.done()
    let_go.set()
    running.result(10)


class Counting(FakeBackend):
    """Knows the most that its models had at the same time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.most_bytes = 0

    def load(self, spec: LoadSpec, scope: Any, on_progress: Any) -> FakeModel:
        model = super().load(spec, scope, on_progress)
        alive = [one for one in list(self._models) if one.is_alive()]
        taken = sum(self.footprints[one.info.model_id] for one in alive)
        self.most_bytes = max(self.most_bytes, taken)
        return model


@pytest.mark.parametrize("seed", range(4))
def test_any_mix_of_models_ends_within_the_budget(make_engine: MakeEngine, seed: int) -> None:
    """Threads with requests, cancels, deadlines, loads, unloads and crashes, models of all sizes, a
    pinned one, loads ahead: every request ends, memory stays within the budget, and in the end the
    books are right and everybody is answered."""
    dice = random.Random(seed)
    models = "abcde"
    sizes = {name: dice.randrange(10, 60) * MIB for name in models}
    backend = Counting(
        {"*": lambda job: FakeAnswer("word " * 4, delay_s=0.0005)},
        footprints=sizes,
        load_delay_s=0.001,
    )
    agents = {name.upper(): [name, models[(n + 1) % 5]] for n, name in enumerate(models)}
    pinned = dice.choice("ABCDE")
    engine = make_engine(
        backend, agents, budget=120 * MIB, slots=2, pinned=[pinned], model_turn_s=0.05
    )

    def work(worker: int) -> int:
        mine = random.Random(seed * 100 + worker)
        answered = 0
        for _ in range(25):
            agent = mine.choice("ABCDE")
            action = mine.random()
            if action < 0.05:
                engine.unload(agent)
            elif action < 0.1:
                engine.plan("Hello?", agent=agent)
                engine.stats()
                engine.health()
            elif action < 0.15 and models_of(backend):
                mine.choice(models_of(backend)).crash()
            deadline = 0.002 if action > 0.9 else 60.0
            session = mine.choice(["one", "two"])
            handle = engine.submit("Hello?", agent=agent, session_id=session, deadline=deadline)
            if action > 0.85:
                handle.cancel()
            try:
                answered += handle.result(BOUND_S).content == "word " * 4
            except OrionError as error:
                assert error.retryable or action > 0.85  # noqa: PT017 (not what is tested)
        return answered

    runs = run_all([lambda n=n: work(n) for n in range(6)])
    assert sum(run.join() for run in runs) > 100
    settle(engine)
    assert backend.most_bytes <= 120 * MIB
    for agent in "ABCDE":
        assert engine.infer("Hello?", agent=agent).content == "word " * 4
    settle(engine)
    stats = engine.stats()
    assert stats.running == stats.waiting == 0
    assert stats.memory.reserved_bytes == sum(m.reserved_bytes for m in stats.models.values())
    assert stats.memory.reserved_bytes <= 120 * MIB
    assert all(model.users == 0 for model in stats.models.values())
    predicted = stats.prediction
    assert predicted.hits + predicted.wasted <= predicted.predictions


# -- who stays


def test_the_models_of_pinned_agents_stay(make_engine: MakeEngine) -> None:
    """Others come and go beside them; statistics say who is pinned."""
    engine = engine_of(make_engine, budget=130 * MIB, pinned=["A"], predictive=False)
    for agent in "ABCBCAC":
        engine.infer("Hello?", agent=agent)
        assert "a" in here(engine)
    assert loads(engine).count("a@q4") == 1
    models = engine.stats().models
    assert models["a@q4"].is_pinned
    assert not models["c@q4"].is_pinned


def test_an_unknown_pinned_agent_is_refused(make_engine: MakeEngine) -> None:
    """A misspelt name would pin nothing."""
    with pytest.raises(UnknownAgentError, match="'Aa'"):
        engine_of(make_engine, pinned=["Aa"])


def test_preload_pins_until_unload(make_engine: MakeEngine) -> None:
    """What was loaded to stay stays, whatever is asked for; unloading it frees it and its pin."""
    engine = engine_of(make_engine, budget=130 * MIB, predictive=False)
    assert engine.preload("A", pin=True).model_id == "a"
    for agent in "BCBC":
        engine.infer("Hello?", agent=agent)
    assert here(engine) == {"a", "c"}
    assert engine.unload("A")
    assert here(engine) == {"c"}
    for agent in "ABC":
        engine.infer("Hello?", agent=agent)
    assert here(engine) == {"b", "c"}


def test_preload_without_pin_may_be_evicted(make_engine: MakeEngine) -> None:
    """It is as idle as any other, and evicts what is."""
    engine = engine_of(make_engine, predictive=False)
    engine.preload("A")
    assert engine.preload("B").model_id == "b"
    assert here(engine) == {"b"}
    assert names(engine).count("pool.evicted") == 1


def test_unload_frees_what_another_wish_has_left(make_engine: MakeEngine, tmp_path: Path) -> None:
    """An agent that wants another variant now still frees the one that was pinned for it."""
    variants = {}
    for name in ("Q4_K_M", "Q8_0"):
        (tmp_path / f"{name}.gguf").touch()
        source = {"path": f"{name}.gguf"}
        variants[name] = {"quantization": name, "size_mb": 1, "min_ram_gb": 1, "source": source}
    engine = make_engine(None, {"A": ["a"]}, models={"a": {"variants": variants}})
    engine.preload("A", pin=True)
    assert engine.stats().models.keys() == {"a@Q8_0"}
    old = engine.registry.agent("A").model_dump(mode="json", exclude_defaults=True)
    engine.registry.add_agent("A", {**old, "quantization": "q4"})
    engine.infer("Hello?", agent="A")
    assert engine.stats().models.keys() == {"a@Q4_K_M", "a@Q8_0"}
    assert engine.unload("A")
    assert engine.stats().models == {}
    engine.infer("Hello?", agent="A")
    assert not any(one.is_pinned for one in engine.stats().models.values())


def test_receipts_list_who_went(make_engine: MakeEngine) -> None:
    """The request whose model needed room says what went for it, in a smallest sufficient set;
    the others say nothing."""
    sizes = {"a": 40 * MIB, "b": 40 * MIB, "c": 90 * MIB}
    backend = FakeBackend({"*": FakeAnswer(TEXT)}, footprints=sizes)
    engine = make_engine(backend, AGENTS, budget=100 * MIB, predictive=False)
    assert engine.infer("Hello?", agent="A").receipt.evicted == []
    assert engine.infer("Hello?", agent="B").receipt.evicted == []
    assert engine.infer("Hello?", agent="C").receipt.evicted == ["a@q4", "b@q4"]
    assert engine.infer("Hello?", agent="C").receipt.evicted == []
    assert engine.infer("Hello?", agent="A").receipt.evicted == ["c@q4"]


# -- who waits


def test_waiting_requests_know_their_place(make_engine: MakeEngine) -> None:
    """From 1 to n in the order in which they would be served; None for what runs or has ended, and
    for what was cancelled."""
    held = Held(FakeAnswer(TEXT))
    engine = engine_of(make_engine, {"*": held}, predictive=False)
    running = engine.submit("Hello?", agent="A")
    held.wait_for()
    waiting = [engine.submit("Hello?", agent="A", session_id="s") for _ in range(4)]
    other = engine.submit("Hello?", agent="B")
    urgent = engine.submit("Hello?", agent="A", session_id="s", priority=3)
    assert running.queue_position is None
    assert urgent.queue_position == 1
    places = [handle.queue_position for handle in (*waiting, other)]
    assert sorted(place for place in places if place) == [2, 3, 4, 5, 6]
    assert [handle.queue_position for handle in waiting] == [2, 3, 4, 5]
    waiting[0].cancel()
    assert waiting[0].queue_position is None
    assert [handle.queue_position for handle in waiting[1:]] == [2, 3, 4]
    held.let_go.set()
    everybody: list[RequestHandle] = [running, *waiting, other, urgent]
    wait_until(lambda: all(handle.done() for handle in everybody))
    assert [handle.queue_position for handle in everybody] == [None] * 7


def test_a_refused_request_has_no_place(make_engine: MakeEngine) -> None:
    """Nor has one that was never put into the queue."""
    handle = ended(engine_of(make_engine).submit(""))
    assert handle.queue_position is None


def test_a_full_queue_says_when_to_come_back(make_engine: MakeEngine) -> None:
    """Once anything was served, the error has a time; before that it has none."""
    held = Held(FakeAnswer(TEXT))
    engine = engine_of(make_engine, {"*": held}, max_queue=1)
    first = engine.submit("Hello?", agent="A")
    held.wait_for()
    second = engine.submit("Hello?", agent="A")
    with pytest.raises(QueueFullError) as refused:
        engine.infer("Hello?", agent="A")
    assert "retry_after_s" not in refused.value.details
    assert (refused.value.details["waiting"], refused.value.details["limit"]) == (1, 1)
    held.let_go.set()
    first.result(10)
    second.result(10)
    held.let_go.clear()
    third = engine.submit("Hello?", agent="A")
    held.wait_for(3)
    fourth = engine.submit("Hello?", agent="A")
    with pytest.raises(QueueFullError, match=r"try again in about [0-9.]+ s") as refused:
        engine.infer("Hello?", agent="A")
    assert 0 < refused.value.details["retry_after_s"] < 60
    held.let_go.set()
    third.result(10)
    fourth.result(10)


# -- the pool's part: room that is being made is not room that is pinned


def test_room_that_is_being_made_for_a_pinned_model_is_awaited() -> None:
    """While a large model is freed for a small one that is pinned, others wait for the rest of its
    room; it is not said that there is none."""
    world = World()
    world.sizes = {"large": 90, "small": 20, "other": 50}
    world.closing = threading.Event()
    pool = ModelPool(world.load, size_of=world.size_of, budget_bytes=lambda: 100)
    first = Holder(pool, "large")
    first.wait()
    first.let_go()
    pool.pin("small@v")
    small = Holder(pool, "small")
    assert world.close_begun.wait(BOUND_S)
    assert pool.availability("other@v", 50).state is not ModelState.IMPOSSIBLE
    assert pool.availability("other@v", 90).state is ModelState.IMPOSSIBLE
    other = Holder(pool, "other")
    wait_until(lambda: waiting_for_memory(pool) == 1)
    world.closing.set()
    assert small.wait().evicted == ("large@v",)
    assert other.wait().evicted == ()
    small.let_go()
    other.let_go()
    pool.close(0.0)


# -- real models


BUDGET_MODELS = 2.3
QUICK = {"max_tokens": 4, "temperature": 0.0}


@pytest.fixture(scope="module")
def three_models(tmp_path_factory: pytest.TempPathFactory) -> ModelRegistry:
    """Three tiny models, each with an agent."""
    folder = tmp_path_factory.mktemp("three")
    models, agents = {}, {}
    for seed, name in enumerate("abc"):
        write_tiny_llama(
            folder / f"{name}.gguf",
            seed=seed,
            name=name,
            context_length=512,
            token_bias={"<|im_end|>": -40},
        )
        source = {"path": f"{name}.gguf"}
        variant = {"quantization": "F16", "size_mb": 1, "min_ram_gb": 0.1, "source": source}
        base = {"name": name, "license": "x", "context_length": 512}
        models[name] = {**base, "variants": {"v": variant}}
        agents[name.upper()] = {
            "name": name,
            "description": "",
            "system_prompt": "Be brief.",
            "models": {"primary": name},
        }
    content = {"version": "1", "models": models, "agents": agents}
    return ModelRegistry.parse(json.dumps(content), base=folder)


@pytest.fixture
def real(three_models: ModelRegistry, tmp_path: Path) -> Iterator[OrionInferenceEngine]:
    """An engine on these, with room for two of them."""
    common: dict[str, Any] = {
        "cache_dir": tmp_path / "cache",
        "slots": 1,
        "threads": 1,
        "context_length": 512,
        "keep_spare_worker": False,
        "predictive": False,
    }
    with OrionInferenceEngine(three_models, config_with(**common)) as looking:
        model = looking.plan("Hello?", agent="A").model
    assert model is not None
    assert model.needed_bytes is not None
    budget = int(BUDGET_MODELS * model.needed_bytes)
    with OrionInferenceEngine(three_models, config_with(budget=budget, **common)) as engine:
        yield engine


def test_a_corrupt_model_says_so_each_time_and_evicts_nobody(
    three_models: ModelRegistry, tmp_path: Path
) -> None:
    """Its header is enough to tell, so nothing is loaded and nothing has to be paused; what is in
    memory stays."""
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + b"\xff" * 60)
    write_tiny_llama(tmp_path / "b.gguf", context_length=512)
    data = three_models.data.model_dump(mode="json", exclude_defaults=True)
    registry = ModelRegistry.parse(json.dumps(data), base=tmp_path)
    config = config_with(
        cache_dir=tmp_path / "cache",
        slots=1,
        threads=1,
        context_length=512,
        keep_spare_worker=False,
        budget=120 * MIB,
    )
    with OrionInferenceEngine(registry, config) as engine:
        engine.preload("B")
        for _ in range(5):
            with pytest.raises(ModelCorruptError, match=r"a\.gguf"):
                engine.infer("Hello?", agent="A")
        assert "a:load" not in engine.stats().breakers
        assert "model.load_failed" not in names(engine)
        assert list(engine.stats().models) == ["b@v"]
        books_are_right(engine)


class Watch:
    """The most memory that all workers had together, looked at all the time."""

    def __init__(self) -> None:
        self.most_bytes = self.most_workers = self.looks = 0
        self._is_over = threading.Event()
        self._running = Running(self._look)

    def _look(self) -> None:
        while not self._is_over.wait(0.02):
            # Not all children: one that is not a worker yet shares all of this process's memory.
            try:
                sizes = [probe.resident_bytes(worker.pid) for worker in worker_processes()]
            except psutil.NoSuchProcess:  # one that ended just now
                continue
            found = [size for size in sizes if size]
            self.most_bytes = max(self.most_bytes, sum(found))
            self.most_workers = max(self.most_workers, len(found))
            self.looks += 1

    def end(self) -> None:
        self._is_over.set()
        self._running.join()


def test_real_workers_stay_within_the_budget(real: OrionInferenceEngine) -> None:
    """Three models take turns where two have room: at no moment do all worker processes together
    have more than the budget, and five percent for what comes and goes."""
    watch = Watch()
    try:
        handles = [real.submit("Hello?", agent="ABC"[n % 3], **QUICK) for n in range(9)]
        for handle in handles:
            handle.result(60)
        for agent in "CAB":
            real.infer("Hello?", agent=agent, **QUICK)
    finally:
        watch.end()
    budget = real.stats().memory.budget_bytes
    assert watch.looks > 10
    assert watch.most_workers == 2
    assert watch.most_bytes <= budget * 1.05
    assert real.stats().memory.reserved_bytes <= budget
    assert len([e for e in real.export_logs() if e["event"] == "pool.evicted"]) >= 2


def test_what_workers_have_is_told_in_parts_and_over_time(real: OrionInferenceEngine) -> None:
    """Private, shared and file-backed memory of each worker add up, and the history has them."""
    real.infer("Hello?", agent="A", **QUICK)
    (model,) = [m for m in real.stats().models.values() if m.pid is not None][:1]
    parts = (model.private_bytes, model.shared_bytes, model.file_bytes)
    assert all(part is not None for part in parts)
    assert model.memory_bytes == sum(part for part in parts if part is not None)
    assert (model.private_bytes or 0) > 1 << 20
    assert (model.file_bytes or 0) > 1 << 20
    wait_until(lambda: any(sample.workers for sample in real.memory_history()))
    times = [sample.at_s for sample in real.memory_history()]
    assert times == sorted(times)


def books_are_right(engine: OrionInferenceEngine) -> None:
    """What is reserved is what those take that are here, and no other process is."""
    stats = engine.stats()
    assert stats.memory.reserved_bytes == sum(m.reserved_bytes for m in stats.models.values())
    wait_until(
        lambda: (
            {process.pid for process in worker_processes()}
            == {model.pid for model in engine.stats().models.values()}
        )
    )


def pid_of(engine: OrionInferenceEngine, key: str) -> int:
    pid = engine.stats().models[key].pid
    assert pid is not None
    return pid


def test_a_worker_that_is_killed_while_idle(real: OrionInferenceEngine) -> None:
    """It takes no room any more, evicts nobody, and is there again when it is asked for."""
    for agent in "AB":
        real.infer("Hello?", agent=agent, **QUICK)
    left = real.stats().models["b@v"].reserved_bytes
    os.kill(pid_of(real, "a@v"), signal.SIGKILL)
    wait_until(lambda: "a@v" not in real.stats().models)
    assert real.stats().memory.reserved_bytes == left
    books_are_right(real)
    result = real.infer("Hello?", agent="C", **QUICK)
    assert result.receipt.evicted == []
    result = real.infer("Hello?", agent="A", **QUICK)
    assert result.receipt.evicted == ["b@v"]
    books_are_right(real)
    assert real.unload("A")
    assert real.unload("C")
    assert real.stats().memory.reserved_bytes == 0
    books_are_right(real)


def test_a_worker_that_is_killed_just_before_it_is_used(real: OrionInferenceEngine) -> None:
    """Whether the engine has heard of it or not, the request is answered."""
    for _ in range(3):
        real.infer("Hello?", agent="A", **QUICK)
        os.kill(pid_of(real, "a@v"), signal.SIGKILL)
        assert real.infer("Hello?", agent="A", **QUICK).usage.completion_tokens == 4
    books_are_right(real)


def test_a_worker_that_is_killed_while_it_is_evicted(real: OrionInferenceEngine) -> None:
    """One that does not end when it is told to, and is then killed: the load that needs its room
    goes on at once, and so does everybody else."""
    evicted: list[str] = []

    def note(event: Event) -> None:
        if event.name == "pool.evicted":
            evicted.append(event.fields["key"])

    real.subscribe(note)
    for agent in "AB":
        real.infer("Hello?", agent=agent, **QUICK)
    pid = pid_of(real, "a@v")
    os.kill(pid, signal.SIGSTOP)
    newcomer = real.submit("Hello?", agent="C", **QUICK)
    wait_until(lambda: "a@v" not in real.stats().models)
    assert psutil.Process(pid).status() == psutil.STATUS_STOPPED
    assert real.infer("Hello?", agent="B", **QUICK).model_id == "b"
    assert evicted == []
    assert real.stats().memory.reserved_bytes <= real.stats().memory.budget_bytes
    os.kill(pid, signal.SIGKILL)
    assert newcomer.result(60).receipt.evicted == ["a@v"]
    assert evicted == ["a@v"]
    assert real.infer("Hello?", agent="A", **QUICK).model_id == "a"
    books_are_right(real)
