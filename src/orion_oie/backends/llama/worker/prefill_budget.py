"""How many prompt tokens a step may read while others wait for their next token.

Learnt from the steps themselves: what a step takes without prompt tokens, and what each prompt
token adds. Knows nothing of slots. Times are in seconds.
"""

# A step with prompt tokens may take this many times what it takes without. Users of a running
# stream should not see more than 3; the rest is for what the estimate misses.
STRETCH = 2.3

_FIRST_GUESS = 8
_WEIGHT = 0.2  # of the newest observation
_MOST = 2.0  # times what is known: what a single observation may claim
_USUAL_EVERY = 64  # steps: so often one without prompt tokens shows what is usual


class Pacer:
    """Keeps the estimates for one model."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._usual_s: dict[int, float] = {}
        self._token_s: float | None = None
        self._since_usual = 0

    def prompt_tokens(self, running: int) -> int:
        """Prompt tokens for a step that also computes one token for each of `running`.

        0 now and then: such a step shows what the usual one takes.
        """
        if running == 0:
            return self._most
        if not self._usual_s or self._since_usual >= _USUAL_EVERY:
            return 0
        if self._token_s is None:
            return min(self._most, _FIRST_GUESS)
        spare_s = (STRETCH - 1) * self._usual(running, self._token_s)
        return max(1, min(self._most, int(spare_s / self._token_s)))

    def note(self, running: int, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step."""
        self._since_usual += 1
        if prompt_tokens == 0:
            self._since_usual = 0
            known = self._usual_s.get(running)
            self._usual_s[running] = seconds if known is None else _mixed(known, seconds)
            return
        usual_s = self._usual(running, seconds / (running + prompt_tokens)) if running else 0.0
        token_s = max(seconds - usual_s, 0.05 * seconds) / prompt_tokens
        self._token_s = token_s if self._token_s is None else _mixed(self._token_s, token_s)

    def _usual(self, running: int, token_s: float) -> float:
        """Seconds of a step without prompt tokens."""
        if running in self._usual_s:
            return self._usual_s[running]
        if not self._usual_s:
            return running * token_s
        nearest = min(self._usual_s, key=lambda count: abs(count - running))
        return self._usual_s[nearest] * min(1.0, running / nearest)


def _mixed(known: float, new: float) -> float:
    return known + _WEIGHT * (min(new, _MOST * known) - known)
