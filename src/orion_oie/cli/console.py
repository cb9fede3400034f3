"""Printing, and reading of options, for all commands."""

import json
import re
import shutil
import sys
from collections.abc import Collection, Sequence
from typing import Any

import click

from orion_oie.cli.layout import table_lines, wrapped
from orion_oie.guardrails import sanitize

GLUE = "\u00a0"
"""A space at which `print_wrapped` breaks no line."""

_NARROW, _WIDE = 20, 100
_QUOTED = re.compile(r"'[^']{1,60}'")
_GAP = re.compile(r"\S {2,}")


def given(**options: Any) -> dict[str, Any]:
    """The options that were given a value."""
    return {name: value for name, value in options.items() if value is not None}


def print_json(value: object) -> None:
    """Print a value as indented JSON."""
    click.echo(json.dumps(value, indent=2))


def print_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Collection[int] = (),
    *,
    elastic: Sequence[int] = (),
    optional: Sequence[int] = (),
) -> None:
    """Print cells in columns that fit the terminal; whole where the output is none. See
    `table_lines`."""
    cells = [[printable(cell) for cell in row] for row in (head, *rows)]
    most = max(_NARROW, terminal_columns()) if sys.stdout.isatty() else None
    for line in table_lines(cells, most, numbers=numbers, elastic=elastic, optional=optional):
        click.echo(line)


def print_wrapped(text: str, *, first: str = "", hang: int = 0) -> None:
    """Print a text in lines that fit the terminal. `first` precedes the first line; the others are
    indented by `hang` characters."""
    width = min(_WIDE, max(_NARROW, terminal_columns()))
    lines = wrapped(printable(text), width, first=printable(first), hang=hang)
    click.echo("\n".join(lines).replace(GLUE, " "))


def print_row(line: str) -> None:
    """Print a line whose last column, behind two spaces, is continued below itself where the
    terminal is too narrow. Whole where the output is none."""
    shown = printable(line)
    column = max((gap.end() for gap in _GAP.finditer(shown)), default=0)
    if sys.stdout.isatty() and column < len(shown):
        width = max(_NARROW, terminal_columns())
        hang = column if column <= width // 2 else 4
        lines = wrapped(shown[column:], width, first=shown[:column], hang=hang)
        shown = "\n".join(lines)
    click.echo(shown)


def print_note(text: str) -> None:
    """Print a remark or an error on the standard error, in lines that fit a terminal. What stands
    in quotes is not broken, because somebody may copy it."""
    lines = printable(text).splitlines()
    if sys.stderr.isatty():
        width = max(_NARROW, terminal_columns())
        lines = [part for line in lines for part in _wrapped_note(line, width)]
    click.echo("\n".join(lines), err=True)


def _wrapped_note(line: str, width: int) -> list[str]:
    indent = line[: len(line) - len(line.lstrip(" "))]
    glued = _QUOTED.sub(lambda quoted: quoted[0].replace(" ", GLUE), line)
    lines = wrapped(glued, width, first=indent, hang=len(indent) + 2)
    return [part.replace(GLUE, " ") for part in lines]


def terminal_columns() -> int:
    """The width of the terminal; `COLUMNS` overrides it."""
    return shutil.get_terminal_size().columns


def shortened(text: str, most: int) -> str:
    """A text in one line of at most `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


def printable(text: str) -> str:
    """A text from a file or a server, without characters that act on the terminal."""
    return sanitize.clean(text)[0]
