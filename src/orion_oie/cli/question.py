"""The question of a command: its words, and the text that is piped into it."""

import os
import select
import stat
import sys
from collections.abc import Sequence
from typing import Literal

import click

from orion_oie.cli.console import print_note

STDIN = "-"
"""The word that stands for the standard input."""

PATIENCE_S = 30.0
"""How long a pipe may say nothing before a question does without it."""

_QUIET_S = 2.0

_Kind = Literal["none", "file", "pipe"]


def read_question(words: Sequence[str], reads_stdin: bool | None = None) -> str:
    """The words as one question, followed by what comes from the standard input.

    "-" alone reads the standard input and nothing else, however long it takes. Otherwise it is read
    if it is a file or a pipe: a terminal or /dev/null is not. A pipe that stays open and silent for
    `PATIENCE_S` seconds is given up, with a note: programs, and ssh, often leave one open by
    accident. `reads_stdin` True waits for it without end, False does not look at it.

    Raises `click.UsageError` where there is nothing to ask.
    """
    if list(words) == [STDIN]:
        return _read()
    question = " ".join(words)
    text = "" if reads_stdin is False else _piped(is_patient=reads_stdin is True)
    if not text.strip():
        if not words:
            raise click.UsageError(
                'there is no question; ask one: orion-oie run "Why is the sky blue?", or pipe a '
                "text into it"
            )
        return question
    text = text.rstrip("\n")
    return f"{question}\n\n{text}" if question.strip() else text


def _piped(is_patient: bool) -> str:
    """What the standard input has, if that is a file or a pipe."""
    kind = _stdin_kind()
    if kind == "none" and not is_patient:
        return ""
    if kind == "pipe" and not is_patient and not _comes(PATIENCE_S):
        print_note(
            f"note: nothing came through the pipe in {PATIENCE_S:g} s: going on without it. "
            "--no-stdin does not wait for it, --stdin waits without end"
        )
        return ""
    return _read()


def _stdin_kind() -> _Kind:
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # it was closed, or is no file of the system
        return "none"
    if stat.S_ISREG(mode):
        return "file"
    return "pipe" if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) else "none"


def _comes(patience_s: float) -> bool:
    """Wait for the first byte or the end of the pipe."""
    quiet_s = min(_QUIET_S, patience_s)
    if select.select([sys.stdin], [], [], quiet_s)[0]:
        return True
    print_note(
        f"note: waiting up to {patience_s:g} s for a text through the pipe (--no-stdin: not)"
    )
    return bool(select.select([sys.stdin], [], [], patience_s - quiet_s)[0])


def _read() -> str:
    if sys.stdin is None:
        raise click.UsageError("the standard input is closed")
    try:
        text = sys.stdin.read()
        text.encode()  # bytes that are no text become surrogates in some locales
    except UnicodeError as error:
        raise no_text() from error
    return text


def no_text() -> click.UsageError:
    """The error for a standard input that is no text."""
    return click.UsageError("the standard input is no text in UTF-8; iconv may convert it")
