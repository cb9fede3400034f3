"""`orion-oie route`: the agent of a question, and the reasons.

Parses, calls the library, prints. Fetches nothing.
"""

import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from orion_oie import (
    Message,
    OrionInferenceEngine,
    Route,
    RouteCandidate,
    RouterConfig,
)
from orion_oie.cli.console import (
    GLUE,
    print_json,
    print_table,
    print_wrapped,
    shortened,
)
from orion_oie.cli.places import (
    Places,
    cache_place,
    model_place,
    pass_places,
    registry_place,
)
from orion_oie.guardrails.requests import check_query
from orion_oie.routing.base import RouteContext

_Command = TypeVar("_Command", bound=Callable[..., None])

_QUESTION = "QUESTION"
_QUOTED = re.compile(r"'[^']{1,40}'")
_MOST_CANDIDATES = 10
_LABEL_WIDTH = 10
_IMAGES = "how many images are attached to the question; default: none"
_EVIDENCE_CHARS = 40  # a pattern of the registry can be as long as a page


class _QuestionGroup(click.Group):
    """A group whose first word is a question unless it is a command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        first = args[0] if args else None
        if first is not None and first not in [*self.list_commands(ctx), *ctx.help_option_names]:
            args = [_QUESTION, *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in super().list_commands(ctx) if name != _QUESTION]

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, f"{_QUESTION} [OPTIONS]")
        formatter.write_usage(ctx.command_path, "COMMAND [OPTIONS] ARGS...", prefix=" " * 7)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        asking = self.commands[_QUESTION].get_params(ctx)
        options = [one for one in asking if isinstance(one, click.Option)]
        records = [option.get_help_record(ctx) for option in options]
        with formatter.section("Options"):
            formatter.write_dl([record for record in records if record is not None])
        self.format_commands(ctx, formatter)


@click.group(cls=_QuestionGroup)
def route() -> None:
    """Say which agent a question goes to, and why.

    "-" reads the question from the standard input. A question that is also the name of a command
    comes after "--". The models that would answer need not be here, and nothing is fetched. The
    embedding model of the registry is asked when its files are here.

    Weights of one's own come from `train`; an application uses them by
    EngineConfig(router=RouterConfig(weights="FILE.npz")).
    """


def weights_place(command: _Command) -> _Command:
    return click.option(
        "--weights",
        type=click.Path(path_type=Path),
        metavar="FILE.npz",
        help="what the router knows; default: the weights that come with the library",
    )(command)


def router_options(command: _Command) -> _Command:
    """The options that determine the router of an engine."""
    for option in (
        cache_place,
        click.option("--no-embeddings", is_flag=True, help="do without the embedding model"),
        click.option(
            "--embedding-model",
            metavar="NAME",
            help="of the registry, or sentence-transformers:NAME; default: the registry's first",
        ),
        registry_place,
    ):
        command = option(command)
    return command


def engine_of(
    places: Places, embedding_model: str | None, no_embeddings: bool, weights: Path | None
) -> OrionInferenceEngine:
    """An engine whose router is what the options say. Raises `ModelNotFoundError` for an embedding
    model that the registry does not have."""
    stages = RouterConfig().stages
    if no_embeddings:
        stages = tuple(stage for stage in stages if stage != "embeddings")
    engine = places.engine(
        router=RouterConfig(stages=stages, weights=weights), embedding_model=embedding_model
    )
    from orion_oie.embeddings.shared import SENTENCE_TRANSFORMERS  # imported with any engine

    if embedding_model is not None and not embedding_model.startswith(SENTENCE_TRANSFORMERS):
        engine.registry.model(embedding_model)  # an unknown model is an error, an absent one is not
    return engine


# -- one question


@route.command(_QUESTION)
@click.argument("question", metavar="")
@click.option("--image", "images", type=click.IntRange(0), default=0, metavar="N", help=_IMAGES)
@click.option(
    "--session-turn",
    "turns",
    multiple=True,
    metavar="TEXT",
    help="an earlier question of the same conversation; may be given several times",
)
@click.option("--json", "is_json", is_flag=True, help="print it as JSON, for programs")
@model_place
@weights_place
@router_options
@pass_places
def explain(
    places: Places,
    /,
    question: str,
    images: int,
    turns: Sequence[str],
    is_json: bool,
    **settings: Any,
) -> None:
    """Say which agent a question goes to, and why; see `orion-oie route --help`."""
    if question == "-":
        question = sys.stdin.read()
    context = RouteContext(
        images=images,
        history=[Message(role="user", content=turn) for turn in turns],
        is_trial=True,
    )
    with engine_of(places, **settings) as engine:
        check_query(question, engine.config.guardrails.max_query_chars)
        agents, started = engine.registry.agents, time.perf_counter()
        # A slightly different text: the cached vector of the same one would look too fast.
        engine.router.route(f". {question}", agents, context)
        between = time.perf_counter()
        found = engine.router.route(question, agents, context)
        ms, first_ms = (time.perf_counter() - between) * 1e3, (between - started) * 1e3
    if is_json:
        print_json({**found.model_dump(mode="json"), "ms": ms, "first_ms": first_ms})
        return
    _print_route(found)
    if images and "attachment" not in found.stages:
        _print_labelled("note", "no agent looks at images")
    _print_labelled("time", f"{ms:.1f} ms; the first question of a process {first_ms:.0f} ms")


def _print_route(found: Route) -> None:
    reason = found.reason
    for note in reversed(found.notes):
        reason = reason.removesuffix(f"; {note}")  # notes have their own lines
    notes = [note for note in found.notes if note != reason]  # one may be the whole reason
    reason = _QUOTED.sub(lambda quoted: quoted[0].replace(" ", GLUE), reason)
    start = f"{found.agent_id}  {found.confidence:.2f}  "
    print_wrapped(reason, first=start, hang=len(start))
    click.echo()
    stages = [stage for stage in found.stages if stage != "attachment"]
    shown = found.candidates[:_MOST_CANDIDATES]
    print_table(
        ["agent", "probability", *(stage.replace("_", "-") for stage in stages)],
        [
            [one.agent_id, *(f"{p:.2f}" for p in (one.score, *map(one.stages.__getitem__, stages)))]
            for one in shown
        ],
        numbers=range(1, 2 + len(stages)),
    )
    if len(found.candidates) > len(shown):
        click.echo(f"and {len(found.candidates) - len(shown)} agents that are less probable")
    click.echo()
    evident = [one for one in found.candidates if one.evidence]
    for number, one in enumerate(evident):
        _print_labelled("" if number else "evidence", f"{one.agent_id}: {_evidence(one)}")
    if found.stages != ["attachment"]:  # else the text was not examined
        _print_labelled("language", found.language or "unknown")
    for note in notes:
        _print_labelled("note", note)


def _evidence(candidate: RouteCandidate) -> str:
    weighed = (f"{_evidence_name(name)} {w:.2f}" for name, w in candidate.evidence.items())
    return ", ".join(one.replace(" ", GLUE) for one in weighed)


def _evidence_name(name: str) -> str:
    """The name of a piece of evidence: words of the question in quotes, other signs without."""
    if name.startswith("shape: "):
        return name.removeprefix("shape: ")
    kind, colon, text = name.partition(":")
    if not colon or kind not in ("keyword", "phrase", "pattern", "feature"):
        return f"'{shortened(name, _EVIDENCE_CHARS)}'"
    shown = shortened(text, _EVIDENCE_CHARS)
    return f"{kind} {shown}" if kind == "feature" else f"{kind} '{shown}'"


def _print_labelled(label: str, text: str) -> None:
    print_wrapped(text, first=label.ljust(_LABEL_WIDTH), hang=_LABEL_WIDTH)
