"""What may answer for an agent: the links of its chain, and the variants of each model. Pure.

`registry` makes these from models.json and the files on this machine; the pool chooses among them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from orion_oie.models.specs import SourceSpec, VariantSpec
from orion_oie.schemas.plans import VariantChoice


class NamedModel(NamedTuple):
    """A model that a caller names, in one variant or in the best one."""

    model_id: str
    variant: str | None


ChoiceRole = Literal["primary", "lite", "fallback"]


@dataclass(frozen=True, slots=True)
class ChainLink:
    """One model of an agent's chain: whose model it is, in which role, and in which variant if one
    was named."""

    agent_id: str
    model_id: str
    role: ChoiceRole
    variant: str | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One model that may answer for an agent, in the order in which they are tried.

    `files` is None when the model is not on this machine; `why_unavailable` then gives the reason.
    `source` is the source of its files, if they can be fetched. `picked` explains the choice of the
    variant.
    """

    agent_id: str
    model_id: str
    role: ChoiceRole
    variant: str
    files: tuple[Path, ...] | None
    why_unavailable: str = ""
    source: SourceSpec | None = field(default=None, compare=False)
    picked: VariantChoice | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class VariantState:
    """A variant of a model, with its files on this machine or the reason that there are none.
    `stated` is what the registry states; `spec` has the rest from the header of the files."""

    name: str
    stated: VariantSpec
    spec: VariantSpec
    files: tuple[Path, ...] | None
    why_not_here: str = ""

    @property
    def is_fetchable(self) -> bool:
        return self.files is None and self.spec.source.is_remote


Pick = Callable[[str, str, Sequence[VariantState]], VariantChoice]
"""A choice among the variants of a model for an agent: `(agent_id, model_id, variants)`, with the
variants in the order of the registry."""


def first_here(_agent_id: str, _model_id: str, variants: Sequence[VariantState]) -> VariantChoice:
    """The first variant on this machine, else the first that can be fetched, else the first."""
    for state in variants:
        if state.files is not None:
            return VariantChoice(variant=state.name, reason="the first one that is here")
    fetchable = next((state for state in variants if state.is_fetchable), variants[0])
    return VariantChoice(variant=fetchable.name, reason="none is here")
