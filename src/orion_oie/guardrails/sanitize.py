"""What may go out: an answer's text without characters that could act on a terminal or a log.

Removes control characters except line breaks and tabs, and unpaired surrogates. Words are never
changed. Works on any cut of the text: each character is judged alone.
"""

import re

_UNSAFE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def clean(text: str) -> tuple[str, int]:
    """The text without unsafe characters, and how many were removed."""
    return _UNSAFE.subn("", text) if _UNSAFE.search(text) else (text, 0)
