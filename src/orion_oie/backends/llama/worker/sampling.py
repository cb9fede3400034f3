"""Sampling: the choice of the next token of one sequence from its logits.

Plain greedy decoding is an argmax; everything else runs through a sampler chain of llama.cpp. A
grammar checks the chosen token first, and the whole vocabulary only when it refuses that token:
most tokens that a model wants to say are allowed. Knows no slots and no requests.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import llama_cpp as lc
import numpy as np
from numpy.typing import NDArray

from orion_oie.backends.llama.protocol import Logprob
from orion_oie.schemas.requests import GenerationOptions

Logits = NDArray[np.float32]

_PENALTY_WINDOW = 64
_COLDEST = 1e-6  # below it, logits divided by the temperature exceed the range of floats
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class NoTokenAllowedError(Exception):
    """The grammar allows no token of the vocabulary."""


class Candidates:
    """The table of candidates that llama.cpp's samplers work on: one per model."""

    def __init__(self, vocab_size: int) -> None:
        self._ids = np.arange(vocab_size, dtype=np.int32)
        self._table = np.empty(vocab_size, _CANDIDATE)
        self._native = lc.llama_token_data_array()
        first: Any = ctypes.cast(self._table.ctypes.data, lc.llama_token_data_p)
        self._native.data = first

    def load(self, logits: Logits) -> None:
        """Reset the table to all tokens."""
        self._table["id"] = self._ids
        self._table["logit"] = logits
        self._table["p"] = 0.0
        self._reset(len(self._ids))

    def load_one(self, token: int) -> None:
        """Reset the table to one token."""
        self._table[0] = (token, 1.0, 0.0)
        self._reset(1)

    def apply(self, sampler: Any) -> None:
        """Apply a sampler of llama.cpp, which filters, reweighs or chooses."""
        lc.llama_sampler_apply(sampler, ctypes.byref(self._native))

    @property
    def chosen(self) -> int:
        """The token that the last sampler chose."""
        return int(self._native.data[self._native.selected].id)

    @property
    def is_anything_left(self) -> bool:
        """False when every token is ruled out."""
        return bool(np.isfinite(self._table["logit"][: self._native.size]).any())

    def _reset(self, size: int) -> None:
        self._native.size = size
        self._native.selected = -1
        self._native.sorted = False


class Sampler:
    """Chooses the tokens of one sequence. Free it with `close`.

    The repeat penalty counts the tokens of `prompt`, too. `bias` is (token, added logit) pairs.
    `grammar` is a grammar sampler of llama.cpp, which this object then owns.
    """

    def __init__(
        self,
        candidates: Candidates,
        options: GenerationOptions,
        prompt: Sequence[int],
        bias: Sequence[tuple[int, float]] = (),
        grammar: Any = None,
    ) -> None:
        self._candidates = candidates
        self._bias_ids = np.array([token for token, _ in bias], np.int64)
        self._bias_values = np.array([value for _, value in bias], np.float32)
        self._grammar = grammar
        self._is_argmax = options.temperature < _COLDEST and options.repeat_penalty == 1.0
        self._chain = lc.llama_sampler_chain_init(lc.llama_sampler_chain_default_params())
        for stage in _stages(options, len(candidates._ids)):
            lc.llama_sampler_chain_add(self._chain, stage)
        if options.repeat_penalty != 1.0:
            for token in prompt[-_PENALTY_WINDOW:]:
                lc.llama_sampler_accept(self._chain, token)

    def sample(self, logits: Logits) -> int:
        """Choose the next token. Raises `NoTokenAllowedError`."""
        if len(self._bias_ids):
            logits = logits.copy()
            np.add.at(logits, self._bias_ids, self._bias_values)
        token = int(logits.argmax()) if self._is_argmax else self._from_chain(logits)
        if self._grammar is not None:
            if not self._is_allowed(token):
                token = self._from_chain(logits, is_limited=True)
            lc.llama_sampler_accept(self._grammar, token)
        if not self._is_argmax:
            lc.llama_sampler_accept(self._chain, token)
        return token

    def close(self) -> None:
        """Free the samplers of llama.cpp. Idempotent."""
        free_sampler(self._chain)
        free_sampler(self._grammar)
        self._chain = self._grammar = None

    def _is_allowed(self, token: int) -> bool:
        self._candidates.load_one(token)
        self._candidates.apply(self._grammar)
        return self._candidates.is_anything_left

    def _from_chain(self, logits: Logits, *, is_limited: bool = False) -> int:
        self._candidates.load(logits)
        if is_limited:
            self._candidates.apply(self._grammar)
            if not self._candidates.is_anything_left:
                raise NoTokenAllowedError
        self._candidates.apply(self._chain)
        return self._candidates.chosen


def free_sampler(sampler: Any) -> None:
    """Free a sampler of llama.cpp, if there is one."""
    if sampler:
        lc.llama_sampler_free(sampler)


def log_probabilities(
    logits: Logits, token: int, top: int
) -> tuple[float, list[tuple[int, float]]]:
    """Natural logarithms of the model's own probabilities, before any sampling setting: of
    `token`, and of the `top` most probable tokens, best first."""
    top = min(top, len(logits))
    shifted = logits.astype(np.float64) - float(logits.max())
    shifted -= np.log(np.exp(shifted).sum())
    best = np.argpartition(shifted, -top)[-top:] if top else np.empty(0, np.int64)
    ranked = sorted(((int(i), float(shifted[i])) for i in best), key=lambda item: -item[1])
    return float(shifted[token]), ranked


def described(logits: Logits, token: int, top: int, piece: Callable[[int], bytes]) -> Logprob:
    """The `log_probabilities` of a token, as the message for the host."""
    own, best = log_probabilities(logits, token, top)

    def text_of(token: int) -> str:
        return piece(token).decode("utf-8", "replace")

    return text_of(token), token, own, tuple((text_of(t), t, logprob) for t, logprob in best)


def _stages(options: GenerationOptions, vocab_size: int) -> list[Any]:
    stages = []
    if options.repeat_penalty != 1.0:
        stages.append(
            lc.llama_sampler_init_penalties(
                vocab_size, _PENALTY_WINDOW, options.repeat_penalty, 0.0, 0.0
            )
        )
    if options.temperature < _COLDEST:
        return [*stages, lc.llama_sampler_init_greedy()]
    if options.top_k > 0:
        stages.append(lc.llama_sampler_init_top_k(options.top_k))
    if options.top_p < 1:
        stages.append(lc.llama_sampler_init_top_p(options.top_p, 1))
    if options.min_p > 0:
        stages.append(lc.llama_sampler_init_min_p(options.min_p, 1))
    stages.append(lc.llama_sampler_init_temp(options.temperature))
    stages.append(lc.llama_sampler_init_dist(options.seed))
    return stages
