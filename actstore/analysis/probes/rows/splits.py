"""Splits: which documents are held out, and which ones a part of the learning curve trains on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.probes.rows.labels import Labels
from actstore.errors import JobError

HELD_OUT = -1
"""Part of rows that are held out."""
UNUSED = -2
"""Part of entries that have no label."""
_MOST_FRACTIONS: Final = 127
"""Fractions of a learning curve below 1 at most: the number of the last part is an int8."""


@dataclass(frozen=True)
class Split:
    """The part of every entry. All rows of a document are in one part, whatever the order of anything else."""

    parts: NDArray[np.int8]
    """[n_addresses]: `HELD_OUT`, `UNUSED`, or k for training rows that come in with the k-th fraction of the learning
    curve, and stay in all larger ones.
    """
    fractions: tuple[float, ...]
    """Fractions of the training documents, ascending; the last one is 1."""
    n_documents: tuple[int, ...]
    """Training documents of each fraction."""
    n_held_out: int
    """Documents that are held out."""


def split_of(labels: Labels, held_out: float, seed: int, curve: Sequence[float] = ()) -> Split:
    """Divide documents at random, each class by itself, so that all have their share of it.

    A document counts as of the class of its first labelled row.

    Args:
        labels: the labels.
        held_out: share of the documents that is held out.
        seed: decides which.
        curve: fractions of the training documents below 1, for a learning curve.

    Raises:
        JobError: a number is not valid, or there are too few documents.
    """
    if not 0 < held_out < 1:
        raise JobError(f"held_out is {held_out:g}; give a share of the documents between 0 and 1")
    fractions = tuple(sorted({float(fraction) for fraction in curve if fraction != 1}))
    if fractions and not 0 < fractions[0] <= fractions[-1] < 1:
        raise JobError(f"curve holds {fractions}; give fractions of the training documents between 0 and 1")
    if len(fractions) > _MOST_FRACTIONS:
        raise JobError(f"curve holds {len(fractions)} fractions; give {_MOST_FRACTIONS} at most")
    fractions = (*fractions, 1.0)
    rows = np.flatnonzero(labels.is_labelled)
    groups, first = np.unique(labels.groups[rows], return_index=True)
    if len(groups) < 2:
        raise JobError(
            "all labelled rows are of one document, so none can be held out; label more documents, or give groups"
        )
    kinds = labels.values[rows[first]] if labels.classes else np.zeros(len(groups), np.int32)
    random = np.random.default_rng(seed)
    # The place of each document among those of its class, from 0 to 1: what is below `held_out` is held out.
    rank = np.empty(len(groups))
    for kind in np.unique(kinds):
        members = np.flatnonzero(kinds == kind)
        rank[random.permutation(members)] = (np.arange(len(members)) + 0.5) / len(members)
    is_held_out = rank < held_out
    if not is_held_out.any():
        is_held_out[rank.argmin()] = True
    if is_held_out.all():
        is_held_out[rank.argmax()] = False
    among_trained = (rank - held_out) / (1 - held_out)
    parts = np.searchsorted(fractions[:-1], among_trained, side="right").astype(np.int8)
    parts[is_held_out] = HELD_OUT
    of_entries = np.full(len(labels.groups), UNUSED, np.int8)
    of_entries[rows] = parts[np.searchsorted(groups, labels.groups[rows])]
    split = Split(
        of_entries,
        fractions,
        tuple(int(((parts >= 0) & (parts <= k)).sum()) for k in range(len(fractions))),
        int(is_held_out.sum()),
    )
    _check_classes(labels, split)
    return split


def _check_classes(labels: Labels, split: Split) -> None:
    sides: dict[str, Any] = {"held-out": split.parts == HELD_OUT, "training": split.parts >= 0}
    for side, is_there in sides.items():
        counts = np.bincount(labels.values[is_there], minlength=len(labels.classes)) if labels.classes else ()
        for name, count in zip(labels.classes, counts, strict=True):
            if not count:
                raise JobError(
                    f"no {side} document has the label {name!r}, of {split.n_held_out} held-out and "
                    f"{split.n_documents[-1]} training documents; label more documents with it, or choose another "
                    "seed or held_out"
                )
