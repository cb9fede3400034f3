"""The tokenizer of one model: text to tokens and back. Runs in a worker only.

It may be used on any thread: the vocabulary of a loaded model does not change.
"""

import ctypes
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import llama_cpp as lc


class Vocabulary:
    """The vocabulary of a loaded model. `handle` is llama.cpp's own, for grammars."""

    def __init__(self, model: Any) -> None:
        self.handle = lc.llama_model_get_vocab(model)
        self.size = int(lc.llama_vocab_n_tokens(self.handle))
        self._pieces: dict[int, bytes] = {}
        self._ends: dict[int, bool] = {}

    def special_text(self, token: int) -> str:
        """The written form of a control token; empty for token -1."""
        return self._piece_of(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    @property
    def bos(self) -> int:
        return int(lc.llama_vocab_bos(self.handle))

    @property
    def eos(self) -> int:
        return int(lc.llama_vocab_eos(self.handle))

    @cached_property
    def _adds_bos(self) -> bool:
        return bool(lc.llama_vocab_get_add_bos(self.handle))

    @cached_property
    def _is_sentencepiece(self) -> bool:
        return int(lc.llama_vocab_type(self.handle)) == lc.LLAMA_VOCAB_TYPE_SPM

    def is_end(self, token: int) -> bool:
        """True for the tokens that end a generation."""
        known = self._ends.get(token)
        if known is None:
            known = self._ends[token] = bool(lc.llama_vocab_is_eog(self.handle, token))
        return known

    # -- text and tokens

    def tokenize(self, segments: Sequence[tuple[str, bool]]) -> list[int]:
        """Tokens of (text, is_control) segments; only control segments yield control tokens."""
        tokens: list[int] = []
        for text, is_control in segments:
            tokens += self._tokens_of(text, parse_special=is_control)
        if self._adds_bos and self.bos >= 0 and tokens[:1] != [self.bos]:
            tokens.insert(0, self.bos)
        return tokens

    def _tokens_of(self, text: str, *, parse_special: bool) -> list[int]:
        if not self._is_sentencepiece:
            return self._raw_tokens(text, parse_special)
        # SentencePiece puts a space before every text; a line break in front absorbs the space, and
        # is removed again.
        lead = self._raw_tokens("\n", parse_special)
        tokens = self._raw_tokens("\n" + text, parse_special)
        if tokens[: len(lead)] != lead:
            return self._raw_tokens(text, parse_special)
        return tokens[len(lead) :]

    def text_tokens(self, text: str) -> list[int]:
        """Tokens of a literal text, without control tokens."""
        return self._tokens_of(text, parse_special=False)

    def _raw_tokens(self, text: str, parse_special: bool) -> list[int]:
        data = text.encode()
        capacity = len(data) + 8
        while True:
            buffer = (lc.llama_token * capacity)()
            count = lc.llama_tokenize(
                self.handle, data, len(data), buffer, capacity, False, parse_special
            )
            if count >= 0:
                return list(buffer[:count])
            capacity = -count

    def piece(self, token: int) -> bytes:
        """The bytes of a token's text; empty for control tokens."""
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = self._piece_of(token, special=False)
        return known

    def _piece_of(self, token: int, *, special: bool) -> bytes:
        capacity = 64
        while True:
            buffer = ctypes.create_string_buffer(capacity)
            length = lc.llama_token_to_piece(self.handle, token, buffer, capacity, 0, special)
            if length >= 0:
                return buffer.raw[:length]
            capacity = -length
