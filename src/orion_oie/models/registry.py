"""The registry of models.json: read, checked as a whole, changed at run time, written back.

`ModelRegistry.resolve` goes from an agent to the files of its models on this machine. The registry
downloads nothing and imports no package.
"""

import importlib.util
import json
import os
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from orion_oie.errors import ModelNotFoundError, RegistryError, UnknownAgentError
from orion_oie.models.files import atomic_write
from orion_oie.models.specs import (
    CONVERSATION,
    AgentSpec,
    ModelSpec,
    ProviderSpec,
    RegistryFile,
    SourceSpec,
    VariantSpec,
)
from orion_oie.schemas.plans import VariantChoice
from orion_oie.schemas.validation import (
    did_you_mean,
    problems_of,
)

if TYPE_CHECKING:
    from orion_oie.models.downloads.cache import ModelCache

ChoiceRole = Literal["primary", "lite", "fallback"]


@dataclass(frozen=True, slots=True)
class ChainLink:
    """One model of an agent's chain: whose model it is, and in which role."""

    agent_id: str
    model_id: str
    role: ChoiceRole


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
    """A variant of a model, with its files on this machine or the reason that there are none."""

    name: str
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


@dataclass(frozen=True, slots=True)
class _Chains:
    """The chains of agents that were asked for, in one state of the registry."""

    data: RegistryFile
    by_agent: dict[str, tuple[ChainLink, ...]]


class ModelRegistry:
    """Agents, models and providers. Changes are seen by the next request."""

    def __init__(self, data: RegistryFile, base: Path) -> None:
        self._data = data
        self._base = base
        self._chains = _Chains(data, {})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ModelRegistry":
        """Read and check a registry file. Raises `RegistryError` with every problem found."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RegistryError(f"cannot read the registry {path}: {error}") from error
        return cls.parse(text, base=path.parent, name=str(path))

    @classmethod
    def packaged(cls) -> "ModelRegistry":
        """The registry that comes with the library."""
        return cls.load(_packaged_file("models.json"))

    @classmethod
    def parse(cls, text: str, *, base: Path, name: str = "registry") -> "ModelRegistry":
        """Check the text of a registry; relative paths in it start at `base`."""
        duplicates: list[str] = []
        try:
            raw = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, duplicates))
        except json.JSONDecodeError as error:
            raise RegistryError(
                f"{name} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise RegistryError(f"{name} cannot be read as JSON: {error}") from error
        return cls(_checked(raw, name, duplicates), base)

    @property
    def agents(self) -> Mapping[str, AgentSpec]:
        return self._data.agents

    @property
    def models(self) -> Mapping[str, ModelSpec]:
        """All models, the custom ones included."""
        return ChainMap(self._data.models, self._data.custom_models)

    @property
    def providers(self) -> Mapping[str, ProviderSpec]:
        return self._data.providers

    @property
    def data(self) -> RegistryFile:
        """The whole registry."""
        return self._data

    def agent(self, agent_id: str) -> AgentSpec:
        """An agent by id. Raises `UnknownAgentError` with the closest name."""
        try:
            return self._data.agents[agent_id]
        except KeyError:
            hint = did_you_mean(agent_id, self._data.agents)
            known = ", ".join(sorted(self._data.agents))
            raise UnknownAgentError(
                f"there is no agent '{agent_id}'{hint}; known are {known}",
                agent_id=agent_id,
                known=sorted(self._data.agents),
            ) from None

    def model(self, model_id: str) -> ModelSpec:
        """A model by id. Raises `ModelNotFoundError` with the closest name."""
        models = self.models
        if model_id not in models:
            raise ModelNotFoundError(
                f"there is no model '{model_id}'{did_you_mean(model_id, models)}",
                model_id=model_id,
            )
        return models[model_id]

    def resolve(
        self, agent_id: str, cache: "ModelCache | None" = None, pick: Pick = first_here
    ) -> list[Choice]:
        """The models that may answer for an agent, best first, each at most once.

        Its own primary, lite and fallback models come first, then those of its fallback
        agents, those of the conversation agent last. Fetched files are looked up in `cache`;
        without one, such models are unavailable. `pick` chooses a variant of each model.
        """
        return [self._choice(link, cache, pick) for link in self.chain(agent_id)]

    def chain(self, agent_id: str) -> tuple[ChainLink, ...]:
        """The models that may answer for an agent, best first, each once: see `resolve`. Looks at
        no file. Raises `UnknownAgentError`."""
        chains = self._chains
        if chains.data is not self._data:  # the registry was changed
            chains = self._chains = _Chains(self._data, {})
        known = chains.by_agent.get(agent_id)
        if known is None:
            links: dict[str, ChainLink] = {}
            for link in self._links(agent_id):
                links.setdefault(link.model_id, link)
            known = chains.by_agent[agent_id] = tuple(links.values())
        return known

    def find_source(self, name: str) -> tuple[str, str, SourceSpec]:
        """The model, variant and source that a name stands for: the primary model of an agent, the
        first variant of a model, or `MODEL@VARIANT`. Raises `ModelNotFoundError` with the closest
        name."""
        model_id, _, variant = name.partition("@")
        if model_id in self._data.agents and not variant:
            model_id = self._data.agents[model_id].models.primary
        models = self.models
        if model_id not in models:
            hint = did_you_mean(name, [*self._data.agents, *models])
            raise ModelNotFoundError(f"there is no agent and no model '{name}'{hint}", name=name)
        variants = models[model_id].variants
        variant = variant or next(iter(variants))
        if variant not in variants:
            raise ModelNotFoundError(
                f"'{model_id}' has no variant '{variant}'{did_you_mean(variant, variants)}; it has "
                f"{', '.join(variants)}",
                name=name,
            )
        return model_id, variant, variants[variant].source

    def local_files(self, source: SourceSpec, name: str) -> tuple[Path, ...]:
        """The files of a `path` or `package` source. Raises `ModelNotFoundError`."""
        files, why = _locate(source, self._base, None)
        if files is None:
            raise ModelNotFoundError(f"{name} cannot be fetched and is not here: {why}", name=name)
        return files

    def add_agent(self, agent_id: str, agent: AgentSpec | Mapping[str, Any]) -> None:
        """Register an agent, or replace one. Raises `RegistryError` and changes nothing if the
        registry would become wrong."""
        self._change("agents", agent_id, agent)

    def add_model(self, model_id: str, model: ModelSpec | Mapping[str, Any]) -> None:
        """Register a custom model, or replace one. Raises `RegistryError` like `add_agent`."""
        if model_id in self._data.models:
            raise RegistryError(
                f"'{model_id}' is one of the registry's own models; choose another id"
            )
        self._change("custom_models", model_id, model)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the registry. The file is either the old one or the complete new one."""
        text = self._data.model_dump_json(indent=2, exclude_defaults=True) + "\n"
        atomic_write(Path(path), text, sync=True)

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """The JSON Schema of models.json."""
        schema = RegistryFile.model_json_schema()
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "Orion registry",
            **{key: value for key, value in schema.items() if key != "title"},
        }

    def _links(self, agent_id: str) -> Iterator[ChainLink]:
        visited: set[str] = set()
        current: str | None = agent_id
        while current is not None and current not in visited:
            visited.add(current)
            spec = self.agent(current)
            is_own = current == agent_id
            yield ChainLink(current, spec.models.primary, "primary" if is_own else "fallback")
            if spec.models.lite is not None:
                yield ChainLink(current, spec.models.lite, "lite" if is_own else "fallback")
            for model_id in spec.models.fallback:
                yield ChainLink(current, model_id, "fallback")
            current = spec.fallback_agent
            if current is None and CONVERSATION in self._data.agents:
                current = CONVERSATION

    def variants(self, model_id: str, cache: "ModelCache | None" = None) -> list[VariantState]:
        """The variants of a model, with their files. Raises `ModelNotFoundError`."""
        return [
            VariantState(name, spec, *_locate(spec.source, self._base, cache))
            for name, spec in self.model(model_id).variants.items()
        ]

    def _choice(self, link: ChainLink, cache: "ModelCache | None", pick: Pick) -> Choice:
        agent_id, model_id, role = link.agent_id, link.model_id, link.role
        states = self.variants(model_id, cache)
        picked = pick(agent_id, model_id, states)
        chosen = next(state for state in states if state.name == picked.variant)
        if chosen.files is not None:
            return Choice(agent_id, model_id, role, chosen.name, chosen.files, picked=picked)
        reasons = "; ".join(f"{state.name}: {state.why_not_here}" for state in states)
        source = chosen.spec.source if chosen.is_fetchable else None
        return Choice(agent_id, model_id, role, chosen.name, None, reasons, source, picked)

    def _change(self, section: str, key: str, value: object) -> None:
        raw = self._data.model_dump(mode="json", exclude_defaults=True)
        if isinstance(value, (AgentSpec, ModelSpec)):
            value = value.model_dump(mode="json", exclude_defaults=True)
        raw.setdefault(section, {})[key] = value
        self._data = _checked(raw, f"{section}.{key}", [])


def registry_of(source: "str | os.PathLike[str] | ModelRegistry | None") -> ModelRegistry:
    """The registry from an engine's argument: a registry, a path, or None for the packaged one."""
    if source is None:
        return ModelRegistry.packaged()
    return source if isinstance(source, ModelRegistry) else ModelRegistry.load(source)


def _packaged_file(name: str) -> Path:
    inside = Path(__file__).resolve().parents[1] / name
    # The wheel carries the file in the package; a source checkout keeps it at its top level.
    return inside if inside.exists() else inside.parents[2] / name


def _unique(pairs: list[tuple[str, Any]], duplicates: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            duplicates.append(f"'{key}' appears twice in one object")
        found[key] = value
    return found


def _checked(raw: object, name: str, duplicates: list[str]) -> RegistryFile:
    """The checked registry. Raises one `RegistryError` that lists all problems."""
    problems = list(duplicates)
    try:
        data = RegistryFile.model_validate(raw)
    except ValidationError as error:
        problems += problems_of(error, RegistryFile)
    else:
        problems += _broken_references(data)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise RegistryError(f"{name} has {count}:\n{listed}", problems)
    return data


def _broken_references(data: RegistryFile) -> list[str]:
    models = {**data.models, **data.custom_models}
    problems = [
        f"custom_models.{model_id}: 'models' has the same id"
        for model_id in data.custom_models
        if model_id in data.models
    ]
    if not data.agents:
        problems.append("agents: there is none")
    for agent_id, agent in data.agents.items():
        wanted = [("primary", agent.models.primary), ("lite", agent.models.lite)]
        wanted += [("fallback", model_id) for model_id in agent.models.fallback]
        problems += [
            _unknown(f"agents.{agent_id}.models.{role}", "model", model_id, models)
            for role, model_id in wanted
            if model_id is not None and model_id not in models
        ]
        if agent.fallback_agent is not None and agent.fallback_agent not in data.agents:
            where = f"agents.{agent_id}.fallback_agent"
            problems.append(_unknown(where, "agent", agent.fallback_agent, data.agents))
    listed = {f"model_groups.{name}": ids for name, ids in data.model_groups.items()}
    listed |= {f"recommendations.{n}.models": r.models for n, r in data.recommendations.items()}
    for where, model_ids in listed.items():
        problems += [
            _unknown(where, "model", model_id, models)
            for model_id in model_ids
            if model_id not in models
        ]
    return problems + _fallback_cycles(data.agents)


def _unknown(where: str, kind: str, name: str, known: Mapping[str, Any]) -> str:
    return f"{where}: there is no {kind} '{name}'{did_you_mean(name, known)}"


def _fallback_cycles(agents: Mapping[str, AgentSpec]) -> list[str]:
    problems = []
    reported: set[str] = set()
    for start in agents:
        path: list[str] = []
        current: str | None = start
        while current is not None and current in agents and current not in {*path, *reported}:
            path.append(current)
            current = agents[current].fallback_agent
        if current is not None and current in path:
            circle = path[path.index(current) :]
            problems.append(f"fallback agents go in a circle: {' -> '.join([*circle, current])}")
            reported.update(circle)
    return problems


def _locate(
    source: SourceSpec, base: Path, cache: "ModelCache | None"
) -> tuple[tuple[Path, ...] | None, str]:
    """The files of a source on this machine, or None and the reason that there are none."""
    if source.path is not None:
        path = base / source.path
        return ((path,), "") if path.exists() else (None, f"there is no file {path}")
    if source.package is not None and source.file is not None:
        return _locate_in_package(source.package, source.file)
    files = cache.find(source) if cache is not None else None
    return files, f"not downloaded from {source.hub or source.url}"


def _locate_in_package(package: str, file: str) -> tuple[tuple[Path, ...] | None, str]:
    # find_spec does not import the package: importing it could load llama.cpp into this process.
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module of that name was made by hand and has no spec
        spec = None
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or []:
        path = Path(folder) / file
        if path.exists():
            return (path,), ""
    if spec is None:
        return None, f"the package {package} is not installed"
    return None, f"the package {package} has no file {file}"
