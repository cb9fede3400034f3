"""`orion-oie pull` and `orion-oie models`: fetch models, list, check and remove them.

Parses, calls the library, prints.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from orion_oie import ModelNotFoundError
from orion_oie.cli.completion import complete_name
from orion_oie.cli.console import given, print_json, print_note, print_table
from orion_oie.cli.groups import Group
from orion_oie.cli.places import Places, both_places, cache_place, model_place, pass_places
from orion_oie.models.inventory import InventoryEntry, fetched_files, inventory
from orion_oie.models.naming import is_source
from orion_oie.schemas.units import size_text
from orion_oie.telemetry.progress import LoadDisplay

if TYPE_CHECKING:
    from orion_oie.models.local.found import LocalModel

_Command = TypeVar("_Command", bound=Callable[..., None])


def list_options(command: _Command) -> _Command:
    """The options of a list of models."""
    for option in (
        click.option("--json", "is_json", is_flag=True, help="print it as JSON, for programs"),
        click.option(
            "--local",
            "is_local",
            is_flag=True,
            help="list the models that other programs have on this machine instead",
        ),
    ):
        command = option(command)
    return command


@click.command()
@click.argument("names", nargs=-1, metavar="NAME...", shell_complete=complete_name)
@click.option(
    "--limit-mb-per-s",
    type=float,
    metavar="X",
    help="fetch at most so many megabytes (10^6 bytes) a second",
)
@click.option(
    "--connections", type=int, metavar="N", help="how many connections at once; default: 4"
)
@model_place
@both_places
@pass_places
def pull(
    places: Places,
    names: Sequence[str],
    limit_mb_per_s: float | None,
    connections: int | None,
) -> None:
    """Fetch models, and print where their files lie.

    NAME is an agent (its own model), a model (its first variant), MODEL@VARIANT, or a source such
    as hf:ORG/REPO:Q4_K_M. What is on this machine is not fetched again. What arrived is kept when
    the command ends early, and the next one goes on from there.

    \b
    Examples:
      orion-oie pull code
      orion-oie pull qwen2.5-0.5b-instruct@q8_0 all-minilm-l6-v2
      orion-oie pull reasoning --limit-mb-per-s 5
      orion-oie pull hf:bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M
    """
    if not names and places.model is None:
        raise click.UsageError(
            "name what to fetch: an agent of 'orion-oie agents', or a model of 'orion-oie models'"
        )
    limit = None if limit_mb_per_s is None else limit_mb_per_s * 1e6
    download = given(bytes_per_s=limit, connections=connections)
    files: list[Path] = []
    with LoadDisplay() as display, places.engine(download=download) as engine:
        engine.subscribe(display.show)
        names = names or [next(iter(engine.registry.agents))]  # whose model is that of --model
        for name in names:
            if not is_source(name):
                engine.registry.find_source(name)  # the last is wrong before the first is fetched
        for name in names:
            files += engine.pull(name)
    for file in files:
        click.echo(file)


@click.group(cls=Group, invoke_without_command=True)
@list_options
@both_places
@pass_places
@click.pass_context
def models(context: click.Context, places: Places, is_json: bool, is_local: bool) -> None:
    """List the models: their sizes, and which are on this machine.

    These are the models of the registry, and what else was fetched. --local lists what other
    programs have on this machine: Ollama, LM Studio, and the Hugging Face cache. A narrow terminal
    leaves out the last columns; --json has everything.

    \b
    Examples:
      orion-oie models
      orion-oie models --local
      orion-oie models rm qwen2.5-0.5b-instruct@q8_0
      orion-oie models prune --keep-gb 20
    """
    if context.invoked_subcommand is None:
        _print_models(places, is_json, is_local)


@models.command("list")
@list_options
@both_places
@pass_places
def list_models(places: Places, is_json: bool, is_local: bool) -> None:
    """List the models, as 'models' does without a command."""
    _print_models(places, is_json, is_local)


def _print_models(places: Places, is_json: bool, is_local: bool) -> None:
    if is_local:
        _print_local(is_json)
        return
    entries = inventory(places.registry(), places.cache())
    if is_json:
        print_json([_entry_facts(entry) for entry in entries])
        return
    head, rows = ["model", "size", "state", "where"], [_cells(entry) for entry in entries]
    optional = [3]
    if any(entry.last_used is not None for entry in entries):
        head.insert(3, "last used")
        for row, entry in zip(rows, entries, strict=True):
            row.insert(3, _last_used(entry))
        optional = [4, 3]
    print_table(head, rows, numbers=(1,), elastic=optional[:1], optional=optional)


def _print_local(is_json: bool) -> None:
    # No other command looks into the folders of other programs.
    from orion_oie.models.local.survey import local_models

    found = local_models()
    if is_json:
        print_json([_local_facts(one) for one in found])
        return
    if not found:
        print_note("no models of Ollama, LM Studio or the Hugging Face cache are on this machine")
        return
    print_table(
        ["model", "size", "type", "of", "-m"],
        [
            [one.name, size_text(one.size_bytes), one.quantization or "-", one.where, one.source]
            for one in found
        ],
        numbers=(1,),
        elastic=(0,),
    )
    print_note(f"note: 'orion-oie run -m {found[0].source} \"...\"' asks one of them")


@models.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=complete_name)
@both_places
@pass_places
def remove(places: Places, names: Sequence[str]) -> None:
    """Remove fetched models from this machine.

    NAME is an agent, a model (all its variants) or MODEL@VARIANT; a file of no model goes by the
    name that 'orion-oie models' shows. What is known of the files, such as their digests, is
    forgotten as well.
    """
    cache = places.cache()
    for key, paths in fetched_files(places.registry(), cache, names):
        click.echo(f"{key}: {size_text(cache.remove_files(paths))} removed")


@models.command()
@click.argument("names", nargs=-1, metavar="[NAME...]", shell_complete=complete_name)
@both_places
@pass_places
@click.pass_context
def verify(context: click.Context, places: Places, names: Sequence[str]) -> None:
    """Check that fetched files are undamaged: hash them again and compare.

    NAME is an agent, a model or MODEL@VARIANT; without one, all files are checked. Has status 1
    when one is wrong.
    """
    cache = places.cache()
    paths = None
    if names:
        named = fetched_files(places.registry(), cache, names)
        paths = [path for _, of_one in named for path in of_one if path.exists()]
        if not paths:
            raise ModelNotFoundError(f"nothing of {', '.join(names)} was fetched as a whole")
    is_right = True
    for found in cache.verify(paths):
        is_right = is_right and found.is_right
        word = "unknown" if found.expected is None else "right" if found.is_right else "WRONG"
        click.echo(f"{word}  {found.sha256}  {found.path}")
    context.exit(0 if is_right else 1)


@models.command()
@click.option(
    "--keep-gb",
    type=float,
    metavar="X",
    help="also remove the longest unused models, until X GB are left",
)
@cache_place
@pass_places
def prune(places: Places, keep_gb: float | None) -> None:
    """Remove what was left half-fetched, to free disk space."""
    for file in places.cache().prune(None if keep_gb is None else int(keep_gb * 1e9)):
        click.echo(f"{file.path}: {size_text(file.arrived_bytes)} removed")


def _cells(entry: InventoryEntry) -> list[str]:
    percent = f" {100 * entry.arrived_bytes / max(1, entry.size_bytes):.0f} %"
    return [
        entry.name,
        size_text(entry.size_bytes),
        entry.state + (percent if entry.state == "partial" else ""),
        entry.where,
    ]


def _last_used(entry: InventoryEntry) -> str:
    used = entry.last_used
    return "-" if used is None else _date(used).isoformat(" ", "minutes")


def _local_facts(model: "LocalModel") -> dict[str, object]:
    return {**asdict(model), "paths": [str(path) for path in model.paths]}


def _entry_facts(entry: InventoryEntry) -> dict[str, object]:
    used = None if entry.last_used is None else _date(entry.last_used).isoformat(" ", "seconds")
    return {**asdict(entry), "last_used": used}


def _date(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds)
