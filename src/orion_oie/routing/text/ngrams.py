"""Hashed word and character n-grams of a text: the input of the router's linear model.

Words carry the sense; character n-grams cover word forms that were never seen. The instruction
counts in full, the payload by its words alone and with less weight. Every digit counts as 0, and
case is ignored. Of a text only bucket numbers are kept. Imports numpy: import this module when
something is to be routed.

The hash of words is CRC-32; of characters it is a polynomial over the code points in 64 bits with a
multiplicative mix, computed for all positions at once.
"""

import math
import re
import zlib
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from orion_oie.routing.text.excerpt import excerpt

BITS = 15
BUCKETS = 2 << BITS  # one table for words, one for pieces of words

_MASK = (1 << BITS) - 1
_SHORTEST, _LONGEST = 3, 5
_SPELLED_CHARS = (600, 300)  # of the start and the end of an instruction
_PAYLOAD_WORDS = 150
_PAYLOAD_WEIGHT = 0.5
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIXER = np.uint64(0xBF58476D1CE4E5B9)
_FOLD, _TOP = np.uint64(29), np.uint64(40)

_WORD = re.compile(r"[^\W\d_]{1,40}(?:'[a-z]+)?|\d+|[^\w\s]")
_DIGIT = re.compile(r"\d")


class Grams(NamedTuple):
    """Buckets, each once, with their values; and the word n-grams by name, with their buckets.

    buckets: shape (n,), in [0, BUCKETS). values: shape (n,), float32: the vectors of the words, the
    character n-grams and the payload are each scaled to length one (the payload to less) and then
    added up. names: the word n-grams. name_buckets, name_values: shape (names,).
    """

    buckets: NDArray[np.int64]
    values: NDArray[np.float32]
    names: list[str]
    name_buckets: NDArray[np.int64]
    name_values: NDArray[np.float32]


def grams(instruction: str, payload: str = "") -> Grams:
    """The n-grams of a prompt, given its instruction and its payload as excerpts."""
    words = _words(instruction)
    names = _word_grams(words)
    named = _hashed(names)
    pieces = _pieces(excerpt(instruction, *_SPELLED_CHARS)) + (1 << BITS)
    buckets, values = _counted(np.concatenate((named, pieces)))
    border = int(np.searchsorted(buckets, 1 << BITS))
    _scale(values[:border], 1.0)
    _scale(values[border:], 1.0)
    name_values = values[np.searchsorted(buckets[:border], named)]
    if payload:  # it shares the table of the instruction's words
        about = _words(payload)[:_PAYLOAD_WORDS]
        more, counts = _counted(_hashed([f"in {word}" for word in about]))
        _scale(counts, _PAYLOAD_WEIGHT)
        buckets, places = np.unique(np.concatenate((buckets, more)), return_inverse=True)
        values = np.bincount(places, np.concatenate((values, counts))).astype(np.float32)
    return Grams(buckets, values, names, named, name_values)


def _words(text: str) -> list[str]:
    """The words and signs of a text in lower case; every number becomes 0."""
    found: list[str] = _WORD.findall(text.lower())
    return ["0" if word[0].isdigit() else word for word in found]


def _word_grams(words: list[str]) -> list[str]:
    """The words, pairs of words, openings and endings: `write a ...`, `... of it ?`."""
    grams = list(words)
    grams += [f"{first} {second}" for first, second in pairwise(words)]
    if words:
        grams += [f"{' '.join(words[:count])} ..." for count in (1, 2, 3)]
        grams += [f"... {' '.join(words[-count:])}" for count in (1, 2)]
    return grams


def _hashed(names: list[str]) -> NDArray[np.int64]:
    # Encoded in one call, which is faster; no name contains a line feed.
    encoded = "\n".join(names).encode("utf-8", "surrogatepass").split(b"\n") if names else []
    return np.array([zlib.crc32(name) & _MASK for name in encoded], np.int64)


def _pieces(text: str) -> NDArray[np.int64]:
    """The hashes of all runs of three to five characters."""
    spaced = f" {_DIGIT.sub('0', ' '.join(text.lower().split()))} "
    points = np.frombuffer(spaced.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    found: list[NDArray[np.uint64]] = []
    rolled = points
    for length in range(2, _LONGEST + 1):
        if len(points) < length:
            break
        rolled = rolled[:-1] * _MULTIPLIER + points[length - 1 :]
        if length >= _SHORTEST:
            found.append(((rolled ^ (rolled >> _FOLD)) * _MIXER) >> _TOP)
    if not found:
        return np.empty(0, np.int64)
    return (np.concatenate(found) & np.uint64(_MASK)).astype(np.int64)


def _counted(hashes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The buckets in order, each once, with values that grow with the logarithm of their counts."""
    if not len(hashes):
        return hashes, np.empty(0, np.float32)
    ordered = np.sort(hashes)
    changes = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    firsts = np.concatenate(([0], changes))
    counts = np.concatenate((changes, [len(ordered)])) - firsts
    return ordered[firsts], (1.0 + np.log(counts)).astype(np.float32)


def _scale(values: NDArray[np.float32], length: float) -> None:
    """Scale a vector to that length, in place; an empty one stays as it is."""
    if len(values):
        values *= length / math.sqrt(values @ values)
