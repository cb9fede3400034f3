"""Minimization by L-BFGS with backtracking, in numpy.

Source: Nocedal and Wright, "Numerical Optimization", 2nd ed., algorithm 7.5.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from orion_oie.routing.linear.model import Floats

STEPS = 80
_MEMORY = 8
_ENOUGH = 1e-5  # largest absolute gradient at which the search stops


def minimum(
    loss: Callable[[Floats], tuple[float, Floats]], point: Floats, steps: int = STEPS
) -> Floats:
    """The point of least loss, searched from `point`; stops at a small gradient, without
    improvement or after so many steps. `loss` returns the value and the gradient at a point."""
    value, gradient = loss(point)
    moves: list[tuple[Floats, Floats, float]] = []
    for _ in range(steps):
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
