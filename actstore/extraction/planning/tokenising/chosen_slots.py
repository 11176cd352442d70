"""Choosing the positions of packed sequences whose activations are stored."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actstore.counted import counted
from actstore.errors import PlanMismatchError, TokensError
from actstore.tokens import Rows, Spool
from actstore.tokens.selection.listed_positions import ListedPositions
from actstore.tokens.selection.positions import Selection, Sequences, slots
from actstore.tokens.selection.text_places import TextPlaces


@dataclass(frozen=True)
class ChosenSlots:
    """Chooses positions of packed sequences."""

    selection: Selection
    places: TextPlaces | None
    listed: ListedPositions | None
    seed: int | None

    def __call__(self, rows: Rows) -> NDArray[np.int32]:
        """The chosen positions, [n, slots], ascending, then -1."""
        mask = self.selection.mask(
            Sequences(
                lengths=rows.lengths,
                documents=rows.documents,
                offsets=rows.offsets,
                roles=rows.roles,
                starts=None if self.places is None else self.places.starts,
                listed=None if self.listed is None else self.listed.listed,
                seed=self.seed or 0,
            )
        )
        for noted in (self.places, self.listed):
            if noted is not None:
                noted.forget_before(int(rows.documents.max()))  # documents come in order
        return slots(mask)


def check_chosen(spooled: Spool, selection: Selection | None, n_slots: int | None) -> None:
    """Check that some positions are chosen, and that the store has slots for them.

    Raises:
        TokensError: none is.
        PlanMismatchError: it has too few.
    """
    if spooled.n_rows == 0:
        raise TokensError(
            f"positions {str(selection)!r} choose no token of {counted(spooled.n_sequences, 'sequence')}; choose "
            "others"
        )
    if n_slots is not None and spooled.n_slots is not None and spooled.n_slots > n_slots:
        raise PlanMismatchError(
            f"a sequence of these tokens has {spooled.n_slots} chosen positions, and the store has {n_slots} slots for "
            "each, which cannot become more; choose another out"
        )
