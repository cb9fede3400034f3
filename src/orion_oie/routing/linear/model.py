"""A small linear model that scores the topics of a prompt: softmax regression on hashed n-grams and
signals, and another one (a head) on the vector of an embedding model.

Its weights come from `weights.npz`, made by `scripts/train_router.py`, or from `fitting.py`. It
knows topics, not agents. Imports numpy: import this module when something is to be routed.
"""

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from orion_oie.errors import InvalidRequestError
from orion_oie.models.files import atomic_write
from orion_oie.routing.linear.probes import NO_PROBES, Probes
from orion_oie.routing.text.ngrams import (
    BUCKETS,
    Grams,
)
from orion_oie.routing.text.opaque import PLACEHOLDERS
from orion_oie.routing.text.signals import SIGNALS

TOPICS = (
    "conversation",
    "code",
    "creative",
    "multilingual",
    "math",
    "logic",
    "data",
    "vision",
)
_FORMAT = 2
_LEAST_GAIN = 0.01
_WORDS_BEFORE_SHAPE = 2
_WORDLESS = frozenset({"length", "length_squared", "substance"})  # they tell a reader nothing
_LOOKS_FOR_EACH = 4  # candidates per reason shown: some are signs or duplicates

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Head:
    """The weights for the vector of one embedding model: shape (dimensions + signals, topics), and
    the bias, shape (topics,). probes: what the model makes of a few texts."""

    weights: Floats
    bias: Floats
    probes: Probes = NO_PROBES

    @cached_property
    def unseen(self) -> tuple[int, ...]:
        """The columns of topics without any training, as `with_topics` adds them."""
        is_blank = ~self.weights.any(axis=0) & (self.bias == _UNSEEN)
        return tuple(np.flatnonzero(is_blank).tolist())


@dataclass(frozen=True)
class Calibration:
    """The calibration of scores, fitted on prompts that the weights were not fitted on.

    Without a vector, the logits of the n-grams are multiplied by `alone`. With one, the logits of
    n-grams and vector are multiplied by `grams` and `vector` and added up. The confidence in the
    best agent, of probability p, is 1 / (1 + exp(-(a * log(p / (1 - p)) + b))), where (a, b) is
    `confidence_alone` or `confidence_fused` (J. Platt, "Probabilistic outputs for support vector
    machines", 1999).
    """

    alone: float = 1.0
    grams: float = 0.75
    vector: float = 0.75
    confidence_alone: tuple[float, float] = (1.0, 0.0)
    confidence_fused: tuple[float, float] = (1.0, 0.0)


@dataclass(frozen=True)
class LinearModel:
    """Weights of the topics.

    gram_weights: shape (BUCKETS, topics). signal_weights: shape (signals, topics). bias: shape
    (topics,). heads: one for each embedding model, by the name that it was trained under; `head_of`
    finds the one of a model. rarity: shape (BUCKETS,), the inverse document frequency of each
    bucket, for comparing texts. about: facts on the training.
    """

    topics: tuple[str, ...]
    gram_weights: Floats
    signal_weights: Floats
    bias: Floats
    rarity: Floats
    heads: Mapping[str, Head] = field(default_factory=dict)
    calibration: Calibration = field(default_factory=Calibration)
    about: Mapping[str, Any] = field(default_factory=dict)

    def logits(self, grams: Grams, signals: Floats) -> Floats:
        """The scores of the topics from n-grams and signals, shape (topics,)."""
        found = grams.values @ self.gram_weights.take(grams.buckets, axis=0)  # faster than [...]
        logits: Floats = found + signals @ self.signal_weights + self.bias
        return logits

    def head_of(self, probes: Probes) -> str | None:
        """The name of the head that was trained for the embedding model with these probes."""
        owned = (name for name, head in self.heads.items() if head.probes.agree_with(probes))
        return next(owned, None)

    def vector_logits(self, name: str, vector: Floats, signals: Floats) -> Floats | None:
        """The scores of the topics from a vector by the head `name`, shape (topics,); None if there
        is no such head, or one for vectors of another length."""
        head = self.heads.get(name)
        if head is None or head.weights.shape[0] != len(vector) + len(signals):
            return None
        logits: Floats = np.concatenate([vector, signals]) @ head.weights + head.bias
        return logits

    def reasons(
        self, grams: Grams, signals: Floats, topic: int, other: int, most: int = 5
    ) -> dict[str, float]:
        """The words, phrases and signals that speak most for one topic against another, rare words
        before common ones. Names with characters that a terminal could interpret are left out, and
        so is what stands for an address: nobody wrote it."""
        rows = self.gram_weights.take(grams.name_buckets, axis=0)
        gains = (rows[:, topic] - rows[:, other]) * grams.name_values
        salience = gains * self.rarity.take(grams.name_buckets)
        counts: dict[str, float] = {}
        for place in np.argsort(-salience)[: _LOOKS_FOR_EACH * most].tolist():
            name = grams.names[place]
            is_shown = any(map(str.isalpha, name)) and name.isprintable()
            if is_shown and len(counts) < most and PLACEHOLDERS.isdisjoint(name.split()):
                counts[name] = float(gains[place])
        shape = (self.signal_weights[:, topic] - self.signal_weights[:, other]) * signals
        strongest = int(shape.argmax())
        if shape[strongest] > _LEAST_GAIN and SIGNALS[strongest] not in _WORDLESS:
            # The shape comes early: a reader learns more from it than from a third word.
            shown = list(counts.items())[:_WORDS_BEFORE_SHAPE]
            rest = list(counts.items())[_WORDS_BEFORE_SHAPE:]
            name = f"shape: {SIGNALS[strongest].replace('_', ' ')}"
            counts = dict([*shown, (name, float(shape[strongest])), *rest])
        best = [(name, gain) for name, gain in counts.items() if gain > _LEAST_GAIN][:most]
        return {name: round(gain, 3) for name, gain in best}

    def similarity(self, first: Grams, second: Grams) -> float:
        """The cosine of two texts, with n-grams weighted by their rarity, in [0, 1]."""
        one = first.values * self.rarity[first.buckets]
        two = second.values * self.rarity[second.buckets]
        norms = float(np.sqrt((one @ one) * (two @ two)))
        if norms == 0:
            return 0.0
        places = np.searchsorted(first.buckets, second.buckets)
        places[places == len(one)] = 0
        shared = first.buckets[places] == second.buckets
        return float(one[places[shared]] @ two[shared]) / norms

    def with_topics(self, topics: tuple[str, ...]) -> "LinearModel":
        """This model with further topics, which have no evidence yet."""
        new = tuple(topic for topic in dict.fromkeys(topics) if topic not in self.topics)
        if not new:
            return self

        def wider(weights: Floats, fill: float = 0.0) -> Floats:
            shape = (*weights.shape[:-1], len(new))
            return np.concatenate([weights, np.full(shape, fill, np.float32)], axis=-1)

        heads = {
            name: Head(wider(head.weights), wider(head.bias, _UNSEEN), head.probes)
            for name, head in self.heads.items()
        }
        return replace(
            self,
            topics=(*self.topics, *new),
            gram_weights=wider(self.gram_weights),
            signal_weights=wider(self.signal_weights),
            bias=wider(self.bias, _UNSEEN),
            heads=heads,
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the model to one .npz file without pickles and return its path; a leading `~`
        stands for the user's home.

        Raises `OSError` if it cannot be written: the folder does not exist, the path is a folder,
        the disk is full.
        """
        calibration = self.calibration
        facts = {
            "format": _FORMAT,
            "topics": list(self.topics),
            "signals": list(SIGNALS),
            "heads": [
                {"name": name, "probes": list(head.probes.texts)}
                for name, head in self.heads.items()
            ],
            "calibration": {
                "alone": calibration.alone,
                "grams": calibration.grams,
                "vector": calibration.vector,
                "confidence_alone": list(calibration.confidence_alone),
                "confidence_fused": list(calibration.confidence_fused),
            },
            "about": dict(self.about),
        }
        arrays: dict[str, NDArray[Any]] = {
            "facts": np.frombuffer(json.dumps(facts).encode(), np.uint8),
            "grams": self.gram_weights.astype(np.float16),
            "signals": self.signal_weights,
            "bias": self.bias,
            "rarity": self.rarity.astype(np.float16),
        }
        for number, head in enumerate(self.heads.values()):
            arrays[f"head{number}"] = head.weights.astype(np.float16)
            arrays[f"head{number}_bias"] = head.bias
            arrays[f"head{number}_probes"] = head.probes.vectors.astype(np.float16)
        buffer = BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        target = Path(os.path.expanduser(path))
        atomic_write(target, buffer.getvalue())
        return target


_UNSEEN = -4.0  # the bias of a topic without any training


def softmax(logits: Floats) -> Floats:
    """Probabilities along the last axis."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: Floats = shifted / shifted.sum(axis=-1, keepdims=True)
    return probabilities


def empty_model(topics: tuple[str, ...] = TOPICS) -> LinearModel:
    """An untrained model: all topics are equally likely."""
    width = len(topics)
    return LinearModel(
        topics,
        np.zeros((BUCKETS, width), np.float32),
        np.zeros((len(SIGNALS), width), np.float32),
        np.zeros(width, np.float32),
        np.ones(BUCKETS, np.float32),
    )


@cache
def shipped_model() -> LinearModel:
    """The model that comes with the package."""
    return _read(
        BytesIO((files("orion_oie.routing.linear") / "weights.npz").read_bytes()), "weights.npz"
    )


def load_model(path: str | os.PathLike[str]) -> LinearModel:
    """Read a model that `LinearModel.save` wrote; a leading `~` stands for the user's home.

    Raises `InvalidRequestError` if the file is no model or belongs to another version of the
    features.
    """
    try:
        content = BytesIO(Path(os.path.expanduser(path)).read_bytes())
    except OSError as error:
        raise InvalidRequestError(f"the router's weights cannot be read: {error}") from error
    return _read(content, os.fspath(path))


def _read(content: BytesIO, name: str) -> LinearModel:
    try:
        with np.load(content, allow_pickle=False) as arrays:
            facts = json.loads(arrays["facts"].tobytes())
            if facts["format"] != _FORMAT or facts["signals"] != list(SIGNALS):
                raise InvalidRequestError(
                    f"{name} holds weights for another version of the router: train them again"
                )
            model = LinearModel(
                tuple(facts["topics"]),
                arrays["grams"].astype(np.float32),
                arrays["signals"].astype(np.float32),
                arrays["bias"].astype(np.float32),
                arrays["rarity"].astype(np.float32),
                {
                    head["name"]: Head(
                        arrays[f"head{number}"].astype(np.float32),
                        arrays[f"head{number}_bias"].astype(np.float32),
                        Probes(
                            tuple(head["probes"]),
                            arrays[f"head{number}_probes"].astype(np.float32),
                        ),
                    )
                    for number, head in enumerate(facts["heads"])
                },
                _calibration(facts["calibration"]),
                facts["about"],
            )
    except DAMAGE as error:
        raise InvalidRequestError(f"{name} holds no weights of a router: {error}") from error
    _check(model, name)
    return model


# What numpy, zipfile and json raise for a file that is truncated, damaged, or of another kind.
DAMAGE = (
    *(OSError, EOFError, BadZipFile, zlib.error, TokenError),
    *(ValueError, LookupError, TypeError, AttributeError, RuntimeError, MemoryError),
)


def _check(model: LinearModel, name: str) -> None:
    topics = model.topics
    width = len(topics)
    are_names = all(isinstance(topic, str) for topic in topics)
    if not topics or not are_names or len(set(topics)) < width:
        raise InvalidRequestError(f"{name} holds weights for the topics {list(topics)}")
    shapes = [a.shape for a in (model.gram_weights, model.signal_weights, model.bias, model.rarity)]
    if shapes != [(BUCKETS, width), (len(SIGNALS), width), (width,), (BUCKETS,)]:
        raise InvalidRequestError(f"{name} holds weights of the shapes {shapes}")
    for head_name, head in model.heads.items():
        ends = (head.weights.shape[1:], head.bias.shape)
        if head.weights.ndim != 2 or ends != ((width,), (width,)):
            raise InvalidRequestError(f"{name} holds a head of another shape for {head_name}")
        texts, vectors = head.probes.texts, head.probes.vectors
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise InvalidRequestError(f"{name} holds probes of another shape for {head_name}")
        if not all(isinstance(text, str) for text in texts):
            raise InvalidRequestError(f"{name} holds probes that are no texts for {head_name}")
    arrays = [model.gram_weights, model.signal_weights, model.bias, model.rarity]
    for head in model.heads.values():
        arrays += [head.weights, head.bias, head.probes.vectors]
    facts = model.calibration
    slopes = (*facts.confidence_alone, *facts.confidence_fused)
    arrays.append(np.array([facts.alone, facts.grams, facts.vector, *slopes], np.float32))
    if not all(np.isfinite(array).all() for array in arrays):
        raise InvalidRequestError(f"{name} holds weights that are no finite numbers")


def _calibration(facts: Mapping[str, Any]) -> Calibration:
    return Calibration(
        float(facts["alone"]),
        float(facts["grams"]),
        float(facts["vector"]),
        (float(facts["confidence_alone"][0]), float(facts["confidence_alone"][1])),
        (float(facts["confidence_fused"][0]), float(facts["confidence_fused"][1])),
    )
