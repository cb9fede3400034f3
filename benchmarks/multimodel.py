"""Several models on one machine: who gets the cores, and how often models are loaded.

Two models answer at the same time, against two processes of `llama_cpp.Llama` that use all cores
each, and against every fixed split of the threads; one model answers while another is loaded and
idle; requests for three models wait under a memory budget for one.

Needs the smollm2 extra.
"""

import itertools
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from _peers import Peer
from _random_model import random_model, registry_of
from _report import Row, extent_of, finish, options, row, show
from _subject import model_file

from orion_oie import (
    EngineConfig,
    LoadingConfig,
    MemoryConfig,
    ModelRegistry,
    OrionInferenceEngine,
    ServingConfig,
)
from orion_oie.backends.llama.host.loader import LlamaBackend, LoaderSettings
from orion_oie.backends.llama.host.threads import (
    Member,
    ThreadAllocator,
)
from orion_oie.hardware.machine import usable_cores

CONTEXT = 2048
FAIR = 0.97
T = TypeVar("T")
QUESTIONS = itertools.cycle(
    [f"Write a long story about {name}." for name in ("a fox", "the sea", "a clock", "two trains")]
)


@dataclass(frozen=True)
class Size:
    """How much is measured. `tokens` are those of one answer, `few_tokens` where it is slow;
    at most so many `splits` are tried."""

    rounds: int
    tokens: int
    few_tokens: int
    requests: int
    queues: int
    splits: int


FULL = Size(rounds=7, tokens=320, few_tokens=64, requests=30, queues=3, splits=3)
QUICK = Size(rounds=1, tokens=64, few_tokens=6, requests=30, queues=1, splits=3)
SMOKE = Size(rounds=1, tokens=8, few_tokens=2, requests=6, queues=1, splits=1)


class FixedThreads(ThreadAllocator):
    """Instead of a allocator: each model computes with the same number of threads all the time."""

    def __init__(self, threads: int) -> None:
        super().__init__(usable_cores())
        self._threads = threads

    def join(self, member: Member) -> None:
        member.use_threads(self._threads)

    def leave(self, member: Member) -> None:
        pass


def answer(engine: OrionInferenceEngine, agent: str, tokens: int) -> tuple[int, float]:
    """Tokens of one answer that is as long as it may be, and when it ended."""
    result = engine.infer(
        next(QUESTIONS), agent=agent, max_tokens=tokens, temperature=0.0, logit_bias={2: -100.0}
    )
    return result.usage.completion_tokens, time.perf_counter()


def speed_of(asks: list[Callable[[], tuple[int, float]]]) -> float:
    """Tokens per second of answers that begin together and are as long as each other: the sum of
    what each had."""
    with ThreadPoolExecutor(len(asks)) as pool:
        barrier = threading.Barrier(len(asks) + 1)

        def begin(ask: Callable[[], tuple[int, float]]) -> tuple[int, float]:
            barrier.wait()
            return ask()

        running = [pool.submit(begin, ask) for ask in asks]
        barrier.wait()
        started = time.perf_counter()
        ended = [future.result() for future in running]
    return sum(tokens / (at - started) for tokens, at in ended)


@contextmanager
def engine_of(
    registry: ModelRegistry, agents: list[str], allocator: ThreadAllocator | None = None
) -> Iterator[OrionInferenceEngine]:
    """An engine with the models of these agents loaded and warm."""
    backend = None
    if allocator is not None:
        backend = LlamaBackend(LoaderSettings(is_adaptive=False))
        backend._threads = allocator
    config = EngineConfig(
        serving=ServingConfig(context_length=CONTEXT, slots=1),
        loading=LoadingConfig(predictive=False, keep_spare_worker=False),
    )
    with OrionInferenceEngine(registry, config, backend=backend) as engine:
        for agent in agents:
            answer(engine, agent, 8)
        yield engine


def two_of(engine: OrionInferenceEngine, tokens: int) -> float:
    """Speed of both models of an engine at once."""
    return speed_of([lambda a=a: answer(engine, a, tokens) for a in "ab"])


def measure_peers(registry: ModelRegistry, file: Path, size: Size) -> list[Row]:
    """Two models that answer at once, against two processes that use all cores each."""
    cores = usable_cores()
    settings = {"slots": 1, "context": CONTEXT, "threads": cores}
    peers = [Peer("llama", file, **settings) for _ in range(2)]

    def of(peer: Peer) -> Callable[[], tuple[int, float]]:
        conversation = [{"role": "user", "content": next(QUESTIONS)}]

        def ask() -> tuple[int, float]:
            ended = peer.run([conversation], size.few_tokens, is_streamed=False)
            return ended["tokens"], time.perf_counter()

        return ask

    ours, theirs = [], []
    try:
        with engine_of(registry, ["a", "b"]) as engine:
            for turn in range(size.rounds):
                steps = [
                    lambda: ours.append(two_of(engine, size.tokens)),
                    lambda: theirs.append(speed_of([of(peer) for peer in peers])),
                ]
                for step in in_turn(steps, turn):
                    step()
    finally:
        for peer in peers:
            peer.close()
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return [
        row("2 models at once, engine", ours, "tokens/s"),
        row(f"2 models at once, 2 Llama with {cores} threads each", theirs, "tokens/s"),
        row("2 models at once, engine / 2 Llama", ratios, "ratio", bar=2),
    ]


def measure_splits(registry: ModelRegistry, size: Size) -> list[Row]:
    """The same against the best of all fixed numbers of threads for each."""
    rows = []
    medians = {}
    for threads in sorted({1, max(1, usable_cores() // 2), usable_cores()})[: size.splits]:
        with engine_of(registry, ["a", "b"], FixedThreads(threads)) as fixed:
            speeds = [two_of(fixed, size.few_tokens) for _ in range(min(3, size.rounds))]
        rows.append(row(f"2 models, {threads} threads each", speeds, "tokens/s"))
        medians[threads] = statistics.median(speeds)
    best = max(medians, key=lambda threads: medians[threads])
    ratios = []
    with (
        engine_of(registry, ["a", "b"], FixedThreads(best)) as fixed,
        engine_of(registry, ["a", "b"]) as engine,
    ):
        for turn in range(size.rounds):
            speeds_of = {}
            for which in in_turn([engine, fixed], turn):
                speeds_of[which] = two_of(which, size.tokens)
            ratios.append(speeds_of[engine] / speeds_of[fixed])
    label = f"2 models at once, engine / best fixed split ({best} each)"
    return [*rows, row(label, ratios, "ratio", bar=0.95)]


def measure_lone(registry: ModelRegistry, size: Size) -> list[Row]:
    """One model beside another that is loaded and idle, against alone."""
    beside, alone = [], []
    with engine_of(registry, ["a", "b"]) as both, engine_of(registry, ["a"]) as one:
        for turn in range(2 * size.rounds + 1):
            for engine, speeds in in_turn([(both, beside), (one, alone)], turn):
                speeds.append(speed_of([lambda e=engine: answer(e, "a", size.tokens // 2)]))
    ratios = [a / b for a, b in zip(beside, alone, strict=True)]
    return [
        row("1 model, alone", alone, "tokens/s"),
        row("1 model, beside a loaded idle one / alone", ratios, "ratio", bar=FAIR),
    ]


def in_turn(steps: list[T], turn: int) -> list[T]:
    """Whoever goes first changes."""
    return steps if turn % 2 else steps[::-1]


def measure_turns(folder: Path, tokenizer_from: Path, size: Size) -> list[Row]:
    """Requests for three models in turn, all waiting, with memory for one model."""
    files = {
        name: random_model(
            folder / f"{name}.gguf",
            layers=4,
            width=256,
            ffn=768,
            heads=4,
            kv_heads=2,
            tokenizer_from=tokenizer_from,
            seed=seed,
        )
        for seed, name in enumerate("abc")
    }
    registry = registry_of(files, folder)
    loads, waits = [], []
    for _ in range(size.queues):
        serving = ServingConfig(context_length=CONTEXT, slots=4)
        sizing = EngineConfig(serving=serving)
        with OrionInferenceEngine(registry, sizing) as engine:
            needed = [engine.plan("Hello", agent=name).model for name in files]
        largest = max(model.needed_bytes or 0 for model in needed if model is not None)
        config = EngineConfig(
            serving=serving,
            memory=MemoryConfig(budget=int(1.5 * largest)),
            loading=LoadingConfig(predictive=False, keep_spare_worker=False),
        )
        with OrionInferenceEngine(registry, config) as engine:
            handles = [
                engine.submit("Say something.", agent=name, max_tokens=8)
                for name, _ in zip(itertools.cycle("abc"), range(size.requests), strict=False)
            ]
            results = [handle.result() for handle in handles]
            events = [event for event in engine.export_logs() if event["event"] == "model.loaded"]
        loads.append(float(len(events)))
        waits.append(max(result.timings.queue_ms for result in results) / 1e3)
    label = f"{size.requests} requests for 3 models in turn, memory for 1"
    return [
        row(f"{label}, loads", loads, "loads", bar=6, higher_is_better=False),
        row(f"{label}, longest wait", waits, "s", higher_is_better=False),
    ]


def main() -> int:
    given = options(__doc__ or "")
    size = extent_of(given, full=FULL, quick=QUICK, smoke=SMOKE)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="orion-multimodel-") as name:
        folder = Path(name)
        file = model_file(folder, is_smoke=given.smoke)
        registry = registry_of({"a": file, "b": file}, folder)
        for measure in (
            lambda: measure_peers(registry, file, size),
            lambda: measure_splits(registry, size),
            lambda: measure_lone(registry, size),
            lambda: measure_turns(folder, file, size),
        ):
            found = measure()
            show(found)
            rows += found
    return finish(rows, given.json)


if __name__ == "__main__":
    sys.exit(main())
