"""Joining the checksums of pieces."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore.store.format.joined_checksum import joined
from actstore.store.format.shard import crc32c


@given(st.lists(st.binary(max_size=200), max_size=6))
def test_pieces_have_the_checksum_of_all(pieces: list[bytes]) -> None:
    assert joined((crc32c(piece), len(piece)) for piece in pieces) == crc32c(b"".join(pieces))


@pytest.mark.parametrize("sizes", [[8 << 20, 1], [1, (8 << 20) + 5, 3 << 20]])
def test_large_pieces(sizes: list[int]) -> None:
    data = bytes(range(251)) * (sum(sizes) // 251 + 1)
    edges = [0, *itertools.accumulate(sizes)]
    pieces = [data[start:stop] for start, stop in itertools.pairwise(edges)]
    assert joined((crc32c(piece), len(piece)) for piece in pieces) == crc32c(data[: edges[-1]])
