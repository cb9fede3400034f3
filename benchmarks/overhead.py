"""What the engine costs: over bare `llama_cpp.Llama`, by itself, and to import.

The engine and Llama answer the same questions in turn, in one run, greedily, with the same file,
threads and system prompt. Both keep what they computed of the last prompts. Needs the smollm2
extra.

By itself: over a fake backend that answers at once. `--against REVISION` measures that revision of
the library in turn with this one, from a git worktree of its own.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from _report import Row, extent_of, options, report, row
from _subject import AGENT, agent_and_file
from llama_cpp import Llama

from orion_oie import EngineConfig, ModelRegistry, OrionInferenceEngine, ServingConfig
from orion_oie.hardware.machine import usable_cores

MAX_TOKENS = 64
CONTEXT = 4096
QUESTIONS = [
    "Why do leaves change their colour in autumn?",
    "What does a lighthouse keeper do all day?",
    "How is bread made from wheat?",
    "What is the difference between a lake and a pond?",
    "Why do cats purr when they are content?",
    "How did people tell the time before clocks?",
    "What makes a good neighbour?",
    "Why is the sea salty?",
]
HEAVY = ("llama_cpp", "torch", "sentence_transformers")
IMPORTS = (
    "import orion_oie",
    "from orion_oie import EngineConfig, OrionInferenceEngine",
    "import pydantic.main",
)
# By the figure of `_fake_load.py`: name, unit, whether more is better, bar of the ratio
FAKE_FIGURES = {
    "cpu_us": ("processor time of the engine per request", "us", False, 0.5),
    "submit_per_s": ("requests through submit", "1/s", True, 2.5),
    "ainfer_per_s": ("requests through ainfer", "1/s", True, 2.5),
}
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Size:
    """How much is measured: over a model, of imports, and over a fake backend."""

    rounds: int
    questions: int
    imports: int
    requests: int
    outstanding: int
    fake_rounds: int


FULL = Size(7, len(QUESTIONS), 15, 2000, 2000, 7)
QUICK = Size(2, len(QUESTIONS), 5, 500, 1000, 3)
SMOKE = Size(1, 1, 1, 20, 20, 1)


def ask_engine(engine: OrionInferenceEngine, question: str) -> tuple[float, int, float]:
    """Seconds to the first text, completion tokens, seconds in all."""
    started = time.perf_counter()
    first = 0.0
    handle = engine.stream(
        question, agent=AGENT, temperature=0.0, repeat_penalty=1.0, max_tokens=MAX_TOKENS
    )
    for _ in handle:
        first = first or time.perf_counter() - started
    total = time.perf_counter() - started
    return first, handle.result().usage.completion_tokens, total


def ask_llama(llama: Llama, system: str, question: str) -> tuple[float, int, float]:
    """The same through create_chat_completion."""
    started = time.perf_counter()
    first = 0.0
    tokens = 0
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    for chunk in llama.create_chat_completion(
        messages, temperature=0.0, repeat_penalty=1.0, max_tokens=MAX_TOKENS, stream=True
    ):
        if chunk["choices"][0]["delta"].get("content"):
            first = first or time.perf_counter() - started
            tokens += 1
    return first, tokens, time.perf_counter() - started


def import_rows(runs: int) -> list[Row]:
    """Times of imports in fresh interpreters, in turn, and the heavy modules that they brought."""
    times: dict[str, list[float]] = {statement: [] for statement in IMPORTS}
    heavy: list[str] = []
    for _ in range(runs):
        for statement in IMPORTS:
            script = (
                f"import sys, time; t = time.perf_counter(); {statement}; "
                "print((time.perf_counter() - t) * 1e3, "
                f"*[name for name in {HEAVY!r} if name in sys.modules])"
            )
            out = subprocess.run(
                [sys.executable, "-c", script], capture_output=True, text=True, check=True
            ).stdout.split()
            times[statement].append(float(out[0]))
            heavy += out[1:]
    plain, engine, peer = (times[statement] for statement in IMPORTS)
    against = [own / other for own, other in zip(plain, peer, strict=True)]
    engine_against = [own / other for own, other in zip(engine, peer, strict=True)]
    of_engine = "import of the engine and its configuration"
    return [
        row("import orion_oie", plain, "ms", bar=150, higher_is_better=False),
        row(of_engine, engine, "ms", higher_is_better=False),
        row("import orion_oie / pydantic.main", against, "ratio", bar=1.35, higher_is_better=False),
        row(f"{of_engine} / pydantic.main", engine_against, "ratio", higher_is_better=False),
        row("heavy modules imported", [len(heavy)], "modules", bar=0, higher_is_better=False),
    ]


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """The sources of another revision, in a folder of their own."""
    with tempfile.TemporaryDirectory(prefix="orion-worktree-") as folder:
        git = ["git", "-C", str(ROOT), "worktree"]
        command = [*git, "add", "--detach", "--force", folder, revision]
        subprocess.run(command, check=True, capture_output=True)
        try:
            yield Path(folder) / "src"
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True, capture_output=True)


def fake_load(sources: Path, requests: int, outstanding: int) -> dict[str, float]:
    """The figures of `_fake_load.py` with the library at `sources`."""
    script = Path(__file__).with_name("_fake_load.py")
    out = subprocess.run(
        [sys.executable, str(script), str(requests), str(outstanding)],
        env={**os.environ, "PYTHONPATH": str(sources)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    figures = json.loads(out)
    if not Path(figures.pop("of")).is_relative_to(sources):
        raise RuntimeError(f"another library was measured than the one at {sources}")
    return {name: float(value) for name, value in figures.items()}


def fake_rows(against: str | None, *, requests: int, outstanding: int, rounds: int) -> list[Row]:
    """The engine's own cost per request, and how many it passes through; with another revision,
    also how both compare."""
    own: list[dict[str, float]] = []
    other: list[dict[str, float]] = []
    with ExitStack() as stack:
        theirs = None if against is None else stack.enter_context(worktree(against))
        for turn in range(rounds):
            runs = [(own, ROOT / "src")] + ([] if theirs is None else [(other, theirs)])
            for figures, sources in runs if turn % 2 else runs[::-1]:
                figures.append(fake_load(sources, requests, outstanding))
    rows = [
        row(name, [one[key] for one in own], unit, higher_is_better=is_better)
        for key, (name, unit, is_better, _bar) in FAKE_FIGURES.items()
    ]
    for key, (name, _unit, is_better, bar) in FAKE_FIGURES.items() if other else ():
        ratios = [mine[key] / its[key] for mine, its in zip(own, other, strict=True)]
        label = f"{name}, this / {against}"
        rows.append(row(label, ratios, "ratio", bar=bar, higher_is_better=is_better))
    return rows


def measure(
    registry: ModelRegistry, file: Path, rounds: int, questions: Sequence[str]
) -> list[Row]:
    threads = usable_cores()
    serving = ServingConfig(threads=threads, context_length=CONTEXT)
    config = EngineConfig(serving=serving, stand_in="allow")
    llama = Llama(
        str(file), n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads,
        verbose=False,
    )  # fmt: skip
    system = registry.agent(AGENT).system_prompt
    results: dict[str, list[list[tuple[float, int, float]]]] = {"engine": [], "llama": []}
    with OrionInferenceEngine(registry, config) as engine:
        askers: dict[str, Callable[[str], tuple[float, int, float]]] = {
            "engine": lambda question: ask_engine(engine, question),
            "llama": lambda question: ask_llama(llama, system, question),
        }
        for ask in askers.values():
            ask("Are you there?")
        for turn in range(rounds):
            for name in results:
                results[name].append([])
            for index, question in enumerate(questions):
                # Whoever goes first changes, so that neither always meets the warmer machine.
                order = list(askers) if (turn + index) % 2 else list(askers)[::-1]
                for name in order:
                    results[name][-1].append(askers[name](question))
    return _rows(results)


def _rows(results: dict[str, list[list[tuple[float, int, float]]]]) -> list[Row]:
    ttft = {n: [statistics.median(a[0] * 1e3 for a in r) for r in rs] for n, rs in results.items()}
    speed = {
        n: [sum(a[1] for a in r) / sum(a[2] for a in r) for r in rs] for n, rs in results.items()
    }
    extra = [e - b for e, b in zip(ttft["engine"], ttft["llama"], strict=True)]
    ratio = [e / b for e, b in zip(speed["engine"], speed["llama"], strict=True)]
    return [
        row("time to first token, Llama", ttft["llama"], "ms", higher_is_better=False),
        row("time to first token, engine", ttft["engine"], "ms", higher_is_better=False),
        row("time to first token, engine - Llama", extra, "ms", bar=5, higher_is_better=False),
        row("end to end, Llama", speed["llama"], "tokens/s"),
        row("end to end, engine", speed["engine"], "tokens/s"),
        row("end to end, engine / Llama", ratio, "ratio", bar=1.0),
    ]


def main() -> int:
    arguments = options("Engine against bare llama_cpp.Llama", against=True)
    size = extent_of(arguments, full=FULL, quick=QUICK, smoke=SMOKE)
    with tempfile.TemporaryDirectory(prefix="orion-overhead-") as name:
        subject = agent_and_file(Path(name), is_smoke=arguments.smoke)
        rows = measure(*subject, size.rounds, QUESTIONS[: size.questions])
    rows += import_rows(size.imports)
    rows += fake_rows(
        arguments.against,
        requests=size.requests,
        outstanding=size.outstanding,
        rounds=size.fake_rounds,
    )
    return report(rows, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
