"""The records of the pool: an entry for each model, a lease for each user, a ticket for each
request that waits for memory; and the errors for want of memory. The pool decides.
"""

import time
from collections.abc import Collection
from dataclasses import dataclass, field

from orion_oie.backends.base import (
    LoadSpec,
    LocalModel,
)
from orion_oie.cancellation import CancelScope
from orion_oie.errors import InsufficientMemoryError
from orion_oie.pool.eviction import (
    Limits,
    Resident,
)
from orion_oie.schemas.loading import LoadProgress
from orion_oie.schemas.units import in_mib

LEAST_RELOAD_S = 1.0


@dataclass(frozen=True, slots=True)
class Lease:
    """A model that is kept in memory while the lease is held."""

    model: LocalModel
    is_cold: bool
    load_ms: float
    evicted: tuple[str, ...]
    reserved_bytes: int = 0


@dataclass(eq=False)
class Entry:
    """A model in memory, or being loaded."""

    spec: LoadSpec
    last_used: int
    size_bytes: int = 0
    evicted: tuple[str, ...] = ()
    reload_s: float = LEAST_RELOAD_S
    displaced_bytes: int = 0  # of models that are still being freed for this one
    scope: CancelScope = field(default_factory=CancelScope)
    users: int = 0
    progress: LoadProgress | None = None
    model: LocalModel | None = None
    error: BaseException | None = None
    has_answered: bool = False
    is_leaving: bool = False  # an abandoned load that ends, or a model that is being freed

    @property
    def is_loading(self) -> bool:
        return self.model is None and self.error is None

    @property
    def is_in_use(self) -> bool:
        return self.users > 0 or self.is_leaving

    @property
    def is_ready(self) -> bool:
        """True when all of it is in memory: it answers at once."""
        model = self.model
        if model is None or not model.is_alive():
            return False
        return model.load_progress.phase in ("ready", "complete")

    @property
    def is_complete(self) -> bool:
        """True when nothing of it is on its way any more."""
        return self.model is not None and self.model.completion.done()

    @property
    def is_free(self) -> bool:
        """True when all of it is in memory, it writes text, and it takes one more request."""
        is_usable = not self.is_leaving and not self.spec.is_embedding
        return is_usable and self.users < self.spec.slots and self.is_ready

    @property
    def is_dead(self) -> bool:
        return self.model is not None and not self.is_leaving and not self.model.is_alive()


@dataclass(eq=False, slots=True)
class Ticket:
    """A place in the line for memory. Nobody has to wait behind a patient ticket, nor behind one
    that waits for the machine (`pressed_since`). A ticket with `may_evict` does not wait itself."""

    is_patient: bool
    may_evict: Collection[str] | None = None
    since: float = field(default_factory=time.monotonic)
    pressed_since: float | None = None  # when the machine was first seen without memory


def check_leave(spec: LoadSpec, ticket: Ticket, victims: Collection[str] | None) -> None:
    """Raise unless a ticket may evict these victims. Victims None stand for a wait, which a ticket
    with `may_evict` does not allow."""
    leave = ticket.may_evict
    if leave is not None and (victims is None or not set(victims) <= set(leave)):
        raise InsufficientMemoryError(f"there is no memory for {spec.key} just now", model=spec.key)


def too_large(
    key: str, size_bytes: int, limits: Limits, residents: list[Resident]
) -> InsufficientMemoryError:
    """The error for a model that would not fit even if all other models but the pinned were
    evicted."""
    pinned = [resident for resident in residents if resident.is_pinned]
    pinned_bytes = sum(resident.size_bytes for resident in pinned)
    budget_bytes = limits.memory_bytes
    held = ", ".join(f"{r.key} ({in_mib(r.size_bytes)})" for r in pinned)
    said = f"; pinned are {held}" if pinned else ""
    there = "no limit" if budget_bytes is None else in_mib(budget_bytes)
    if limits.models is not None and len(pinned) >= limits.models:
        said += f"; at most {limits.models} models may be in memory"
    return InsufficientMemoryError(
        f"{key} needs {in_mib(size_bytes)}, and the memory budget is {there}{said}; use a smaller "
        "variant or context_length, raise EngineConfig.memory.budget, or unpin",
        model=key,
        needed_bytes=size_bytes,
        budget_bytes=budget_bytes,
        pinned_bytes=pinned_bytes,
        pinned=[resident.key for resident in pinned],
    )
