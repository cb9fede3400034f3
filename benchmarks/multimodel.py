"""Several models on one machine: who gets the cores, and how often models are loaded.

Two models answer at the same time, against two processes of `llama_cpp.Llama` that use all cores
each, and against every fixed split of the threads; one model answers while another is loaded and
idle; requests for three models wait under a memory budget for one.

Needs the smollm2 extra.
"""

import itertools
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from _peers import Peer
from _random_model import random_model, registry_of, smollm2_path
from _report import Row, finish, options, row, show

from orion_oie import EngineConfig, ModelRegistry, OrionInferenceEngine
from orion_oie.backends.llama.governor import Member, ThreadGovernor
from orion_oie.backends.llama.loader import LlamaBackend
from orion_oie.hardware import usable_cores

CONTEXT = 2048
FAIR = 0.97
QUESTIONS = itertools.cycle(
    [f"Write a long story about {name}." for name in ("a fox", "the sea", "a clock", "two trains")]
)


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rounds: int
    tokens: int
    requests: int


FULL = Size(rounds=7, tokens=192, requests=30)
QUICK = Size(rounds=3, tokens=64, requests=30)


class FixedThreads(ThreadGovernor):
    """Instead of a governor: each model computes with the same number of threads all the time."""

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
    registry: ModelRegistry, agents: list[str], governor: ThreadGovernor | None = None
) -> Iterator[OrionInferenceEngine]:
    """An engine with the models of these agents loaded and warm."""
    backend = None
    if governor is not None:
        backend = LlamaBackend()
        backend._governor = governor
    config = EngineConfig(context_length=CONTEXT, slots=1, enable_predictive_loading=False)
    with OrionInferenceEngine(registry, config, backend=backend) as engine:
        for agent in agents:
            answer(engine, agent, 8)
        yield engine


def measure_two(folder: Path, size: Size) -> list[Row]:
    """Two models that answer at once, and one beside an idle one."""
    file = smollm2_path()
    registry = registry_of({"a": file, "b": file}, folder)
    cores = usable_cores()
    splits = sorted({1, max(1, cores // 2), cores})
    speeds: dict[str, list[float]] = {}

    def note(name: str, speed: float) -> None:
        speeds.setdefault(name, []).append(speed)

    peers = [Peer("llama", file, slots=1, context=CONTEXT, threads=cores) for _ in range(2)]
    try:
        with (
            engine_of(registry, ["a", "b"]) as engine,
            engine_of(registry, ["a"]) as alone,
        ):

            def of_peer(peer: Peer) -> Callable[[], tuple[int, float]]:
                conversation = [{"role": "user", "content": next(QUESTIONS)}]

                def ask() -> tuple[int, float]:
                    ended = peer.run([conversation], size.tokens, is_streamed=False)
                    return ended["tokens"], time.perf_counter()

                return ask

            def of(which: OrionInferenceEngine, agent: str) -> Callable[[], tuple[int, float]]:
                return lambda: answer(which, agent, size.tokens)

            for turn in range(size.rounds):
                steps: list[Callable[[], None]] = [
                    lambda: note("engine", speed_of([of(engine, "a"), of(engine, "b")])),
                    lambda: note("llama", speed_of([of_peer(peer) for peer in peers])),
                    lambda: note("beside", speed_of([of(engine, "a")])),
                    lambda: note("alone", speed_of([of(alone, "a")])),
                ]
                for step in steps if turn % 2 else reversed(steps):
                    step()
    finally:
        for peer in peers:
            peer.close()
    for threads in splits:
        with (
            engine_of(registry, ["a", "b"], FixedThreads(threads)) as fixed,
            engine_of(registry, ["a", "b"]) as engine,
        ):
            for turn in range(size.rounds):
                pair = [(f"fixed {threads}", fixed), (f"governed {threads}", engine)]
                for name, which in pair if turn % 2 else reversed(pair):
                    asks = [lambda a=a, w=which: answer(w, a, size.tokens) for a in "ab"]
                    note(name, speed_of(asks))

    def ratio(one: str, other: str) -> list[float]:
        return [a / b for a, b in zip(speeds[one], speeds[other], strict=True)]

    rows = [row("2 models at once, engine", speeds["engine"], "tokens/s")]
    rows.append(row(f"2 models at once, 2 Llama with {cores} threads", speeds["llama"], "tokens/s"))
    rows.append(row("2 models at once, engine / 2 Llama", ratio("engine", "llama"), "ratio", bar=2))
    medians = {}
    for threads in splits:
        rows.append(
            row(f"2 models, {threads} threads each", speeds[f"fixed {threads}"], "tokens/s")
        )
        medians[threads] = sorted(speeds[f"fixed {threads}"])[size.rounds // 2]
    best = max(medians, key=lambda threads: medians[threads])
    label = f"2 models at once, engine / best fixed split ({best} each)"
    rows.append(row(label, ratio(f"governed {best}", f"fixed {best}"), "ratio", bar=0.95))
    rows.append(row("1 model, alone", speeds["alone"], "tokens/s"))
    label = "1 model, beside a loaded idle one / alone"
    rows.append(row(label, ratio("beside", "alone"), "ratio", bar=FAIR))
    return rows


def measure_turns(folder: Path, size: Size) -> list[Row]:
    """Requests for three models in turn, all waiting, with memory for one model."""
    files = {
        name: random_model(
            folder / f"{name}.gguf",
            layers=4,
            width=256,
            ffn=768,
            heads=4,
            kv_heads=2,
            tokenizer_from=smollm2_path(),
            seed=seed,
        )
        for seed, name in enumerate("abc")
    }
    registry = registry_of(files, folder)
    loads, waits = [], []
    for _ in range(3):
        sizing = EngineConfig(context_length=CONTEXT, slots=4)
        with OrionInferenceEngine(registry, sizing) as engine:
            needed = [engine.plan("Hello", agent=name).model for name in files]
        largest = max(model.needed_bytes or 0 for model in needed if model is not None)
        config = EngineConfig(
            context_length=CONTEXT,
            slots=4,
            memory_budget=int(1.5 * largest),
            keep_warm=False,
            enable_predictive_loading=False,
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
    size = QUICK if given.quick else FULL
    with tempfile.TemporaryDirectory(prefix="orion-multimodel-") as name:
        folder = Path(name)
        rows = []
        for measure in (measure_two, measure_turns):
            found = measure(folder, size)
            show(found)
            rows += found
    return finish(rows, given.json)


if __name__ == "__main__":
    sys.exit(main())
