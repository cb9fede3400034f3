"""The command line: parses, calls the library, prints. Holds no logic.

Answers and lists go to the standard output, everything else to the standard error. Exit statuses:
0, 1 when the library refused or found something wrong, 2 for wrong usage, 130 after Ctrl-C.
"""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from orion_oie import EngineConfig, ModelRegistry, OrionError, __version__
from orion_oie.cli.agents import agents
from orion_oie.cli.chat import chat
from orion_oie.cli.console import print_note
from orion_oie.cli.gguf import convert, inspect
from orion_oie.cli.groups import Group
from orion_oie.cli.hardware import hardware
from orion_oie.cli.hints import message_of
from orion_oie.cli.models import models, pull
from orion_oie.cli.route import route
from orion_oie.cli.run import run
from orion_oie.cli.train import evaluate, export_weights, train
from orion_oie.engine import lifecycle
from orion_oie.schemas import option_docs
from orion_oie.telemetry import event_docs


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # answers are of any script, terminals are not
    try:
        status = commands.main(argv, prog_name="orion-oie", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except SystemExit as ended:  # click has handled a closed pipe
        return ended.code if isinstance(ended.code, int) else 1
    except OrionError as error:
        print_note(f"error: {message_of(error)}")
        return 1
    except OSError as error:
        print_note(f"error: {error}")
        return 1
    return status if isinstance(status, int) else 0


SECTIONS = {
    "Ask": ("run", "chat", "agents", "route"),
    "Models": ("models", "pull", "convert"),
    "Look inside": ("inspect", "hardware"),
    "Train the router": ("route train", "route evaluate", "route export"),
    "Documents": ("schema", "options", "lifecycle", "events"),
}
"""The commands by task, as the help lists them."""


@click.group(
    cls=Group,
    sections=SECTIONS,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="'orion-oie COMMAND --help' explains a command, with all its options.",
)
@click.version_option(__version__, message="%(version)s")
@click.pass_context
def commands(context: click.Context) -> None:
    """Ask language models that run on this machine, and look after them.

    \b
    orion-oie run "Why is the sky blue?"
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (run, chat, agents, route, models, pull, convert, inspect, hardware):
    commands.add_command(command)
for command in (train, evaluate, export_weights):
    route.add_command(command)


@commands.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
def schema(file: Path | None) -> None:
    """Write the JSON Schema of models.json, for editors and checks.

    It goes to FILE or the standard output.
    """
    _write(json.dumps(ModelRegistry.json_schema(), indent=2) + "\n", file)


@commands.command("options")
@click.argument("file", type=click.Path(path_type=Path), required=False)
def write_options(file: Path | None) -> None:
    """Write the options of a request and the settings, as Markdown.

    It goes to FILE or the standard output.
    """
    _write(option_docs.document(EngineConfig), file)


@commands.command("lifecycle")
@click.argument("file", type=click.Path(path_type=Path), required=False)
def write_lifecycle(file: Path | None) -> None:
    """Write the states that a request goes through, as Markdown.

    It goes to FILE or the standard output.
    """
    _write(lifecycle.document(), file)


@commands.command("events")
@click.argument("file", type=click.Path(path_type=Path), required=False)
def write_events(file: Path | None) -> None:
    """Write the list of the events that an engine reports, as Markdown.

    It goes to FILE or the standard output.
    """
    _write(event_docs.document(), file)


def _write(text: str, file: Path | None) -> None:
    if file is None:
        click.echo(text, nl=False)
    else:
        file.write_text(text, encoding="utf-8")
