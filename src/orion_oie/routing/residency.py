"""Preference for agents whose model is in memory: a pure function.

An agent that can answer at once may replace a slightly better one whose model has to be loaded
first. The difference in probability that this may bridge grows with the seconds saved, up to a
limit; a clear difference is never bridged.
"""

from collections.abc import Callable, Sequence

NEAR = 0.12  # largest difference in probability of near-equal agents
_LEAST_S = 0.1  # a shorter wait is not noticed


def faster_alternative(
    ranked: Sequence[tuple[str, float]],
    wait_s: Callable[[str], float | None],
    limit_s: float,
    near: float = NEAR,
) -> tuple[str, float] | None:
    """The agent to use instead of the best one, and the seconds that saves; None to keep the best.

    ranked: agents and their probabilities, best first; an agent of probability 0 is never chosen.
    wait_s: seconds until an agent could answer, None if unknown. limit_s: seconds saved at which
    the full difference `near` is bridged; 0 keeps the order.
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
