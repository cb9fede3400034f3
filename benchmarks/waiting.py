"""What it costs that many requests wait: their order, their positions, health, cancels, the end.

An engine over a fake backend whose only slots are taken, so that everything else waits; and the
pure parts by themselves. Its name is not that of its subject: a `queue.py` beside the other
benchmarks would hide the module of the standard library from all of them.
"""

import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from _report import Row, extent_of, options, report, row

from orion_oie import EngineConfig, ModelRegistry, OrionInferenceEngine, RequestHandle
from orion_oie.backends.base import GenerationJob
from orion_oie.backends.fake import FakeAnswer, FakeBackend
from orion_oie.cancellation import CancelScope, DeadlineTimer
from orion_oie.config import BreakerConfig
from orion_oie.engine.breaker import BreakerBoard
from orion_oie.engine.scheduling.history import History, Settings
from orion_oie.engine.scheduling.lines import Lines, Waiting
from orion_oie.engine.scheduling.policy import choose, order
from orion_oie.pool.eviction import Limits, Resident, availability_of
from orion_oie.schemas.availability import READY, Availability, ModelState

COUNTS = (256, 2_000, 10_000)
AGENTS = 8
BAR_COUNT = 10_000
# By the figure: the bar with that many waiting, in ms.
BARS = {
    "queue_position": 2,
    "queue_position, of a new one": 25,
    "order": 5,
    "order, 1 model, 16 agents, 1,000 sessions": 20,
    "order, 1 model, 16 agents, 10,000 sessions": 20,
    "order, 8 models, 16 agents, 1,000 sessions, 3 priorities": 20,
    "order, 50 models": 20,
    "health()": 50,
    "shutdown(0)": 500,
}
MODELS = 1_000


def timed_ms(call: Callable[[], object], rounds: int) -> list[float]:
    times = []
    for _ in range(rounds):
        began_at = time.perf_counter()
        call()
        times.append((time.perf_counter() - began_at) * 1e3)
    return times


def figure(name: str, count: int, times_ms: Sequence[float], unit: str = "ms") -> Row:
    bar = BARS.get(name, BARS.get(name.partition(",")[0])) if count == BAR_COUNT else None
    return row(f"{name}, {count} waiting", times_ms, unit, bar=bar, higher_is_better=False)


# The order alone


def crowd(count: int, *, models: int, sessions: int, priorities: int) -> Lines:
    """Requests of 16 agents in turn, or of one if there is one session."""
    return Lines(
        Waiting(
            seq,
            f"m{seq % models}",
            f"a{seq % 16}" if sessions > 1 else "a",
            f"s{seq % sessions}" if sessions > 1 else None,
            seq % priorities,
            seq / 100,
        )
        for seq in range(count)
    )


CROWDS = {
    "one agent": {"models": 1, "sessions": 1, "priorities": 1},
    "8 models": {"models": 8, "sessions": 1, "priorities": 1},
    "8 models, 3 priorities": {"models": 8, "sessions": 1, "priorities": 3},
    "8 models, 16 agents, 1,000 sessions": {"models": 8, "sessions": 1000, "priorities": 1},
    "8 models, 16 agents, 1,000 sessions, 3 priorities": {
        "models": 8,
        "sessions": 1000,
        "priorities": 3,
    },
    "1 model, 16 agents, 1,000 sessions": {"models": 1, "sessions": 1000, "priorities": 1},
    "1 model, 16 agents, 10,000 sessions": {"models": 1, "sessions": 10_000, "priorities": 1},
    "50 models": {"models": 50, "sessions": 1, "priorities": 1},
}


def _change(lines: Lines, seq: int, now: float) -> None:
    """The oldest request leaves, and one like it comes."""
    one = next(iter(lines))
    lines.remove(one)
    lines.add(Waiting(seq, one.model, one.agent, one.session, one.priority, now))


def order_rows(counts: Sequence[int], rounds: int) -> Iterator[Row]:
    loadable = Availability(ModelState.LOADABLE, frozenset({"m0"}))
    for label, kind in CROWDS.items():
        for count in counts:
            lines = crowd(count, **kind)
            found = {model: READY if model < "m4" else loadable for model in lines.counts}
            now = count / 100
            history, times = History(), list[float]()
            for number in range(rounds + 1):
                _change(lines, count + number, now)
                at = (lines, found, history, now, Settings())
                times += timed_ms(lambda at=at: order(*at), 1)
            # The first one finds lines that nobody has looked at.
            yield figure(f"order, {label}", count, times[1:])
            if count == BAR_COUNT:
                yield row(f"first order, {label}", times[:1], "ms", higher_is_better=False)
            history = History()
            served = min(count, 1000)
            began_at = time.perf_counter()
            for _ in range(served):
                pick = choose(lines, found, history, now, Settings()).pick
                assert pick is not None
                history.note(pick, lines, now, is_load=False)
                lines.remove(pick)
            each_us = (time.perf_counter() - began_at) / served * 1e6
            yield figure(f"choice of the next, {label}", count, [each_us], "us")


# An engine in which nothing moves


def registry(folder: Path) -> ModelRegistry:
    models, agents = {}, {}
    for number in range(AGENTS):
        path = folder / f"m{number}.gguf"
        path.touch()
        source = {"path": str(path)}
        variant = {"quantization": "q4_k_m", "size_mb": 1, "min_ram_gb": 0.1, "source": source}
        models[f"m{number}"] = {
            "name": "M", "license": "x", "context_length": 2048, "variants": {"q4": variant},
        }  # fmt: skip
        agents[f"a{number}"] = {
            "name": "A", "description": "", "system_prompt": "You help.",
            "models": {"primary": f"m{number}"},
        }  # fmt: skip
    return ModelRegistry.parse(
        json.dumps({"version": "1", "models": models, "agents": agents}), base=folder
    )


@contextmanager
def crowded(
    count: int, *, is_endless: bool = True
) -> Iterator[tuple[OrionInferenceEngine, list[RequestHandle], float, threading.Event]]:
    """An engine with so many waiting requests, their handles, the microseconds of each submit, and
    the event that has all of them answered, unless it is endless."""
    let_go = threading.Event()

    def script(_job: GenerationJob) -> FakeAnswer:
        if is_endless:
            return FakeAnswer("Yes.", delay_s=3600)
        let_go.wait(60)
        return FakeAnswer("Yes.")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = EngineConfig.model_validate(
            {
                "serving": {"slots": 4, "max_queue": count + 100},
                "download": {"cache_dir": folder},
                "memory": {"max_models": 4},
            }
        )
        engine = OrionInferenceEngine(registry(folder), config, backend=FakeBackend({"*": script}))
        try:
            for number in range(AGENTS * 5):  # they take all places
                engine.submit("Hello?", agent=f"a{number % AGENTS}")
            began_at = time.perf_counter()
            handles = [
                engine.submit("Hello?", agent=f"a{number % AGENTS}", priority=number % 3)
                for number in range(count)
            ]
            submit_us = (time.perf_counter() - began_at) / count * 1e6
            yield engine, handles, submit_us, let_go
        finally:
            let_go.set()
            engine.shutdown(0)


def engine_rows(count: int, rounds: int) -> Iterator[Row]:
    with crowded(count) as (engine, handles, submit_us, _):
        yield figure("submit", count, [submit_us], "us")
        first = [handles[-1].queue_position is not None]
        times = []
        for number in range(rounds):
            # A change before each call: nothing that was worked out before is exact any more.
            engine.submit("Hello?", agent="a0").cancel()
            times += timed_ms(lambda n=number: handles[n - rounds].queue_position, 1)
        assert first == [True]
        yield figure("queue_position", count, times)
        times = []
        for number in range(rounds):
            new = engine.submit("Hello?", agent=f"a{number % AGENTS}", priority=number % 3)
            times += timed_ms(lambda handle=new: handle.queue_position, 1)
            new.cancel()
        yield figure("queue_position, of a new one", count, times)
        yield figure("health()", count, timed_ms(engine.health, rounds))
        yield figure("stats()", count, timed_ms(engine.stats, rounds))
        half = handles[::2]
        began_at = time.perf_counter()
        for handle in half:
            handle.cancel()
        each_us = (time.perf_counter() - began_at) / len(half) * 1e6
        yield figure("cancel", count, [each_us], "us")
    with crowded(count) as (engine, handles, _, _):
        yield figure("shutdown(0)", count, timed_ms(lambda: engine.shutdown(0), 1))
        left = sum(not handle.done() for handle in handles)
        assert left <= AGENTS * 5, f"{left} of {count} did not end"
    with crowded(count, is_endless=False) as (engine, handles, _, let_go):
        let_go.set()
        began_at = time.perf_counter()
        for handle in handles:
            handle.result()
        each_us = (time.perf_counter() - began_at) / count * 1e6
        yield figure("answer of each", count, [each_us], "us")


# Other parts that look at many


def other_rows(rounds: int, deadlines: int) -> Iterator[Row]:
    board = BreakerBoard(BreakerConfig())
    for number in range(MODELS):
        with board.guard(f"m{number}", "load"):
            pass
    times = timed_ms(lambda: board.paused_s("m7"), rounds)
    yield row(f"paused_s, {MODELS} models", times, "ms", bar=0.1, higher_is_better=False)
    residents = [Resident(f"m{n}", n, n % 5 == 0, 10 + n % 7, 1.0 + n % 3) for n in range(MODELS)]
    held = sum(one.size_bytes for one in residents)
    times = timed_ms(lambda: availability_of(residents, Limits(None, held), 4_000), rounds)
    name = f"availability, {MODELS} models in memory"
    yield row(name, times, "ms", bar=20, higher_is_better=False)
    few = [Resident(f"m{n}", n, False, 10 + n % 7, 1.0 + n % 3) for n in range(12)]
    times = timed_ms(lambda: availability_of(few, Limits(None, 150), 75), rounds)
    yield row("availability, 12 models in memory", times, "ms", bar=5, higher_is_better=False)
    yield deadline_row(deadlines)


def deadline_row(rounds: int) -> Row:
    """How late deadlines fire among 10,000 others, while callbacks do not return."""
    timer, let_go = DeadlineTimer(), threading.Event()
    others = [CancelScope() for _ in range(BAR_COUNT)]
    for scope in others:
        timer.watch(scope, 3600)
    for _ in range(4):
        scope = CancelScope()
        scope.on_cancel(lambda: let_go.wait(30))
        timer.watch(scope, 0.05)
    late_ms = []
    for number in range(rounds):
        told, scope = threading.Event(), CancelScope()
        scope.on_cancel(told.set)
        deadline_s = 0.1 + number / 500
        began_at = time.perf_counter()
        timer.watch(scope, deadline_s)
        while scope.error is None:
            time.sleep(0.001)
        late_ms.append((time.perf_counter() - began_at - deadline_s) * 1e3)
    let_go.set()
    for scope in others:
        timer.forget(scope)
    return row("deadline, 10000 others", late_ms, "ms late", bar=50, higher_is_better=False)


def main() -> int:
    arguments = options("What it costs that many requests wait")
    rounds = extent_of(arguments, full=11, quick=3, smoke=1)
    counts = extent_of(arguments, full=COUNTS, quick=COUNTS, smoke=COUNTS[:1])
    deadlines = extent_of(arguments, full=50, quick=50, smoke=2)
    rows = [*order_rows(counts, rounds), *other_rows(rounds, deadlines)]
    for count in counts:
        rows += engine_rows(count, rounds)
    return report(rows, arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
