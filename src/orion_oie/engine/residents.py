"""The model operations of an application: preload, unload, pull."""

from collections.abc import Callable
from pathlib import Path

from orion_oie.cancellation import CancelScope
from orion_oie.engine.chain import ModelChain
from orion_oie.engine.stand_ins import StandIns
from orion_oie.errors import InsufficientMemoryError, RequestCancelledError, described
from orion_oie.models.keys import ModelKey
from orion_oie.models.registry import ModelRegistry
from orion_oie.pool.candidate import Candidate
from orion_oie.pool.pool import ModelPool
from orion_oie.pool.preloader import Preloader
from orion_oie.pool.variants import VariantSelector
from orion_oie.schemas.results import ModelInfo
from orion_oie.telemetry.event_log import EventLog
from orion_oie.telemetry.events import PoolUnloaded
from orion_oie.threads import unbroken


class Residents:
    """Loads and frees models on request. `OrionInferenceEngine` documents each method."""

    def __init__(
        self,
        registry: ModelRegistry,
        variants: VariantSelector,
        pool: ModelPool,
        chain: ModelChain,
        preloader: Preloader,
        stand_ins: StandIns,
        events: EventLog,
        pull: Callable[[str], tuple[Path, ...]],
    ) -> None:
        self._registry = registry
        self._variants = variants
        self._pool = pool
        self._chain = chain
        self._preloader = preloader
        self._stand_ins = stand_ins
        self._events = events
        self.pull = pull

    def preload(self, agent_id: str, *, pin: bool) -> ModelInfo:
        """Load the model that would answer for an agent now."""
        candidates = self._variants.candidates(agent_id, is_fresh=True)
        self._stand_ins.announce(agent_id, candidates)
        first = self._chain.available(candidates, agent_id)[0]
        scope = CancelScope()
        try:
            return unbroken(lambda: self._load(first, scope, pin=pin), "orion-preload").result()
        except Exception:
            raise
        except BaseException as error:  # Ctrl-C: the load ends if nobody else waits for it
            reason = RequestCancelledError(f"preload was interrupted by {described(error)}")
            unbroken(lambda: scope.cancel(reason), "orion-cancel")
            raise

    def _load(self, first: Candidate, scope: CancelScope, *, pin: bool) -> ModelInfo:
        try:
            with self._pool.acquire(first.load_spec, scope) as lease:
                scope.check()
                if pin:
                    self._pool.pin(first.key)
                return lease.model.info
        except InsufficientMemoryError as error:
            raise self._variants.explained(error, first) from error

    def unload(self, agent_id: str) -> bool:
        """Free the idle models that an agent itself names."""
        links = self._registry.chain(agent_id)
        own = sorted({one.model_id for one in links if one.agent_id == agent_id})
        keys = [
            ModelKey(model_id, variant)
            for model_id in own
            for variant in self._registry.model(model_id).variants
        ]
        for key in keys:
            self._pool.unpin(key)
        unloaded = [key for key in keys if self._pool.unload(key)]
        for key in unloaded:
            self._preloader.note_gone(key)
            self._events.publish(PoolUnloaded(key=key))
        return bool(unloaded)
