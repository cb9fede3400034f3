"""Softmax regression on a table of features: the loss, its gradient, and the weights of least loss.

The loss is the mean of -log p(topics of the best label | row), or, if further labels are
acceptable, nine tenths of that plus one tenth of -log p(their topics | row); plus half of the
squared distance of the weights from their start, times a strength for each feature. The strengths
amount to a Gaussian prior around the initial weights.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from orion_oie.routing.linear.lbfgs import STEPS, minimum
from orion_oie.routing.linear.model import Floats, softmax
from orion_oie.routing.text.ngrams import BUCKETS
from orion_oie.routing.text.prompt import Prompt

_CHUNK_ROWS = 1024
_SECOND_SHARE = 0.1  # weight in the loss of the acceptable labels other than the best one


class Table(Protocol):
    """Rows of features, shape (rows, features)."""

    def times(self, weights: Floats) -> Floats:
        """The product with `weights`, shape (rows, topics)."""
        ...

    def transposed_times(self, errors: Floats) -> Floats:
        """The product of the transposed rows with `errors`, shape (features, topics)."""
        ...


class DenseTable:
    """A table that holds a whole matrix."""

    def __init__(self, rows: Floats) -> None:
        self._rows = rows

    def times(self, weights: Floats) -> Floats:
        product: Floats = self._rows @ weights
        return product

    def transposed_times(self, errors: Floats) -> Floats:
        product: Floats = self._rows.T @ errors
        return product


class SparseTable:
    """A table of n-grams, held sparsely, followed by a dense part."""

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


def fitted_weights(
    table: Table,
    accepted: Floats,
    weights: Floats,
    pulls: Floats,
    start: Floats,
    bias: Floats,
    steps: int = STEPS,
) -> tuple[Floats, Floats]:
    """The weights, shape (features, topics), and the bias that minimize the loss. pulls: strength
    of the prior for each feature, then for the bias, shape (features + 1,). steps: the most that
    the search takes."""
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

    end = minimum(loss, begin.ravel(), steps).reshape(begin.shape)
    return end[:-1], end[-1]
