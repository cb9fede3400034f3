"""The report on requests that make no progress, and on what blocks them. Pure: it ends nothing.

Deadlines end requests; this explains those that have none.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest


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


NAMED = 20
"""At most that many requests are named one by one."""

IDLE_S = 2.0
"""Nothing may run or load for that long while requests wait."""


def idle(waiting: int, idle_s: float, longest: Activity | None) -> list[str]:
    """A sentence if requests wait although nothing at all runs or loads: something is wrong then,
    whatever they wait for. `longest` is one of them."""
    if not waiting or longest is None or idle_s < IDLE_S:
        return []
    what = "a request waits" if waiting == 1 else f"{waiting} requests wait"
    why = f", because {longest.why}" if longest.why else ""
    return [
        f"{what} although nothing has run or loaded for {idle_s:.0f} s: {longest.request_id} waits "
        f"for {longest.model or 'a model'}{why}"
    ]


def stuck(activities: Iterable[Activity], stuck_after_s: float) -> list[str]:
    """A sentence for each request without progress for `stuck_after_s`, with its blockers, the
    longest first; of very many, one for all but the first."""
    activities = list(activities)
    quiet = [one for one in activities if one.quiet_s >= stuck_after_s]
    named = nlargest(NAMED, quiet, key=lambda one: one.quiet_s)
    users: dict[str, list[str]] = {}
    for one in activities:
        if not one.why and one.model is not None:
            users.setdefault(one.model, []).append(one.request_id)
    sentences = [_sentence(one, users) for one in named]
    if len(quiet) > NAMED:
        sentences.append(f"{len(quiet) - NAMED} more requests have made no progress for as long")
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
