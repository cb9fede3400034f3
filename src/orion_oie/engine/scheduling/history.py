"""What was served so far, as far as it affects who is next, and the settings of that choice.

Times are seconds of one clock.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from orion_oie.engine.scheduling.fairness import AgentShares
from orion_oie.engine.scheduling.lines import Line, Lines, Waiting


@dataclass(frozen=True, slots=True)
class Settings:
    """turn_s: the seconds for which a model is served before others have to be. aging_s: the
    seconds of waiting that are worth one step of priority."""

    turn_s: float = 10.0
    aging_s: float = 30.0


class History:
    """The dispatches so far. Only `note` and `note_models` change a decision."""

    def __init__(self) -> None:
        self._dispatched_at: dict[str, float] = {}
        self._loaded_at: dict[str, float] = {}
        self._shares: dict[str, AgentShares] = {}

    def without_shares(self) -> "History":
        """An independent copy, as if nobody had been served."""
        new = History()
        new._dispatched_at = dict(self._dispatched_at)
        new._loaded_at = dict(self._loaded_at)
        return new

    def copy(self) -> "History":
        """An independent copy."""
        new = self.without_shares()
        new._shares = {model: shares.copy() for model, shares in self._shares.items()}
        return new

    def note(self, pick: Waiting, lines: Lines, now: float, *, is_load: bool) -> None:
        """Note that `pick` out of `lines` is dispatched; `is_load`: its model is loaded for it."""
        self.note_models((pick.model,), now, pick.model if is_load else None)
        askers = lines.askers(pick.model)
        sessions = askers.get(pick.agent, {})
        self.shares(pick.model).serve(
            pick.agent,
            pick.session,
            len(askers) + (pick.agent not in askers),
            len(sessions) + (pick.session not in sessions),
        )

    def note_models(self, models: Iterable[str], now: float, loaded: str | None) -> None:
        """Note that requests for models are dispatched, and which of them is loaded, without the
        shares of those who asked."""
        self._dispatched_at.update(dict.fromkeys(models, now))
        if loaded is not None:
            self._loaded_at[loaded] = now

    def unserved_since(self, model: str, arrived_at: float) -> float:
        """The time since which a model is wanted but not served, given its oldest request's
        arrival."""
        return max(arrived_at, self._dispatched_at.get(model, arrived_at))

    def is_in_turn(self, model: str, now: float, turn_s: float) -> bool:
        """True when the model was loaded less than a turn ago."""
        loaded_at = self._loaded_at.get(model)
        return loaded_at is not None and now - loaded_at < turn_s

    def shares(self, model: str) -> AgentShares:
        """The shares of those who ask for a model."""
        return self._shares.setdefault(model, AgentShares())

    def fairest(self, line: Line) -> Waiting:
        """The request of a line whose turn it is."""
        return line.fairest(self.shares(line.model))
