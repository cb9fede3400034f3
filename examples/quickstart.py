"""Five questions, five agents, one small model: answers as they are written, with receipts.

Runs offline with the smollm2 extra. SmolLM2-135M is tiny: expect fluent, not always right.
"""

import sys

from orion_oie import InferenceResult, OrionInferenceEngine
from orion_oie.telemetry.events import ModelLoaded

BOLD, DIM, PLAIN = ("\033[1m", "\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "", "")

QUESTIONS = [
    "Hi! Who was Marie Curie?",
    "Write a Python function that adds two numbers.",
    "Write a short poem about the sea at night.",
    "If a train travels 60 km in 1.5 hours, what is its average speed?",
    "Traduis en français : good morning, my friends.",
]


def main() -> None:
    loads: list[str] = []
    with OrionInferenceEngine(model="smollm2-135m-instruct") as engine:
        engine.subscribe(
            lambda event: loads.append(event.key) if isinstance(event, ModelLoaded) else None
        )
        for question in QUESTIONS:
            print(f"\n{BOLD}> {question}{PLAIN}")
            with engine.stream(question, max_tokens=80, seed=1) as handle:
                for event in handle:
                    print(event.text, end="", flush=True)
            print_receipt(handle.result())
        agents = engine.stats().requests.by_agent
    print(
        f"\n{sum(agents.values())} answers from {len(agents)} agents ({', '.join(agents)}); "
        f"models loaded: {len(loads)} ({', '.join(loads)})"
    )


def print_receipt(result: InferenceResult) -> None:
    receipt, timings = result.receipt, result.timings
    assert receipt.route is not None
    assert receipt.model is not None
    skipped = [c.model_id for c in receipt.considered if c.outcome == "unavailable"]
    lines = [
        f"agent   {result.agent_id} ({result.confidence:.2f}): {receipt.route.reason}",
        f"model   {result.model_id} {result.model_version} {result.variant} on "
        f"{receipt.model.device}, {receipt.model.threads} threads"
        + (f"; not on this machine: {', '.join(skipped)}" if skipped else ""),
        f"tokens  {result.usage.prompt_tokens} in ({result.usage.cached_tokens} cached), "
        f"{result.usage.completion_tokens} out, ended by {result.finish_reason}, "
        f"seed {receipt.seed}",
        f"time    {timings.load_ms:.0f} ms load, {timings.ttft_ms or 0:.0f} ms to the first "
        f"token, {timings.tokens_per_second or 0:.0f} tokens/s, {timings.total_ms:.0f} ms in all",
    ]
    print("\n" + "\n".join(f"{DIM}  {line}{PLAIN}" for line in lines))


if __name__ == "__main__":
    main()
