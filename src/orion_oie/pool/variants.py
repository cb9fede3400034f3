"""Selects the variant of each model that an agent gets, and so the candidates of its chain: by the
registry, the agent's presets, the files on this machine, and the memory budget.

Decides by `quantization.choose_variant`; loads nothing and evicts nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from orion_oie.backends.base import Footprint, LoadSpec
from orion_oie.config import EngineConfig, ShardingConfig
from orion_oie.errors import InsufficientMemoryError, InvalidRequestError, ModelNotFoundError
from orion_oie.models.choices import ChainLink, NamedModel
from orion_oie.models.keys import ModelKey
from orion_oie.models.quantization import VariantOption, choose_variant, level_of
from orion_oie.models.registry import ModelRegistry
from orion_oie.models.specs import AgentSpec, VariantSpec
from orion_oie.pool.candidate import Candidate
from orion_oie.pool.files import LOOK_AGAIN_S, Look, ModelFiles, VariantFiles
from orion_oie.pool.sizes import ModelSizes
from orion_oie.schemas.plans import VariantChoice
from orion_oie.schemas.results import VariantReport
from orion_oie.schemas.units import in_mib

_BYTES_PER_MB = 10**6


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The candidates of one agent, and the facts that they were chosen by."""

    agent: AgentSpec
    looks: tuple[Look, ...]
    revisions: tuple[int, int]
    candidates: tuple[Candidate, ...]


class VariantSelector:
    """The candidates of one engine's agents.

    `budget_bytes()` is the memory that models may take; `is_resident(key)` is True for a model in
    memory or being loaded: such a variant stays selected while it fits.
    """

    def __init__(
        self,
        registry: ModelRegistry,
        config: EngineConfig,
        files: ModelFiles,
        sizes: ModelSizes,
        budget_bytes: Callable[[], int],
        is_resident: Callable[[str], bool],
    ) -> None:
        self._registry = registry
        self._config = config
        self._files = files
        self._sizes = sizes
        self._budget_bytes = budget_bytes
        self._is_resident = is_resident
        self._picks: dict[tuple[str, str], tuple[object, VariantChoice]] = {}
        self._chosen: dict[tuple[str, NamedModel | None], _Chosen] = {}
        self._reports: dict[ModelKey, tuple[tuple[VariantChoice, int, int], VariantReport]] = {}

    def candidates(
        self, agent_id: str, named: NamedModel | None = None, *, is_fresh: bool = False
    ) -> tuple[Candidate, ...]:
        """The models that may answer for an agent, best first, each in one variant; the one that
        the caller `named` and no other. Of a model of which no variant fits, the smallest is among
        them: its load says why not.

        The age of the file checks that it relies on:
        1. checked now, if `is_fresh`;
        2. a few seconds, if a candidate is in memory: the memory manager checks more often;
        3. checked now, if none is: the request waits for a load anyway.

        Raises `UnknownAgentError`.
        """
        agent = self._registry.agent(agent_id)
        last = self._chosen.get((agent_id, named))
        if last is None or last.agent is not agent or is_fresh:
            return self._choose(agent_id, agent, named, max_age_s=0.0)
        if self._is_current(last):
            return last.candidates
        is_any_resident = any(self._is_resident(one.key) for one in last.candidates)
        max_age_s = LOOK_AGAIN_S if is_any_resident else 0.0
        return self._choose(agent_id, agent, named, max_age_s)

    def _is_current(self, last: _Chosen) -> bool:
        """True when nothing has changed, and the best candidate is in memory and fits."""
        best = last.candidates[0]
        return (
            best.is_available
            and self._is_resident(best.key)
            and last.revisions == (self._files.revision, self._sizes.revision)
            and (best.max_bytes is None or best.max_bytes <= self._budget_bytes())
            and self._files.are_recent(last.looks)
        )

    def _choose(
        self, agent_id: str, agent: AgentSpec, named: NamedModel | None, max_age_s: float
    ) -> tuple[Candidate, ...]:
        links = self._registry.chain(agent_id)
        if named is not None:
            links = (ChainLink(agent_id, named.model_id, "primary", named.variant),)
        # Read before the looks: what comes in between is news to the next request.
        revisions = self._files.revision, self._sizes.revision
        looks = tuple(self._files.of(link.model_id, max_age_s) for link in links)
        last = self._chosen.get((agent_id, named))
        is_known = (
            last is not None
            and last.agent is agent
            and last.revisions == revisions
            and _are_same(last.looks, looks)
        )
        if last is not None and is_known:
            picks = [self._pick(link, look) for link, look in zip(links, looks, strict=True)]
            chosen = zip(last.candidates, picks, strict=True)
            if all(one.picked is pick for one, pick in chosen):
                return last.candidates
        candidates = tuple(
            self._candidate(link, look) for link, look in zip(links, looks, strict=True)
        )
        self._chosen[agent_id, named] = _Chosen(agent, looks, revisions, candidates)
        return candidates

    def _candidate(self, link: ChainLink, look: Look) -> Candidate:
        picked = self._pick(link, look)
        chosen = next(one for one in look.variants if one.state.name == picked.variant)
        agent = self._registry.agent(link.agent_id)
        is_progressive = self.loading_strategy(link.agent_id) == "progressive"
        spec, footprint, load_s = chosen.spec, None, None
        if spec is not None:
            spec = replace(
                spec,
                sharding=self._sharding(agent, chosen.state.spec),
                is_progressive=is_progressive,
            )
            if chosen.estimate is not None:
                footprint = self._sizes.corrected(spec, chosen.estimate)
                load_s = self._sizes.load_s(spec, chosen.estimate)
        why_unavailable = ""
        if not chosen.is_on_disk:
            why_unavailable = _why_none(look.variants)
        return Candidate(
            agent_id=link.agent_id,
            model_id=link.model_id,
            role=link.role,
            picked=picked,
            key=chosen.key,
            quantization=chosen.state.spec.quantization or "",
            spec=spec,
            footprint=footprint,
            load_s=load_s,
            file_bytes=chosen.file_bytes,
            is_on_disk=chosen.is_on_disk,
            is_available=self._can_be_used(chosen),
            can_be_fetched=chosen.state.spec.source.is_remote,
            is_progressive=is_progressive,
            why_unavailable=why_unavailable,
            error=chosen.error,
            price=look.model.price,
        )

    def embedding_spec(self, model_id: str) -> LoadSpec:
        """The spec that loads an embedding model of the registry, in its first variant on this
        machine.

        Raises `ModelNotFoundError`, `InvalidRequestError` for a model of another type.
        """
        model = self._registry.model(model_id)
        if model.type != "embedding":
            raise InvalidRequestError(f"'{model_id}' is a {model.type}, not an embedding model")
        look = self._files.of(model_id)
        if _first_on_disk(look) is None:
            look = self._files.of(model_id, max_age_s=0.0)  # it may have been fetched just now
        chosen = _first_on_disk(look)
        if chosen is None or chosen.spec is None:
            reasons, advice = _why_none(look.variants), ""
            if any(one.state.is_fetchable for one in look.variants):
                advice = f"; fetch it with 'orion-oie pull {model_id}'"
            raise ModelNotFoundError(
                f"the embedding model '{model_id}' is not on this machine: {reasons}{advice}",
                model_id=model_id,
            )
        return chosen.spec

    def loading_strategy(self, agent_id: str) -> str:
        """The loading strategy of an agent's models: "progressive" or "sequential"."""
        agent = self._registry.agent(agent_id)
        return agent.loading_strategy or self._config.loading.strategy

    def report(self, candidate: Candidate, reserved_bytes: int) -> VariantReport:
        """The variant of a candidate, for a receipt."""
        facts = (candidate.picked, reserved_bytes, self._budget_bytes())
        last_facts, report = self._reports.get(candidate.key, (None, None))
        if report is None or last_facts != facts:
            report = VariantReport(
                quantization=candidate.quantization,
                level=level_of(candidate.quantization),
                reduction=candidate.picked.reduction,
                reason=candidate.picked.reason,
                reserved_bytes=reserved_bytes,
                budget_bytes=facts[-1],
            )
            self._reports[candidate.key] = facts, report
        return report

    def explained(
        self, error: InsufficientMemoryError, candidate: Candidate
    ) -> InsufficientMemoryError:
        """The same error, with the variants of the model that would fit."""
        budget_bytes = error.details.get("budget_bytes")
        if budget_bytes is None:
            return error
        left_bytes = budget_bytes - error.details["pinned_bytes"]
        if error.details["needed_bytes"] <= left_bytes:
            return error  # its size is not the problem
        fitting = [
            option
            for option in self._options(self._files.of(candidate.model_id))
            if (option.is_here or option.can_be_fetched)
            and option.memory_bytes <= left_bytes
            and option.variant != candidate.key.variant
        ]
        if fitting:
            listed = ", ".join(
                f"{o.variant} ({in_mib(o.memory_bytes)}{'' if o.is_here else ', to be fetched'})"
                for o in fitting
            )
            advice = f"of its variants, this would fit: {listed}"
        else:
            advice = "none of its other variants would fit"
        return InsufficientMemoryError(
            f"{error.message}; {advice}",
            **{**error.details, "would_fit": [option.variant for option in fitting]},
        )

    def _sharding(self, agent: AgentSpec, variant: VariantSpec) -> ShardingConfig:
        preset = agent.sharding or variant.sharding
        if preset is None:
            return self._config.loading.sharding
        update = {"num_shards": preset.num_shards, "initial_shards": preset.initial_shards}
        if agent.sharding is not None and "enabled" in agent.sharding.model_fields_set:
            update["enabled"] = agent.sharding.enabled
        return self._config.loading.sharding.model_copy(update=update)

    # -- one model's variant

    def _pick(self, link: ChainLink, look: Look) -> VariantChoice:
        """The variant of a model for an agent.

        1. The last choice while nothing has changed and there is no alternative, or while it is in
           memory and fits.
        2. Otherwise the choice of `choose_variant` among the usable ones.
        3. If there is none, the smallest one, so that its load explains why it does not fit.
        """
        if link.variant is not None:
            return VariantChoice(variant=link.variant, reason="asked for by name")
        agent = self._registry.agent(link.agent_id)
        asked = (agent.quantization, agent.optimized_size, look.choices)
        last_asked, last = self._picks.get((link.agent_id, link.model_id), (None, None))
        if last is not None and asked == last_asked:
            usable = sum(map(self._can_be_used, look.variants))
            if usable <= 1:
                return last
            chosen = next(one for one in look.variants if one.state.name == last.variant)
            if self._is_resident(chosen.key):
                footprint = self._corrected(chosen)
                if footprint is None or footprint.max_bytes <= self._budget_bytes():
                    return last
        limit_mb = agent.optimized_size
        options = self._options(look)
        choice = choose_variant(
            options,
            wanted=agent.quantization,
            budget_bytes=self._budget_bytes(),
            size_limit_bytes=None if limit_mb is None else int(limit_mb * _BYTES_PER_MB),
        )
        if choice.variant is None:
            usable_options = [o for o in options if o.is_here or o.can_be_fetched] or options
            smallest = min(usable_options, key=lambda o: (not o.is_here, o.memory_bytes))
            choice = choice.model_copy(update={"variant": smallest.variant})
        if last is not None and choice == last:
            choice = last  # the same object: comparisons are quick
        self._picks[link.agent_id, link.model_id] = asked, choice
        return choice

    def _options(self, look: Look) -> list[VariantOption]:
        options = []
        for one in look.variants:
            footprint = self._corrected(one)
            options.append(
                VariantOption(
                    variant=one.state.name,
                    quantization=one.state.spec.quantization or "",
                    size_bytes=one.state.spec.size_bytes or one.file_bytes,
                    needed_bytes=None if footprint is None else footprint.max_bytes,
                    is_here=one.is_on_disk,
                    can_be_fetched=not one.is_on_disk and self._can_be_used(one),
                )
            )
        return options

    def _can_be_used(self, one: VariantFiles) -> bool:
        if one.is_on_disk or not one.state.is_fetchable:
            return one.is_on_disk
        auto = self._config.download.auto
        return self._registry.is_asked_for(one.key.model_id) if auto is None else auto

    def _corrected(self, one: VariantFiles) -> Footprint | None:
        if one.spec is None or one.estimate is None:
            return None
        return self._sizes.corrected(one.spec, one.estimate)


def _are_same(some: Sequence[Look], others: Sequence[Look]) -> bool:
    return len(some) == len(others) and all(
        a.variants is b.variants and a.model is b.model for a, b in zip(some, others, strict=True)
    )


def _first_on_disk(look: Look) -> VariantFiles | None:
    return next((one for one in look.variants if one.is_on_disk), None)


def _why_none(variants: Sequence[VariantFiles]) -> str:
    """The reason that no variant is on this machine; the same one is given once."""
    reasons = {one.state.name: one.state.why_not_here for one in variants}
    if len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    return "; ".join(f"{name}: {why}" for name, why in reasons.items())
