"""What the engine costs over bare `llama_cpp.Llama`: the same file, prompts and threads.

Both answer the same questions in turn, in one run, greedily, with the same system prompt. Both
keep what they computed of the last prompts. Needs the smollm2 extra.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from _report import Row, options, report, row
from llama_cpp import Llama

from orion_oie import EngineConfig, ModelRegistry, OrionInferenceEngine, ServingConfig
from orion_oie.hardware.machine import usable_cores

AGENT = "conversation"
MODEL = "smollm2-135m-instruct"
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


def import_times(runs: int) -> tuple[list[float], list[str]]:
    """Milliseconds of `import orion_oie` in fresh interpreters, and heavy modules it brought."""
    script = (
        "import sys, time; t = time.perf_counter(); import orion_oie; "
        "print((time.perf_counter() - t) * 1e3, "
        f"*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    times, heavy = [], []
    for _ in range(runs):
        out = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout.split()
        times.append(float(out[0]))
        heavy += out[1:]
    return times, heavy


def measure(rounds: int) -> list[Row]:
    registry = ModelRegistry.packaged()
    choice = next(c for c in registry.resolve(AGENT) if c.model_id == MODEL)
    assert choice.files is not None
    threads = usable_cores()
    config = EngineConfig(serving=ServingConfig(threads=threads, context_length=CONTEXT))
    llama = Llama(
        str(choice.files[0]), n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads,
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
            for index, question in enumerate(QUESTIONS):
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
    arguments = options("Engine against bare llama_cpp.Llama")
    rows = measure(rounds=2 if arguments.quick else 7)
    times, heavy = import_times(5 if arguments.quick else 15)
    rows.append(row("import orion_oie", times, "ms", bar=150, higher_is_better=False))
    rows.append(
        row("heavy modules imported", [len(heavy)], "modules", bar=0, higher_is_better=False)
    )
    return report(rows, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
