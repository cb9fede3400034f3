"""Samplers that follow a grammar in llama.cpp's GBNF and never leave a broken character.

They may be made on any thread: only the vocabulary is read.
"""

import codecs
import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import llama_cpp as lc

from orion_oie.errors import InvalidRequestError

# After these lead bytes, some bytes make no character, although llama.cpp's grammars accept them:
# overlong forms, surrogates, and numbers beyond Unicode.
_WRONG_SECOND = {
    0xE0: range(0x80, 0xA0),
    0xED: range(0xA0, 0xC0),
    0xF0: range(0x80, 0x90),
    0xF4: range(0x90, 0xC0),
}
_CONTINUATIONS = bytes(range(0x80, 0xC0))


def parse_grammar(vocab: Any, text: str) -> Any:
    """A llama.cpp sampler that keeps the tokens with which the grammar continues.

    The tokens it keeps are valid UTF-8 and part of the answer's text: no control tokens, whose
    names a grammar would count. The caller frees the sampler. Raises `InvalidRequestError`.
    """
    vocabulary = _vocabulary(vocab, lc.llama_vocab_n_tokens(vocab))
    grammar = lc.llama_sampler_init_grammar(vocab, text.encode(), b"root")
    if not grammar:
        raise InvalidRequestError(
            "llama.cpp does not accept the grammar; its reasons are in the worker's log"
        )
    chain = lc.llama_sampler_chain_init(lc.llama_sampler_chain_default_params())
    lc.llama_sampler_chain_add(chain, vocabulary.ban(vocabulary.unwritable))
    guard = lc.llama_sampler_init(ctypes.byref(_INTERFACE), None)
    _guards[ctypes.addressof(guard.contents)] = _Guard(vocabulary)
    lc.llama_sampler_chain_add(chain, guard)
    lc.llama_sampler_chain_add(chain, grammar)
    return chain


class _Vocabulary:
    """The tokens that a grammar would read differently from the answer's text."""

    def __init__(self, vocab: Any, size: int) -> None:
        self._size = size
        self.unwritable: list[int] = []
        self.leads: dict[int, int] = {}  # tokens that end with one of the lead bytes
        wrong: dict[int, list[int]] = {lead: [] for lead in _WRONG_SECOND}
        buffer = ctypes.create_string_buffer(1024)
        for token in range(size):
            length = lc.llama_token_to_piece(vocab, token, buffer, len(buffer), 0, False)
            piece = ctypes.string_at(buffer, max(length, 0))
            if lc.llama_vocab_is_eog(vocab, token):
                continue
            if not _is_writable(piece):
                self.unwritable.append(token)
                continue
            if piece[-1] in wrong:
                self.leads[token] = piece[-1]
            for lead, seconds in _WRONG_SECOND.items():
                if piece[0] in seconds:
                    wrong[lead].append(token)
        # They live as long as the process: one vocabulary, a few hundred tokens.
        self.bans = {lead: self.ban(tokens) for lead, tokens in wrong.items()}

    def ban(self, tokens: list[int]) -> Any:
        """A sampler that rules out these tokens."""
        biases = (lc.llama_logit_bias * len(tokens))()
        for entry, token in zip(biases, tokens, strict=True):
            entry.token, entry.bias = token, -math.inf
        return lc.llama_sampler_init_logit_bias(self._size, len(tokens), biases)


@lru_cache(maxsize=1)
def _vocabulary(vocab: Any, size: int) -> _Vocabulary:
    return _Vocabulary(vocab, size)


def _is_writable(piece: bytes) -> bool:
    """True if the token has text, which is valid if the text before and after it is."""
    if piece.isascii():
        return bool(piece) and b"\0" not in piece
    try:
        codecs.utf_8_decode(piece.lstrip(_CONTINUATIONS), "strict", False)
    except UnicodeDecodeError:
        return False
    return b"\0" not in piece


@dataclass(slots=True)
class _Guard:
    """State of a sampler that continues where the last token ended inside a character."""

    vocabulary: _Vocabulary
    lead: int | None = None


_guards: dict[int, _Guard] = {}


def _on_accept(sampler: Any, token: int) -> None:
    guard = _guards[ctypes.addressof(sampler.contents)]
    guard.lead = guard.vocabulary.leads.get(token)


def _on_apply(sampler: Any, candidates: Any) -> None:
    guard = _guards[ctypes.addressof(sampler.contents)]
    if guard.lead is not None:
        lc.llama_sampler_apply(guard.vocabulary.bans[guard.lead], candidates)


def _on_free(sampler: Any) -> None:
    del _guards[ctypes.addressof(sampler.contents)]


_INTERFACE = lc.llama_sampler_i(
    accept=lc.llama_sampler_i_accept(_on_accept),
    apply=lc.llama_sampler_i_apply(_on_apply),
    free=lc.llama_sampler_i_free(_on_free),
)
