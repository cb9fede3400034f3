"""Training of the router's linear model on labelled prompts, with numpy alone.

Softmax regression: minimizes the mean of -log p(topics of the best label | prompt), or, if further
labels are acceptable, nine tenths of that plus one tenth of -log p(their topics | prompt); plus
half of `pull` / n times the squared distance of the weights from their start. The result is the
most probable model under a Gaussian prior around the initial weights, so a few examples change a
trained model a little, and many change it a lot. The minimum is found by L-BFGS (Nocedal and
Wright, "Numerical Optimization", 2nd ed., algorithm 7.5) with backtracking.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from orion_oie.errors import InvalidRequestError
from orion_oie.routing.linear.model import (
    Floats,
    Head,
    LinearModel,
    softmax,
)
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

_STEPS = 80
_MEMORY = 8
_ENOUGH = 1e-5  # largest absolute gradient at which the search stops
_CHUNK_ROWS = 1024


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


class _Table(Protocol):
    """Rows of features, shape (rows, features)."""

    def times(self, weights: Floats) -> Floats:
        """The product with `weights`, shape (rows, topics)."""
        ...

    def transposed_times(self, errors: Floats) -> Floats:
        """The product of the transposed rows with `errors`, shape (features, topics)."""
        ...


class _Dense:
    def __init__(self, rows: Floats) -> None:
        self._rows = rows

    def times(self, weights: Floats) -> Floats:
        product: Floats = self._rows @ weights
        return product

    def transposed_times(self, errors: Floats) -> Floats:
        product: Floats = self._rows.T @ errors
        return product


class _Sparse:
    """Rows with a sparse part, followed by a dense part."""

    def __init__(self, prompts: Sequence[Prompt], dense: Floats) -> None:
        sizes = [len(prompt.grams.buckets) for prompt in prompts]
        self._columns = np.concatenate([prompt.grams.buckets for prompt in prompts])
        self._values = np.concatenate([prompt.grams.values for prompt in prompts])
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes
        self._row_of = np.repeat(np.arange(len(prompts)), sizes)
        self._order = np.argsort(self._columns, kind="stable")
        self._used, self._firsts = np.unique(self._columns[self._order], return_index=True)
        self._dense = dense

    def times(self, weights: Floats) -> Floats:
        product: Floats = self._dense @ weights[BUCKETS:]
        for first in range(0, len(self._starts), _CHUNK_ROWS):
            rows = range(first, min(first + _CHUNK_ROWS, len(self._starts)))
            some = slice(self._starts[rows[0]], self._ends[rows[-1]])
            if some.start == some.stop:
                continue
            found = self._values[some, None] * weights[self._columns[some]]
            sums = np.cumsum(found, axis=0, dtype=np.float64)
            sums = np.concatenate([np.zeros((1, sums.shape[1])), sums])
            ends = self._ends[rows[0] : rows[-1] + 1] - some.start
            starts = self._starts[rows[0] : rows[-1] + 1] - some.start
            product[rows[0] : rows[-1] + 1] += sums[ends] - sums[starts]
        return product

    def transposed_times(self, errors: Floats) -> Floats:
        product = np.zeros((BUCKETS + self._dense.shape[1], errors.shape[1]), np.float32)
        product[BUCKETS:] = self._dense.T @ errors
        if len(self._used):
            rows, values = self._row_of[self._order], self._values[self._order]
            for topic in range(errors.shape[1]):
                weighted = values * errors[rows, topic]
                product[self._used, topic] = np.add.reduceat(weighted, self._firsts)
        return product


def fitted(
    model: LinearModel,
    examples: Iterable[Example],
    *,
    topics_of: Mapping[str, Sequence[str]] | None = None,
    vectors: tuple[str, Floats] | None = None,
    pull: float = 1.0,
) -> LinearModel:
    """A copy of `model`, trained further on examples.

    topics_of: the topics of a label that is not a topic itself. A label that is no topic of the
    model becomes one. vectors: the name of an embedding model and its vectors of the examples,
    shape (examples, dimensions), to train a head for it as well. pull: strength of the prior that
    holds the weights where they are; with a smaller one they follow the examples more.

    A head that exists is trained further; a topic that it has not seen stays blank without an
    example. If there is no head for the embedding model, or one of another width, a new head is
    made only if every topic of the model is the best label of `LEAST_FOR_A_HEAD` examples, since
    fewer do not suffice; otherwise the result has no head of that name.

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
    end, bias = _minimum(
        _Sparse(prompts, signals),
        accepted,
        weights,
        pulls * np.float32(pull / count),
        start,
        model.bias,
    )
    heads = dict(model.heads)
    if vectors is not None:
        name, matrix = vectors
        head = _head(heads.get(name), matrix, signals, accepted, weights, pull / count)
        if head is None:
            heads.pop(name, None)
        else:
            heads[name] = head
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


_SECOND_SHARE = 0.1  # weight in the loss of the acceptable labels other than the best one


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
    matrix: Floats,
    signals: Floats,
    accepted: Floats,
    weights: Floats,
    pull: float,
) -> Head | None:
    """`known` trained further, or a first head; None if the examples are too few for one."""
    if len(matrix) != len(signals):
        raise InvalidRequestError(f"{len(matrix)} vectors for {len(signals)} examples")
    rows = np.concatenate([matrix.astype(np.float32), signals], axis=1)
    counted = accepted[:, weights > 0]
    if known is None or known.weights.shape[0] != rows.shape[1]:
        if counted[0].sum(axis=0).min() < LEAST_FOR_A_HEAD:
            return None
        width = accepted.shape[2]
        known = Head(np.zeros((rows.shape[1], width), np.float32), np.zeros(width, np.float32))
    pulls = np.concatenate(
        [
            np.full(matrix.shape[1], PULL_OF_VECTOR, np.float32),
            np.full(signals.shape[1], PULL_OF_SIGNALS, np.float32),
            np.array([PULL_OF_BIAS], np.float32),
        ]
    )
    table, start, bias = _Dense(rows), known.weights, known.bias
    end, end_bias = _minimum(table, accepted, weights, pulls * np.float32(pull), start, bias)
    # Training on other topics moves an unseen topic's weights a little, so that it would no longer
    # count as unseen; they are reset.
    idle = [topic for topic in known.unseen if not counted[:, :, topic].any()]
    end[:, idle], end_bias[idle] = start[:, idle], bias[idle]
    return Head(end, end_bias)


def _minimum(
    table: _Table,
    accepted: Floats,
    weights: Floats,
    pulls: Floats,
    start: Floats,
    bias: Floats,
) -> tuple[Floats, Floats]:
    """The weights, shape (features, topics), and the bias that minimize the loss. pulls: strength
    of the prior for each feature, then for the bias, shape (features + 1,)."""
    shares = (weights / weights.sum())[:, None]
    begin = np.concatenate([start, bias[None]]).astype(np.float32)
    first, second = accepted
    has_second = second.any(axis=1, keepdims=True)
    tiny = np.float32(1e-12)

    def loss(point: Floats) -> tuple[float, Floats]:
        current = point.reshape(begin.shape)
        probabilities = softmax(table.times(current[:-1]) + current[-1])
        best = (probabilities * first).sum(axis=1, keepdims=True) + tiny
        also = (probabilities * second).sum(axis=1, keepdims=True) + tiny
        second_share = np.where(has_second, _SECOND_SHARE, 0.0).astype(np.float32)
        wanted = (1 - second_share) * probabilities * first / best
        wanted += second_share * probabilities * second / also
        terms = (1 - second_share) * np.log(best) + second_share * np.log(also)
        away = current - begin
        errors = (probabilities - wanted) * shares
        gradient = np.concatenate(
            [table.transposed_times(errors), errors.sum(axis=0, keepdims=True)]
        )
        gradient += pulls[:, None] * away
        value = -float((terms * shares).sum()) + 0.5 * float(
            (pulls[:, None].astype(np.float64) * away * away).sum()
        )
        return value, gradient.ravel()

    end = _descended(loss, begin.ravel()).reshape(begin.shape)
    return end[:-1], end[-1]


def _descended(loss: Callable[[Floats], tuple[float, Floats]], point: Floats) -> Floats:
    """The minimum by L-BFGS from `point`; stops at a small gradient or without improvement."""
    value, gradient = loss(point)
    moves: list[tuple[Floats, Floats, float]] = []
    for _ in range(_STEPS):
        if float(np.abs(gradient).max()) < _ENOUGH:
            break
        direction = _direction(gradient, moves)
        slope = float(direction @ gradient)
        if slope >= 0:
            direction, slope, moves = -gradient, -float(gradient @ gradient), []
        step = 1.0 if moves else min(1.0, 1.0 / float(np.abs(gradient).sum()))
        for _try in range(20):
            candidate = point + np.float32(step) * direction
            new_value, new_gradient = loss(candidate)
            if new_value <= value + 1e-4 * step * slope:
                break
            step /= 2
        else:
            break
        moved, turned = candidate - point, new_gradient - gradient
        curvature = float(moved @ turned)
        if curvature > 1e-12:
            moves = [*moves[-_MEMORY + 1 :], (moved, turned, 1.0 / curvature)]
        point, value, gradient = candidate, new_value, new_gradient
    return point


def _direction(gradient: Floats, moves: list[tuple[Floats, Floats, float]]) -> Floats:
    direction = -gradient
    shares: list[float] = []
    for moved, turned, inverse in reversed(moves):
        share = inverse * float(moved @ direction)
        shares.append(share)
        direction = direction - np.float32(share) * turned
    if moves:
        moved, turned, inverse = moves[-1]
        direction = direction * np.float32(1.0 / (inverse * float(turned @ turned)))
    for (moved, turned, inverse), share in zip(moves, reversed(shares), strict=True):
        back = inverse * float(turned @ direction)
        direction = direction + np.float32(share - back) * moved
    result: NDArray[np.float32] = direction
    return result
