"""Training of the router's linear model on labelled prompts, with numpy alone.

Softmax regression (see `regression`), whose weights are held where they were by a Gaussian prior of
strength `pull` / n. So a few examples change a trained model a little, and many change it a lot.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from orion_oie.errors import InvalidRequestError
from orion_oie.routing.linear.lbfgs import STEPS
from orion_oie.routing.linear.model import (
    Floats,
    Head,
    LinearModel,
)
from orion_oie.routing.linear.probes import Probes
from orion_oie.routing.linear.regression import DenseTable, SparseTable, fitted_weights
from orion_oie.routing.text.ngrams import BUCKETS
from orion_oie.routing.text.prompt import (
    Prompt,
    read,
)

PULL_OF_GRAMS = 0.05
PULL_OF_SIGNALS = 1.5
PULL_OF_VECTOR = 0.2
PULL_OF_BIAS = 0.6  # otherwise a few examples of one topic would attract all prompts

LEAST_FOR_A_HEAD = 10
"""The examples of every topic that are needed to train a first head for an embedding model."""


@dataclass(frozen=True)
class Example:
    """A prompt and the agents or topics that should answer it: `label` is the best, `labels` are
    all acceptable ones. `weight` is its weight in the loss."""

    text: str
    label: str
    labels: tuple[str, ...] = ()
    weight: float = 1.0
    images: int = 0

    @property
    def accepted(self) -> tuple[str, ...]:
        """All acceptable labels, best first."""
        return (self.label, *(label for label in self.labels if label != self.label))


class Embedded(NamedTuple):
    """Vectors of examples by one embedding model, shape (examples, dimensions). name: that of its
    head in the weights, or the one that a first head gets. probes: what the model makes of the
    texts of that head, or of `PROBE_TEXTS`."""

    name: str
    vectors: Floats
    probes: Probes


def read_examples(path: str | os.PathLike[str]) -> list[Example]:
    """Read examples from a JSON Lines file; a line is {"text", "label", "labels" (optional), ...}.

    Raises `InvalidRequestError` with the number of the first line that is no example.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"the examples cannot be read: {error}") from error
    return [
        _example(line, f"{os.fspath(path)}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def _example(line: str, place: str) -> Example:
    try:
        row = json.loads(line)
        text, label = row["text"], row["label"]
        labels = row.get("labels") or [label]
        images = row.get("images", 0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidRequestError(
            f'{place}: an object with "text" and "label" is needed ({error!r})'
        ) from error
    names = [label, *labels] if isinstance(labels, list) else [None]
    if not isinstance(text, str) or not all(isinstance(name, str) and name for name in names):
        raise InvalidRequestError(f'{place}: "text" and "label" are texts, "labels" a list of them')
    if not isinstance(images, int):
        raise InvalidRequestError(f'{place}: "images" is a number')
    return Example(text, label, tuple(labels), images=images)


def fitted(
    model: LinearModel,
    examples: Iterable[Example],
    *,
    topics_of: Mapping[str, Sequence[str]] | None = None,
    vectors: Embedded | None = None,
    pull: float = 1.0,
    steps: int = STEPS,
) -> LinearModel:
    """A copy of `model`, trained further on examples.

    topics_of: the topics of a label that is not a topic itself. A label that is no topic of the
    model becomes one. vectors: those of an embedding model, to train a head for it as well. pull:
    strength of the prior that holds the weights where they are; with a smaller one they follow the
    examples more. steps: the most that the search for the weights takes; from the weights of a
    trained model few suffice.

    A head that belongs to the embedding model is trained further; a topic that it has not seen
    stays blank without an example. Without one a first head is made, but only if every topic of the
    model is the best label of `LEAST_FOR_A_HEAD` examples, since fewer do not suffice; otherwise
    the result has no head of that name.

    Raises `InvalidRequestError` for no example, a malformed one, a label without a topic, a `pull`
    that is not a number of at least 0, or a different number of vectors.
    """
    rows = list(examples)
    check(rows, pull)
    names = {label: tuple((topics_of or {}).get(label, (label,))) for label in _labels(rows)}
    idle = [label for label, topics in names.items() if not topics]
    if idle:
        raise InvalidRequestError(f"{', '.join(idle)}: no topic is named that could be learned")
    model = model.with_topics(tuple(topic for topics in names.values() for topic in topics))
    accepted = _accepted(rows, names, model.topics)
    prompts = [read(row.text) for row in rows]
    signals = np.array([prompt.signals for prompt in prompts], np.float32)
    weights = np.array([row.weight for row in rows], np.float32)
    count = float(weights.sum())
    pulls = np.concatenate(
        [
            np.full(BUCKETS, PULL_OF_GRAMS, np.float32),
            np.full(signals.shape[1], PULL_OF_SIGNALS, np.float32),
            np.array([PULL_OF_BIAS], np.float32),
        ]
    )
    start = np.concatenate([model.gram_weights, model.signal_weights])
    end, bias = fitted_weights(
        SparseTable(prompts, signals),
        accepted,
        weights,
        pulls * np.float32(pull / count),
        start,
        model.bias,
        steps,
    )
    heads = dict(model.heads)
    if vectors is not None:
        known = heads.pop(vectors.name, None)
        if known is not None and not known.probes.agree_with(vectors.probes):
            known = None  # the head of another model of that name
        head = _head(known, vectors, signals, accepted, weights, pull / count, steps)
        if head is not None:
            heads[vectors.name] = head
    return replace(
        model,
        gram_weights=end[:BUCKETS],
        signal_weights=end[BUCKETS:],
        bias=bias,
        heads=heads,
    )


def rarity_of(prompts: Sequence[Prompt]) -> Floats:
    """The inverse document frequency of each bucket: log((1 + n) / (1 + n with it)), divided by
    that of a bucket that never occurs, so in [0, 1]. Raises `InvalidRequestError` for no prompt."""
    if not prompts:
        raise InvalidRequestError("there is no prompt to count in")
    counts = np.zeros(BUCKETS, np.float64)
    for prompt in prompts:
        counts[prompt.grams.buckets] += 1
    rarity = np.log((1 + len(prompts)) / (1 + counts)) / np.log(1 + len(prompts))
    narrow: Floats = rarity.astype(np.float32)
    return narrow


def check(rows: Sequence[Example], pull: float) -> None:
    """Raise `InvalidRequestError` for examples or a `pull` that `fitted` cannot use."""
    if not rows:
        raise InvalidRequestError("there is no example to learn from")
    for number, row in enumerate(rows):
        if not isinstance(row.text, str) or not all(
            isinstance(label, str) and label for label in row.accepted
        ):
            raise InvalidRequestError(
                f"example {number}: a text and the name of an agent is needed"
            )
        if not 0 <= row.weight < math.inf:
            raise InvalidRequestError(f"example {number}: its weight is {row.weight}")
    if sum(row.weight for row in rows) <= 0:
        raise InvalidRequestError("all examples have the weight 0")
    if not 0 <= pull < math.inf:
        raise InvalidRequestError(f"pull is {pull}; it has to be a number from 0 on")


def _labels(rows: Sequence[Example]) -> list[str]:
    return list(dict.fromkeys(label for row in rows for label in row.accepted))


def _accepted(
    rows: Sequence[Example], names: Mapping[str, Sequence[str]], topics: Sequence[str]
) -> Floats:
    """The wanted topics as 1 or 0, shape (2, rows, topics): first those of the best label, then
    those of the other acceptable labels."""
    place = {topic: index for index, topic in enumerate(topics)}
    wanted = np.zeros((2, len(rows), len(topics)), np.float32)
    for index, row in enumerate(rows):
        for topic in names[row.label]:
            wanted[0, index, place[topic]] = 1.0
        for label in row.accepted[1:]:
            for topic in names[label]:
                wanted[1, index, place[topic]] = 1.0
    return wanted


def _head(
    known: Head | None,
    given: Embedded,
    signals: Floats,
    accepted: Floats,
    weights: Floats,
    pull: float,
    steps: int,
) -> Head | None:
    """`known` trained further, or a first head; None if the examples are too few for one."""
    matrix = given.vectors
    if len(matrix) != len(signals):
        raise InvalidRequestError(f"{len(matrix)} vectors for {len(signals)} examples")
    rows = np.concatenate([matrix.astype(np.float32), signals], axis=1)
    counted = accepted[:, weights > 0]
    if known is None or known.weights.shape[0] != rows.shape[1]:
        if counted[0].sum(axis=0).min() < LEAST_FOR_A_HEAD:
            return None
        width = accepted.shape[2]
        zeros = np.zeros((rows.shape[1], width), np.float32)
        known = Head(zeros, np.zeros(width, np.float32), given.probes)
    pulls = np.concatenate(
        [
            np.full(matrix.shape[1], PULL_OF_VECTOR, np.float32),
            np.full(signals.shape[1], PULL_OF_SIGNALS, np.float32),
            np.array([PULL_OF_BIAS], np.float32),
        ]
    )
    table, start, bias = DenseTable(rows), known.weights, known.bias
    end, end_bias = fitted_weights(
        table, accepted, weights, pulls * np.float32(pull), start, bias, steps
    )
    # Training on other topics moves an unseen topic's weights a little, so that it would no longer
    # count as unseen; they are reset.
    idle = [topic for topic in known.unseen if not counted[:, :, topic].any()]
    end[:, idle], end_bias[idle] = start[:, idle], bias[idle]
    return Head(end, end_bias, known.probes)
