"""Ways to take a stream: by word, by sentence, with a callback, like a typewriter."""

from orion_oie import OrionInferenceEngine, TokenEvent


def main() -> None:
    with OrionInferenceEngine(model="smollm2-135m-instruct") as engine:
        print("-- by sentence, each on its own line")
        for event in engine.stream(
            "Explain what rain is.", agent="conversation", max_tokens=60, chunk_by="sentence"
        ):
            print(f"[{event.elapsed_ms:6.0f} ms] {event.text.strip()}")

        print("\n-- by word, like a typewriter (20 ms a word)")
        handle = engine.stream(
            "Tell me about the moon.",
            agent="conversation",
            max_tokens=40,
            chunk_by="word",
            typewriter_delay=0.02,
        )
        for event in handle:
            print(event.text, end="", flush=True)

        print("\n\n-- with a callback, while this thread waits for the result")
        seen: list[TokenEvent] = []
        handle = engine.stream("Name two colours.", max_tokens=24, on_event=seen.append)
        result = handle.result()
        stats = handle.stats
        print(result.content)
        print(
            f"{stats.tokens} tokens, first after {stats.ttft_ms:.0f} ms, "
            f"{stats.tokens_per_second or 0:.0f} tokens/s"
        )


if __name__ == "__main__":
    main()
