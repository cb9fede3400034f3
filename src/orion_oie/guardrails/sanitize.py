"""Sanitizing of answers: removes characters that could act on a terminal or a log.

These are control characters except line breaks and tabs, and unpaired surrogates. Words are never
changed. Each character is judged alone, so a stream may be cut anywhere.
"""

import re

_UNSAFE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def clean(text: str) -> tuple[str, int]:
    """The text without unsafe characters, and the number of characters removed."""
    return _UNSAFE.subn("", text) if _UNSAFE.search(text) else (text, 0)
