"""The number of prompt tokens a step may compute while other requests decode.

Learned from the steps themselves: the time of a step without prompt tokens, and the time that each
prompt token adds. Knows nothing of slots. Times are in seconds.
"""

# A step with prompt tokens may take this many times as long as a step without. Users of a running
# stream should see a factor of 3 at most; the rest is for errors of the estimate.
STRETCH = 2.3

_FIRST_GUESS = 8
_WEIGHT = 0.2  # of the newest observation
_MOST = 2.0  # a single observation counts at most as this many times the estimate
_DECODE_ONLY_EVERY = 64  # steps: then one without prompt tokens renews the baseline


class PrefillBudget:
    """The estimates for one model. `max_tokens` is the largest batch."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._decode_s: dict[int, float] = {}  # by the number of decoding tasks
        self._token_s: float | None = None
        self._since_decode_only = 0

    def tokens(self, decoding: int) -> int:
        """The prompt tokens for a step that also computes one token for each of `decoding` tasks.

        0 every now and then: such a step measures the baseline.
        """
        if decoding == 0:
            return self._max_tokens
        if not self._decode_s or self._since_decode_only >= _DECODE_ONLY_EVERY:
            return 0
        if self._token_s is None:
            return min(self._max_tokens, _FIRST_GUESS)
        spare_s = (STRETCH - 1) * self._baseline(decoding, self._token_s)
        return max(1, min(self._max_tokens, int(spare_s / self._token_s)))

    def note(self, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step."""
        self._since_decode_only += 1
        if prompt_tokens == 0:
            self._since_decode_only = 0
            known = self._decode_s.get(decoding)
            self._decode_s[decoding] = seconds if known is None else _mixed(known, seconds)
            return
        each_s = seconds / (decoding + prompt_tokens)
        baseline_s = self._baseline(decoding, each_s) if decoding else 0.0
        token_s = max(seconds - baseline_s, 0.05 * seconds) / prompt_tokens
        self._token_s = token_s if self._token_s is None else _mixed(self._token_s, token_s)

    def _baseline(self, decoding: int, token_s: float) -> float:
        """The seconds of a step without prompt tokens."""
        if decoding in self._decode_s:
            return self._decode_s[decoding]
        if not self._decode_s:
            return decoding * token_s
        nearest = min(self._decode_s, key=lambda count: abs(count - decoding))
        return self._decode_s[nearest] * min(1.0, decoding / nearest)


def _mixed(known: float, new: float) -> float:
    return known + _WEIGHT * (min(new, _MOST * known) - known)
