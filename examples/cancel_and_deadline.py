"""Stopping: by the caller, by a deadline, and by leaving a `with` block."""

import time

from orion_oie import (
    DeadlineExceededError,
    OrionInferenceEngine,
    RequestCancelledError,
)

LONG = "Tell me a very long story about a dragon."


def main() -> None:
    with OrionInferenceEngine(model="smollm2-135m-instruct") as engine:
        engine.preload("creative")

        handle = engine.submit(LONG, max_tokens=2000)
        for event in handle:
            if event.index == 10:
                asked = time.perf_counter()
                handle.cancel()
                break
        try:
            handle.result()
        except RequestCancelledError as error:
            print(f"{error} ({(time.perf_counter() - asked) * 1e3:.0f} ms after asking)")

        try:
            engine.infer(LONG, max_tokens=2000, deadline=0.5)
        except DeadlineExceededError as error:
            print(error)

        with engine.stream(LONG, max_tokens=2000) as handle:
            first = next(iter(handle)).text
        print(f"read {first!r}, left the block: {handle!r}")

        print("and the engine still answers:", engine.infer("Say hi.", max_tokens=12).content)


if __name__ == "__main__":
    main()
