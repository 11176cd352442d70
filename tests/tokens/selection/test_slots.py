"""Chosen positions of whole sources: spooled block by block, against Python over one document at a time."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.tokens import Packing, Rows, pack, spool
from actstore.tokens.selection import slots as module
from actstore.tokens.selection.positions import Sequences, parse_positions, slots

L = 12
PACKING = Packing(mode="document", context_length=L, begin_batch=0, pad=1, truncate="right")


@pytest.fixture(autouse=True, scope="module")
def _small_blocks() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pack.__globals__, "BLOCK_TOKENS", 3 * L)
        patch.setattr(module, "_BLOCK", 20)
        yield


EXPECTED = {
    "last:2": lambda n: list(range(n))[-2:],
    "3:-1": lambda n: list(range(n))[3:-1],
    "every:5": lambda n: list(range(n))[::5],
}


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 1, 2, 5, L - 1, L]), min_size=1, max_size=14).filter(any),
    st.sampled_from(sorted(EXPECTED)),
    st.sampled_from([1, 3, 20]),
)
def test_all_positions_come_out_with_the_most_slots_of_any(sizes: list[int], text: str, least: int) -> None:
    """Documents are empty, of one token, as long as the context with the token that packing puts in, or longer."""
    selection = parse_positions(text)
    assert selection is not None

    def choose(rows: Rows) -> np.ndarray:
        sequences = Sequences(lengths=rows.lengths, documents=rows.documents, offsets=rows.offsets)
        return slots(selection.mask(sequences))

    documents = [np.full(size, 7, np.int32) for size in sizes]
    with tempfile.TemporaryDirectory() as folder:
        blocks = pack(enumerate(documents), PACKING)
        spooled = spool(blocks, Path(folder), choose=choose, n_slots=least)
        expected = [EXPECTED[text](min(size + 1, L)) for size in sizes if size]
        n_slots = max(least, *map(len, expected))
        assert spooled.positions is not None
        assert spooled.positions.tolist() == [row + [-1] * (n_slots - len(row)) for row in expected]
        assert (spooled.n_slots, spooled.n_rows) == (n_slots, sum(map(len, expected)))
