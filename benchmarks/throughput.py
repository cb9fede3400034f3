"""Many requests at once: the engine against `llama_cpp.Llama` behind a lock, llama.cpp's own server
loop (the xllamacpp wheel) and llama_decode in a loop, in one run, in turn, on the same file and
threads.

Needs the smollm2 and bench extras.
"""

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from _peers import Conversation, OnFirst, Peer, private_bytes, run_all
from _report import Row, extent_of, finish, options, row, show
from _subject import AGENT, agent_and_file

from orion_oie import EngineConfig, ModelRegistry, OrionInferenceEngine, ServingConfig
from orion_oie.hardware.machine import usable_cores

CONTEXT = 8192
BARE = {16: 0.95, 32: 0.95}  # the bars against llama_decode in a loop
LADDER = {1: 1.4, 4: 2.0, 8: 2.8, 16: 3.5, 32: 3.5}  # the bars against Llama
END_TOKEN = 2
FORMS = [
    "Why do people care about {}?",
    "Tell me three facts about {}.",
    "How would you explain {} to a child?",
    "What is the history of {}?",
    "What do most people get wrong about {}?",
    "Describe {} in a few sentences.",
    "What should a beginner know about {}?",
    "Which question about {} is still open?",
]
TOPICS = """lighthouses, bread, the tides, clocks, beekeeping, glass, rivers, maps, volcanoes,
paper, bridges, salt, the moon, violins, forests, trains, coffee, deserts, printing, whales,
snow, chess, gardens, ceramics, libraries, markets, windmills, comets, wool, harbours""".replace(
    "\n", " "
).split(", ")
QUESTIONS = itertools.cycle(form.format(topic) for form in FORMS for topic in TOPICS)


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rounds: int
    levels: tuple[int, ...]
    least_requests: int
    agents: int
    per_agent: int
    conversation_tokens: int
    others: tuple[int, ...]
    tokens: int = 64  # of an answer
    slots: int = 16
    steps: int = 40  # of all slots
    before: int = 60  # tokens of a stream before the long prompt comes


FULL = Size(
    rounds=5,
    levels=tuple(LADDER),
    least_requests=6,
    agents=4,
    per_agent=4,
    conversation_tokens=1500,
    others=(0, 3),
)
QUICK = Size(
    rounds=1,
    levels=(1, 4),
    least_requests=2,
    agents=1,
    per_agent=4,
    conversation_tokens=400,
    others=(0,),
)
SMOKE = Size(
    rounds=1,
    levels=(1, 4),
    least_requests=1,
    agents=1,
    per_agent=2,
    conversation_tokens=64,
    others=(0,),
    tokens=4,
    slots=4,
    steps=2,
    before=8,
)

Run = Callable[..., dict[str, Any]]


def text_of(tokens: int) -> str:
    """A text of about so many tokens that no other text begins like."""
    parts = [next(QUESTIONS)]
    while sum(map(len, parts)) < 4.6 * tokens:
        parts.append(next(QUESTIONS))
    return " ".join(parts)


def user(question: str) -> Conversation:
    return [{"role": "user", "content": question}]


def asker(engine: OrionInferenceEngine) -> Callable[[Conversation, int, OnFirst], int]:
    """Asks the engine what the peers are asked, with the same settings."""

    def ask(conversation: Conversation, max_tokens: int, on_first: OnFirst) -> int:
        *head, last = conversation
        settings = {
            "agent": AGENT,
            "system_prompt": head.pop(0)["content"] if head else "",
            "conversation_history": head,
            "temperature": 0.0,
            "repeat_penalty": 1.0,
            "max_tokens": max_tokens,
        }
        if on_first is None:
            return engine.infer(last["content"], **settings).usage.completion_tokens
        handle = engine.stream(last["content"], **settings)
        for index, _ in enumerate(handle):
            if index == 0:
                on_first()
        return handle.result().usage.completion_tokens

    return ask


@contextmanager
def systems(
    registry: ModelRegistry, file: Path, slots: int, kinds: tuple[str, ...]
) -> Iterator[tuple[dict[str, Run], Any, Any]]:
    """The engine and the peers, loaded and warm: how to run them, the engine, the peers."""
    threads = usable_cores()
    peers = {
        kind: Peer(kind, file, slots=slots, context=CONTEXT, threads=threads) for kind in kinds
    }
    serving = ServingConfig(threads=threads, context_length=CONTEXT, slots=slots)
    config = EngineConfig(serving=serving, stand_in="allow")
    try:
        with OrionInferenceEngine(registry, config) as engine:
            ask = asker(engine)
            runs: dict[str, Run] = {"engine": lambda *a, **k: run_all(ask, *a, **k)}
            runs |= {kind: peer.run for kind, peer in peers.items()}
            for run in runs.values():
                run([user("Are you there?")], 8, is_streamed=True)
            yield runs, engine, peers
    finally:
        for peer in peers.values():
            peer.close()


def in_turn(runs: dict[str, Run], turn: int) -> list[str]:
    """Whoever goes first changes."""
    return list(runs) if turn % 2 else list(runs)[::-1]


def measure_ladder(registry: ModelRegistry, file: Path, size: Size) -> list[Row]:
    """Tokens per second at several numbers of requests at once."""
    rows = []
    kinds = ("llama", "xllamacpp", "bare")
    with systems(registry, file, max(LADDER), kinds) as (runs, _engine, _peers):
        speeds: dict[tuple[str, int], list[float]] = {}
        for turn, level in itertools.product(range(size.rounds), size.levels):
            # A single request is short: several of them, one after the other.
            times = -(-size.least_requests // level)
            batches = [[user(next(QUESTIONS)) for _ in range(level)] for _ in range(times)]
            for name in in_turn(runs, turn):
                ended = [runs[name](batch, size.tokens, is_streamed=False) for batch in batches]
                speed = sum(e["tokens"] for e in ended) / sum(e["seconds"] for e in ended)
                speeds.setdefault((name, level), []).append(speed)
        for level in size.levels:
            ours = speeds["engine", level]
            rows.append(row(f"{level} at once, engine", ours, "tokens/s"))
            for name, bar in (
                ("llama", LADDER[level]),
                ("xllamacpp", 1.0),
                ("bare", BARE.get(level)),
            ):
                theirs = speeds[name, level]
                ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
                rows.append(row(f"{level} at once, {name}", theirs, "tokens/s"))
                rows.append(row(f"{level} at once, engine / {name}", ratios, "ratio", bar=bar))
    return rows


def measure_agents(runs: dict[str, Run], size: Size) -> list[Row]:
    """Requests to agents with 400-token system prompts that nobody has seen before."""
    totals: dict[str, list[float]] = {name: [] for name in runs}
    firsts: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(size.rounds):
        prompts = [f"You are assistant {n}. Remember: {text_of(385)}" for n in range(size.agents)]
        work = [
            [{"role": "system", "content": prompt}, *user(next(QUESTIONS))]
            for prompt in prompts
            for _ in range(size.per_agent)
        ]
        for name in in_turn(runs, turn):
            ended = runs[name](work, size.tokens, is_streamed=True)
            totals[name].append(ended["seconds"])
            firsts[name].append(statistics.quantiles(ended["firsts"], n=20)[-1])
    what = f"{size.agents * size.per_agent} requests to {size.agents} agents"
    rows = []
    for name, values, bar in (("total", totals, 0.6), ("first token p95", firsts, 0.5)):
        rows += [
            row(f"{what}, {name}, {k}", v, "s", higher_is_better=False) for k, v in values.items()
        ]
        ratios = [a / b for a, b in zip(values["engine"], values["xllamacpp"], strict=True)]
        label = f"{what}, {name}, engine / xllamacpp"
        rows.append(row(label, ratios, "ratio", bar=bar, higher_is_better=False))
    return rows


def first_token_s(
    engine: OrionInferenceEngine, question: str, **settings: Any
) -> tuple[float, Any]:
    """Seconds to the first token, and the result."""
    result = engine.infer(
        question, agent=AGENT, system_prompt="", temperature=0.0, max_tokens=16, **settings
    )
    assert result.timings.ttft_ms is not None
    return result.timings.ttft_ms / 1e3, result


def measure_conversations(engine: OrionInferenceEngine, size: Size) -> list[Row]:
    """The second turn of a long conversation, at once and with three others in between."""
    ratios: dict[int, list[float]] = {others: [] for others in size.others}
    wholes, seconds = [], []
    for others, _ in itertools.product(ratios, range(size.rounds)):
        name = f"session {len(wholes)}"
        text = text_of(size.conversation_tokens)
        whole_s, answer = first_token_s(engine, text, session_id=name)
        for other in range(others):
            first_token_s(engine, text_of(size.conversation_tokens), session_id=f"{name}-{other}")
        history = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": answer.content},
        ]
        second_s, _ = first_token_s(
            engine, next(QUESTIONS), session_id=name, conversation_history=history
        )
        wholes.append(whole_s)
        seconds.append(second_s)
        ratios[others].append(second_s / whole_s)
    tokens = size.conversation_tokens
    rows = [
        row(f"{tokens}-token prompt, first token", wholes, "s", higher_is_better=False),
        row("second turn, first token", seconds, "s", higher_is_better=False),
    ]
    for others, values in ratios.items():
        label = f"second turn / whole prompt, {others} others in between"
        rows.append(row(label, values, "ratio", bar=0.1, higher_is_better=False))
    return rows


def measure_gaps(engine: OrionInferenceEngine, size: Size) -> list[Row]:
    """What a stream notices of a long prompt that is read beside it."""
    p95, worst = [], []
    for _ in range(size.rounds):
        times: list[float] = []
        bounds: list[float] = []
        handle = engine.stream(
            next(QUESTIONS), agent=AGENT, temperature=0.0, max_tokens=1500,
            logit_bias={END_TOKEN: -100.0},
        )  # fmt: skip
        other: Any = None
        for _event in handle:
            times.append(time.perf_counter())
            if len(times) == size.before:
                bounds.append(time.perf_counter())
                other = engine.submit(text_of(size.conversation_tokens), agent=AGENT, max_tokens=1)
            if other is not None and other.done():
                bounds.append(time.perf_counter())
                break
        handle.cancel()
        gaps = [(b - a, b) for a, b in itertools.pairwise(times)]
        usual = statistics.median(gap for gap, at in gaps if at < bounds[0])
        during = sorted(gap / usual for gap, at in gaps if bounds[0] <= at <= bounds[-1])
        p95.append(during[int(len(during) * 0.95)])
        worst.append(during[-1])
    what = f"gap of a stream while {size.conversation_tokens} tokens are read / usual gap"
    return [
        row(f"{what}, p95", p95, "ratio", bar=3.0, higher_is_better=False),
        row(f"{what}, longest", worst, "ratio", higher_is_better=False),
    ]


def measure_memory(engine: OrionInferenceEngine, peers: dict[str, Peer], slots: int) -> list[Row]:
    """Private memory of both after as many short answers as slots."""
    (model,) = engine.stats().models.values()
    assert model.pid is not None
    ours = private_bytes(model.pid) / 2**20
    theirs = peers["xllamacpp"].memory_bytes() / 2**20
    return [
        row(f"private memory of the worker, {slots} slots", [ours], "MiB", higher_is_better=False),
        row(f"private memory of xllamacpp, {slots} slots", [theirs], "MiB", higher_is_better=False),
        row("private memory, engine / xllamacpp", [ours / theirs], "ratio", bar=1.15,
            higher_is_better=False),
    ]  # fmt: skip


def measure_python(file: Path, size: Size) -> list[Row]:
    """The part of a step of all slots that is spent outside llama_decode."""
    from orion_oie.backends.base import GenerationJob
    from orion_oie.backends.llama.protocol import GenerateCommand, send_report
    from orion_oie.backends.llama.worker import native
    from orion_oie.backends.llama.worker.batcher import Batcher
    from orion_oie.backends.llama.worker.prepare import (
        prepared,
        prompt_form,
    )
    from orion_oie.schemas.requests import GenerationOptions, Message

    ours, theirs = Pipe()
    native.capture_logs(lambda _level, _line: None)
    model = native.NativeModel(
        [file], slots=size.slots, context_length=CONTEXT, threads=usable_cores(),
        abort=native.AbortFlag(), on_progress=lambda _fraction: None,
    )  # fmt: skip
    form = prompt_form(model, None)
    spent = {"native": 0.0}
    decode = model.decode

    def timed(rows: Any) -> int:
        started = time.perf_counter()
        code = decode(rows)
        spent["native"] += time.perf_counter() - started
        return code

    model.decode = timed  # type: ignore[method-assign]
    shares = []
    for _ in range(size.rounds):
        batcher = Batcher(model)
        options = GenerationOptions(temperature=0.0, max_tokens=64)
        for index in range(size.slots):
            messages = tuple(Message.model_validate(each) for each in user(next(QUESTIONS)))
            command = GenerateCommand(index, GenerationJob(messages, options))
            batcher.add(prepared(command, model, form))
        while any(run.pending != 1 for run in batcher._running) or not batcher._running:
            batcher.step()  # until all of them are running
        spent["native"] = 0.0
        started = time.perf_counter()
        for _ in range(size.steps):
            send_report(ours, batcher.step().report())
            theirs.recv_bytes()
        total = time.perf_counter() - started
        shares.append(1 - spent["native"] / total)
    return [
        row(f"part of a {size.slots}-slot step outside llama_decode", shares, "ratio", bar=0.1,
            higher_is_better=False)
    ]  # fmt: skip


def main() -> int:
    arguments = options("Many requests at once, against two peers")
    size = extent_of(arguments, full=FULL, quick=QUICK, smoke=SMOKE)
    rows: list[Row] = []

    def note(measured: list[Row]) -> None:
        show(measured)
        rows.extend(measured)

    with tempfile.TemporaryDirectory(prefix="orion-throughput-") as name:
        registry, file = agent_and_file(Path(name), is_smoke=arguments.smoke)
        measure_all(registry, file, size, note)
    return finish(rows, arguments.json)


def measure_all(
    registry: ModelRegistry, file: Path, size: Size, note: Callable[[list[Row]], None]
) -> None:
    note(measure_ladder(registry, file, size))
    with systems(registry, file, size.slots, ("xllamacpp",)) as (runs, engine, peers):
        for run in runs.values():
            run([user(next(QUESTIONS)) for _ in range(size.slots)], 16, is_streamed=True)
        note(measure_memory(engine, peers, size.slots))
        note(measure_agents(runs, size))
        note(measure_conversations(engine, size))
        note(measure_gaps(engine, size))
    note(measure_python(file, size))


if __name__ == "__main__":
    sys.exit(main())
