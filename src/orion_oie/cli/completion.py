"""Names that the shell completes: agents, models, fetched files.

They are read from the registry alone, without an engine. A registry that cannot be read, or any
other error, completes nothing: a traceback would land in the line that is being typed.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click

from orion_oie import ModelRegistry, OrionError

if TYPE_CHECKING:  # only completion needs it
    from click.shell_completion import CompletionItem

_Names = Callable[[ModelRegistry], Iterable[tuple[str, str]]]


def _agents(registry: ModelRegistry) -> Iterable[tuple[str, str]]:
    return ((name, agent.description) for name, agent in registry.agents.items())


def _models(registry: ModelRegistry) -> Iterable[tuple[str, str]]:
    return ((name, model.name or "") for name, model in registry.models.items())


def _variants(registry: ModelRegistry) -> Iterable[tuple[str, str]]:
    for name, model in registry.models.items():
        for variant, spec in model.variants.items():
            yield f"{name}@{variant}", spec.quantization or ""


def _completed(context: click.Context, incomplete: str, *kinds: _Names) -> "list[CompletionItem]":
    from click.shell_completion import CompletionItem

    try:
        # The object is the `Places` of the options so far, if there were any.
        registry = ModelRegistry.default() if context.obj is None else context.obj.registry()
    except (OrionError, OSError):
        return []
    return [
        CompletionItem(name, help=text)
        for kind in kinds
        for name, text in kind(registry)
        if name.startswith(incomplete)
    ]


def complete_agent(
    context: click.Context, _parameter: click.Parameter, incomplete: str
) -> "list[CompletionItem]":
    """The agents of the registry."""
    return _completed(context, incomplete, _agents)


def complete_name(
    context: click.Context, _parameter: click.Parameter, incomplete: str
) -> "list[CompletionItem]":
    """Agents and models; the variants of a model once its name ends with "@"."""
    if "@" in incomplete:
        return _completed(context, incomplete, _variants)
    return _completed(context, incomplete, _agents, _models)


def complete_source(
    context: click.Context, _parameter: click.Parameter, incomplete: str
) -> "list[CompletionItem]":
    """Models, or else files."""
    from click.shell_completion import CompletionItem

    kinds = [_variants] if "@" in incomplete else [_models]
    found = _completed(context, incomplete, *kinds)
    return found or [CompletionItem(incomplete, type="file")]
