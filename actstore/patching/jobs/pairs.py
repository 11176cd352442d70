"""Pairs of prompts as token ids, the same for every worker."""

import hashlib
import io
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

NO_TOKEN: Final = -1
"""Stands for a wrong answer that is not given."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of prompts, numbered from 0."""

    clean: NDArray[np.int32]
    """Ids of all clean prompts, one after the other [token]."""
    corrupted: NDArray[np.int32]
    """Ids of all corrupted prompts, which are as long as the clean ones [token]."""
    ends: NDArray[np.int64]
    """The token behind the last one of each pair [pair]."""
    answers: NDArray[np.int32]
    """Ids of the right answers [pair]."""
    wrong: NDArray[np.int32]
    """Ids of the wrong answers [pair], or `NO_TOKEN`."""

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each prompt [pair]."""
        return np.diff(self.ends, prepend=0)

    def prompts(self, pair: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(clean ids, corrupted ids) of one pair, both [position]."""
        tokens = slice(int(self.ends[pair - 1]) if pair else 0, int(self.ends[pair]))
        return self.clean[tokens], self.corrupted[tokens]

    def sha256(self) -> str:
        """A digest of everything that results depend on."""
        digest = hashlib.sha256()
        for array in (self.ends, self.clean, self.corrupted, self.answers, self.wrong):
            digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()

    def to_parquet(self) -> bytes:
        """A table with a line for each pair, to look up what a number of a pair stands for."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        offsets = [0, *self.ends.tolist()]
        table = pa.table(
            {
                "pair": pa.array(np.arange(len(self), dtype=np.int32)),
                "clean": pa.ListArray.from_arrays(offsets, pa.array(self.clean, pa.int32())),
                "corrupted": pa.ListArray.from_arrays(offsets, pa.array(self.corrupted, pa.int32())),
                "answer": pa.array(self.answers),
                "wrong": pa.array(self.wrong, mask=self.wrong == NO_TOKEN),
            }
        )
        stream = io.BytesIO()
        pq.write_table(table, stream, compression="zstd")
        return stream.getvalue()
