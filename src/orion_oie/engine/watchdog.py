"""The report on requests that make no progress, and on what blocks them. Pure: it ends nothing.

Deadlines end requests; this explains those that have none.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Activity:
    """The activity of one request. `quiet_s`: seconds without any progress. `model` is the key of
    the model that it waits for or uses; `pid` the process of that model, if it is in memory. `why`
    is the reason, in a sentence, for which it is in the queue; `blockers` are the models that have
    to become idle first. `is_waiting`: in the queue, or for memory."""

    request_id: str
    state: str
    quiet_s: float
    model: str | None = None
    pid: int | None = None
    why: str = ""
    blockers: frozenset[str] = frozenset()
    is_waiting: bool = False


IDLE_S = 2.0
"""Nothing may run or load for that long while requests wait."""


def idle(activities: Iterable[Activity], idle_s: float) -> list[str]:
    """A sentence if a request waits although nothing at all runs or loads: something is wrong then,
    whatever it waits for."""
    waiting = [one for one in activities if one.is_waiting and one.quiet_s >= IDLE_S]
    if not waiting or idle_s < IDLE_S:
        return []
    longest = max(waiting, key=lambda one: one.quiet_s)
    why = f", because {longest.why}" if longest.why else ""
    return [
        f"request {longest.request_id} waits for {longest.model or 'a model'} although nothing has "
        f"run or loaded for {idle_s:.0f} s{why}"
    ]


def stuck(activities: Iterable[Activity], stuck_after_s: float, more: int = 0) -> list[str]:
    """A sentence for each request without progress for `stuck_after_s`, with its blockers, the
    longest first. `more` are that quiet, and not among them."""
    activities = list(activities)
    quiet = sorted((a for a in activities if a.quiet_s >= stuck_after_s), key=lambda a: -a.quiet_s)
    users: dict[str, list[str]] = {}
    for one in activities:
        if not one.why and one.model is not None:
            users.setdefault(one.model, []).append(one.request_id)
    sentences = [_sentence(one, users) for one in quiet]
    if more:
        sentences.append(f"{more} more requests have made no progress for {stuck_after_s:g} s")
    return sentences


def _sentence(one: Activity, users: Mapping[str, Sequence[str]]) -> str:
    head = f"request {one.request_id} has made no progress for {one.quiet_s:.0f} s in {one.state}"
    if one.model is None:
        return head
    if one.why:
        in_use = [name for model in one.blockers or {one.model} for name in users.get(model, ())]
        running = f"; in use by {', '.join(in_use)}" if in_use else ""
        return f"{head}: it waits for {one.model}, because {one.why}{running}"
    where = f"worker {one.pid} of {one.model}" if one.pid is not None else one.model
    return f"{head}: it waits for {where}"
