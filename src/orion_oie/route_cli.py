"""`orion-oie route`: why a question goes where it goes; training and judging the router.

Parses, calls the library, prints, like `cli`. Fetches nothing.
"""

import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from orion_oie import (
    EngineConfig,
    Message,
    ModelNotFoundError,
    OrionInferenceEngine,
    Route,
    RouteCandidate,
)
from orion_oie.console import (
    GLUE,
    cache_place,
    print_json,
    print_table,
    print_wrapped,
    printable,
    registry_place,
)
from orion_oie.guardrails import check_query
from orion_oie.routing.base import RouteContext
from orion_oie.routing.hybrid import FITTING_PULL
from orion_oie.validation import did_you_mean

if TYPE_CHECKING:  # with numpy, which most commands do without
    from orion_oie.routing.evaluation import Judged, Score
    from orion_oie.routing.fitting import Example
    from orion_oie.routing.hybrid import HybridRouter
    from orion_oie.specs import AgentSpec

_Command = TypeVar("_Command", bound=Callable[..., None])

_QUESTION = "QUESTION"
_QUOTED = re.compile(r"'[^']{1,40}'")
_MOST_CANDIDATES = 10
_LABEL_WIDTH = 10
_PROMPT_CHARS = 100
_IMAGES = "how many images are attached to the question; default: none"
_EVIDENCE_CHARS = 40  # a pattern of the registry can fill a page


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
    EngineConfig(router_weights="FILE.npz").
    """


def _weights(command: _Command) -> _Command:
    return click.option(
        "--weights",
        type=click.Path(path_type=Path),
        metavar="FILE.npz",
        help="what the router knows; default: the weights that come with the library",
    )(command)


def _router_options(command: _Command) -> _Command:
    """What an engine is made with, for the sake of its router."""
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


def _engine(
    registry: Path | None,
    cache_dir: Path | None,
    embedding_model: str | None,
    no_embeddings: bool,
    weights: Path | None,
) -> OrionInferenceEngine:
    config = EngineConfig(
        cache_dir=cache_dir,
        slots=1,
        keep_warm=False,
        embedding_model=embedding_model,
        enable_neural_router=not no_embeddings,
        router_weights=weights,
    )
    engine = OrionInferenceEngine(registry, config)
    from orion_oie.embeddings.shared import SENTENCE_TRANSFORMERS  # here with every engine

    if embedding_model is not None and not embedding_model.startswith(SENTENCE_TRANSFORMERS):
        engine.registry.model(embedding_model)  # one that nobody knows is not merely not here
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
@click.option("--json", "is_json", is_flag=True, help="as JSON")
@_weights
@_router_options
def explain(
    question: str, images: int, turns: Sequence[str], is_json: bool, **settings: Any
) -> None:
    """Say which agent a question goes to, and why; see `orion-oie route --help`."""
    if question == "-":
        question = sys.stdin.read()
    context = RouteContext(
        images=images,
        history=[Message(role="user", content=turn) for turn in turns],
        is_trial=True,
    )
    with _engine(**settings) as engine:
        check_query(question, engine.config.max_query_chars)
        agents, started = engine.registry.agents, time.perf_counter()
        # Nearly the same, but another text: a vector that is remembered would look too fast.
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
        reason = reason.removesuffix(f"; {note}")  # they have lines of their own
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
    if found.stages != ["attachment"]:  # nobody looked at the text
        _print_labelled("language", found.language or "unknown")
    for note in notes:
        _print_labelled("note", note)


def _evidence(candidate: RouteCandidate) -> str:
    weighed = (f"{_evidence_name(name)} {w:.2f}" for name, w in candidate.evidence.items())
    return ", ".join(one.replace(" ", GLUE) for one in weighed)


def _evidence_name(name: str) -> str:
    """Words of the question in quotes; what else was seen in it without."""
    if name.startswith("shape: "):
        return name.removeprefix("shape: ")
    kind, colon, text = name.partition(":")
    if not colon or kind not in ("keyword", "phrase", "pattern", "feature"):
        return f"'{_shortened(name, _EVIDENCE_CHARS)}'"
    shown = _shortened(text, _EVIDENCE_CHARS)
    return f"{kind} {shown}" if kind == "feature" else f"{kind} '{shown}'"


def _print_labelled(label: str, text: str) -> None:
    print_wrapped(text, first=label.ljust(_LABEL_WIDTH), hang=_LABEL_WIDTH)


# -- weights


def _place_to_write(_context: click.Context, _parameter: click.Parameter, path: Path) -> Path:
    """A path for a new file. What is wrong with it is said before any work is done for it."""
    path = Path(os.path.expanduser(path))
    if path.is_dir():
        raise click.BadParameter(
            f"{printable(str(path))} is a folder; the name of a file is needed"
        )
    if not path.parent.is_dir():
        raise click.BadParameter(f"there is no folder {printable(str(path.parent))}")
    return path


@route.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE.jsonl...")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    callback=_place_to_write,
    metavar="WEIGHTS.npz",
    help="where to write them, in a folder that is there",
)
@click.option(
    "--from",
    "weights",
    type=click.Path(path_type=Path),
    metavar="WEIGHTS.npz",
    help="where to begin; default: the weights that come with the library",
)
@click.option(
    "--pull",
    type=float,
    default=FITTING_PULL,
    show_default=True,
    metavar="X",
    help="how strongly they are held where they are; less follows the prompts more",
)
@_router_options
def train(files: Sequence[str], out: Path, pull: float, **settings: Any) -> None:
    """Draw the router's weights towards labelled prompts.

    A line of a file is {"text": ..., "label": AGENT}, with "labels": [...] where several agents
    are acceptable. First a fifth of each label is held out, to show what the rest changes about
    it; then all are learned from, and the weights written. Use them by
    EngineConfig(router_weights="WEIGHTS.npz"), or here with --weights.

    Vectors of the embedding model are learned from as well, when its files are here. For a model
    that the weights know nothing of, that takes 10 prompts of every topic.
    """
    from orion_oie.routing.evaluation import judged
    from orion_oie.routing.fitting import LEAST_FOR_A_HEAD
    from orion_oie.routing.holdout import split

    examples = _read(files)
    rest, held = split(examples)
    with _engine(**settings) as engine:
        router, agents = _hybrid(engine), engine.registry.agents
        missing = _load_embeddings(engine)
        if missing is not None:
            click.echo(f"note: only words are learned from: {printable(missing.message)}", err=True)
        _note_new_topics(examples, agents, router.model.topics)
        before = judged(router, held, agents)
        if rest and held:
            router.fit(rest, agents, pull=pull)
        after = judged(router, held, agents)
    started = time.perf_counter()
    with _engine(**settings) as engine:  # the weights to begin with again
        is_embedding = engine.config.enable_neural_router and _load_embeddings(engine) is None
        router = _hybrid(engine)
        model = router.fit(examples, engine.registry.agents, pull=pull)
    seconds = time.perf_counter() - started
    name = router.embedding_model
    if is_embedding and name is not None and name not in model.heads:
        click.echo(
            f"note: the embedding model {printable(name)} learned nothing: a first head takes "
            f"{LEAST_FOR_A_HEAD} examples of every topic",
            err=True,
        )
    path = model.save(out)
    if held:
        _print_change(before, after)
    print_wrapped(
        f"{path} ({path.stat().st_size / 1e6:.1f} MB): learned from all {len(examples)} prompts "
        f"in {seconds:.1f} s"
    )


def _read(files: Sequence[str]) -> "list[Example]":
    from orion_oie.routing.fitting import read_examples

    return [example for file in files for example in read_examples(file)]


def _hybrid(engine: OrionInferenceEngine) -> "HybridRouter":
    from orion_oie.routing.hybrid import HybridRouter

    assert isinstance(engine.router, HybridRouter), "it was made without another one"
    return engine.router


def _load_embeddings(engine: OrionInferenceEngine) -> ModelNotFoundError | None:
    """Have the embedding model in memory, however long that takes, unless the router does without.
    Returns the error when it is not here."""
    if engine.config.enable_neural_router:
        try:
            engine.embed(["load"], user="router")
        except ModelNotFoundError as error:
            return error
    return None


def _note_new_topics(
    examples: "Sequence[Example]", agents: "Mapping[str, AgentSpec]", topics: Sequence[str]
) -> None:
    from orion_oie.routing.profiles import AGENT_TOPICS

    owned = [topic for spec in agents.values() for topic in spec.routing.topics or ()]
    known = list(dict.fromkeys([*agents, *topics, *owned, *AGENT_TOPICS]))
    counts = Counter(label for example in examples for label in example.accepted)
    for label in (label for label in counts if label not in known):
        click.echo(
            f"note: '{label}' is no agent of the registry and no topic of the weights"
            f"{did_you_mean(label, known)}; it becomes a topic, which goes to nobody without an "
            "agent of that name",
            err=True,
        )


def _print_change(before: "Sequence[Judged]", after: "Sequence[Judged]") -> None:
    """How many held-out prompts went to an acceptable agent."""
    rows = [
        [label, str(len(old)), _right(old), _right(new)]
        for (label, old), new in zip(
            _by_label(before).items(), _by_label(after).values(), strict=True
        )
    ]
    rows.sort()
    rows.append(["all", str(len(before)), _right(before), _right(after)])
    click.echo("Held-out prompts that go to an acceptable agent:\n")
    print_table(["label", "prompts", "before", "after"], rows, numbers=(1, 2, 3))
    click.echo()


def _by_label(found: "Sequence[Judged]") -> "dict[str, list[Judged]]":
    groups: dict[str, list[Judged]] = {}
    for one in found:
        groups.setdefault(one.example.label, []).append(one)
    return groups


def _right(found: "Sequence[Judged]") -> str:
    from orion_oie.routing.evaluation import score

    return f"{score(found).lenient:.3f}"


@route.command("export")
@click.argument(
    "out", type=click.Path(path_type=Path), callback=_place_to_write, metavar="WEIGHTS.npz"
)
def export_weights(out: Path) -> None:
    """Write the weights that come with the library into a file.

    An application reads such a file by EngineConfig(router_weights="WEIGHTS.npz"); `route`,
    `route train` and `route evaluate` read it too.
    """
    from orion_oie.routing.linear import shipped_model

    path = shipped_model().save(out)
    click.echo(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


# -- judging


@route.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE.jsonl...")
@click.option(
    "--errors", type=click.IntRange(0), default=0, metavar="N", help="show so many misrouted ones"
)
@click.option("--json", "is_json", is_flag=True, help="as JSON")
@_weights
@_router_options
def evaluate(files: Sequence[str], errors: int, is_json: bool, **settings: Any) -> None:
    """Say how well labelled prompts are routed, each by itself.

    A line of a file is {"text": ..., "label": AGENT}, with "labels": [...] where several agents
    are acceptable.
    """
    from orion_oie.routing.evaluation import judged, score

    examples = _read(files)
    if not examples:
        raise click.UsageError("there is no prompt in these files")
    with _engine(**settings) as engine:
        agents = engine.registry.agents
        found = judged(engine.router, examples, agents)
    wrong = sorted(
        (one for one in found if not one.is_right), key=lambda one: -one.route.confidence
    )
    _note_nobody(found, agents)
    if is_json:
        print_json(_figures(found, wrong[:errors]))
        return
    _print_score(score(found))
    _print_confusion(found)
    _print_labels(found)
    for one in wrong[:errors]:
        _print_error(one)


def _print_score(total: "Score") -> None:
    lines = [
        ("lenient", total.lenient, "went to an acceptable agent"),
        ("strict", total.strict, "went to the best one"),
        ("calibration", total.calibration_error, "mean gap between confidence and share of right"),
        ("sure", total.coverage, "reach a confidence of 0.55"),
        ("sure and right", total.confident_right, "of those go to an acceptable agent"),
    ]
    click.echo(f"{total.count} prompts\n")
    print_table(["", "share", ""], [[n, f"{v:.3f}", what] for n, v, what in lines], numbers=(1,))
    click.echo()


def _print_confusion(found: "Sequence[Judged]") -> None:
    """Rows: the agents that should have answered; columns: those that were taken, by number."""
    from orion_oie.routing.evaluation import confusion

    counts = confusion(found)
    names = sorted({name for pair in counts for name in pair})
    numbers = [str(number) for number in range(1, len(names) + 1)]
    rows = []
    for number, should in zip(numbers, names, strict=True):
        of_row = [counts[should, did] for did in names]
        share = f"{counts[should, should] / sum(of_row):.2f}" if any(of_row) else ""
        rows.append([f"{number:>2} {should}", *(str(c) if c else "." for c in of_row), share])
    head = ["   should go to", *numbers, "right"]
    print_table(head, rows, numbers=range(1, len(head)))
    click.echo()


def _print_labels(found: "Sequence[Judged]") -> None:
    """Labels, the worst first, and where their misrouted prompts go."""
    from orion_oie.routing.evaluation import score

    groups = {label: (score(of_one), of_one) for label, of_one in _by_label(found).items()}
    worst = sorted(groups.items(), key=lambda item: (item[1][0].lenient, item[0]))
    print_table(
        ["label", "prompts", "lenient", "strict", "misrouted to"],
        [
            [
                label,
                str(figures.count),
                f"{figures.lenient:.3f}",
                f"{figures.strict:.3f}",
                ", ".join(f"{agent} {count}" for agent, count in _taken(of_one).most_common(3)),
            ]
            for label, (figures, of_one) in worst
        ],
        numbers=(1, 2, 3),
    )


def _taken(found: "Sequence[Judged]") -> Counter[str]:
    return Counter(one.route.agent_id for one in found if not one.is_right)


def _print_error(one: "Judged") -> None:
    click.echo()
    start = f"{one.route.confidence:.2f}  "
    print_wrapped(
        f"{one.route.agent_id}, should be {' or '.join(one.agents)}", first=start, hang=len(start)
    )
    print_wrapped(
        _shortened(one.example.text, _PROMPT_CHARS), first=" " * len(start), hang=len(start)
    )


def _shortened(text: str, most: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


def _note_nobody(found: "Sequence[Judged]", agents: Mapping[str, object]) -> None:
    """Prompts that cannot be routed right: none of their agents is there."""
    missing = Counter(one.agents for one in found if not set(one.agents) & set(agents))
    for names, count in missing.items():
        prompts = "1 prompt" if count == 1 else f"{count} prompts"
        click.echo(
            f"note: {prompts} should go to {' or '.join(names)}, which the registry does not have",
            err=True,
        )


def _figures(found: "Sequence[Judged]", wrong: "Sequence[Judged]") -> dict[str, Any]:
    from orion_oie.routing.evaluation import confusion, score

    matrix: dict[str, dict[str, int]] = {}
    for (should, did), count in sorted(confusion(found).items()):
        matrix.setdefault(should, {})[did] = count
    return {
        **asdict(score(found)),
        "labels": {label: asdict(score(of_one)) for label, of_one in _by_label(found).items()},
        "confusion": matrix,
        "errors": [
            {
                "text": one.example.text,
                "agents": list(one.agents),
                "routed": one.route.agent_id,
                "confidence": one.route.confidence,
            }
            for one in wrong
        ],
    }
