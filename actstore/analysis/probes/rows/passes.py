"""Passes over labelled rows: sums that probes are solved from. All arithmetic is float64 on the values as stored."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.probes.rows.labels import Labels
from actstore.analysis.probes.rows.sources import RowsOf
from actstore.analysis.probes.rows.splits import HELD_OUT, Split
from actstore.analysis.scanning.reduction import Arrays

if TYPE_CHECKING:
    import torch

_CHUNK: Final = 1024
"""Rows that are converted to float64 together, so that they are still in the cache when they are multiplied."""


@dataclass(frozen=True, eq=False)
class Targets:
    """What is known of every entry: what passes compare rows with."""

    labels: Labels
    split: Split

    @cached_property
    def identity(self) -> str:
        """A text that differs for other targets, and for other numbers of parts and classes, which give sums shapes."""
        digest = hashlib.sha256(self.labels.values.tobytes())
        digest.update(self.split.parts.tobytes())
        numbers = (self.labels.values.dtype.str, len(self.labels.classes), len(self.split.fractions))
        return f"{numbers} {digest.hexdigest()}"


@dataclass(frozen=True)
class Chunk:
    """Some labelled rows of a hook."""

    x: "torch.Tensor"
    """float64 [n_rows, d]."""
    y: "torch.Tensor"
    """Labels as in `Labels.values`, int64 or float64 [n_rows]."""
    parts: "torch.Tensor"
    """As in `Split.parts`, int8 [n_rows]."""
    places: NDArray[np.int64]
    """Where in the block they are, [n_rows]."""


def chunks(block: RowsOf, hook: str, targets: Targets, *, lowest: int, highest: int = 127) -> Iterator[Chunk]:
    """The rows of a block whose part is from ``lowest`` to ``highest``."""
    import torch

    parts = targets.split.parts[block.addresses]
    places = np.flatnonzero((parts >= lowest) & (parts <= highest))
    if not len(places):
        return
    y = targets.labels.values[block.addresses[places]]
    y = y.astype(np.int64) if y.dtype.kind == "i" else y
    values = block.values(hook).flatten(1)
    for start in range(0, len(places), _CHUNK):
        some = places[start : start + _CHUNK]
        is_run = some[-1] - some[0] == len(some) - 1
        rows = values[some[0] : some[-1] + 1] if is_run else values[torch.from_numpy(some)]
        # Converting float16 directly is four times slower than through float32.
        x = (rows.float() if rows.dtype == torch.float16 else rows).double()
        yield Chunk(x, torch.from_numpy(y[start : start + _CHUNK]), torch.from_numpy(parts[some]), some)


class Summing(Protocol):
    """A reduction to sums."""

    def zeros(self) -> dict[str, NDArray[Any]]:
        """The sums of no rows."""
        ...

    def add(self, block: RowsOf, sums: dict[str, NDArray[Any]]) -> None:
        """Add the rows of a block."""
        ...


@dataclass
class SumState:
    """Sums so far."""

    of: Summing
    sums: dict[str, NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sums = self.sums or self.of.zeros()

    def update(self, block: RowsOf) -> None:
        """Take the rows of a block."""
        self.of.add(block, self.sums)

    def merge(self, other: Self) -> None:
        """Take the sums of rows that follow."""
        for name, values in other.sums.items():
            self.sums[name] += values

    def arrays(self) -> Arrays:
        """All that is known."""
        return self.sums


class _Sums:
    """What reductions to sums have in common."""

    def zeros(self) -> dict[str, NDArray[Any]]:
        raise NotImplementedError

    def add(self, block: RowsOf, sums: dict[str, NDArray[Any]]) -> None:
        raise NotImplementedError

    def start(self) -> SumState:
        """See `Reduction.start`."""
        return SumState(self)

    def restore(self, arrays: Arrays) -> SumState:
        """See `Reduction.restore`."""
        return SumState(self, dict(arrays))

    def finish(self, state: SumState) -> Mapping[str, NDArray[Any]]:
        """See `Reduction.finish`."""
        return state.sums


@dataclass(frozen=True, eq=False)
class ColumnSums(_Sums):
    """Reduction of the training rows to sums by part and class, and sums of squares of their elements."""

    hooks: tuple[str, ...]
    sizes: tuple[int, ...]
    """Elements of a row of each hook."""
    targets: Targets

    def identity(self) -> str:
        return f"column sums {self.hooks} {self.targets.identity}"

    def zeros(self) -> dict[str, NDArray[Any]]:
        """``count.h`` [n_parts, n_classes], ``sum.h`` [n_parts, n_classes, d] and ``squares.h`` [d]."""
        n_parts, n_classes = len(self.targets.split.fractions), len(self.targets.labels.classes)
        sums: dict[str, NDArray[Any]] = {}
        for number, size in enumerate(self.sizes):
            sums[f"count.{number}"] = np.zeros((n_parts, n_classes))
            sums[f"sum.{number}"] = np.zeros((n_parts, n_classes, size))
            sums[f"squares.{number}"] = np.zeros(size)
        return sums

    def add(self, block: RowsOf, sums: dict[str, NDArray[Any]]) -> None:
        """See `Summing.add`."""
        import torch

        n_parts, n_classes = len(self.targets.split.fractions), len(self.targets.labels.classes)
        for number, (hook, size) in enumerate(zip(self.hooks, self.sizes, strict=True)):
            total = torch.from_numpy(sums[f"sum.{number}"]).view(-1, size)
            for chunk in chunks(block, hook, self.targets, lowest=0):
                place = chunk.parts.long() * n_classes + chunk.y
                is_of = torch.nn.functional.one_hot(place, n_parts * n_classes).double().T.contiguous()
                sums[f"count.{number}"] += is_of.sum(1).view(n_parts, n_classes).numpy()
                total.addmm_(is_of, chunk.x)
                sums[f"squares.{number}"] += chunk.x.square().sum(0).numpy()


@dataclass(frozen=True, eq=False)
class Products(_Sums):
    """Reduction to products of the elements of rows, with each other and with what is predicted."""

    hooks: tuple[str, ...]
    sizes: tuple[int, ...]
    targets: Targets

    def identity(self) -> str:
        return f"products {self.hooks} {self.targets.identity}"

    def zeros(self) -> dict[str, NDArray[Any]]:
        """``products.h`` [n_parts + 1, d + 2, d + 2], of the row, 1, and what is predicted, by part; the last one is
        that of the held-out rows.
        """
        n_parts = len(self.targets.split.fractions)
        return {
            f"products.{number}": np.zeros((n_parts + 1, size + 2, size + 2))
            for number, size in enumerate(self.sizes)
        }

    def add(self, block: RowsOf, sums: dict[str, NDArray[Any]]) -> None:
        """See `Summing.add`."""
        import torch

        for number, hook in enumerate(self.hooks):
            for part in (*range(len(self.targets.split.fractions)), HELD_OUT):
                total = torch.from_numpy(sums[f"products.{number}"][part])
                for chunk in chunks(block, hook, self.targets, lowest=part, highest=part):
                    ones = torch.ones(len(chunk.x), 1, dtype=torch.float64)
                    rows = torch.cat([chunk.x, ones, chunk.y[:, None].double()], dim=1)
                    total.addmm_(rows.T, rows)


@dataclass(frozen=True, eq=False)
class Problem:
    """Linear functions of the rows of a hook, several of which are looked at together."""

    weights: NDArray[np.float64]
    """In units of the stored values, [d, n_problems, n_outputs]."""
    bias: NDArray[np.float64]
    """[n_problems, n_outputs]"""
    limits: NDArray[np.int8]
    """The highest part that each problem trains on, [n_problems]."""


@dataclass(frozen=True, eq=False)
class Losses(_Sums):
    """Reduction to the log loss of each problem and its gradient, and to what it gives on the held-out rows."""

    hooks: tuple[str, ...]
    targets: Targets
    problems: tuple[Problem, ...]
    """Those of each hook."""

    def identity(self) -> str:
        digest = hashlib.sha256()
        for problem in self.problems:
            for values in (problem.weights, problem.bias, problem.limits):
                digest.update(np.ascontiguousarray(values).tobytes())
        return f"losses {self.hooks} {self.targets.identity} {digest.hexdigest()}"

    def zeros(self) -> dict[str, NDArray[Any]]:
        """``loss.h``, ``held_loss.h`` and ``held_correct.h`` [n_problems], ``slope.h`` [n_problems * n_outputs] and
        ``gradient.h`` [n_problems * n_outputs, d].
        """
        sums: dict[str, NDArray[Any]] = {}
        for number, problem in enumerate(self.problems):
            size, n_problems, n_outputs = problem.weights.shape
            sums[f"gradient.{number}"] = np.zeros((n_problems * n_outputs, size))
            sums[f"slope.{number}"] = np.zeros(n_problems * n_outputs)
            for name in ("loss", "held_loss", "held_correct"):
                sums[f"{name}.{number}"] = np.zeros(n_problems)
        return sums

    def add(self, block: RowsOf, sums: dict[str, NDArray[Any]]) -> None:
        """See `Summing.add`."""
        import torch

        for number, (hook, problem) in enumerate(zip(self.hooks, self.problems, strict=True)):
            size, n_problems, n_outputs = problem.weights.shape
            # Products of few columns are fastest with the rows behind.
            weights = torch.from_numpy(problem.weights).reshape(size, -1).T.contiguous()
            bias, limits = torch.from_numpy(problem.bias).reshape(-1, 1), torch.from_numpy(problem.limits)
            gradient = torch.from_numpy(sums[f"gradient.{number}"])
            for chunk in chunks(block, hook, self.targets, lowest=HELD_OUT):
                scores = (weights @ chunk.x.T).add_(bias).view(n_problems, n_outputs, -1)
                losses, slopes, is_correct = log_losses(scores, chunk.y)
                trains = ((chunk.parts >= 0) & (chunk.parts <= limits[:, None])).double()
                held = (chunk.parts == HELD_OUT).double()
                slopes = (slopes * trains[:, None]).flatten(0, 1)
                gradient.addmm_(slopes, chunk.x)
                sums[f"slope.{number}"] += slopes.sum(1).numpy()
                sums[f"loss.{number}"] += (losses * trains).sum(1).numpy()
                sums[f"held_loss.{number}"] += (losses @ held).numpy()
                sums[f"held_correct.{number}"] += (is_correct.double() @ held).numpy()


def log_losses(
    scores: "torch.Tensor", y: "torch.Tensor"
) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
    """The log loss, its slope, and whether the class is right.

    Args:
        scores: [n_problems, n_outputs, n_rows], where one output means two classes.
        y: number of the class, [n_rows].

    Returns:
        [n_problems, n_rows], [n_problems, n_outputs, n_rows], and [n_problems, n_rows].
    """
    import torch

    if scores.shape[1] == 1:
        score, is_second = scores[:, 0], y.double()
        losses = torch.nn.functional.softplus(score, threshold=50) - is_second * score
        return losses, (torch.sigmoid(score) - is_second)[:, None], (score > 0) == (is_second > 0)
    total = scores.logsumexp(1, keepdim=True)
    right = y.expand(len(scores), 1, -1)
    losses = (total - scores.gather(1, right))[:, 0]
    slopes = (scores - total).exp()
    slopes.scatter_add_(1, right, -torch.ones_like(slopes[:, :1]))
    return losses, slopes, scores.argmax(1) == y


@dataclass(frozen=True, eq=False)
class HeldOutScores:
    """Reduction to the held-out rows: ``addresses`` [n_rows], and ``scores.h`` [n_rows, n_outputs]."""

    hooks: tuple[str, ...]
    targets: Targets
    problems: tuple[Problem, ...]
    """One problem for each hook."""

    def identity(self) -> str:
        return f"held-out {Losses(self.hooks, self.targets, self.problems).identity()}"

    def start(self) -> "ScoreState":
        return ScoreState(self)

    def restore(self, arrays: Arrays) -> "ScoreState":
        """See `Reduction.restore`."""
        return ScoreState(self, [dict(arrays)])

    def finish(self, state: "ScoreState") -> Arrays:
        return state.arrays()


@dataclass
class ScoreState:
    """Scores so far."""

    of: HeldOutScores
    pieces: list[dict[str, NDArray[Any]]] = field(default_factory=list)

    def update(self, block: RowsOf) -> None:
        """Take the rows of a block."""
        import torch

        piece: dict[str, NDArray[Any]] = {}
        for number, (hook, problem) in enumerate(zip(self.of.hooks, self.of.problems, strict=True)):
            weights, bias = torch.from_numpy(problem.weights[:, 0]), torch.from_numpy(problem.bias[0])
            scores, places = [], []
            for chunk in chunks(block, hook, self.of.targets, lowest=HELD_OUT, highest=HELD_OUT):
                scores.append(torch.addmm(bias, chunk.x, weights).numpy())
                places.append(chunk.places)
            if scores:
                piece[f"scores.{number}"] = np.concatenate(scores)
                piece["addresses"] = block.addresses[np.concatenate(places)]
        if piece:
            self.pieces.append(piece)

    def merge(self, other: Self) -> None:
        """Take the scores of rows that follow."""
        self.pieces += other.pieces

    def arrays(self) -> Arrays:
        """All that is known."""
        empty: dict[str, NDArray[Any]] = {"addresses": np.empty(0, np.int64)} | {
            f"scores.{number}": np.empty((0, problem.weights.shape[2]))
            for number, problem in enumerate(self.of.problems)
        }
        return {
            name: np.concatenate([none, *(piece[name] for piece in self.pieces)])
            for name, none in empty.items()
        }
