"""The policy in its plainest form, over lists, as the oracle of `test_plain_policy.py`: each choice
looks at everything, and the whole order is one choice after the other."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orion_oie.engine.scheduling.lines import Waiting
from orion_oie.schemas.availability import READY, UNKNOWN, Availability, ModelState

Flow = tuple[str, str | None]


class PlainShares:
    """Start-time fair queueing of some flows."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.ends: dict[Any, float] = {}

    def start(self, flow: Any) -> float:
        return max(self.clock, self.ends.get(flow, 0.0))

    def serve(self, flow: Any, flows: int) -> None:
        start = self.start(flow)
        self.ends[flow] = start + 1
        self.clock = max(start, self.clock + 1 / (flows + 1))
        if len(self.ends) > 2 * flows + 16:
            self.ends = {flow: end for flow, end in self.ends.items() if end > self.clock}


class PlainPolicy:
    """What was served, and who is next by that."""

    def __init__(self, turn_s: float, aging_s: float) -> None:
        self.turn_s, self.aging_s = turn_s, aging_s
        self.dispatched_at: dict[str, float] = {}
        self.loaded_at: dict[str, float] = {}
        self.agents: dict[str, PlainShares] = {}
        self.sessions: dict[tuple[str, str], PlainShares] = {}

    def note(self, pick: Waiting, waiting: Iterable[Waiting], now: float, *, is_load: bool) -> None:
        self.dispatched_at[pick.model] = now
        if is_load:
            self.loaded_at[pick.model] = now
        flows = {one.flow for one in waiting if one.model == pick.model} | {pick.flow}
        agents = self.agents.setdefault(pick.model, PlainShares())
        agents.serve(pick.agent, len({agent for agent, _ in flows}))
        sessions = self.sessions.setdefault((pick.model, pick.agent), PlainShares())
        sessions.serve(pick.session, sum(agent == pick.agent for agent, _ in flows))

    def fairest(self, line: Sequence[Waiting]) -> Waiting:
        model = line[0].model
        agents = self.agents.get(model) or PlainShares()
        agent = min(dict.fromkeys(one.agent for one in line), key=agents.start)
        own = [one for one in line if one.agent == agent]
        sessions = self.sessions.get((model, agent)) or PlainShares()
        session = min(dict.fromkeys(one.session for one in own), key=sessions.start)
        return next(one for one in own if one.session == session)

    def choose(
        self, waiting: Sequence[Waiting], availability: Mapping[str, Availability], now: float
    ) -> Waiting | None:
        classes: dict[int, dict[str, list[Waiting]]] = {}
        for one in sorted(waiting, key=lambda one: one.seq):
            found = availability.get(one.model, UNKNOWN)
            if found.state is not ModelState.FULL:
                classes.setdefault(one.priority, {}).setdefault(one.model, []).append(one)
        holds: dict[str, str] = {}
        runnable = []
        for lines in sorted((list(c.values()) for c in classes.values()), key=self._class_order):
            lines.sort(key=lambda line: self._rank(line, availability, now))
            may_run = self._runnable(lines, availability, holds, now)
            if may_run:
                runnable.append(may_run)
        if not runnable:
            return None
        return self.fairest(min(runnable, key=self._class_order)[0])

    def _class_order(self, lines: Sequence[Sequence[Waiting]]) -> tuple[float, int]:
        oldest = min((line[0] for line in lines), key=lambda one: one.seq)
        return (oldest.arrived_at - oldest.priority * self.aging_s, -oldest.priority)

    def _rank(
        self, line: Sequence[Waiting], availability: Mapping[str, Availability], now: float
    ) -> tuple[int, float, int]:
        oldest = line[0]
        since = max(oldest.arrived_at, self.dispatched_at.get(oldest.model, oldest.arrived_at))
        if now - since >= self.turn_s:
            return (0, since, oldest.seq)
        state = availability.get(oldest.model, UNKNOWN).state
        return ({ModelState.READY: 1, ModelState.BLOCKED: 3}.get(state, 2), 0.0, oldest.seq)

    def _is_in_turn(self, model: str, now: float) -> bool:
        return model in self.loaded_at and now - self.loaded_at[model] < self.turn_s

    def _runnable(
        self,
        lines: Sequence[Sequence[Waiting]],
        availability: Mapping[str, Availability],
        holds: dict[str, str],
        now: float,
    ) -> list[Sequence[Waiting]]:
        of = {line[0].model: availability.get(line[0].model, UNKNOWN) for line in lines}
        in_turn = {
            model
            for model, found in of.items()
            if found.state is ModelState.READY and self._is_in_turn(model, now)
        }

        def hold(model: str) -> None:
            for key in of[model].displaced if of[model].blockers else ():
                holds.setdefault(key, model)

        kept_for = next(iter(holds.values()), None)
        may_run = []
        for line in lines:
            model = line[0].model
            if of[model].state is ModelState.BLOCKED:
                if of[model].blockers:
                    kept_for = kept_for or model
                    if not of[model].displaced & in_turn:
                        hold(model)
            elif of[model].is_loadable and kept_for is not None:
                holds.setdefault(model, kept_for)
            elif of[model].victims & in_turn:
                kept_for = model
            elif model not in holds:
                may_run.append(line)
        for model in of:
            hold(model)
        return may_run

    def order(
        self, waiting: Sequence[Waiting], availability: Mapping[str, Availability], now: float
    ) -> list[Waiting]:
        """Uses up the history."""
        left = list(waiting)
        later = {one.model: _once_idle(availability.get(one.model, UNKNOWN)) for one in left}
        ordered = []
        while left:
            pick = self.choose(left, later, now)
            assert pick is not None
            is_load = later[pick.model].is_loadable
            self.note(pick, left, now, is_load=is_load)
            if is_load:
                gone = later[pick.model].victims
                later[pick.model] = READY
                for model in later.keys() - {pick.model}:
                    if model in gone:
                        later[model] = Availability(ModelState.LOADABLE, frozenset({pick.model}))
                    elif later[model].victims & gone:
                        victims = later[model].victims - gone | {pick.model}
                        later[model] = Availability(ModelState.LOADABLE, victims)
            ordered.append(pick)
            left.remove(pick)
        return ordered


def _once_idle(found: Availability) -> Availability:
    if found.state is ModelState.FULL:
        return READY
    if found.state is ModelState.BLOCKED:
        return Availability(ModelState.LOADABLE, found.displaced)
    return found
