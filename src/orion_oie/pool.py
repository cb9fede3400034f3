"""Models in memory, shared by the agents that use them.

`acquire` gives a model for as long as its `with` block runs: it is loaded once however many ask
at the same time, never unloaded while in use, and the least recently used idle one makes room.
Whoever waits for room is overtaken by users of what is in memory, but only for so long.
Loading runs on a thread of its own and goes on as long as somebody waits for it.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from orion_oie.backends.base import LoadedModel, LoadProgress, LoadSpec, OnProgress
from orion_oie.cancellation import CancelScope
from orion_oie.errors import EngineClosedError, RequestCancelledError
from orion_oie.eviction import Resident, choose_victims
from orion_oie.schemas import ModelInfo, Schema

Load = Callable[[LoadSpec, CancelScope, OnProgress], LoadedModel]


class ResidentModel(Schema):
    """One model in memory, for statistics. `users` counts requests that hold or await it."""

    model: ModelInfo
    pid: int | None
    users: int
    is_loading: bool


@dataclass(frozen=True, slots=True)
class Lease:
    """A model that is kept in memory while the lease is held."""

    model: LoadedModel
    is_cold: bool
    load_ms: float
    evicted: tuple[str, ...]


@dataclass(eq=False)
class _Entry:
    spec: LoadSpec
    last_used: int
    evicted: tuple[str, ...] = ()
    scope: CancelScope = field(default_factory=CancelScope)
    users: int = 0
    progress: LoadProgress | None = None
    model: LoadedModel | None = None
    error: BaseException | None = None
    is_leaving: bool = False  # an abandoned load that ends, or a model that is being freed

    @property
    def is_loading(self) -> bool:
        return self.model is None and self.error is None

    @property
    def is_in_use(self) -> bool:
        return self.users > 0 or self.is_leaving

    @property
    def is_dead(self) -> bool:
        return self.model is not None and not self.is_leaving and not self.model.is_alive()


@dataclass(eq=False, slots=True)
class _Ticket:
    """A place in the line of those who wait for room; for a patient one nobody else waits."""

    is_patient: bool
    since: float = field(default_factory=time.monotonic)


class AgentPool:
    """Loaded models by `LoadSpec.key`. `on_evicted(key)` is called with no lock held.

    After `patience_s` of waiting for room, later requests for models in memory wait as well, so
    that one of these becomes idle.
    """

    def __init__(
        self,
        load: Load,
        max_models: int,
        on_evicted: Callable[[str], None] = lambda _key: None,
        patience_s: float = 2.0,
    ) -> None:
        self._load = load
        self._max_models = max_models
        self._on_evicted = on_evicted
        self._patience_s = patience_s
        self._waiting_for_room: list[_Ticket] = []
        self._changed = threading.Condition()
        self._entries: dict[str, _Entry] = {}
        self._uses = 0
        self._is_closed = False

    @contextmanager
    def acquire(
        self,
        spec: LoadSpec,
        scope: CancelScope,
        on_progress: OnProgress = lambda _p: None,
        *,
        is_patient: bool = False,
    ) -> Iterator[Lease]:
        """Hold the model of `spec`, loading it if needed. Users of what is in memory overtake a
        patient one as long as they like.

        Raises what the load raised, the error that `scope` was cancelled with while waiting, or
        `EngineClosedError`.
        """
        started = time.perf_counter()
        undo = scope.on_cancel(self._notify)
        try:
            entry, is_cold = self._join(spec, scope, _Ticket(is_patient))
            try:
                model = self._await_load(entry, scope, on_progress)
                load_ms = (time.perf_counter() - started) * 1e3
                undo()
                yield Lease(model, is_cold, load_ms, entry.evicted if is_cold else ())
            finally:
                self._leave(entry)
        finally:
            undo()

    def unload(self, key: str) -> bool:
        """Free an idle model; False when it is not loaded or in use."""
        with self._changed:
            entry = self._entries.get(key)
            if entry is None or entry.model is None or entry.is_in_use or entry.is_dead:
                return False
            entry.is_leaving = True
        try:
            entry.model.close()
        finally:
            with self._changed:
                if self._entries.get(key) is entry:
                    del self._entries[key]
                self._changed.notify_all()
        return True

    def is_ready(self, key: str) -> bool:
        """True when all of a model is in memory: it answers at once."""
        with self._changed:
            entry = self._entries.get(key)
            model = entry.model if entry is not None else None
        is_there = model is not None and model.is_alive()
        return is_there and model.load_progress.phase in ("ready", "complete")  # type: ignore[union-attr]

    def residents(self) -> dict[str, ResidentModel]:
        """What is in memory or on its way there."""
        with self._changed:
            return {
                key: ResidentModel(
                    model=entry.model.info if entry.model else entry.spec.info,
                    pid=entry.model.pid if entry.model else None,
                    users=entry.users,
                    is_loading=entry.is_loading,
                )
                for key, entry in self._entries.items()
                if entry.is_loading or (entry.model is not None and entry.model.is_alive())
            }

    def close(self, timeout_s: float) -> None:
        """Stop all loads and free all models; those in use fail with `EngineClosedError`."""
        with self._changed:
            self._is_closed = True
            entries = list(self._entries.values())
            self._entries.clear()
            self._changed.notify_all()
        for entry in entries:
            entry.scope.cancel(EngineClosedError("the engine was shut down during a load"))
        for entry in entries:
            if entry.model is not None:
                entry.model.close(timeout_s)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _join(self, spec: LoadSpec, scope: CancelScope, ticket: _Ticket) -> tuple[_Entry, bool]:
        """Become a user of the model's entry, making it (and starting the load) if there is none.

        Waits while the model's last load or use ends, and while every model that could make room
        is in use. Dead models take no room.
        """
        line = self._waiting_for_room
        with self._changed:
            try:
                while True:
                    if self._is_closed:
                        raise EngineClosedError("the engine was shut down")
                    scope.check()
                    self._drop_dead()
                    entry = self._entries.get(spec.key)
                    if entry is None:
                        if ticket not in line:
                            line.append(ticket)
                        victims = choose_victims(self._as_residents(), self._max_models)
                        if victims is not None and line[0] is ticket:
                            return self._begin_load(spec, victims), True
                    elif not entry.is_leaving and not self._must_wait_behind_others(ticket):
                        entry.users += 1
                        return entry, entry.is_loading
                    self._changed.wait()
            finally:
                if ticket in line:
                    line.remove(ticket)
                    self._changed.notify_all()

    def _must_wait_behind_others(self, ticket: _Ticket) -> bool:
        """True when somebody who came before has waited for room for too long."""
        oldest = next((other for other in self._waiting_for_room if not other.is_patient), None)
        if oldest is None:
            return False
        return oldest.since < ticket.since and time.monotonic() - oldest.since > self._patience_s

    def _drop_dead(self) -> None:
        for key in [key for key, entry in self._entries.items() if entry.is_dead]:
            del self._entries[key]

    def _as_residents(self) -> list[Resident]:
        return [
            Resident(key, entry.last_used, entry.is_in_use) for key, entry in self._entries.items()
        ]

    def _begin_load(self, spec: LoadSpec, victims: list[str]) -> _Entry:
        self._uses += 1
        entry = _Entry(spec, self._uses, tuple(victims), users=1)
        removed = [(key, self._entries[key]) for key in victims]
        threading.Thread(
            target=self._run_load,
            args=(entry, removed),
            name=f"orion-load-{spec.info.model_id}",
            daemon=True,
        ).start()
        for key in victims:
            del self._entries[key]
        self._entries[spec.key] = entry
        return entry

    def _run_load(self, entry: _Entry, removed: list[tuple[str, _Entry]]) -> None:
        def on_progress(progress: LoadProgress) -> None:
            with self._changed:
                entry.progress = progress
                self._changed.notify_all()

        model: LoadedModel | None = None
        error: BaseException | None = None
        try:
            for key, victim in removed:
                if victim.model is not None:
                    victim.model.close()
                self._on_evicted(key)
            model = self._load(entry.spec, entry.scope, on_progress)
        except BaseException as caught:  # noqa: BLE001 (handed to those who wait for the load)
            error = caught
        with self._changed:
            entry.model, entry.error = model, error
            entry.is_leaving = False  # it may have completed although nobody waited any more
            if error is not None and self._entries.get(entry.spec.key) is entry:
                del self._entries[entry.spec.key]
            is_orphaned = self._is_closed
            self._changed.notify_all()
        if is_orphaned and model is not None:
            model.close(0.0)

    def _await_load(
        self, entry: _Entry, scope: CancelScope, on_progress: OnProgress
    ) -> LoadedModel:
        shown: LoadProgress | None = None
        while True:
            with self._changed:
                while entry.is_loading and entry.progress is shown and scope.error is None:
                    self._changed.wait()
                scope.check()
                if entry.error is not None:
                    raise entry.error
                if entry.model is not None:
                    return entry.model
                shown = entry.progress
            if shown is not None:
                on_progress(shown)

    def _leave(self, entry: _Entry) -> None:
        with self._changed:
            entry.users -= 1
            self._uses += 1
            entry.last_used = self._uses
            is_abandoned = entry.users == 0 and entry.is_loading
            entry.is_leaving = entry.is_leaving or is_abandoned
            self._changed.notify_all()
        if is_abandoned:
            entry.scope.cancel(RequestCancelledError("nobody waits for this load any more"))
