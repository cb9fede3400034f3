"""The report on requests that make no progress, and on what blocks them. Pure: it ends nothing.

Deadlines end requests; this explains those that have none.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Activity:
    """The activity of one request. `quiet_s`: seconds without any progress. `model` is the key of
    the model that it waits for or uses; `pid` the process of that model, if it is in memory. `why`
    is the reason, in a sentence, for which it is in the queue; `blockers` are the models that have
    to become idle first."""

    request_id: str
    state: str
    quiet_s: float
    model: str | None = None
    pid: int | None = None
    why: str = ""
    blockers: frozenset[str] = frozenset()


def stuck(activities: Iterable[Activity], stuck_after_s: float) -> list[str]:
    """A sentence for each request without progress for `stuck_after_s`, with its blockers, the
    longest first."""
    activities = list(activities)
    quiet = sorted((a for a in activities if a.quiet_s >= stuck_after_s), key=lambda a: -a.quiet_s)
    return [_sentence(activity, activities) for activity in quiet]


def _sentence(one: Activity, everybody: Sequence[Activity]) -> str:
    head = f"request {one.request_id} has made no progress for {one.quiet_s:.0f} s in {one.state}"
    if one.model is None:
        return head
    if one.why:
        wanted = one.blockers or {one.model}
        users = [a.request_id for a in everybody if a.model in wanted and not a.why]
        running = f"; in use by {', '.join(users)}" if users else ""
        return f"{head}: it waits for {one.model}, because {one.why}{running}"
    where = f"worker {one.pid} of {one.model}" if one.pid is not None else one.model
    return f"{head}: it waits for {where}"
