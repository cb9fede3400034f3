"""Loads the model that is likely to be needed next, while memory is plentiful and nothing waits.

Gathers the facts for `prediction.should_preload`, and begins the load that it chooses. A model that
was loaded ahead is as idle as any other: it is evicted for others, and then counts as wasted.
"""

from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from orion_oie.backends.base import LoadSpec
from orion_oie.config import EngineConfig
from orion_oie.errors import UnknownAgentError, described
from orion_oie.pool.budget import MemoryBudget
from orion_oie.pool.candidate import Candidate
from orion_oie.pool.pool import ModelPool
from orion_oie.pool.prediction import (
    NextAgentPredictor,
    PreloadLedger,
    should_preload,
)
from orion_oie.pool.variants import VariantSelector
from orion_oie.schemas.availability import ModelState
from orion_oie.schemas.results import ModelInfo
from orion_oie.schemas.stats import PredictionStats
from orion_oie.telemetry.event_log import EventLog
from orion_oie.telemetry.events import ModelLoadingAhead, PreloadTrouble

LoadAhead = Callable[[LoadSpec, Collection[str]], "Future[ModelInfo]"]
"""Begins to load a model, evicting no others than these."""


@dataclass(frozen=True, slots=True)
class _Prospect:
    """A model that may be needed next. `victims` would be evicted for it; None: it cannot be loaded
    now."""

    candidate: Candidate
    max_bytes: int
    victims: frozenset[str] | None


class Preloader:
    """Loads models ahead of need, by the order of earlier requests. Thread-safe, as its parts are.
    `is_calm`, `is_anything_waiting`, `is_paused(model_id)` and `load_ahead` must return at once."""

    def __init__(
        self,
        config: EngineConfig,
        variants: VariantSelector,
        pool: ModelPool,
        budget: MemoryBudget,
        events: EventLog,
        *,
        is_calm: Callable[[], bool],
        is_anything_waiting: Callable[[], bool],
        is_paused: Callable[[str], bool],
        load_ahead: LoadAhead,
        clock: Callable[[], float],
    ) -> None:
        self._is_enabled = config.loading.predictive
        self._variants = variants
        self._pool = pool
        self._budget = budget
        self._events = events
        self._is_calm = is_calm
        self._is_anything_waiting = is_anything_waiting
        self._is_paused = is_paused
        self._load_ahead = load_ahead
        self._predictor = NextAgentPredictor(clock)
        self._ledger = PreloadLedger(self._is_enabled)

    def note_request(self, agent_id: str, session_id: str | None) -> None:
        """Note a request for an agent."""
        if self._is_enabled:
            self._predictor.observe(agent_id, session_id)

    def note_use(self, key: str, is_cold: bool) -> None:
        """Note that a request has its model; `is_cold`: it had to be loaded."""
        if self._ledger.is_ahead(key):
            self._ledger.used(key)
        elif is_cold:
            self._ledger.cold(key)

    def note_gone(self, key: str) -> None:
        """Note that a model was evicted or unloaded."""
        self._ledger.gone(key)

    def stats(self) -> PredictionStats:
        """The counts so far."""
        return self._ledger.stats()

    def consider(self, agent_id: str, session_id: str | None) -> None:
        """Begin to load the model that is likely to be needed after an answer, if that is wise.

        Nobody waits for it: errors are published as events."""
        try:
            self._consider(agent_id, session_id)
        except Exception as error:  # noqa: BLE001 (the answer is given, and others are to come)
            self._events.publish(PreloadTrouble(text=described(error)))

    def _consider(self, agent_id: str, session_id: str | None) -> None:
        if not self._is_enabled or not self._predictor.knows_others(agent_id):
            return
        if self._is_anything_waiting() or not self._is_calm():
            return
        predictions = self._predictor.predict(session_id, agent_id)
        prospects: dict[str, _Prospect] = {}
        key_of_agent: dict[str, str] = {}
        for prediction in predictions:
            found = self._prospect(prediction.agent_id)
            if found is not None:
                key = found.candidate.key
                key_of_agent[prediction.agent_id] = key
                prospects[key] = found
        if all(self._pool.is_resident(key) for key in prospects):
            return
        residents = self._pool.residents()
        probability = {
            key_of_agent[p.agent_id]: p.probability
            for p in reversed(predictions)
            if p.agent_id in key_of_agent
        }
        sizes = {key: one.reserved_bytes for key, one in residents.items()}
        decision = should_preload(
            predictions,
            {
                key: 1.0 if one.users else probability.get(key, 0.0)
                for key, one in residents.items()
            },
            key_of_agent,
            free_bytes=self._budget.bytes() - sum(sizes.values()),
            footprints_bytes={**{k: one.max_bytes for k, one in prospects.items()}, **sizes},
            victims={
                key: None if one.victims is None else tuple(one.victims)
                for key, one in prospects.items()
            },
            is_calm=self._is_calm(),
            is_anything_waiting=self._is_anything_waiting(),
            is_enabled=self._is_enabled,
        )
        if decision.key is None or decision.agent_id is None:
            return
        self._ledger.started(decision.key)
        self._events.publish(
            ModelLoadingAhead(
                key=decision.key,
                agent_id=decision.agent_id,
                probability=round(decision.probability, 2),
            )
        )
        chosen = prospects[decision.key]
        loading = self._load_ahead(chosen.candidate.load_spec, chosen.victims or ())
        loading.add_done_callback(partial(self._note_load, decision.key))

    def _note_load(self, key: str, loading: "Future[ModelInfo]") -> None:
        if loading.exception() is not None:
            self._ledger.gone(key)

    def _prospect(self, agent_id: str) -> _Prospect | None:
        """The model that would answer for an agent, if it is on this machine and can be loaded."""
        try:
            candidates = self._variants.candidates(agent_id)
        except UnknownAgentError:  # it was removed from the registry
            return None
        usable = (one for one in candidates if one.is_on_disk and not self._is_paused(one.model_id))
        first = next(usable, None)
        if first is None or first.max_bytes is None:
            return None
        found = self._pool.availability(first.key, first.max_bytes)
        may_load = found.state in (ModelState.READY, ModelState.LOADABLE)
        return _Prospect(first, first.max_bytes, found.victims if may_load else None)
