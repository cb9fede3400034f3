"""Printing, and reading of options, for all commands."""

import json
import shutil
import textwrap
from collections.abc import Collection, Sequence
from typing import Any

import click

from orion_oie.guardrails import sanitize

GLUE = "\u00a0"
"""A space at which `print_wrapped` breaks no line."""

_NARROW, _WIDE = 60, 100


def given(**options: Any) -> dict[str, Any]:
    """The options that were given a value."""
    return {name: value for name, value in options.items() if value is not None}


def print_json(value: object) -> None:
    """Print a value as indented JSON."""
    click.echo(json.dumps(value, indent=2))


def print_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[int] = ()
) -> None:
    """Print cells in columns. `numbers`: the columns that are aligned to the right."""
    lines = [[printable(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        padded = (
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        click.echo("  ".join(padded).rstrip())


def print_wrapped(text: str, *, first: str = "", hang: int = 0) -> None:
    """Print a text in lines that fit the terminal. `first` precedes the first line; the others are
    indented by `hang` characters."""
    width = min(_WIDE, max(_NARROW, shutil.get_terminal_size().columns))
    lines = textwrap.wrap(
        printable(text),
        width,
        initial_indent=printable(first),
        subsequent_indent=" " * hang,
        break_on_hyphens=False,
    )
    shown = "\n".join(lines) or printable(first).rstrip()
    click.echo(shown.replace(GLUE, " "))


def shortened(text: str, most: int) -> str:
    """A text in one line of at most `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


def printable(text: str) -> str:
    """A text from a file or a server, without characters that act on the terminal."""
    return sanitize.clean(text)[0]
