"""The command line: parses, calls the library, prints. Holds no logic."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from orion_oie import ModelRegistry, __version__, lifecycle


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="orion_oie", description="Orion Inference Engine")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    schema = commands.add_parser("schema", help="write the JSON Schema of models.json")
    diagram = commands.add_parser("lifecycle", help="write the states of a request, as Markdown")
    for command in (schema, diagram):
        command.add_argument("file", type=Path, nargs="?", help="where to; default: print it")
    arguments = parser.parse_args(argv)
    match arguments.command:
        case "schema":
            text = json.dumps(ModelRegistry.json_schema(), indent=2) + "\n"
        case _:
            text = lifecycle.document()
    if arguments.file is None:
        sys.stdout.write(text)
    else:
        arguments.file.write_text(text, encoding="utf-8")
    return 0
