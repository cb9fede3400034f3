"""The plan of a request: the agent, model and variant, and the models to load and to evict. The
counterpart of the receipt, before the fact.

Loads, fetches and evicts nothing.
"""

from collections.abc import Sequence

from orion_oie.engine.breaker import BreakerBoard
from orion_oie.pool.budget import MemoryBudget
from orion_oie.pool.candidate import Candidate
from orion_oie.pool.pool import ModelPool
from orion_oie.schemas.availability import ModelState
from orion_oie.schemas.plans import Plan, PlannedModel
from orion_oie.schemas.results import Route

# For a model that was never loaded: the start of a process, and reading from the system's cache.
_START_S = 0.3
_READ_BYTES_PER_S = 1.5e9


class Planner:
    """Makes plans from the state of the pool, the budget and the breakers."""

    def __init__(self, pool: ModelPool, budget: MemoryBudget, breakers: BreakerBoard) -> None:
        self._pool = pool
        self._budget = budget
        self._breakers = breakers

    def plan(
        self,
        route: Route,
        candidates: Sequence[Candidate],
        order: Sequence[Candidate],
        *,
        waiting: int = 0,
        images: int = 0,
    ) -> Plan:
        """The plan of a request that was routed. `order`: the available candidates, in the order in
        which they would be tried; `waiting`: the requests before it; `images`: the number of its
        images."""
        self._budget.refresh()
        budget_bytes = self._budget.bytes()
        models = {one.key: self._planned(one, order, budget_bytes) for one in candidates}
        if images:
            blind = {"why_not": "it cannot read images"}
            models = {key: one.model_copy(update=blind) for key, one in models.items()}
        plan = Plan(
            route=route,
            model=None,
            budget_bytes=budget_bytes,
            reserved_bytes=self._pool.reserved_bytes,
            waiting=waiting,
            considered=list(models.values()),
        )
        for one in order:
            if not models[one.key].why_not:
                return plan.model_copy(update=self._steps(one, models[one.key]))
        return plan

    def wait_s(self, candidate: Candidate) -> float | None:
        """Seconds until a model could begin to answer, as far as loading goes: 0 when all of it is
        in memory, None if that is unknown: it would have to be fetched, or cannot be read."""
        if self._pool.is_ready(candidate.key):
            return 0.0
        if not candidate.is_on_disk or candidate.footprint is None:
            return None
        return candidate.load_s or _START_S + candidate.file_bytes / _READ_BYTES_PER_S

    def _planned(
        self, one: Candidate, order: Sequence[Candidate], budget_bytes: int
    ) -> PlannedModel:
        found = self._pool.availability(one.key, one.max_bytes or 0)
        is_loaded = found.state is ModelState.READY
        return PlannedModel(
            agent_id=one.agent_id,
            model_id=one.model_id,
            role=one.role,
            variant=one.picked,
            is_here=one.is_on_disk,
            is_loaded=is_loaded,
            needed_bytes=one.max_bytes if one in order else None,
            is_measured=one in order and one.footprint is not None and one.footprint.is_measured,
            why_not=self._why_not(one, order, budget_bytes, found.state),
        )

    def _why_not(
        self, one: Candidate, order: Sequence[Candidate], budget_bytes: int, state: ModelState
    ) -> str:
        """The reason that a model would not answer; empty if it would."""
        paused_s = self._breakers.paused_s(one.model_id)
        if one not in order:
            return one.why_unavailable
        if one.max_bytes is None:
            return one.why_not
        if paused_s:
            return f"it failed and is paused for {paused_s:.1f} s more"
        if one.role == "primary" and order[0].role == "lite":
            return "it is loaded in the background, and answers when it is in memory"
        if state is not ModelState.READY and one.max_bytes > budget_bytes:
            return f"it needs {one.max_bytes} bytes of a budget of {budget_bytes}"
        if state is ModelState.IMPOSSIBLE:
            return f"it needs {one.max_bytes} bytes, and pinned models leave less"
        return ""

    def _steps(self, one: Candidate, model: PlannedModel) -> dict[str, object]:
        wait_s = self.wait_s(one)
        if model.is_loaded:
            return {"model": model, "answer_in_s": wait_s}
        found = self._pool.availability(one.key, one.max_bytes or 0)
        is_loadable = found.state is ModelState.LOADABLE
        return {
            "model": model,
            "loads": True,
            "evicts": self._pool.longest_unused_first(found.victims) if is_loadable else [],
            "waits_for": self._pool.longest_unused_first(found.blockers),
            "fetch_bytes": 0 if model.is_here else one.load_spec.expected_bytes or 0,
            "load_s": wait_s,
            "answer_in_s": wait_s if is_loadable else None,
        }
