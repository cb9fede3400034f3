"""A conversation that remembers: asked, streamed, saved, loaded, taken back.

python chat.py               a short conversation by itself
python chat.py talk.json     talk yourself; the file keeps the conversation
"""

import contextlib
import sys
import tempfile
from pathlib import Path

from orion_oie import Chat, OrionError, OrionInferenceEngine


def main() -> None:
    with OrionInferenceEngine(model="smollm2-135m-instruct") as engine:
        if len(sys.argv) > 1:
            with contextlib.suppress(EOFError):  # Ctrl-D
                talk(engine, Path(sys.argv[1]))
        else:
            demonstrate(engine)


def demonstrate(engine: OrionInferenceEngine) -> None:
    chat = engine.chat("conversation", system_prompt="You are a friendly guide. Be brief.")
    first = "Hello, my name is Ada and I like volcanoes."
    print(f"> {first}\n{chat.ask(first, max_tokens=40, seed=1).content}")

    print("\n> What do I like?")
    with chat.stream("What do I like?", max_tokens=40, seed=1) as handle:
        for event in handle:
            print(event.text, end="", flush=True)
    usage = handle.result().usage
    print(f"\n({usage.cached_tokens} of {usage.prompt_tokens} tokens were not computed again)")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chat.json"
        chat.save(path)
        later = Chat.load(path, engine)
    question, answer = later.undo()
    print(
        f"\nloaded {later!r} after taking back {question.content!r} ({len(answer.content)} chars)"
    )


def talk(engine: OrionInferenceEngine, path: Path) -> None:
    chat = Chat.load(path, engine) if path.exists() else engine.chat()
    print(f"{chat!r}; an empty line ends it, Ctrl-C stops an answer")
    while question := input("> ").strip():
        try:
            with chat.stream(question) as handle:
                for event in handle:
                    print(event.text, end="", flush=True)
            chat.save(path)
        except KeyboardInterrupt:
            print(" ... stopped: the conversation goes on without it", end="")
        except OrionError as error:
            print(f"{type(error).__name__}: {error}", end="")
        print()


if __name__ == "__main__":
    main()
