"""How soon a cancel takes effect, in every phase of a request: from `cancel()` to its error.

Needs the smollm2 extra.
"""

import sys
import time
from collections.abc import Callable

from _report import Row, extent_of, options, report, row

from orion_oie import OrionInferenceEngine, RequestCancelledError, RequestHandle, RequestState

BAR_MS = 100
BOUND_S = 20
LONG_PROMPT = "word " * 2500
STORY = "Tell me a very long story about a dragon and a castle."


def until(condition: Callable[[], bool]) -> None:
    ends_at = time.monotonic() + BOUND_S
    while not condition():
        if time.monotonic() > ends_at:
            raise SystemExit("the awaited phase did not come")
        time.sleep(0.002)


def cancel_ms(handle: RequestHandle) -> float:
    """Milliseconds until the handle raises."""
    started = time.perf_counter()
    handle.cancel()
    try:
        handle.result(BOUND_S)
    except RequestCancelledError:
        return (time.perf_counter() - started) * 1e3
    raise SystemExit("the request ended before it was cancelled")


def in_prefill(engine: OrionInferenceEngine) -> float:
    handle = engine.submit(LONG_PROMPT, max_tokens=4)
    until(lambda: handle.state is RequestState.INFERENCING)
    time.sleep(0.3)  # in the middle of a prompt that takes seconds to read
    return cancel_ms(handle)


def in_decode(engine: OrionInferenceEngine) -> float:
    handle = engine.submit(STORY, max_tokens=2000)
    until(lambda: handle.stats.tokens > 5)
    return cancel_ms(handle)


def in_queue(engine: OrionInferenceEngine) -> float:
    busy = [
        engine.submit(STORY, max_tokens=2000) for _ in range(2 * engine.config.serving.slot_count)
    ]
    waiting = engine.submit(STORY)
    until(lambda: waiting.queue_position is not None)
    took = cancel_ms(waiting)
    for handle in busy:
        cancel_ms(handle)
    return took


def in_load() -> float:
    with OrionInferenceEngine(model="smollm2-135m-instruct") as engine:
        handle = engine.submit("Hello?")
        until(lambda: bool(engine.stats().models))
        return cancel_ms(handle)


def measure(times: int) -> list[Row]:
    phases: dict[str, list[float]] = {"load": [in_load() for _ in range(times)]}
    with OrionInferenceEngine(model="smollm2-135m-instruct") as engine:
        engine.preload("creative")
        for name, phase in (("queue", in_queue), ("prefill", in_prefill), ("decode", in_decode)):
            phases[name] = [phase(engine) for _ in range(times)]
    return [
        row(f"cancel during {name}", values, "ms", bar=BAR_MS, higher_is_better=False)
        for name, values in phases.items()
    ]


def main() -> int:
    arguments = options("How soon a cancel takes effect")
    times = extent_of(arguments, full=20, quick=5, smoke=1)
    return report(measure(times), arguments.json)


if __name__ == "__main__":
    sys.exit(main())
