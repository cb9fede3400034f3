"""Which variant of each model an agent gets, and how it is loaded: by the registry, the agent's
presets, what is here, and what fits.

Decides by `quantization.choose_variant`; loads nothing and evicts nothing.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from orion_oie.backends.base import LoadSpec
from orion_oie.config import EngineConfig, ShardingConfig
from orion_oie.errors import (
    InsufficientMemoryError,
    InvalidRequestError,
    ModelNotFoundError,
    OrionError,
)
from orion_oie.models.quantization import (
    Candidate,
    choose_variant,
    level_of,
)
from orion_oie.models.registry import (
    Choice,
    ModelRegistry,
    VariantState,
)
from orion_oie.models.specs import (
    AgentSpec,
    ModelSpec,
    VariantSpec,
)
from orion_oie.pool.sizes import ModelSizes
from orion_oie.schemas.plans import VariantChoice
from orion_oie.schemas.results import (
    ModelInfo,
    VariantReport,
)
from orion_oie.schemas.units import in_mib

if TYPE_CHECKING:  # nothing of it is needed before something is fetched
    from orion_oie.models.downloads.cache import ModelCache

_BYTES_PER_MB = 10**6


class Placement:
    """The choices of one engine. `budget_bytes` is what models may take, `is_resident(key)` says
    what is in memory: a variant that is there stays the chosen one while it fits."""

    def __init__(
        self,
        registry: ModelRegistry,
        config: EngineConfig,
        cache: "ModelCache",
        sizes: ModelSizes,
        budget_bytes: Callable[[], int],
        is_resident: Callable[[str], bool],
    ) -> None:
        self._registry = registry
        self._config = config
        self._cache = cache
        self._sizes = sizes
        self._budget_bytes = budget_bytes
        self._is_resident = is_resident
        self._last: dict[tuple[str, str], tuple[object, VariantChoice]] = {}

    def choices(self, agent_id: str) -> list[Choice]:
        """The models that may answer for an agent, best first; see `ModelRegistry.resolve`. Of a
        model of which no variant fits, the smallest is among them: whoever loads it hears why not.
        """
        return self._registry.resolve(agent_id, self._cache, self._pick)

    def load_spec(self, choice: Choice) -> LoadSpec:
        """What to load for a choice that is available."""
        files = choice.files
        if files is None:
            assert choice.source is not None
            files = self._cache.paths(choice.source)
        agent = self._registry.agent(choice.agent_id)
        model = self._registry.model(choice.model_id)
        variant = model.variants.get(choice.variant)
        if variant is None:
            raise ModelNotFoundError(
                f"'{choice.model_id}' has no variant '{choice.variant}' any more; ask again",
                model_id=choice.model_id,
            )
        return LoadSpec(
            info=_info(choice.model_id, choice.variant, model),
            files=files,
            source=choice.source,
            sharding=self._sharding(agent, variant),
            slots=self._config.serving.slot_count,
            context_length=self._config.serving.context_length,
            threads=self._config.serving.threads,
            gpu_layers=_gpu_layers(self._config),
            parked_bytes=self._config.memory.host_cache_bytes,
            prompt_format=model.prompt_format,
            expected_bytes=int(variant.size_mb * _BYTES_PER_MB),
            is_progressive=self.loading_strategy(choice.agent_id) == "progressive",
        )

    def embedding_spec(self, model_id: str) -> LoadSpec:
        """What to load to embed texts with a model of the registry, in its first variant that is
        here. Raises `ModelNotFoundError`, `InvalidRequestError` for a model of another type."""
        model = self._registry.model(model_id)
        if model.type != "embedding":
            raise InvalidRequestError(f"'{model_id}' is a {model.type}, not an embedding model")
        states = self._registry.variants(model_id, self._cache)
        state = next((state for state in states if state.files is not None), None)
        if state is None or state.files is None:
            reasons = "; ".join(f"{state.name}: {state.why_not_here}" for state in states)
            raise ModelNotFoundError(
                f"the embedding model '{model_id}' is not on this machine: {reasons}; fetch it "
                f"with 'orion-oie pull {model_id}'",
                model_id=model_id,
            )
        return LoadSpec(
            info=_info(model_id, state.name, model),
            files=state.files,
            threads=self._config.serving.threads,
            gpu_layers=_gpu_layers(self._config),
            is_embedding=True,
            expected_bytes=int(state.spec.size_mb * _BYTES_PER_MB),
        )

    def loading_strategy(self, agent_id: str) -> str:
        """How an agent's models are loaded."""
        agent = self._registry.agent(agent_id)
        return agent.loading_strategy or self._config.loading.strategy

    def report(self, choice: Choice, reserved_bytes: int) -> VariantReport:
        """The variant of a choice, for a receipt."""
        quantization = self._registry.model(choice.model_id).variants[choice.variant].quantization
        picked = choice.picked
        return VariantReport(
            quantization=quantization,
            level=level_of(quantization),
            reduction=None if picked is None else picked.reduction,
            reason="" if picked is None else picked.reason,
            reserved_bytes=reserved_bytes,
            budget_bytes=self._budget_bytes(),
        )

    def explained(self, error: InsufficientMemoryError, choice: Choice) -> InsufficientMemoryError:
        """The same error, with the variants of the model that would fit."""
        budget_bytes = error.details.get("budget_bytes")
        if budget_bytes is None:
            return error
        there_bytes = budget_bytes - error.details["pinned_bytes"]
        if error.details["needed_bytes"] <= there_bytes:
            return error  # it is not for its size
        states = self._registry.variants(choice.model_id, self._cache)
        candidates = self._candidates(choice.agent_id, choice.model_id, states)
        fitting = [
            candidate
            for candidate, state in zip(candidates, states, strict=True)
            if (candidate.is_here or state.is_fetchable)
            and candidate.memory_bytes <= there_bytes
            and candidate.variant != choice.variant
        ]
        if fitting:
            listed = ", ".join(
                f"{c.variant} ({in_mib(c.memory_bytes)}{'' if c.is_here else ', to be fetched'})"
                for c in fitting
            )
            advice = f"of its variants, this would fit: {listed}"
        else:
            advice = "none of its other variants would fit"
        return InsufficientMemoryError(
            f"{error.message}; {advice}",
            **{**error.details, "would_fit": [c.variant for c in fitting]},
        )

    def _sharding(self, agent: AgentSpec, variant: VariantSpec) -> ShardingConfig:
        told = agent.sharding or variant.sharding
        if told is None:
            return self._config.loading.sharding
        update = {"num_shards": told.num_shards, "initial_shards": told.initial_shards}
        if agent.sharding is not None and "enabled" in agent.sharding.model_fields_set:
            update["enabled"] = agent.sharding.enabled
        return self._config.loading.sharding.model_copy(update=update)

    def _pick(
        self, agent_id: str, model_id: str, variants: Sequence[VariantState]
    ) -> VariantChoice:
        agent = self._registry.agent(agent_id)
        limit_mb = agent.optimized_size
        usable = [state for state in variants if self._can_be_used(state)]
        # What a variant needs is not among it: that is measured again and again.
        asked = (
            agent.quantization,
            limit_mb,
            [(state.name, state.spec, state.files is not None) for state in variants],
        )
        last_asked, last = self._last.get((agent_id, model_id), (None, None))
        if last is not None and last_asked == asked:
            if len(usable) <= 1:
                return last
            chosen = next(state for state in variants if state.name == last.variant)
            if self._is_resident(f"{model_id}@{last.variant}"):
                needed_bytes = self._needed_bytes(agent_id, model_id, chosen)
                if needed_bytes is None or needed_bytes <= self._budget_bytes():
                    return last
        candidates = self._candidates(agent_id, model_id, variants)
        budget_bytes = self._budget_bytes()
        choice = choose_variant(
            candidates,
            wanted=agent.quantization,
            budget_bytes=budget_bytes,
            size_limit_bytes=None if limit_mb is None else int(limit_mb * _BYTES_PER_MB),
        )
        if choice.variant is None:
            had = [c for c in candidates if c.is_here or c.can_be_fetched] or candidates
            smallest = min(had, key=lambda c: (not c.is_here, c.memory_bytes))
            choice = choice.model_copy(update={"variant": smallest.variant})
        self._last[agent_id, model_id] = asked, choice
        return choice

    def _candidates(
        self, agent_id: str, model_id: str, variants: Sequence[VariantState]
    ) -> list[Candidate]:
        return [
            Candidate(
                variant=state.name,
                quantization=state.spec.quantization,
                size_bytes=int(state.spec.size_mb * _BYTES_PER_MB),
                needed_bytes=self._needed_bytes(agent_id, model_id, state),
                is_here=state.files is not None,
                can_be_fetched=state.files is None and self._can_be_used(state),
            )
            for state in variants
        ]

    def _can_be_used(self, state: VariantState) -> bool:
        return state.files is not None or (state.is_fetchable and self._config.download.auto)

    def _needed_bytes(self, agent_id: str, model_id: str, state: VariantState) -> int | None:
        source = state.spec.source if state.is_fetchable else None
        if state.files is None and source is None:
            return None
        spec = self.load_spec(
            Choice(agent_id, model_id, "primary", state.name, state.files, source=source)
        )
        try:
            return self._sizes.most_bytes(spec)
        except OrionError:  # whoever loads it hears what is wrong with its files
            return None


def _gpu_layers(config: EngineConfig) -> int | None:
    return None if config.serving.gpu_layers == "auto" else config.serving.gpu_layers


def _info(model_id: str, variant: str, model: ModelSpec) -> ModelInfo:
    return ModelInfo(
        model_id=model_id,
        variant=variant,
        name=model.name,
        version=model.version,
        license=model.license,
    )
