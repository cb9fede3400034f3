"""The tie-break: asks a language model already in memory to choose between two close agents.

The model answers with one letter. It is asked twice, with the agents in both orders, and the two
log-odds are averaged, so that a bias for the first agent or for a letter cancels out. No model is
loaded for it, nothing leaves this machine, and after a short time limit the route goes on without.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

from orion_oie.backends.base import GenerationJob, LocalModel
from orion_oie.cancellation import CancelScope, DeadlineTimer
from orion_oie.errors import DeadlineExceededError
from orion_oie.models.specs import AgentSpec
from orion_oie.routing.text.excerpt import excerpt
from orion_oie.schemas.requests import (
    GenerationOptions,
    Message,
)
from orion_oie.schemas.results import TokenLogprob

LIMIT_S = 3.0

_QUESTION_CHARS = (600, 200)
_PRIORITY = 100  # a single token, and a caller waits for the route
_SYSTEM_PROMPT = (
    "You send each question to the assistant that it suits best. Answer with one letter."
)
_OPTIONS = GenerationOptions(
    temperature=0.0, max_tokens=1, grammar='root ::= "A" | "B"', logprobs=20
)


class TieBreaker:
    """Asks the model that `borrow()` yields, for `limit_s` seconds at most; `borrow()` yields None
    if no model is in memory. Thread-safe."""

    def __init__(
        self,
        borrow: Callable[[], AbstractContextManager[LocalModel | None]],
        deadlines: DeadlineTimer,
        limit_s: float = LIMIT_S,
    ) -> None:
        self._borrow = borrow
        self._deadlines = deadlines
        self._limit_s = limit_s

    def __call__(
        self, query: str, first: AgentSpec, second: AgentSpec, limit_s: float | None = None
    ) -> float | None:
        """The probability that `first` suits the question better than `second`; None if no model
        is in memory or none answered within `limit_s`. Raises what the model raises."""
        limit_s = self._limit_s if limit_s is None else min(limit_s, self._limit_s)
        with self._borrow() as model:
            if model is None:
                return None
            scope = CancelScope()
            self._deadlines.watch(scope, limit_s)
            try:
                forward = _log_odds(model, query, first, second, scope)
                backward = _log_odds(model, query, second, first, scope)
            except DeadlineExceededError:
                return None
            finally:
                self._deadlines.forget(scope)
        if forward is None or backward is None:
            return None
        return 0.5 + 0.5 * math.tanh((forward - backward) / 4)  # logistic function of their mean


def _log_odds(
    model: LocalModel, query: str, a: AgentSpec, b: AgentSpec, scope: CancelScope
) -> float | None:
    """The log-odds of agent `a` against `b`; None if the model returns no probabilities."""
    question = excerpt(query, *_QUESTION_CHARS)
    asked = (
        f"Assistant A, {a.name}: {a.description}\nAssistant B, {b.name}: {b.description}\n\n"
        f"The question:\n{question}\n\nWhich assistant suits it best, A or B?"
    )
    messages = (Message(role="system", content=_SYSTEM_PROMPT), Message(role="user", content=asked))
    job = GenerationJob(messages, _OPTIONS, priority=_PRIORITY, is_streamed=False)
    completion = model.generate(job, scope, lambda _text, _tokens: None)
    if not completion.logprobs:
        return None
    said = completion.logprobs[0]
    return _logprob_of("A", said) - _logprob_of("B", said)


def _logprob_of(letter: str, said: TokenLogprob) -> float:
    """The log-probability of a letter; that of the least probable alternative if it is missing."""
    found = [one.logprob for one in (said, *said.top) if one.text == letter]
    return found[0] if found else min(one.logprob for one in (said, *said.top))
