"""Answers of other models than the wanted one: whether they are allowed, and what is said of them.

The chain decides which model answers. This module keeps count, warns once for each agent and
process, and words the reasons.
"""

import sys
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from orion_oie.errors import OrionWarning
from orion_oie.pool.candidate import Candidate
from orion_oie.schemas.results import Consideration

StandInPolicy = Literal["warn", "allow", "error"]

_LIBRARY = __name__.partition(".")[0] + "."
_warned: set[str] = set()
_warning = threading.Lock()


@dataclass(frozen=True, slots=True)
class StandIn:
    """The last answer of an agent that another model than the wanted one gave."""

    agent_id: str
    model_id: str
    wanted_model_id: str
    why: str
    can_be_fetched: bool = False

    @property
    def message(self) -> str:
        """A sentence that names both models and the reason."""
        return (
            f"agent '{self.agent_id}' is answered by {self.model_id} in place of "
            f"{self.wanted_model_id}, which {self.why}"
        )


class StandIns:
    """The stand-ins of one engine, by its policy. Thread-safe."""

    def __init__(self, policy: StandInPolicy) -> None:
        self.policy = policy
        self._lock = threading.Lock()
        self._count = 0
        self._current: dict[str, StandIn] = {}

    @property
    def count(self) -> int:
        """The number of answers that a stand-in gave."""
        return self._count

    def allowed(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates that may answer: all of them, or the first alone."""
        return list(candidates[:1] if self.policy == "error" else candidates)

    def announce(self, agent_id: str, candidates: Sequence[Candidate]) -> None:
        """Warn if the wanted model is not here and another one is going to answer. Called on the
        caller's thread; the warning points to the line of the application."""
        wanted = candidates[0]
        if self.policy != "warn" or not wanted.why_not:
            return
        answering = next((one for one in candidates if not one.why_not), None)
        if answering is not None:
            why = f"cannot answer: {wanted.why_not}"
            found = StandIn(
                agent_id, answering.model_id, wanted.model_id, why, wanted.can_be_fetched
            )
            _warn_once(found)

    def note(
        self,
        agent_id: str,
        answered: Candidate,
        wanted: Candidate,
        considered: Sequence[Consideration],
    ) -> bool:
        """Note which model answered for an agent; True if it was a stand-in."""
        is_stand_in = answered.model_id != wanted.model_id
        if not is_stand_in and agent_id not in self._current:
            return False
        with self._lock:
            if is_stand_in:
                self._count += 1
                why = _why_not(wanted, considered)
                found = StandIn(agent_id, answered.model_id, wanted.model_id, why)
                self._current[agent_id] = found
            else:
                self._current.pop(agent_id, None)
        return is_stand_in

    def reasons(self) -> list[str]:
        """A sentence for each agent whose last answer a stand-in gave; none if that is allowed."""
        if self.policy == "allow":
            return []
        with self._lock:
            return [one.message for one in self._current.values()]


def _why_not(wanted: Candidate, considered: Sequence[Consideration]) -> str:
    """The reason that a wanted model did not answer."""
    found = [
        one for one in considered if one.model_id == wanted.model_id and one.outcome != "not_needed"
    ]
    if not found:
        return "was not tried"
    if found[-1].outcome == "loading":
        return "is being loaded"
    return f"cannot answer: {found[-1].error or found[-1].reason}"


def _level_of_caller() -> int:
    """The `stacklevel`, for the function that calls this one, of the first frame outside of this
    library."""
    frame = sys._getframe(1)
    level = 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_LIBRARY):
        frame, level = frame.f_back, level + 1
    return level


def _warn_once(found: StandIn) -> None:
    with _warning:
        if found.agent_id in _warned:
            return
        _warned.add(found.agent_id)
    advice = ""
    if found.can_be_fetched:
        advice = (
            f"Fetch it with engine.pull('{found.agent_id}') or 'orion-oie pull {found.agent_id}', "
            "or answer with a model of your own, OrionInferenceEngine(model='your.gguf'). "
        )
    warnings.warn(
        f"{found.message}. {advice}EngineConfig(stand_in='allow') accepts this in silence, "
        "stand_in='error' never accepts it.",
        OrionWarning,
        stacklevel=_level_of_caller(),
    )


def forget_warnings() -> None:
    """Let every agent warn once more, as in a new process."""
    with _warning:
        _warned.clear()
