"""Logistic probes: the minimum of the mean log loss plus half of ``l2`` times the squared weights.

Many problems, those of several hooks and several penalties, share each pass over the rows. Steps are taken by L-BFGS
from about the Newton step, whose Hessian is that of a sample of the rows; so few passes are needed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.probes.rows.passes import Losses, Problem, Targets
from actstore.analysis.probes.rows.sources import Source
from actstore.analysis.probes.solvers.descent import Descent

if TYPE_CHECKING:
    import torch

TOLERANCE: Final = 1e-12
"""The mean log loss is about half of this above its minimum."""
MAX_PASSES: Final = 200
_REFRESH: Final = (6, 16, 40)
"""Passes after which the Hessian is computed again where the search is: it costs as much as dozens of passes over rows
that are few, and helps most where the search is long.
"""


@dataclass(frozen=True, eq=False)
class Scale:
    """Mean and standard deviation of the elements of a row over the training rows; 0 and 1 if they are left as is."""

    mean: NDArray[np.float64]
    """[d]"""
    deviation: NDArray[np.float64]
    """[d]; 1 where an element is constant."""

    def to_stored(
        self, weights: NDArray[np.float64], bias: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weights [d, ...] and bias [...] of standardised rows in units of the stored values."""
        scaled = weights / self.deviation.reshape(-1, *[1] * (weights.ndim - 1))
        return scaled, bias - np.tensordot(self.mean, scaled, 1)


@dataclass(frozen=True, eq=False)
class Sample:
    """Some training rows of a hook, for its Hessian."""

    rows: "torch.Tensor"
    """[n_rows, d], as stored."""
    parts: "torch.Tensor"
    """As in `Split.parts`, int8 [n_rows]."""


@dataclass(frozen=True, eq=False)
class Fitted:
    """The solutions of the problems of a hook."""

    weights: NDArray[np.float64]
    """Weights of standardised rows, [d, n_problems, n_outputs]."""
    bias: NDArray[np.float64]
    """[n_problems, n_outputs]"""
    held_loss: NDArray[np.float64]
    """Log loss summed over the held-out rows, [n_problems]."""
    held_correct: NDArray[np.float64]
    """Held-out rows whose class is right, [n_problems]."""
    n_passes: int
    is_converged: NDArray[np.bool_]
    """[n_problems]"""


@dataclass(frozen=True, eq=False)
class Wanted:
    """The problems of a hook."""

    hook: str
    scale: Scale
    sample: Sample
    penalties: NDArray[np.float64]
    """[n_problems]"""
    limits: NDArray[np.int8]
    """The highest part that each problem trains on, [n_problems]."""
    n_rows: NDArray[np.float64]
    """Training rows of each problem, [n_problems]."""
    start: NDArray[np.float64]
    """Weights and bias at the beginning, [d + 1, n_problems, n_outputs]."""


def solve(source: Source, targets: Targets, wanted: Sequence[Wanted]) -> list[Fitted]:
    """Solve the problems of some hooks together.

    Args:
        source: gives the rows.
        targets: what is known of them.
        wanted: the problems of each hook.

    Returns:
        The solutions for each hook.
    """
    hooks = tuple(one.hook for one in wanted)
    searches = [_searches(one) for one in wanted]
    of_pass: Mapping[str, NDArray[Any]] = {}
    best: list[list[tuple[float, float]]] = [[(math.nan, math.nan)] * len(one.penalties) for one in wanted]
    n_passes = 0
    while n_passes < MAX_PASSES and not all(one.is_done for some in searches for one in some):
        trials = [np.stack([one.trial for one in some], axis=1) for some in searches]
        problems = tuple(
            Problem(*one.scale.to_stored(trial[:-1], trial[-1]), one.limits)
            for one, trial in zip(wanted, trials, strict=True)
        )
        of_pass = source.run(Losses(hooks, targets, problems))
        n_passes += 1
        for number, (one, some) in enumerate(zip(wanted, searches, strict=True)):
            values, gradients = _objective(one, trials[number], number, of_pass)
            for index, search in enumerate(some):
                if search.is_done:
                    continue
                trial = search.trial
                search.tell(float(values[index]), gradients[:, index])
                if search.point is trial:
                    best[number][index] = (
                        float(of_pass[f"held_loss.{number}"][index]),
                        float(of_pass[f"held_correct.{number}"][index]),
                    )
            if n_passes in _REFRESH:
                _refresh(one, some)
    fitted = []
    for some, figures in zip(searches, best, strict=True):
        points = np.stack([one.point for one in some], axis=1)
        fitted.append(
            Fitted(
                points[:-1],
                points[-1],
                np.array([loss for loss, _ in figures]),
                np.array([correct for _, correct in figures]),
                n_passes,
                np.array([one.is_converged for one in some]),
            )
        )
    return fitted


def _objective(
    one: Wanted, trial: NDArray[np.float64], number: int, of_pass: Mapping[str, NDArray[Any]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values [n_problems] and gradients [d + 1, n_problems, n_outputs] in weights of standardised rows."""
    sums = of_pass[f"gradient.{number}"].T.reshape(trial[:-1].shape)
    slope = of_pass[f"slope.{number}"].reshape(trial.shape[1:])
    slopes = (sums - one.scale.mean[:, None, None] * slope) / one.scale.deviation[:, None, None]
    n_rows = one.n_rows[:, None]
    gradients = np.concatenate(
        [slopes / n_rows + one.penalties[:, None] * trial[:-1], (slope / n_rows)[None]]
    )
    values = of_pass[f"loss.{number}"] / one.n_rows + 0.5 * one.penalties * np.square(trial[:-1]).sum((0, 2))
    return values, gradients


def _searches(one: Wanted) -> list[Descent]:
    # At the beginning, all problems are at the same point, or, for a learning curve, each has other rows.
    hessians = _hessians(one, one.start[:, :1], range(1)) if _are_alike(one) else None
    solvers = _solvers(one, hessians or _hessians(one, one.start, range(len(one.penalties))))
    return [
        Descent(np.ascontiguousarray(one.start[:, index]), solver, TOLERANCE)
        for index, solver in enumerate(solvers)
    ]


def _are_alike(one: Wanted) -> bool:
    return bool((one.limits == one.limits[0]).all() and (one.start == one.start[:, :1]).all())


def _refresh(one: Wanted, searches: Sequence[Descent]) -> None:
    going = [index for index, search in enumerate(searches) if not search.is_done]
    points = np.stack([search.point for search in searches], axis=1)
    hessians = _hessians(one, points, going)
    for index, solver in zip(going, _solvers(one, hessians, going), strict=True):
        searches[index].use(solver)


def _hessians(one: Wanted, points: NDArray[np.float64], problems: Sequence[int]) -> "list[torch.Tensor]":
    """About the Hessian of some problems without the penalty, from the sample, [d + 1, d + 1] each.

    The classes of several share one matrix.
    """
    import torch

    if not problems:
        return []
    # It only has to be about right, so it is in float32.
    x = one.sample.rows.double()
    x = ((x - torch.from_numpy(one.scale.mean)) / torch.from_numpy(one.scale.deviation)).float()
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    hessians = []
    for index in problems:
        trains = one.sample.parts <= int(one.limits[index])
        chosen = x if bool(trains.all()) or not bool(trains.any()) else x[trains]
        scores = chosen @ torch.from_numpy(points[:, index].astype(np.float32))
        if scores.shape[1] == 1:
            likely = scores[:, 0].sigmoid()
            curvature = likely * (1 - likely)
        else:
            likely = scores.softmax(1)
            curvature = (likely * (1 - likely)).mean(1)
        # A row that is far from the boundary bends nothing now, but it will if the boundary moves.
        curvature = curvature.clamp(min=1e-4)
        hessians.append(((chosen * curvature[:, None]).T @ chosen / len(chosen)).double())
    return hessians


def _solvers(
    one: Wanted, hessians: "Sequence[torch.Tensor]", problems: Sequence[int] | None = None
) -> list[Callable[[NDArray[np.float64]], NDArray[np.float64]]]:
    """What multiplies with the inverse of the Hessian of each problem; one Hessian may be that of all."""
    import torch

    penalties = one.penalties if problems is None else one.penalties[list(problems)]
    solvers: list[Callable[[NDArray[np.float64]], NDArray[np.float64]]] = []
    for number, penalty in enumerate(penalties.tolist()):
        hessian = hessians[number if len(hessians) > 1 else 0].clone()
        hessian.diagonal()[:-1] += penalty
        # More than what rounding in float32 can take away.
        hessian.diagonal().add_(1e-6 * float(hessian.diagonal().max()))
        solvers.append(partial(_solved, torch.linalg.cholesky(hessian)))
    return solvers


def _solved(factor: "torch.Tensor", vector: NDArray[np.float64]) -> NDArray[np.float64]:
    import torch

    solution: NDArray[np.float64] = torch.cholesky_solve(torch.from_numpy(vector), factor).numpy()
    return solution
