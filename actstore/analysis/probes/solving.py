"""Solving the probes of a group of hooks, of each kind, and measuring them on the held-out rows."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.probes.metrics import Interval, Resampled, metrics_of_classes, metrics_of_numbers
from actstore.analysis.probes.planning import Group, sample_rows
from actstore.analysis.probes.probe import Kind
from actstore.analysis.probes.rows.passes import ColumnSums, HeldOutScores, Problem, Products, Targets
from actstore.analysis.probes.rows.sources import FromStore, Hold, Source
from actstore.analysis.probes.rows.splits import HELD_OUT
from actstore.analysis.probes.solvers.closed_form import mean_difference, mean_squared_error, ridge, scale_of
from actstore.analysis.probes.solvers.logistic import Fitted, Sample, Wanted, solve
from actstore.analysis.scanning.scan import ScanOptions

if TYPE_CHECKING:
    from actstore.store.committed_store import CommittedStore

Vector = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked of every hook."""

    kind: Kind
    penalties: Vector
    standardise: bool
    seed: int


@dataclass(frozen=True, eq=False)
class Outcome:
    """The probe of a hook, in units of the stored values."""

    weights: Vector
    """[d, n_outputs]"""
    bias: Vector
    """[n_outputs]"""
    metrics: Mapping[str, Interval]
    by_l2: Mapping[float, float]
    l2: float | None
    curve: Mapping[int, float]
    is_converged: bool
    n_passes: int


@dataclass(frozen=True, eq=False)
class Solved:
    """The probe of a hook before it is measured."""

    chosen: Problem
    """One problem with as many outputs as the probe has."""
    by_l2: Mapping[float, float] = field(default_factory=dict)
    l2: float | None = None
    of_fractions: Sequence[float] = ()
    """Accuracy, or R2, on the held-out rows of the probes of all fractions but the last."""
    is_converged: bool = True
    n_passes: int = 1


def solve_group(
    store: "CommittedStore",
    group: Group,
    targets: Targets,
    asked: Asked,
    resampled: Resampled,
    options: ScanOptions,
    on_hook: Callable[[], None],
) -> tuple[list[Outcome], int]:
    """Solve and measure the probes of a group.

    Returns:
        What came out for each hook, and the number of scans of the store.
    """
    from_store = FromStore(store, options)
    source: Source = from_store
    batches: list[tuple[str, ...]] = [group.hooks]
    dtypes = {hook: store[hook].dtype for hook in group.hooks}
    if group.is_held:
        source = from_store.run(Hold(group.hooks, targets.split.parts >= HELD_OUT, targets.identity, dtypes))
        batches = [(hook,) for hook in group.hooks]
    outcomes: list[Outcome] = []
    for hooks in batches:
        sizes = tuple(math.prod(store.array_of(hook).shape) for hook in hooks)
        if asked.kind == "ridge":
            solved = _ridge(source, targets, asked, hooks, sizes)
        elif asked.kind == "mean_difference":
            solved = _mean_difference(source, targets, hooks, sizes)
        else:
            is_sampled = _sampled(targets, asked.seed, max(sizes))
            sample = Hold(hooks, is_sampled, f"sample {asked.seed} {targets.identity}", dtypes)
            solved = _logistic(source, targets, asked, hooks, sizes, sample)
        for one in _measured(source, targets, asked.kind, hooks, solved, resampled):
            outcomes.append(one)
            on_hook()
    return outcomes, from_store.n_reads


def _measured(
    source: Source,
    targets: Targets,
    kind: Kind,
    hooks: tuple[str, ...],
    solved: Sequence[Solved],
    resampled: Resampled,
) -> "list[Outcome]":
    of_pass = source.run(HeldOutScores(hooks, targets, tuple(one.chosen for one in solved)))
    truth = targets.labels.values[of_pass["addresses"]]
    outcomes = []
    for number, one in enumerate(solved):
        scores = of_pass[f"scores.{number}"]
        # Of several outputs of one kind, those before the last are of the learning curve.
        last = scores if kind == "multinomial" else scores[:, -1:]
        metrics = (
            metrics_of_numbers(last[:, 0], truth, resampled)
            if kind == "ridge"
            else metrics_of_classes(last, truth, resampled, has_chances=kind != "mean_difference")
        )
        of_fractions = list(one.of_fractions)
        if kind == "mean_difference":
            of_fractions = [
                float(((scores[:, k] > 0) == (truth == 1)).mean()) for k in range(scores.shape[1] - 1)
            ]
        of_all = metrics["r2" if kind == "ridge" else "accuracy"].value
        n_outputs = last.shape[1]
        outcomes.append(
            Outcome(
                one.chosen.weights[:, 0, -n_outputs:],
                one.chosen.bias[0, -n_outputs:],
                metrics,
                one.by_l2,
                one.l2,
                dict(zip(targets.split.n_documents, [*of_fractions, of_all], strict=True)),
                one.is_converged,
                one.n_passes + 1,
            )
        )
    return outcomes


def _one(weights: Vector, bias: Vector) -> Problem:
    """Weights [d, n_outputs] and biases [n_outputs] as one problem."""
    return Problem(
        np.ascontiguousarray(weights[:, None]), np.ascontiguousarray(bias[None]), np.zeros(1, np.int8)
    )


def _best(penalties: Vector, losses: Vector) -> int:
    """The place of the lowest loss; of equal ones, of the larger penalty."""
    order = np.lexsort((-penalties, losses))
    return int(order[0])


def _mean_difference(
    source: Source, targets: Targets, hooks: tuple[str, ...], sizes: tuple[int, ...]
) -> list[Solved]:
    sums = source.run(ColumnSums(hooks, sizes, targets))
    solved = []
    for number in range(len(hooks)):
        # A fraction has the rows of all parts up to it.
        totals, counts = np.cumsum(sums[f"sum.{number}"], axis=0), np.cumsum(sums[f"count.{number}"], axis=0)
        found = [mean_difference(total, count) for total, count in zip(totals, counts, strict=True)]
        weights = np.stack([direction for direction, _ in found], axis=1)
        bias = np.array([offset for _, offset in found])
        solved.append(Solved(_one(weights, bias)))
    return solved


def _ridge(
    source: Source, targets: Targets, asked: Asked, hooks: tuple[str, ...], sizes: tuple[int, ...]
) -> list[Solved]:
    sums = source.run(Products(hooks, sizes, targets))
    solved = []
    for number in range(len(hooks)):
        *parts, held = sums[f"products.{number}"]
        until = np.cumsum(parts, axis=0)
        of_all = until[-1]
        scale = scale_of(
            of_all[-2, :-2], np.diagonal(of_all)[:-2], of_all[-2, -2], standardise=asked.standardise
        )
        weights, bias = scale.to_stored(*ridge(of_all, scale, asked.penalties))
        errors = mean_squared_error(held, weights, bias)
        best = _best(asked.penalties, errors)
        spread = held[-1, -1] / held[-2, -2] - (held[-2, -1] / held[-2, -2]) ** 2
        of_fractions = []
        for products in until[:-1]:
            some = scale.to_stored(*ridge(products, scale, asked.penalties[best : best + 1]))
            of_fractions.append(float(1 - mean_squared_error(held, *some)[0] / spread))
        solved.append(
            Solved(
                _one(weights[:, best : best + 1], bias[best : best + 1]),
                dict(zip(asked.penalties.tolist(), errors.tolist(), strict=True)),
                float(asked.penalties[best]),
                of_fractions,
            )
        )
    return solved


def _sampled(targets: Targets, seed: int, size: int) -> NDArray[np.bool_]:
    """Which entries the Hessian is computed from, [n_addresses]."""
    train = np.flatnonzero(targets.split.parts >= 0)
    is_sampled = np.zeros(len(targets.split.parts), bool)
    chosen = np.random.default_rng([seed, 2]).permutation(len(train))[: sample_rows(len(train), size)]
    is_sampled[train[chosen]] = True
    return is_sampled


def _logistic(
    source: Source,
    targets: Targets,
    asked: Asked,
    hooks: tuple[str, ...],
    sizes: tuple[int, ...],
    sample: Hold,
) -> list[Solved]:
    import torch

    sums = source.run(ColumnSums(hooks, sizes, targets))
    held = source.run(sample)
    n_penalties, n_curve = len(asked.penalties), len(targets.split.fractions) - 1
    sampled = np.concatenate([block.addresses for unit in held.units for block in unit])
    parts = torch.from_numpy(targets.split.parts[sampled])
    wanted, rows_of_fractions = [], []
    for number, hook in enumerate(hooks):
        counts = sums[f"count.{number}"]
        of_classes, n_rows = counts.sum(0), counts.sum()
        scale = scale_of(
            sums[f"sum.{number}"].sum((0, 1)),
            sums[f"squares.{number}"],
            n_rows,
            standardise=asked.standardise,
        )
        odds = np.log(of_classes)
        first = odds - odds.mean() if asked.kind == "multinomial" else odds[1:] - odds[:1]
        start = np.zeros((sizes[number] + 1, n_penalties, len(first)))
        start[-1] = first
        rows = Sample(torch.cat([block.values(hook) for unit in held.units for block in unit]), parts)
        limits = np.full(n_penalties, n_curve, np.int8)
        wanted.append(Wanted(hook, scale, rows, asked.penalties, limits, np.full(n_penalties, n_rows), start))
        rows_of_fractions.append(np.cumsum(counts.sum(1)))
    fitted = solve(source, targets, wanted)
    best = [_best(asked.penalties, one.held_loss) for one in fitted]
    curves = (
        [None] * len(hooks)
        if not n_curve
        else solve(
            source,
            targets,
            [
                Wanted(
                    one.hook,
                    one.scale,
                    one.sample,
                    np.full(n_curve, asked.penalties[index]),
                    np.arange(n_curve, dtype=np.int8),
                    rows[:-1],
                    np.repeat(
                        np.concatenate([found.weights, found.bias[None]])[:, index : index + 1],
                        n_curve,
                        axis=1,
                    ),
                )
                for one, found, index, rows in zip(wanted, fitted, best, rows_of_fractions, strict=True)
            ],
        )
    )
    n_held = float((targets.split.parts == HELD_OUT).sum())
    return [
        _chosen(asked, one, found, curve, index, n_held)
        for one, found, curve, index in zip(wanted, fitted, curves, best, strict=True)
    ]


def _chosen(
    asked: Asked, one: Wanted, found: Fitted, curve: Fitted | None, index: int, n_held: float
) -> Solved:
    weights, bias = one.scale.to_stored(found.weights[:, index], found.bias[index])
    return Solved(
        _one(weights, bias),
        dict(zip(asked.penalties.tolist(), (found.held_loss / n_held).tolist(), strict=True)),
        float(asked.penalties[index]),
        [] if curve is None else (curve.held_correct / n_held).tolist(),
        bool(found.is_converged[index]),
        found.n_passes + 2 + (0 if curve is None else curve.n_passes),
    )
