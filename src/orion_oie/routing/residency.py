"""Pure: which of near-equal agents has its model in memory.

An agent that could answer at once may be taken instead of a slightly better one that has to be
loaded first. The gap that this may bridge grows with the seconds that it saves, up to a limit; a
clear difference is never bridged.
"""

from collections.abc import Callable, Sequence

NEAR = 0.12  # of probability: what is further behind is clearly worse
_LEAST_S = 0.1  # what nobody would notice decides nothing


def faster_alternative(
    ranked: Sequence[tuple[str, float]],
    wait_s: Callable[[str], float | None],
    limit_s: float,
    near: float = NEAR,
) -> tuple[str, float] | None:
    """The agent to take instead of the first, and the seconds that it saves; else None.

    ranked: agents and their probabilities, the best first; what has none is never taken.
    limit_s: seconds from which on a wait counts in full; 0 leaves the order as it is.
    """
    if limit_s <= 0 or len(ranked) < 2:
        return None
    best_id, best = ranked[0]
    rivals = [(agent_id, p) for agent_id, p in ranked[1:] if p > 0 and best - p <= near]
    best_wait = wait_s(best_id) if rivals else None
    if not best_wait:
        return None
    for agent_id, probability in rivals:
        wait = wait_s(agent_id)
        saved = 0.0 if wait is None else best_wait - wait
        if saved >= _LEAST_S and best - probability <= near * min(1.0, saved / limit_s):
            return agent_id, saved
    return None
