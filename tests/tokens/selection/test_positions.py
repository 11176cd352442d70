"""Choosing positions, against plain Python over one sequence at a time."""

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from actstore.errors import JobError, TokensError
from actstore.tokens.selection.positions import Sequences, parse_positions, slots

L = 12
CANONICAL = {
    "last": "last",
    "last:1": "last",
    "-1:": "last",
    "last: 3": "last:3",
    "-3:": "last:3",
    ":5": "0:5",
    " 2 : -1 ": "2:-1",
    "2:": "2:",
    "every:4": "every:4",
    "sample:2": "sample:2",
    "role:tool": "role:tool",
    "role:template:last": "role:template:last",
    "role:assistant:last": "role:assistant:last",
    "after:Answer: ": "after:Answer: ",
    "column:spots": "column:spots",
}


@pytest.mark.parametrize(("text", "canonical"), CANONICAL.items())
def test_each_selection_has_one_spelling(text: str, canonical: str) -> None:
    assert str(parse_positions(text)) == canonical
    assert str(parse_positions(canonical)) == canonical


@pytest.mark.parametrize("text", ["all", ":", "0:", "every:1"])
def test_what_leaves_nothing_out_is_all(text: str) -> None:
    assert parse_positions(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "lst",
        "7",
        "last:0",
        "last:x",
        "every",
        "every:-2",
        "sample:0",
        "1:2:3",
        "a:b",
        "role:me",
        "after:",
        "All",
    ],
)
def test_what_means_nothing_is_refused_with_what_can_be_said(text: str) -> None:
    with pytest.raises(JobError, match=r"^positions is '.*'; it can be all, last, .* or column:NAME$"):
        parse_positions(text)


def packed(lengths: list[int]) -> Sequences:
    """One document a sequence: 1, 3, 5, ... Every second sequence begins with an inserted token."""
    documents = np.full((len(lengths), L), -1, np.int64)
    offsets = np.full((len(lengths), L), -1, np.int32)
    for row, length in enumerate(lengths):
        first = min(row % 2, length)
        documents[row, first:length] = 2 * row + 1
        offsets[row, first:length] = np.arange(length - first)
    return Sequences(lengths=np.array(lengths, np.int32), documents=documents, offsets=offsets, seed=3)


def chosen(text: str, sequences: Sequences) -> list[list[int]]:
    selection = parse_positions(text)
    assert selection is not None
    positions = slots(selection.mask(sequences))
    assert positions.dtype == np.int32
    used = [[position for position in row if position >= 0] for row in positions.tolist()]
    width = max(map(len, used), default=0)
    assert positions.tolist() == [row + [-1] * (width - len(row)) for row in used]
    return used


LENGTHS = st.lists(st.integers(0, L), min_size=1, max_size=6)
EDGE = st.none() | st.integers(-L - 2, L + 2)


@given(LENGTHS, EDGE, EDGE)
def test_spans_are_slices_of_real_tokens(lengths: list[int], start: int | None, stop: int | None) -> None:
    if not start and stop is None:
        return
    text = f"{'' if start is None else start}:{'' if stop is None else stop}"
    expected = [list(range(length))[start:stop] for length in lengths]
    assert chosen(text, packed(lengths)) == expected


@given(LENGTHS, st.integers(1, L + 2))
def test_the_last_and_every_few(lengths: list[int], k: int) -> None:
    assert chosen(f"last:{k}", packed(lengths)) == [list(range(length))[-k:] for length in lengths]
    assert chosen(f"every:{k + 1}", packed(lengths)) == [list(range(length))[:: k + 1] for length in lengths]


@given(LENGTHS, st.integers(1, L + 2))
def test_a_sample_is_of_each_document_wherever_it_is_packed(lengths: list[int], k: int) -> None:
    sequences = packed(lengths)
    drawn = chosen(f"sample:{k}", sequences)
    for row, (positions, length) in enumerate(zip(drawn, lengths, strict=True)):
        first = min(row % 2, length)
        assert len(positions) == len(set(positions)) == min(k, length - first)
        assert all(first <= position < length for position in positions)
    # The same documents in another order, further to the right.
    order = random.Random(0).sample(range(len(lengths)), len(lengths))
    moved = Sequences(
        lengths=sequences.lengths[order] + 2,
        documents=np.pad(sequences.documents[order], ((0, 0), (2, 0)), constant_values=-1),
        offsets=np.pad(sequences.offsets[order], ((0, 0), (2, 0)), constant_values=-1),
        seed=3,
    )
    again = chosen(f"sample:{k}", moved)
    assert again == [[position + 2 for position in drawn[row]] for row in order]


def test_another_seed_draws_others_and_all_are_drawn_alike_often() -> None:
    lengths = [L] * 2000
    first = packed(lengths)
    other = Sequences(lengths=first.lengths, documents=first.documents, offsets=first.offsets, seed=4)
    by_seed = [np.array(chosen("sample:3", sequences)[::2]) for sequences in (first, other)]
    assert (by_seed[0] == by_seed[1]).all(axis=1).mean() < 0.05
    counts = np.bincount(by_seed[0].reshape(-1), minlength=L)
    assert counts.min() > 180  # 250 on average, with a standard deviation of 14
    assert counts.max() < 320


def test_roles_are_those_of_their_tokens() -> None:
    roles: NDArray[Any] = np.array(
        [[0, 2, 2, 0, 3, 3, 0, 2, 0, 3, -1, -1], [1, 1, 2, 2, 2] + [-1] * 7], np.int8
    )
    bare = packed([10, 5])
    chats = Sequences(lengths=bare.lengths, documents=bare.documents, offsets=bare.offsets, roles=roles)
    assert chosen("role:assistant", chats) == [[4, 5, 9], []]
    assert chosen("role:user", chats) == [[1, 2, 7], [2, 3, 4]]
    assert chosen("role:user:last", chats) == [[7], [4]]
    with pytest.raises(JobError, match="^positions role:user:last need chats, or token ids with token_roles"):
        chosen("role:user:last", bare)


def test_behind_a_text_is_by_offset_of_the_document() -> None:
    bare = packed([4, 6, 5])
    named = Sequences(
        lengths=bare.lengths, documents=bare.documents, offsets=bare.offsets, starts={1: 2, 3: 0, 9: 0}
    )
    assert chosen("after:x", named) == [[2, 3], [1, 2, 3, 4, 5], []]
    with pytest.raises(JobError, match="need text, and these documents are token ids"):
        chosen("after:x", bare)


def test_a_column_counts_the_tokens_of_the_sequence() -> None:
    bare = packed([4, 6, 5])
    listed: dict[int, list[int]] = {1: [3, -4, 3, -1], 3: []}
    named = Sequences(lengths=bare.lengths, documents=bare.documents, offsets=bare.offsets, listed=listed)
    assert chosen("column:spots", named) == [[0, 3], [], []]
    for wrong in (4, -5):
        listed[1] = [wrong]
        with pytest.raises(
            TokensError, match=f"^column spots lists position {wrong} for document 1, which has 4 tok"
        ):
            chosen("column:spots", named)
    with pytest.raises(JobError, match="need a table with that column"):
        chosen("column:spots", bare)
