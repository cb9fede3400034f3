"""The excerpt of a text that routers read, which bounds the time they take.

A request mostly states its purpose at its start or its end. Sentences are not respected.
"""

HEAD_CHARS = 2000
TAIL_CHARS = 1000


def excerpt(text: str, head: int = HEAD_CHARS, tail: int = TAIL_CHARS) -> str:
    """The text itself if it is short, else its first `head` and last `tail` characters."""
    if len(text) <= head + tail:
        return text
    return f"{text[:head]}\n{text[-tail:]}"
