"""The registry of models.json: read, checked as a whole, changed at run time, written back.

`ModelRegistry.resolve` goes from an agent to the files of its models on this machine. The registry
downloads nothing and imports no package.
"""

import json
import os
import threading
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from orion_oie.errors import (
    InvalidRequestError,
    ModelError,
    ModelNotFoundError,
    OrionError,
    RegistryError,
    UnknownAgentError,
)
from orion_oie.models.choices import (
    ChainLink,
    Choice,
    NamedModel,
    Pick,
    VariantState,
    first_here,
)
from orion_oie.models.files import atomic_write
from orion_oie.models.layers import (
    Raw,
    absolute_path,
    changes_between,
    merged,
    with_absolute_paths,
)
from orion_oie.models.local_files import completed, locate
from orion_oie.models.naming import (
    Named,
    Source,
    distinct,
    named_source,
    not_found,
)
from orion_oie.models.registry_check import broken_references, checked_registry
from orion_oie.models.registry_reader import (
    ReadRegistry,
    as_json,
    read_default,
    read_packaged,
    read_registry,
    read_text,
)
from orion_oie.models.specs import (
    CONVERSATION,
    PACKAGED,
    AgentModels,
    AgentSpec,
    ModelSpec,
    PromptFormat,
    ProviderSpec,
    RegistryFile,
    SourceSpec,
    Spec,
)
from orion_oie.schemas.validation import (
    did_you_mean,
    problems_of,
)

if TYPE_CHECKING:
    from orion_oie.models.downloads.cache import ModelCache


@dataclass(frozen=True, slots=True)
class _State:
    """All that a change replaces, at once."""

    data: RegistryFile
    asked_for: frozenset[str] = frozenset()  # named by an address, which asks for their files, too
    names: Mapping[str, str] = field(default_factory=dict)  # the models that addresses stand for
    chains: dict[str, tuple[ChainLink, ...]] = field(default_factory=dict)  # as they were asked for

    @property
    def models(self) -> Mapping[str, ModelSpec]:
        return ChainMap(self.data.models, self.data.custom_models)

    def with_data(self, data: RegistryFile) -> "_State":
        """The same with other content."""
        return replace(self, data=data, chains={})


class ModelRegistry:
    """Agents, models and providers. Changes are seen by the next request. Thread-safe: changes
    follow one another, and who reads sees all of a change or nothing of it.

    base: the folder at which relative paths start. beneath: the registry that `data` extends, as
    JSON. packaged: the packaged agents, for a registry that builds on them.
    """

    def __init__(
        self,
        data: RegistryFile,
        base: Path,
        beneath: Raw | None = None,
        packaged: Mapping[str, AgentSpec] = MappingProxyType({}),
    ) -> None:
        self._state = _State(data)
        self._base = Path(os.path.abspath(base))
        self._beneath = beneath
        self._packaged = dict(packaged)
        # Held by those who change the state, never while a file or a hub is looked at.
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "_lock"}
        state["_state"] = replace(self._state, chains={})  # threads add to it
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ModelRegistry":
        """Read and check a registry file. Raises `RegistryError` with every problem found."""
        return cls._of(read_registry(Path(path).expanduser()))

    @classmethod
    def packaged(cls) -> "ModelRegistry":
        """The registry that comes with the library."""
        return cls._of(read_packaged())

    @classmethod
    def default(cls) -> "ModelRegistry":
        """The registry of a program that names none: the file that `ORION_REGISTRY` names, else
        `models.json` in the user's configuration folder (`user_folders.registry_file`), else the
        packaged one. Raises `RegistryError`."""
        return cls._of(read_default())

    @classmethod
    def parse(cls, text: str, *, base: Path, name: str = "registry") -> "ModelRegistry":
        """Check the text of a registry; relative paths in it start at `base`."""
        return cls._of(read_text(text, base, name))

    @classmethod
    def _of(cls, read: ReadRegistry) -> "ModelRegistry":
        return cls(read.data, read.base, read.beneath, read.packaged)

    def copy(self) -> "ModelRegistry":
        """A registry of the same content, whose changes do not reach this one."""
        state = self._state
        other = ModelRegistry(state.data, self._base, self._beneath, self._packaged)
        other._state = state.with_data(state.data)
        return other

    @property
    def agents(self) -> Mapping[str, AgentSpec]:
        return self._state.data.agents

    @property
    def models(self) -> Mapping[str, ModelSpec]:
        """All models, the custom ones included."""
        return self._state.models

    @property
    def providers(self) -> Mapping[str, ProviderSpec]:
        return self._state.data.providers

    @property
    def data(self) -> RegistryFile:
        """The whole registry."""
        return self._state.data

    def agent(self, agent_id: str) -> AgentSpec:
        """An agent by id. Raises `UnknownAgentError` with the closest name."""
        return _agent_of(self._state.data, agent_id)

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

        Its own primary, lite and fallback models come first, then those of its fallback agents.
        The models of the conversation agent come last for an agent of the packaged registry whose
        models were not changed. Fetched files are looked up in `cache`;
        without one, such models are unavailable. `pick` chooses a variant of each model.
        """
        return [self._choice(link, cache, pick) for link in self.chain(agent_id)]

    def chain(self, agent_id: str) -> tuple[ChainLink, ...]:
        """The models that may answer for an agent, best first, each once: see `resolve`. Looks at
        no file. Raises `UnknownAgentError`."""
        state = self._state
        known = state.chains.get(agent_id)
        if known is None:
            links: dict[str, ChainLink] = {}
            for link in self._links(state.data, agent_id):
                links.setdefault(link.model_id, link)
            known = state.chains[agent_id] = tuple(links.values())
        return known

    def find_source(self, name: str) -> tuple[str, str, SourceSpec]:
        """The model, variant and source that a name stands for: the primary model of an agent, the
        first variant of a model, or `MODEL@VARIANT`. Raises `ModelNotFoundError` with the closest
        name."""
        state = self._state
        agents, models = state.data.agents, state.models
        model_id, _, variant = name.partition("@")
        if model_id in agents and not variant:
            model_id = agents[model_id].models.primary
        if model_id not in models:
            hint = did_you_mean(name, [*agents, *models])
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
        files, why = locate(source, self._base, None)
        if files is None:
            raise ModelNotFoundError(f"{name} cannot be fetched and is not here: {why}", name=name)
        return files

    def add_agent(self, agent_id: str, agent: AgentSpec | Mapping[str, Any]) -> None:
        """Register an agent, or replace one. Raises `RegistryError` and changes nothing if the
        registry would become wrong."""
        with self._lock:
            self._state = _changed(self._state, "agents", agent_id, agent)

    def update_agent(self, agent_id: str, **fields: Any) -> None:
        """Change single fields of an agent: `update_agent("code", system_prompt="Be brief.")`.

        Objects such as `defaults` and `routing` are merged key by key, and None removes a key;
        `models` is replaced as a whole, with its fallbacks. Raises `UnknownAgentError`, and
        `RegistryError` like `add_agent`.
        """
        with self._lock:
            before = self.agent(agent_id).model_dump(mode="json", exclude_defaults=True)
            changes = {name: _as_json(value) for name, value in fields.items()}
            # One level down, as in a file: `models` are the agent's.
            after = merged({"agent": before}, {"agent": changes})["agent"]
            self._state = _changed(self._state, "agents", agent_id, after)

    def remove_agent(self, agent_id: str) -> None:
        """Remove an agent. Raises `UnknownAgentError`, and `RegistryError`, changing nothing, if
        another agent falls back to it or it is the last one."""
        with self._lock:
            state = self._state
            _agent_of(state.data, agent_id)
            rest = {key: spec for key, spec in state.data.agents.items() if key != agent_id}
            data = state.data.model_copy(update={"agents": rest})
            problems = broken_references(data)
            if problems:
                raise RegistryError(
                    f"agent '{agent_id}' cannot be removed: {'; '.join(problems)}", problems
                )
            self._state = state.with_data(data)

    def add_gguf(
        self,
        path: str | os.PathLike[str],
        id: str | None = None,
        agent: str | None = None,
        *,
        prompt_format: PromptFormat | Mapping[str, Any] | Literal["plain"] | None = None,
    ) -> str:
        """Register a GGUF file as a model, and return its id. All facts come from its header.

        path: the file, or anything else that `OrionInferenceEngine(model=...)` takes; a relative
        one starts at the working directory. id: by default it is made from the name of the file.
        agent: this agent answers with the model from now on, and with no other. prompt_format:
        for a file without a chat template, see `ModelSpec`.

        Raises `ModelNotFoundError` or `ModelCorruptError` for what is no whole GGUF file,
        `UnknownAgentError`, and `RegistryError` for an id that cannot be taken.
        """
        if agent is not None:
            self.agent(agent)
        form = _checked_format(prompt_format)
        named = self._named(path, None)
        with self._lock:
            before = self._state
            model_id = self._register(path, named, id, form)
            if agent is not None:
                try:
                    self.update_agent(agent, models={"primary": model_id}, fallback_agent=None)
                except OrionError:  # it was removed meanwhile
                    self._state = before
                    raise
        return model_id

    def add_model(self, model_id: str, model: ModelSpec | Mapping[str, Any]) -> None:
        """Register a custom model, or replace one. Raises `RegistryError` like `add_agent`."""
        with self._lock:
            self._state = self._with_model(model_id, model)

    def name_source(
        self,
        source: Source,
        *,
        model_id: str | None = None,
        prompt_format: PromptFormat | Mapping[str, Any] | Literal["plain"] | None = None,
        cache: "ModelCache | None" = None,
    ) -> str:
        """The id of the model that a source stands for, which is registered if it is new; see
        `OrionInferenceEngine` for the sources.

        Raises `ModelNotFoundError`, `ModelCorruptError` and `ModelError` for what cannot be
        loaded, `DownloadError` for a repository that cannot be looked into, and `RegistryError`
        for a `model_id` that cannot be taken.
        """
        form = _checked_format(prompt_format)
        state = self._state
        known = state.names.get(source) if isinstance(source, str) else None
        if known is not None and known in state.models and model_id is None and form is None:
            return known  # a repository is not asked again
        named = self._named(source, cache)
        with self._lock:
            return self._register(source, named, model_id, form)

    def _register(
        self,
        source: Source,
        named: Named,
        model_id: str | None,
        form: PromptFormat | Literal["plain"] | None,
    ) -> str:
        """The id of the model that a source stands for, registered if it is new. Needs the lock."""
        if model_id is None and form is None:
            same = self._with_file(named.source)
            if same is not None:
                return same
        spec, models = named.spec(form), self.models
        wanted = model_id or named.model_id
        if model_id is None and wanted in models:
            if not _has_source(models[wanted], named.source):
                wanted = distinct(wanted, named.source)
            known_spec = models.get(wanted)
            if known_spec is not None and form is None and _is_up_to_date(known_spec, spec):
                return wanted
        state = self._with_model(wanted, spec)
        if named.source.is_remote:
            state = replace(state, asked_for=state.asked_for | {wanted})
        if named.source.hub is not None and isinstance(source, str):
            state = replace(state, names={**state.names, source: wanted})
        self._state = state
        return wanted

    def model_named(self, name: Source, cache: "ModelCache | None" = None) -> NamedModel:
        """The model that a caller names to answer with: an id, `ID@VARIANT` or a source. Raises
        like `name_source`, and `ModelError` for a model that does not answer questions."""
        found = None
        if isinstance(name, str):
            model_id, _, variant = name.partition("@")
            known = self.models.get(model_id)
            if known is not None:
                if variant:
                    self.find_source(name)  # raises for a variant that it does not have
                found = NamedModel(model_id, variant or None)
        if found is None:
            found = NamedModel(self.name_source(name, cache=cache), None)
        if self.model(found.model_id).type == "embedding":
            raise ModelError(
                f"{name}: this is an embedding model, which makes vectors (engine.embed) and does "
                "not answer questions: name another one",
                model_id=found.model_id,
            )
        return found

    def is_asked_for(self, model_id: str) -> bool:
        """True for a model that was named by a remote address: that asks for its files, too."""
        return model_id in self._state.asked_for

    def answering_with(self, name: Source, cache: "ModelCache | None" = None) -> "ModelRegistry":
        """A copy in which every agent answers with one model, and with no other. Raises like
        `name_source`."""
        other = self.copy()
        model_id, variant = other.model_named(name, cache)
        if variant is not None:
            spec = other.model(model_id)
            only = spec.model_copy(update={"variants": {variant: spec.variants[variant]}})
            data = other._state.data
            section = "models" if model_id in data.models else "custom_models"
            entries = {**getattr(data, section), model_id: only}
            other._state = other._state.with_data(data.model_copy(update={section: entries}))
        models = AgentModels(primary=model_id)
        agents = {
            agent_id: spec.model_copy(update={"models": models, "fallback_agent": None})
            for agent_id, spec in other.agents.items()
        }
        data = other._state.data.model_copy(update={"agents": agents})
        other._state = other._state.with_data(data)
        return other

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the registry. The file is either the old one or the complete new one. Of a registry
        that extends another one, only the differences are written."""
        path = Path(path)
        raw = as_json(self._state.data)
        if path.absolute().parent != self._base:
            raw = with_absolute_paths(raw, self._base)
        if self._beneath is not None:
            extends = raw.pop("extends", PACKAGED)
            if extends != PACKAGED:
                extends = str(absolute_path(extends, self._base))
            raw = {"extends": extends, **changes_between(self._beneath, raw)}
        text = json.dumps(raw, indent=2, ensure_ascii=False) + "\n"
        atomic_write(path, text, sync=True)

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """The JSON Schema of models.json."""
        schema = RegistryFile.model_json_schema()
        model = schema["$defs"]["ModelSpec"]
        # As in the specs, `source` may stand in place of `variants`.
        model["properties"]["source"] = {"$ref": "#/$defs/SourceSpec"}
        model["required"].remove("variants")
        model["oneOf"] = [{"required": ["variants"]}, {"required": ["source"]}]
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "Orion registry",
            **{key: value for key, value in schema.items() if key != "title"},
        }

    def _links(self, data: RegistryFile, agent_id: str) -> Iterator[ChainLink]:
        visited: set[str] = set()
        current: str | None = agent_id
        while current is not None and current not in visited:
            visited.add(current)
            spec = _agent_of(data, current)
            is_own = current == agent_id
            yield ChainLink(current, spec.models.primary, "primary" if is_own else "fallback")
            if spec.models.lite is not None:
                yield ChainLink(current, spec.models.lite, "lite" if is_own else "fallback")
            for model_id in spec.models.fallback:
                yield ChainLink(current, model_id, "fallback")
            current = spec.fallback_agent or self._implied_fallback(data, current)

    def _implied_fallback(self, data: RegistryFile, agent_id: str) -> str | None:
        """The agent that a packaged one falls back to without a word. Where somebody chose models
        of their own, nothing else answers unless they wrote it down."""
        packaged, spec = self._packaged.get(agent_id), data.agents[agent_id]
        is_as_packaged = packaged is not None and packaged.models == spec.models
        return CONVERSATION if is_as_packaged and CONVERSATION in data.agents else None

    def variants(self, model_id: str, cache: "ModelCache | None" = None) -> list[VariantState]:
        """The variants of a model, with their files. Raises `ModelNotFoundError`."""
        found = []
        for name, spec in self.model(model_id).variants.items():
            files, why_not = locate(spec.source, self._base, cache)
            whole = spec if files is None else completed(spec, files)
            found.append(VariantState(name, spec, whole, files, why_not))
        return found

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

    def _with_file(self, source: SourceSpec) -> str | None:
        """The model of the registry that consists of this very file."""
        if source.path is None:
            return None
        path = Path(source.path)
        for model_id, model in self.models.items():
            known = [variant.source.path for variant in model.variants.values()]
            if len(known) == 1 and known[0] and absolute_path(known[0], self._base) == path:
                return model_id
        return None

    def _named(self, source: Source, cache: "ModelCache | None") -> Named:
        """What a source stands for."""
        text = os.fspath(source) if isinstance(source, (str, os.PathLike)) else None
        if not isinstance(text, str) or not text.strip():
            raise InvalidRequestError(f"model: a text or a path is needed, got {source!r}")
        found = named_source(source if isinstance(source, str) else Path(text), cache)
        if found is None:
            raise not_found(text, self.models, self.agents)
        return found

    def _with_model(self, model_id: str, model: object) -> _State:
        """The state with a custom model, new or in place of another. Raises `RegistryError`."""
        if model_id in self._state.data.models:
            raise RegistryError(
                f"'{model_id}' is one of the registry's own models; choose another id"
            )
        return _changed(self._state, "custom_models", model_id, model)


def _agent_of(data: RegistryFile, agent_id: str) -> AgentSpec:
    try:
        return data.agents[agent_id]
    except KeyError:
        known = sorted(data.agents)
        raise UnknownAgentError(
            f"there is no agent '{agent_id}'{did_you_mean(agent_id, data.agents)}; known are "
            f"{', '.join(known)}",
            agent_id=agent_id,
            known=known,
        ) from None


def _changed(state: _State, section: str, key: str, value: object) -> _State:
    """The state with an entry, new or in place of another. Raises `RegistryError`."""
    raw = state.data.model_dump(mode="json", exclude_defaults=True)
    raw.setdefault(section, {})[key] = _as_json(value)
    checked = checked_registry(raw, f"{section}.{key}", [])
    # What did not change stays the same objects, so that comparisons are quick; and a spec keeps
    # what JSON leaves out, the signature of an address.
    entry = value if isinstance(value, Spec) else getattr(checked, section)[key]
    entries = {**getattr(state.data, section), key: entry}
    return state.with_data(state.data.model_copy(update={section: entries}))


def _as_json(value: object) -> object:
    if isinstance(value, Spec):
        return value.model_dump(mode="json", exclude_defaults=True)
    return value


def _has_source(model: ModelSpec, source: SourceSpec) -> bool:
    """True for a model from the same place, whatever signs its address."""
    return any(_place(variant.source) == _place(source) for variant in model.variants.values())


def _place(source: SourceSpec) -> dict[str, Any]:
    return source.model_dump(mode="json", exclude_defaults=True)  # without a signature


def _is_up_to_date(known: ModelSpec, spec: ModelSpec) -> bool:
    """True unless the address was signed anew."""
    sources = [variant.source for variant in spec.variants.values()]
    return all(any(v.source == source for v in known.variants.values()) for source in sources)


def _checked_format(
    given: PromptFormat | Mapping[str, Any] | Literal["plain"] | None,
) -> PromptFormat | Literal["plain"] | None:
    """A prompt format that a caller gives. Raises `RegistryError` for a wrong one."""
    if given is None or isinstance(given, PromptFormat) or given == "plain":
        return given
    try:
        return PromptFormat.model_validate(given)
    except ValidationError as error:
        problems = [f"prompt_format.{problem}" for problem in problems_of(error, PromptFormat)]
        raise RegistryError(
            f'{"; ".join(problems)}; or take "plain" for a base model', problems
        ) from error


def registry_of(source: "str | os.PathLike[str] | ModelRegistry | None") -> ModelRegistry:
    """The registry from an engine's argument: a registry, a path, or None for the default one."""
    if source is None:
        return ModelRegistry.default()
    return source if isinstance(source, ModelRegistry) else ModelRegistry.load(source)
