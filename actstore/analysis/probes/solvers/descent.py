"""Minimising one convex function by L-BFGS, step by step, so that many functions share each pass over the rows."""

from collections import deque
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

_MEMORY: Final = 12
_LEAST_DECREASE: Final = 1e-4
_LEAST_STEP: Final = 1e-10


class Descent:
    """The minimisation of one function: ask for its value at `trial`, and `tell` it."""

    def __init__(self, start: Vector, solve: Callable[[Vector], Vector], tolerance: float) -> None:
        """
        Args:
            start: the first point, of any shape.
            solve: multiplies a vector with the inverse of about the Hessian.
            tolerance: the search ends where the function is about half of this above its minimum.
        """
        self.point = start
        """The best point so far."""
        self.trial = start
        """Where the function is to be evaluated next."""
        self.is_done = False
        self.is_converged = False
        """Whether it ended at the minimum, rather than where no step leads down any more."""
        self._solve = solve
        self._tolerance = tolerance
        self._value = np.inf
        self._gradient: Vector | None = None
        self._direction = np.zeros_like(start)
        self._step = 1.0
        self._pairs: deque[tuple[Vector, Vector, float]] = deque(maxlen=_MEMORY)

    def use(self, solve: Callable[[Vector], Vector]) -> None:
        """Go on with another approximation of the Hessian."""
        self._solve = solve
        self._pairs.clear()
        if self._gradient is not None and not self.is_done:
            self._turn(self._gradient)

    def tell(self, value: float, gradient: Vector) -> None:
        """Take the value and the gradient at `trial`, and choose the next one."""
        if self._gradient is not None:
            decrease = _LEAST_DECREASE * self._step * float((self._gradient * self._direction).sum())
            # Near the minimum, rounding decides whether a value is smaller; the gradient still tells.
            is_equal = value <= self._value + 1e-13 * abs(self._value)
            is_flatter = abs(float((gradient * self._direction).sum())) <= abs(
                float((self._gradient * self._direction).sum())
            )
            if not (value <= self._value + decrease or (is_equal and is_flatter)):
                self._step *= 0.25
                if self._step < _LEAST_STEP:
                    self.is_done = True
                    self.trial = self.point
                    return
                self.trial = self.point + self._step * self._direction
                return
            moved, bent = self.trial - self.point, gradient - self._gradient
            curvature = float((moved * bent).sum())
            if curvature > 1e-14 * float((moved * moved).sum()):
                self._pairs.append((moved, bent, curvature))
        self.point, self._value, self._gradient = self.trial, value, gradient
        self._turn(gradient)

    def _turn(self, gradient: Vector) -> None:
        """Choose the next direction, or end."""
        self.is_done = self.is_converged = float((gradient * self._solve(gradient)).sum()) <= self._tolerance
        if self.is_done:
            self.trial = self.point
            return
        rest = gradient.copy()
        shares = []
        for moved, bent, curvature in reversed(self._pairs):
            share = float((moved * rest).sum()) / curvature
            shares.append(share)
            rest -= share * bent
        direction = self._solve(rest)
        for (moved, bent, curvature), share in zip(self._pairs, reversed(shares), strict=True):
            direction = direction + (share - float((bent * direction).sum()) / curvature) * moved
        self._direction = -direction
        self._step = 1.0
        self.trial = self.point + self._direction
