"""Models in memory, shared by the agents that use them.

`acquire` holds a model while its `with` block runs. Concurrent requests share one load, and a model
in use is never unloaded. Idle models are evicted to keep all of them within their limits. Users of
models in memory overtake those who wait for memory, but only for a limited time. A load runs on a
thread of its own, as long as somebody waits for it.

The size of a model, the available memory and the choice of victims are decided elsewhere.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

from orion_oie.backends.base import (
    LoadSpec,
    LocalModel,
)
from orion_oie.cancellation import CancelScope
from orion_oie.errors import EngineClosedError, InsufficientMemoryError, RequestCancelledError
from orion_oie.pool.closing import close_all
from orion_oie.pool.entries import (
    LEAST_RELOAD_S,
    Entry,
    Lease,
    Ticket,
    check_leave,
    too_large,
)
from orion_oie.pool.eviction import (
    Limits,
    Resident,
    availability_of,
    choose_relief,
    choose_victims,
)
from orion_oie.schemas.availability import ARRIVING, READY, Availability, ModelState
from orion_oie.schemas.loading import (
    LoadProgress,
    OnProgress,
)
from orion_oie.schemas.stats import ResidentModel
from orion_oie.telemetry.callbacks import call_safely
from orion_oie.threads import Condition, start_thread

Load = Callable[[LoadSpec, CancelScope, OnProgress], LocalModel]

_PRESSURE_POLL_S = 0.5


class ModelPool:
    """Loaded models by `LoadSpec.key`. `on_evicted(key)` is called with no lock held, and so is
    `on_changed()`, when a model was loaded or freed, or became idle.

    size_of: the bytes that a model may take; may read files and raise. budget_bytes: the bytes that
    all may take together, None for no limit. has_memory: False while the machine has no memory for
    any load. Both are called often and must return at once. A load waits `pressure_wait_s` for
    memory. After a request has waited `patience_s` for memory, later requests for models in memory
    wait as well, so that one of these becomes idle.
    """

    def __init__(
        self,
        load: Load,
        max_models: int | None = None,
        *,
        on_evicted: Callable[[str], None] = lambda _key: None,
        on_changed: Callable[[], None] = lambda: None,
        size_of: Callable[[LoadSpec], int] = lambda _spec: 0,
        budget_bytes: Callable[[], int | None] = lambda: None,
        has_memory: Callable[[], bool] = lambda: True,
        pressure_wait_s: float = 30.0,
        patience_s: float = 2.0,
    ) -> None:
        self._load = load
        self._max_models = max_models
        self._on_evicted = on_evicted
        self._on_changed = on_changed
        self._size_of = size_of
        self._budget_bytes = budget_bytes
        self._has_memory = has_memory
        self._pressure_wait_s = pressure_wait_s
        self._patience_s = patience_s
        self._waiting_for_memory: list[Ticket] = []
        self._changed = self._lock = Condition()
        self._entries: dict[str, Entry] = {}
        self._pinned: set[str] = set()
        self._uses = 0
        self._active_at = time.monotonic()
        self._is_closed = False

    @contextmanager
    def acquire(
        self,
        spec: LoadSpec,
        scope: CancelScope,
        on_progress: OnProgress = lambda _p: None,
        *,
        is_patient: bool = False,
        may_evict: Collection[str] | None = None,
    ) -> Iterator[Lease]:
        """Hold the model of `spec`, loading it if needed. Users of models in memory may always
        overtake a patient request. With `may_evict`, it is loaded at once, evicting no other models
        than these, or `InsufficientMemoryError` is raised.

        Raises what the load raised, `InsufficientMemoryError` when no waiting would help, the error
        that `scope` was cancelled with while waiting, or `EngineClosedError`.
        """
        started = time.perf_counter()
        size_bytes = self._known_size(spec.key)
        if size_bytes is None:
            size_bytes = self._size_of(spec)
        undo = scope.on_cancel(self._notify)
        try:
            ticket = Ticket(is_patient, may_evict)
            entry, is_cold = self._join(spec, size_bytes, scope, ticket)
            try:
                model = self._await_load(entry, scope, on_progress)
                load_ms = (time.perf_counter() - started) * 1e3
                undo()
                yield Lease(
                    model, is_cold, load_ms, entry.evicted if is_cold else (), entry.size_bytes
                )
            finally:
                self._leave(entry)
        finally:
            undo()

    @contextmanager
    def borrow(self) -> Iterator[LocalModel | None]:
        """Hold the largest model that could generate at once; None when there is none. Loads and
        evicts nothing, and does not wait."""
        with self._lock:
            free = [entry for entry in self._entries.values() if entry.is_free]
            entry = max(free, key=lambda one: one.size_bytes, default=None)
            if entry is not None:
                entry.users += 1
        try:
            yield None if entry is None else entry.model
        finally:
            if entry is not None:
                self._leave(entry)

    def unload(self, key: str) -> bool:
        """Free an idle model; False when it is not loaded or in use."""
        return bool(self._free([key]))

    def relieve(self, wanted_bytes: int) -> list[str]:
        """Free idle models until `wanted_bytes` are freed, or none is idle; returns their keys."""
        with self._lock:
            self._drop_dead()
            keys = choose_relief(self._as_residents(), wanted_bytes)
        freed = self._free(keys)
        for key in freed:
            call_safely(self._on_evicted, key)
        return freed

    def trim(self) -> list[str]:
        """Free idle models while all together may take more than the budget; returns their keys."""
        budget_bytes = self._budget_bytes()
        excess = 0 if budget_bytes is None else self.reserved_bytes - budget_bytes
        return self.relieve(excess) if excess > 0 else []

    def pin(self, key: str) -> None:
        """Never evict a model, from when it is loaded until `unpin`."""
        with self._lock:
            self._pinned.add(key)

    def unpin(self, key: str) -> None:
        """Let a model be evicted again."""
        with self._lock:
            self._pinned.discard(key)
            self._changed.notify_all()
        self._on_changed()

    def availability(self, key: str, size_bytes: int) -> Availability:
        """The availability of a model of this size now; the queue itself detects FULL."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and not entry.is_leaving and not entry.is_dead:
                return READY if entry.is_complete else ARRIVING
            if not self._has_memory():
                return Availability(ModelState.SHORT)
            self._drop_dead()
            residents, limits = self._as_residents(), self._limits()
            settled = residents
            if any(one.displaced_bytes for one in self._entries.values()):
                settled = self._as_residents(is_settled=True)
        found = availability_of(residents, limits, size_bytes)
        if found.state is not ModelState.IMPOSSIBLE:
            return found
        later = availability_of(settled, limits, size_bytes)
        if later.state is ModelState.IMPOSSIBLE:
            return later
        return Availability(ModelState.SHORT)  # until the models being unloaded are freed

    def longest_unused_first(self, keys: Iterable[str]) -> list[str]:
        """The keys in the order in which their models would be evicted."""
        with self._lock:
            used = {key: entry.last_used for key, entry in self._entries.items()}
        return sorted(keys, key=lambda key: (used.get(key, 0), key))

    def note_answer(self, key: str) -> None:
        """Note that a model has answered: its memory is that of a model in use from now on."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                entry.has_answered = True

    def settled(self) -> dict[str, bool]:
        """The completely loaded models (a load takes more memory), by key, with True for those that
        have answered."""
        with self._lock:
            entries = list(self._entries.items())
        return {key: entry.has_answered for key, entry in entries if entry.is_complete}

    def spec(self, key: str) -> LoadSpec | None:
        """The spec that a model was loaded by; None when it is not in memory."""
        with self._lock:
            entry = self._entries.get(key)
            return None if entry is None else entry.spec

    def can_hold(self, sizes_bytes: Mapping[str, int]) -> bool:
        """True when all of these models, by key, may be in memory together, without any others. For
        those in memory, the reserved size counts."""
        total_bytes = 0
        for key, size_bytes in sizes_bytes.items():
            known_bytes = self._known_size(key)
            total_bytes += size_bytes if known_bytes is None else known_bytes
        limits = self._limits()
        is_too_many = limits.models is not None and len(sizes_bytes) > limits.models
        is_too_large = limits.memory_bytes is not None and total_bytes > limits.memory_bytes
        return not is_too_many and not is_too_large

    def note_size(self, key: str, measured_bytes: int) -> None:
        """Raise the reserved size of a model to the measured one."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and measured_bytes > entry.size_bytes:
                entry.size_bytes = measured_bytes

    @property
    def reserved_bytes(self) -> int:
        """The bytes that all models in memory, or being loaded, may take together."""
        with self._lock:
            self._drop_dead()
            return sum(resident.size_bytes for resident in self._as_residents())

    def is_resident(self, key: str) -> bool:
        """True when a model is in memory, or being loaded."""
        return self._known_size(key) is not None

    def is_ready(self, key: str) -> bool:
        """True when all of a model is in memory: it answers at once."""
        with self._lock:
            entry = self._entries.get(key)
        return entry is not None and entry.is_ready

    def residents(self) -> dict[str, ResidentModel]:
        """The models in memory or being loaded, by key."""
        with self._lock:
            entries, pinned = list(self._entries.items()), set(self._pinned)
        return {
            key: ResidentModel(
                model=entry.model.info if entry.model else entry.spec.info,
                pid=entry.model.pid if entry.model else None,
                users=entry.users,
                is_loading=entry.is_loading,
                is_pinned=key in pinned,
                reserved_bytes=entry.size_bytes,
            )
            for key, entry in entries
            if entry.is_loading or (entry.model is not None and entry.model.is_alive())
        }

    def idle_s(self) -> float:
        """Seconds since anything was used or loaded; 0 while anything is."""
        with self._lock:
            if any(entry.is_in_use or entry.is_loading for entry in self._entries.values()):
                return 0.0
            return time.monotonic() - self._active_at

    def close(self, timeout_s: float) -> None:
        """Stop all loads and free all models; those in use fail with `EngineClosedError`."""
        with self._lock:
            self._is_closed = True
            entries = list(self._entries.values())
            self._entries.clear()
            self._changed.notify_all()
        try:
            for entry in entries:
                entry.scope.cancel(EngineClosedError("the engine was shut down during a load"))
        finally:
            close_all(_models_of(entries), timeout_s)

    def _free(self, keys: Iterable[str]) -> list[str]:
        """Close the models that are idle, and return their keys."""
        leaving: dict[str, Entry] = {}
        with self._lock:
            for key in keys:
                entry = self._entries.get(key)
                if entry is None or entry.model is None or entry.is_in_use or entry.is_dead:
                    continue
                entry.is_leaving = True
                leaving[key] = entry
        if not leaving:
            return []
        try:
            close_all(_models_of(leaving.values()))
        finally:
            with self._lock:
                for key, entry in leaving.items():
                    if self._entries.get(key) is entry:
                        del self._entries[key]
                self._changed.notify_all()
            call_safely(self._on_changed)
        return list(leaving)

    def _notify(self) -> None:
        with self._lock:
            self._changed.notify_all()

    def _known_size(self, key: str) -> int | None:
        with self._lock:
            entry = self._entries.get(key)
            return None if entry is None else entry.size_bytes

    def _join(
        self, spec: LoadSpec, size_bytes: int, scope: CancelScope, ticket: Ticket
    ) -> tuple[Entry, bool]:
        """Become a user of the model's entry, making it (and starting the load) if there is none.

        1. The model is in memory or on its way: use it, unless it is about to leave, or others have
           waited for memory for too long.
        2. It is not, and the machine has no memory: wait for some, but not for ever.
        3. It is not, and the idle models to evict for it are known: if this ticket is the first in
           line, begin the load. Patient tickets stand behind all others, and not in each other's
           way.
        4. Otherwise wait for a change: a load or a use that ends, or a place in the line.

        Dead models do not count. A ticket that may not wait, or may not evict so much, is refused.
        """
        line = self._waiting_for_memory
        with self._lock:
            try:
                while True:
                    if self._is_closed:
                        raise EngineClosedError("the engine was shut down")
                    scope.check()
                    self._drop_dead()
                    timeout_s = None
                    entry = self._entries.get(spec.key)
                    if entry is None:
                        if ticket not in line:
                            line.append(ticket)
                        if self._has_memory():
                            ticket.pressed_since = None
                            victims = self._victims(spec, size_bytes)
                            if victims is not None and self._is_first(ticket):
                                check_leave(spec, ticket, victims)
                                return self._begin_load(spec, size_bytes, victims), True
                        else:
                            timeout_s = _PRESSURE_POLL_S
                            self._check_patience(spec, ticket)
                    elif not entry.is_leaving and not self._must_wait_behind_others(ticket):
                        entry.users += 1
                        return entry, entry.is_loading
                    check_leave(spec, ticket, None)
                    self._changed.wait(timeout_s)
            finally:
                if ticket in line:
                    line.remove(ticket)
                    self._changed.notify_all()

    def _victims(self, spec: LoadSpec, size_bytes: int) -> list[str] | None:
        """The models to evict for a model; None while some must become idle first. Raises
        `InsufficientMemoryError` when it would not fit even then."""
        limits = self._limits()
        victims = choose_victims(self._as_residents(), limits, size_bytes)
        if victims is None:
            settled = self._as_residents(is_settled=True)
            if availability_of(settled, limits, size_bytes).state is ModelState.IMPOSSIBLE:
                raise too_large(spec.key, size_bytes, limits, settled)
        return victims

    def _check_patience(self, spec: LoadSpec, ticket: Ticket) -> None:
        now = time.monotonic()
        if ticket.pressed_since is None:
            ticket.pressed_since = now
            self._changed.notify_all()  # nobody waits behind it any more
        if now - ticket.pressed_since > self._pressure_wait_s:
            raise InsufficientMemoryError(
                f"the machine is about to run out of memory, and had none for {spec.key} for "
                f"{self._pressure_wait_s:g} s; end other programs, or use a smaller model",
                model=spec.key,
            )

    def _is_first(self, ticket: Ticket) -> bool:
        """True when no other ticket goes before this one."""
        impatient = next((one for one in self._waiting_for_memory if not one.is_patient), None)
        return impatient is ticket or (impatient is None and ticket.is_patient)

    def _must_wait_behind_others(self, ticket: Ticket) -> bool:
        """True when an earlier request has waited for models to become idle for too long."""
        line = self._waiting_for_memory
        waiting = (one for one in line if not one.is_patient and one.pressed_since is None)
        oldest = next(waiting, None)
        if oldest is None:
            return False
        return oldest.since < ticket.since and time.monotonic() - oldest.since > self._patience_s

    def _drop_dead(self) -> None:
        for key in [key for key, entry in self._entries.items() if entry.is_dead]:
            del self._entries[key]

    def _limits(self) -> Limits:
        return Limits(self._max_models, self._budget_bytes())

    def _as_residents(self, *, is_settled: bool = False) -> list[Resident]:
        """The models in memory or being loaded, for `eviction.py`; `is_settled`: as if the victims
        of current loads were freed already."""
        return [
            Resident(
                key,
                entry.last_used,
                entry.is_in_use,
                max(entry.size_bytes, 0 if is_settled else entry.displaced_bytes),
                entry.reload_s,
                key in self._pinned,
            )
            for key, entry in self._entries.items()
        ]

    def _begin_load(self, spec: LoadSpec, size_bytes: int, victims: list[str]) -> Entry:
        self._uses += 1
        removed = [(key, self._entries[key]) for key in victims]
        entry = Entry(
            spec,
            self._uses,
            size_bytes,
            tuple(victims),
            displaced_bytes=sum(victim.size_bytes for _key, victim in removed),
            users=1,
        )
        start_thread(
            lambda: self._run_load(entry, removed), name=f"orion-load-{spec.info.model_id}"
        )
        for key in victims:
            del self._entries[key]
        self._entries[spec.key] = entry
        return entry

    def _run_load(self, entry: Entry, removed: list[tuple[str, Entry]]) -> None:
        def on_progress(progress: LoadProgress) -> None:
            with self._lock:
                entry.progress = progress
                self._changed.notify_all()

        model: LocalModel | None = None
        error: BaseException | None = None
        try:
            close_all(_models_of(victim for _key, victim in removed))
            for key, _victim in removed:
                call_safely(self._on_evicted, key)
            with self._lock:
                entry.displaced_bytes = 0
                self._changed.notify_all()
            started = time.monotonic()
            model = self._load(entry.spec, entry.scope, on_progress)
            entry.reload_s = max(LEAST_RELOAD_S, round(time.monotonic() - started))
        except BaseException as caught:  # noqa: BLE001 (handed to those who wait for the load)
            error = caught
        with self._lock:
            entry.model, entry.error = model, error
            entry.is_leaving = False  # it may have completed although nobody waited any more
            if error is not None and self._entries.get(entry.spec.key) is entry:
                del self._entries[entry.spec.key]
            is_orphaned = self._is_closed
            self._active_at = time.monotonic()
            self._changed.notify_all()
        if is_orphaned and model is not None:
            call_safely(model.close, 0.0)
        call_safely(self._on_changed)

    def _await_load(self, entry: Entry, scope: CancelScope, on_progress: OnProgress) -> LocalModel:
        shown: LoadProgress | None = None
        while True:
            with self._lock:
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

    def _leave(self, entry: Entry) -> None:
        with self._lock:
            entry.users -= 1
            self._uses += 1
            self._active_at = time.monotonic()
            entry.last_used = self._uses
            is_abandoned = entry.users == 0 and entry.is_loading
            entry.is_leaving = entry.is_leaving or is_abandoned
            is_idle = entry.users == 0
            self._changed.notify_all()
        if is_abandoned:
            entry.scope.cancel(RequestCancelledError("nobody waits for this load any more"))
        if is_idle:
            call_safely(self._on_changed)


def _models_of(entries: Iterable[Entry]) -> list[LocalModel]:
    return [entry.model for entry in entries if entry.model is not None]
