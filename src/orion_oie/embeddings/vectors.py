"""The arithmetic of vectors: checks of an embedder's results, and rows of unit length."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from orion_oie.errors import WorkerError

Row = NDArray[np.float32] | NDArray[np.float16]


def checked(
    vectors: NDArray[np.float32], count: int, dimensions: int | None
) -> NDArray[np.float32]:
    """Check the vectors of `count` texts, and return them as unit rows. `dimensions` None allows
    any.

    Raises `WorkerError` for another shape, and for a row without a direction.
    """
    given = np.shape(vectors)
    if len(given) != 2 or given[0] != count or given[1] == 0:
        raise WorkerError(f"the embedder gave an array of shape {given} for {count} texts")
    if dimensions is not None and given[1] != dimensions:
        raise WorkerError(
            f"the embedder gave vectors of {given[1]} dimensions after some of {dimensions}; "
            "they cannot be compared"
        )
    return unit_rows(vectors)


def unit_rows(rows: NDArray[np.float32] | Sequence[Row]) -> NDArray[np.float32]:
    """Rows of unit length with the directions of the given ones, shape (rows, dimensions).

    Raises `WorkerError` for a row that is zero or not a number.
    """
    wide = np.asarray(rows, np.float64)  # the square of a large float32 leaves its range
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    if not (np.isfinite(lengths).all() and lengths.all()):
        raise WorkerError("the embedder gave a vector without direction: zero, or not a number")
    return np.asarray(wide / lengths, np.float32)


def halves(rows: NDArray[np.float32]) -> list[NDArray[np.float16]]:
    """Each unit row in 16 bits. Components within [-1, 1] are in the range of these."""
    return [row.astype(np.float16) for row in rows]
