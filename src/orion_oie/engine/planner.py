"""What a request would do, without doing it: which agent, model and variant, what would be loaded
and what would have to go. The counterpart of the receipt, before the fact.

Loads, fetches and evicts nothing.
"""

from orion_oie.backends.base import LoadSpec
from orion_oie.engine.breaker import BreakerBoard
from orion_oie.errors import OrionError
from orion_oie.models.registry import Choice
from orion_oie.pool.budget import MemoryBudget
from orion_oie.pool.pool import AgentPool
from orion_oie.pool.sizes import ModelSizes
from orion_oie.pool.variants import Placement
from orion_oie.schemas.plans import (
    Plan,
    PlannedModel,
    VariantChoice,
)
from orion_oie.schemas.results import Route

# Of a model that was never loaded here: a process, and files that lie in the system's cache.
_START_S = 0.3
_READ_BYTES_PER_S = 1.5e9


class Planner:
    """Makes plans from what an engine decides with."""

    def __init__(
        self,
        placement: Placement,
        pool: AgentPool,
        sizes: ModelSizes,
        budget: MemoryBudget,
        breakers: BreakerBoard,
    ) -> None:
        self._placement = placement
        self._pool = pool
        self._sizes = sizes
        self._budget = budget
        self._breakers = breakers

    def plan(
        self,
        route: Route,
        choices: list[Choice],
        order: list[Choice],
        *,
        waiting: int = 0,
        images: int = 0,
    ) -> Plan:
        """What would become of a request that was routed. `order`: those of the choices that can be
        loaded, in the order in which they would be tried; `waiting`: requests before it; `images`:
        how many it comes with."""
        self._budget.refresh()
        budget_bytes = self._budget.bytes()
        models = {choice: self._planned(choice, order, budget_bytes) for choice in choices}
        if images:
            blind = {"why_not": "it cannot read images"}
            models = {choice: one.model_copy(update=blind) for choice, one in models.items()}
        plan = Plan(
            route=route,
            model=None,
            budget_bytes=budget_bytes,
            reserved_bytes=self._pool.reserved_bytes,
            waiting=waiting,
            considered=list(models.values()),
        )
        for choice in order:
            if not models[choice].why_not:
                return plan.model_copy(update=self._steps(choice, models[choice]))
        return plan

    def wait_s(self, spec: LoadSpec) -> float | None:
        """Seconds until a model could begin to answer, as far as loading goes: 0 when all of it is
        in memory, None where nobody knows, because it would have to be fetched.

        Raises `ModelNotFoundError`, `ModelCorruptError` for files that are none.
        """
        if self._pool.is_ready(spec.key):
            return 0.0
        if spec.source is not None:
            return None
        size_bytes = sum(file.stat().st_size for file in spec.files if file.exists())
        return self._sizes.load_s(spec) or _START_S + size_bytes / _READ_BYTES_PER_S

    def _planned(self, choice: Choice, order: list[Choice], budget_bytes: int) -> PlannedModel:
        key = f"{choice.model_id}@{choice.variant}"
        is_loaded = self._pool.room_for(key, 0).is_here
        needed_bytes, is_measured, why_not = None, False, ""
        paused_s = self._breakers.paused_s(choice.model_id)
        if choice not in order:
            why_not = choice.why_unavailable
        else:
            try:
                footprint = self._sizes.footprint(self._placement.load_spec(choice))
            except OrionError as error:
                why_not = error.message
            else:
                needed_bytes, is_measured = footprint.most_bytes, footprint.is_measured
                if paused_s:
                    why_not = f"it failed and is paused for {paused_s:.1f} s more"
                elif choice.role == "primary" and order[0].role == "lite":
                    why_not = "it is loaded meanwhile, and answers when it is in memory"
                elif not is_loaded and needed_bytes > budget_bytes:
                    why_not = f"it needs {needed_bytes} bytes of a budget of {budget_bytes}"
                elif not self._pool.room_for(key, needed_bytes).is_possible:
                    why_not = f"it needs {needed_bytes} bytes, and what is pinned leaves less"
        return PlannedModel(
            agent_id=choice.agent_id,
            model_id=choice.model_id,
            role=choice.role,
            variant=choice.picked or VariantChoice(variant=choice.variant, reason=""),
            is_here=choice.files is not None,
            is_loaded=is_loaded,
            needed_bytes=needed_bytes,
            is_measured=is_measured,
            why_not=why_not,
        )

    def _steps(self, choice: Choice, model: PlannedModel) -> dict[str, object]:
        spec = self._placement.load_spec(choice)
        wait_s = self.wait_s(spec)
        if model.is_loaded:
            return {"model": model, "answer_in_s": wait_s}
        assert model.needed_bytes is not None
        room = self._pool.room_for(spec.key, model.needed_bytes)
        return {
            "model": model,
            "loads": True,
            "evicts": list(room.victims or ()),
            "waits_for": list(room.blockers),
            "fetch_bytes": 0 if model.is_here else spec.expected_bytes or 0,
            "load_s": wait_s,
            "answer_in_s": wait_s if room.victims is not None else None,
        }
