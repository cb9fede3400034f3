"""The command line: parses, calls the library, prints. Holds no logic."""

import argparse
import json
from collections.abc import Sequence

from orion_oie import ModelRegistry, __version__, lifecycle


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="orion_oie", description="Orion Inference Engine")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("schema", help="print the JSON Schema of models.json")
    commands.add_parser("lifecycle", help="print docs/lifecycle.md")
    match parser.parse_args(argv).command:
        case "schema":
            print(json.dumps(ModelRegistry.json_schema(), indent=2))
        case "lifecycle":
            print(lifecycle.document(), end="")
    return 0
