"""Reading the tokens of a segment, with the positions whose activations are stored."""

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from actstore.storage.blobs import BlobReader
from actstore.store.format.batches import Batch, batches_of
from actstore.store.format.plan import Plan, Segment
from actstore.store.format.sizes import Sizes
from actstore.store.reading.rows import Rows, Section


@dataclass(frozen=True, eq=False)
class SegmentTokens:
    """The tokens of the n sequences of a segment."""

    tokens: NDArray[Any]
    """Token ids, int32 [n, L], padding included."""
    positions: NDArray[Any] | None
    """Chosen positions, int32 [n, slots], ascending, then -1; None if all are stored."""
    sizes: Sizes
    batches: list[Batch]
    """The batches that its values are computed in."""

    @property
    def lengths(self) -> NDArray[Any]:
        return self.sizes.lengths

    @property
    def counts(self) -> NDArray[Any]:
        return self.sizes.counts

    def entries(self, row: int) -> NDArray[Any] | None:
        """The chosen positions of one sequence, [its slots in use]; None if all are stored."""
        return None if self.positions is None else self.positions[row, : int(self.counts[row])]


class TokenReader:
    """Reads the tokens that a plan is over. They must be committed."""

    def __init__(self, blobs: BlobReader, plan: Plan) -> None:
        self._plan = plan
        names = ("tokens", "lengths", *(() if plan.n_slots is None else ("positions",)))
        self._arrays = {
            name: Rows(blobs, [Section(plan.token_array(name), lambda _: True)]) for name in names
        }

    def __call__(self, segment: Segment) -> SegmentTokens:
        """Read the tokens of a segment.

        Raises:
            StorageError: they are damaged or cannot be read.
        """
        rows = {name: array[segment.start : segment.stop] for name, array in self._arrays.items()}
        positions = rows.get("positions")
        return SegmentTokens(
            rows["tokens"],
            positions,
            Sizes.of(rows["lengths"], positions),
            batches_of(self._plan.request, rows["lengths"]),
        )
