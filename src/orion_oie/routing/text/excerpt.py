"""The part of a text that routers look at, so that their work has a bound.

A request mostly states what it wants at its start or its end. Nothing here looks for sentences.
"""

HEAD_CHARS = 2000
TAIL_CHARS = 1000


def excerpt(text: str, head: int = HEAD_CHARS, tail: int = TAIL_CHARS) -> str:
    """`text` itself when it is short, else its first `head` and last `tail` characters."""
    if len(text) <= head + tail:
        return text
    return f"{text[:head]}\n{text[-tail:]}"
