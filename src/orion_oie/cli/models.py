"""`orion-oie pull` and `orion-oie models`: fetch models, list, check and remove them.

Parses, calls the library, prints.
"""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import click

from orion_oie import ModelNotFoundError
from orion_oie.cli.console import given, print_json, print_table
from orion_oie.cli.places import Places, both_places, cache_place, pass_places
from orion_oie.models.inventory import InventoryEntry, fetched_files, inventory
from orion_oie.schemas.units import size_text
from orion_oie.telemetry.progress import LoadDisplay


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="AGENT|MODEL[@VARIANT]...")
@click.option("--limit-mb-per-s", type=float, metavar="X", help="at most 10^6 bytes a second")
@click.option("--connections", type=int, metavar="N", help="how many at once; default: 4")
@both_places
@pass_places
def pull(
    places: Places,
    names: Sequence[str],
    limit_mb_per_s: float | None,
    connections: int | None,
) -> None:
    """Fetch models that are not here; print where their files lie.

    NAME is an agent (its primary model), a model (its first variant), or MODEL@VARIANT. What
    arrived is kept when the command ends early, and the next one goes on from there.
    """
    limit = None if limit_mb_per_s is None else limit_mb_per_s * 1e6
    download = given(bytes_per_s=limit, connections=connections)
    files: list[Path] = []
    with LoadDisplay() as display, places.engine(download=download) as engine:
        engine.subscribe(display.show)
        for name in names:
            engine.registry.find_source(name)  # the last name is wrong before the first is fetched
        for name in names:
            files += engine.pull(name)
    for file in files:
        click.echo(file)


@click.group(invoke_without_command=True)
@click.option("--json", "is_json", is_flag=True, help="as JSON")
@both_places
@pass_places
@click.pass_context
def models(context: click.Context, places: Places, is_json: bool) -> None:
    """List the models of the registry, and what else was fetched."""
    if context.invoked_subcommand is not None:
        return
    entries = inventory(places.registry(), places.cache())
    if is_json:
        print_json([_entry_facts(entry) for entry in entries])
    else:
        head = ["model", "size", "state", "last used", "where"]
        print_table(head, [_cells(entry) for entry in entries])


@models.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="AGENT|MODEL[@VARIANT]...")
@both_places
@pass_places
def remove(places: Places, names: Sequence[str]) -> None:
    """Remove what was fetched of models, and what is known of it.

    A model without a variant stands for all its variants; a file of no model goes by the name
    that `models` shows.
    """
    cache = places.cache()
    for key, paths in fetched_files(places.registry(), cache, names):
        click.echo(f"{key}: {size_text(cache.remove_files(paths))} removed")


@models.command()
@click.argument("names", nargs=-1, metavar="[AGENT|MODEL[@VARIANT]]...")
@both_places
@pass_places
@click.pass_context
def verify(context: click.Context, places: Places, names: Sequence[str]) -> None:
    """Hash fetched files again and compare; by default all of them."""
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
@click.option("--keep-gb", type=float, metavar="X", help="also the longest unused, down to X GB")
@cache_place
@pass_places
def prune(places: Places, keep_gb: float | None) -> None:
    """Remove what was left half-fetched."""
    for file in places.cache().prune(None if keep_gb is None else int(keep_gb * 1e9)):
        click.echo(f"{file.path}: {size_text(file.arrived_bytes)} removed")


def _cells(entry: InventoryEntry) -> list[str]:
    percent = f" {100 * entry.arrived_bytes / max(1, entry.size_bytes):.0f} %"
    return [
        entry.name,
        size_text(entry.size_bytes),
        entry.state + (percent if entry.state == "partial" else ""),
        "-" if entry.last_used is None else _date(entry.last_used).isoformat(" ", "minutes"),
        entry.where,
    ]


def _entry_facts(entry: InventoryEntry) -> dict[str, object]:
    used = None if entry.last_used is None else _date(entry.last_used).isoformat(" ", "seconds")
    return {**asdict(entry), "last_used": used}


def _date(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds)
