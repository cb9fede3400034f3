"""`orion-oie route train`, `evaluate` and `export`: the router's weights, and its accuracy.

Parses, calls the library, prints. Fetches nothing.
"""

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orion_oie import ModelNotFoundError, OrionInferenceEngine
from orion_oie.cli.console import (
    print_json,
    print_table,
    print_wrapped,
    printable,
    shortened,
)
from orion_oie.cli.places import Places, pass_places
from orion_oie.cli.route import (
    engine_of,
    router_options,
    weights_place,
)
from orion_oie.routing.hybrid import FITTING_PULL
from orion_oie.schemas.units import size_text
from orion_oie.schemas.validation import did_you_mean

if TYPE_CHECKING:  # imports numpy, which most commands do not need
    from orion_oie.models.specs import AgentSpec
    from orion_oie.routing.evaluation import Judged, Score
    from orion_oie.routing.hybrid import HybridRouter
    from orion_oie.routing.linear.fitting import Example

_PROMPT_CHARS = 100

# -- weights


def _place_to_write(_context: click.Context, _parameter: click.Parameter, path: Path) -> Path:
    """A path for a new file, checked before any work is done."""
    path = Path(os.path.expanduser(path))
    if path.is_dir():
        raise click.BadParameter(
            f"{printable(str(path))} is a folder; the name of a file is needed"
        )
    if not path.parent.is_dir():
        raise click.BadParameter(f"there is no folder {printable(str(path.parent))}")
    return path


@click.command()
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
@router_options
@pass_places
def train(places: Places, /, files: Sequence[str], out: Path, pull: float, **settings: Any) -> None:
    """Train the router on labelled questions of your own.

    Its weights are drawn towards them. A line of a file is {"text": ..., "label": AGENT}, with
    "labels": [...] where several agents are acceptable. First a fifth of each label is held out,
    to show what the rest changes about it; then all are learned from, and the weights written. Use
    them by EngineConfig(router=RouterConfig(weights="WEIGHTS.npz")), or here with --weights.

    Vectors of the embedding model are learned from as well, when its files are here. For a model
    that the weights know nothing of, that takes 10 prompts of every topic.
    """
    from orion_oie.routing.evaluation import judged
    from orion_oie.routing.linear.fitting import LEAST_FOR_A_HEAD
    from orion_oie.routing.linear.holdout import split

    examples = _read(files)
    rest, held = split(examples)
    with engine_of(places, **settings) as engine:
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
    with engine_of(places, **settings) as engine:  # the weights to begin with again
        is_embedding = _is_embedding(engine) and _load_embeddings(engine) is None
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
        f"{path} ({size_text(path.stat().st_size)}): learned from all {len(examples)} prompts "
        f"in {seconds:.1f} s"
    )


def _read(files: Sequence[str]) -> "list[Example]":
    from orion_oie.routing.linear.fitting import read_examples

    return [example for file in files for example in read_examples(file)]


def _hybrid(engine: OrionInferenceEngine) -> "HybridRouter":
    from orion_oie.routing.hybrid import HybridRouter

    if not isinstance(engine.router, HybridRouter):
        raise TypeError(f"a {type(engine.router).__name__} learns no weights")
    return engine.router


def _is_embedding(engine: OrionInferenceEngine) -> bool:
    return "embeddings" in engine.config.router.stages


def _load_embeddings(engine: OrionInferenceEngine) -> ModelNotFoundError | None:
    """Load the embedding model, however long that takes, unless the router uses none. Return the
    error when the model is not on this machine."""
    if _is_embedding(engine):
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
    """Print the shares of held-out prompts that went to an acceptable agent."""
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


@click.command("export")
@click.argument(
    "out", type=click.Path(path_type=Path), callback=_place_to_write, metavar="WEIGHTS.npz"
)
def export_weights(out: Path) -> None:
    """Write the weights that come with the library into a file.

    An application reads such a file by EngineConfig(router=RouterConfig(weights="WEIGHTS.npz"));
    `route`, `route train` and `route evaluate` read it too.
    """
    from orion_oie.routing.linear.model import shipped_model

    path = shipped_model().save(out)
    click.echo(f"{path} ({size_text(path.stat().st_size)})")


# -- judging


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE.jsonl...")
@click.option(
    "--errors", type=click.IntRange(0), default=0, metavar="N", help="show so many misrouted ones"
)
@click.option("--json", "is_json", is_flag=True, help="print it as JSON, for programs")
@weights_place
@router_options
@pass_places
def evaluate(
    places: Places, /, files: Sequence[str], errors: int, is_json: bool, **settings: Any
) -> None:
    """Measure how well the router sorts labelled questions.

    Each is routed by itself. A line of a file is {"text": ..., "label": AGENT}, with
    "labels": [...] where several agents are acceptable.
    """
    from orion_oie.routing.evaluation import judged, score

    examples = _read(files)
    if not examples:
        raise click.UsageError("there is no prompt in these files")
    with engine_of(places, **settings) as engine:
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
    click.echo(f"{total.count} prompt{'' if total.count == 1 else 's'}\n")
    print_table(["", "share", ""], [[n, f"{v:.3f}", what] for n, v, what in lines], numbers=(1,))
    click.echo()


def _print_confusion(found: "Sequence[Judged]") -> None:
    """Print the confusion matrix. Rows: the right agents; columns: the chosen ones, by number."""
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
    """Print the labels, the worst first, with the agents of their misrouted prompts."""
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
        shortened(one.example.text, _PROMPT_CHARS), first=" " * len(start), hang=len(start)
    )


def _note_nobody(found: "Sequence[Judged]", agents: Mapping[str, object]) -> None:
    """Print a note on prompts that cannot be routed right, because all their agents are missing."""
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
