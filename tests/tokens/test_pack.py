"""Packing compared with SAELens and with the documents, and its errors."""

import importlib.util
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from actstore.errors import TokensError
from actstore.tokens import Packing, Rows, encode_documents, pack

Ids = NDArray[np.int32]
SPECIAL = (None, 0, 1, 2)
COMBINATIONS = list(itertools.product(SPECIAL, repeat=3))
PAIRS = list(itertools.product(SPECIAL, repeat=2))


@pytest.fixture(scope="module")
def saelens() -> Any:
    """The one module of SAELens that packs, without the package, which takes seconds to import."""
    package = importlib.util.find_spec("sae_lens")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).parent / "tokenization_and_batching.py"
    spec = importlib.util.spec_from_file_location("saelens_packing", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_documents(rng: np.random.Generator, length: int, n: int) -> list[Ids]:
    """Documents of 0 to many rows, with the special ids 0 to 2 at the start, inside, and everywhere."""
    documents = []
    for _ in range(n):
        size = int(rng.choice([0, 1, 2, length - 1, length, length + 1, int(rng.integers(0, 8 * length))]))
        low, high = [(0, 3), (0, 12), (3, 50)][rng.integers(3)]
        ids = rng.integers(low, high, max(size, 0)).astype(np.int32)
        if len(ids) and rng.random() < 0.3:
            ids[0] = rng.integers(3)
        documents.append(ids)
    return documents


def together(blocks: Iterator[Rows]) -> Rows:
    parts = list(blocks)
    return Rows(
        np.concatenate([rows.tokens for rows in parts]),
        np.concatenate([rows.lengths for rows in parts]),
        np.concatenate([rows.documents for rows in parts]),
        np.concatenate([rows.offsets for rows in parts]),
        np.concatenate([rows.cut for rows in parts]),
    )


def packed(documents: list[Ids], packing: Packing, **options: Any) -> Rows:
    """All rows as one block; no rows if pack raises for having none."""
    try:
        return together(pack(enumerate(documents), packing, **options))
    except TokensError as error:
        assert "0 rows" in str(error) or "nothing to pack" in str(error)  # noqa: PT017 - not what is under test
        shape = (0, packing.context_length)
        return Rows(
            np.empty(shape, np.int32),
            np.empty(0, np.int32),
            np.empty(shape, np.int64),
            np.empty(shape, np.int32),
            np.empty(0, np.int32),
        )


def expected(saelens: Any, documents: list[Ids], packing: Packing, *, separate: bool = False) -> Ids:
    rows = saelens.concat_and_batch_sequences(
        iter([torch.from_numpy(ids.astype(np.int64)) for ids in documents]),
        packing.context_length,
        begin_batch_token_id=packing.begin_batch,
        begin_sequence_token_id=packing.begin_sequence,
        sequence_separator_token_id=packing.separator,
        disable_concat_sequences=separate,
    )
    saelens_rows = [row.numpy().astype(np.int32) for row in rows]
    return np.array(saelens_rows, np.int32).reshape(-1, packing.context_length)


def assert_provenance(rows: Rows, documents: list[Ids], packing: Packing) -> None:
    """Check that every token with a document is that document's, and that packing inserted every other token."""
    inserted = {packing.begin_batch, packing.begin_sequence, packing.separator}
    for row, length in enumerate(rows.lengths.tolist()):
        for column in range(packing.context_length):
            document, offset = int(rows.documents[row, column]), int(rows.offsets[row, column])
            token = int(rows.tokens[row, column])
            if document >= 0:
                assert column < length
                assert token == documents[document][offset]
            else:
                assert (document, offset) == (-1, -1)
                assert token in (inserted if column < length else {packing.pad})


@pytest.mark.parametrize("length", [2, 3, 5, 16])
@pytest.mark.parametrize(("begin_batch", "begin_sequence", "separator"), COMBINATIONS)
def test_concat_equals_saelens(
    saelens: Any, length: int, begin_batch: int | None, begin_sequence: int | None, separator: int | None
) -> None:
    packing = Packing(
        context_length=length, begin_batch=begin_batch, begin_sequence=begin_sequence, separator=separator
    )
    rng = np.random.default_rng(
        [length, *(9 if x is None else x for x in (begin_batch, begin_sequence, separator))]
    )
    for n in (1, 2, 5, 12, 30):
        documents = random_documents(rng, length, n)
        rows = packed(documents, packing)
        np.testing.assert_array_equal(rows.tokens, expected(saelens, documents, packing))
        assert (rows.lengths == length).all()
        assert_provenance(rows, documents, packing)


@pytest.mark.parametrize(("begin_sequence", "separator"), PAIRS)
def test_concat_equals_saelens_for_rows_of_one_token(
    saelens: Any, begin_sequence: int | None, separator: int | None
) -> None:
    packing = Packing(context_length=1, begin_sequence=begin_sequence, separator=separator)
    documents = random_documents(np.random.default_rng(1), 1, 20)
    np.testing.assert_array_equal(packed(documents, packing).tokens, expected(saelens, documents, packing))


def test_concat_equals_saelens_across_blocks(saelens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pack.__globals__, "BLOCK_TOKENS", 3 * 7)
    rng = np.random.default_rng(2)
    for options in COMBINATIONS:
        packing = Packing(
            context_length=7, begin_batch=options[0], begin_sequence=options[1], separator=options[2]
        )
        documents = random_documents(rng, 7, 12)
        rows = packed(documents, packing)
        np.testing.assert_array_equal(rows.tokens, expected(saelens, documents, packing))
        assert_provenance(rows, documents, packing)


def test_concat_equals_saelens_on_real_text(saelens: Any, tokenizer: Any, play: str) -> None:
    documents = encode_documents(tokenizer, play.split("\n\n"))
    bos = tokenizer.bos_token_id
    packing = Packing(context_length=128, begin_batch=bos, separator=bos)
    rows = packed(documents, packing, vocab_size=len(tokenizer))
    assert len(rows) > 50
    np.testing.assert_array_equal(rows.tokens, expected(saelens, documents, packing))
    assert_provenance(rows, documents, packing)


def test_a_separator_cut_off_from_begin_sequence_leaves_it_for_the_next_row() -> None:
    documents = [np.array([7, 7, 7], np.int32), np.array([8, 8, 8], np.int32)]
    rows = packed(documents, Packing(context_length=4, begin_sequence=1, separator=2))
    assert rows.tokens.tolist() == [[1, 7, 7, 7], [1, 8, 8, 8]]
    rows = packed(documents, Packing(context_length=5, begin_sequence=1, separator=2))
    assert rows.tokens.tolist() == [[1, 7, 7, 7, 2]]
    rows = packed([*documents, documents[0]], Packing(context_length=5, begin_sequence=1, separator=2))
    assert rows.tokens.tolist() == [[1, 7, 7, 7, 2], [1, 8, 8, 8, 2]]
    assert rows.documents.tolist() == [[-1, 0, 0, 0, -1], [-1, 1, 1, 1, -1]]


@pytest.mark.parametrize("length", [2, 3, 8])
@pytest.mark.parametrize(("begin_batch", "begin_sequence"), PAIRS)
def test_document_rows(
    saelens: Any, length: int, begin_batch: int | None, begin_sequence: int | None
) -> None:
    packing = Packing(
        mode="document",
        context_length=length,
        begin_batch=begin_batch,
        begin_sequence=begin_sequence,
        pad=99,
        truncate="right",
    )
    opener = begin_batch if begin_sequence is None else begin_sequence
    documents = random_documents(np.random.default_rng(length), length, 60)
    rows = packed(documents, packing)
    wanted = []
    for ids in documents:
        row = ids.tolist() if opener is None or ids[:1].tolist() == [opener] else [opener, *ids.tolist()]
        if len(ids):
            wanted.append(row[:length])
    assert rows.lengths.tolist() == [len(row) for row in wanted]
    assert rows.tokens.tolist() == [row + [99] * (length - len(row)) for row in wanted]
    assert_provenance(rows, documents, packing)
    full = rows.tokens[rows.lengths == length]
    np.testing.assert_array_equal(full, expected(saelens, documents, packing, separate=True))


def test_document_rows_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pack.__globals__, "BLOCK_TOKENS", 8)
    documents = [np.arange(n, dtype=np.int32) for n in (1, 2, 0, 9, 4)]
    packing = Packing(mode="document", context_length=4, pad=99, truncate="right")
    blocks = list(pack(enumerate(documents), packing))
    assert [len(rows) for rows in blocks] == [2, 2]
    rows = together(iter(blocks))
    assert rows.tokens.tolist() == [[0, 99, 99, 99], [0, 1, 99, 99], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert rows.documents[:, 0].tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize("opener", [None, 1])
@pytest.mark.parametrize("truncate", ["left", "right"])
def test_a_document_is_cut_at_the_end_that_is_named(truncate: Any, opener: int | None) -> None:
    length = 5
    packing = Packing(
        mode="document", context_length=length, begin_batch=opener, pad=99, truncate=truncate, kept=1
    )
    documents = [np.arange(2, 2 + n, dtype=np.int32) for n in (1, 4, 5, 6, 40)]
    documents += [np.array([1, *ids], np.int32) for ids in documents]  # with a BOS token of their own
    rows = packed(documents, packing)
    n_cut = 0
    for row, ids in enumerate(documents):
        begin = ids[:1].tolist() if ids[0] == 1 else [] if opener is None else [opener]
        rest = ids[int(ids[0] == 1) :].tolist()
        room = length - len(begin)
        kept = rest[:room] if truncate == "right" else rest[max(0, len(rest) - room) :]
        wanted = begin + kept
        assert rows.tokens[row].tolist() == wanted + [99] * (length - len(wanted))
        assert rows.lengths[row] == len(wanted)
        assert rows.cut[row] == len(rest) - len(kept)
        n_cut += len(rest) > room
    assert np.count_nonzero(rows.cut) == n_cut > 0
    assert_provenance(rows, documents, packing)


def test_documents_that_may_not_be_cut_are_all_counted_before_they_are_refused() -> None:
    packing = Packing(mode="document", context_length=4, begin_batch=1, pad=0)
    documents = [np.full(n, 5, np.int32) for n in (3, 4, 0, 2, 90, 4)]
    message = (
        "3 of 5 documents do not fit in a sequence of 4 tokens, and the longest needs 91; choose truncate: left or "
        "right"
    )
    with pytest.raises(TokensError, match=message):
        list(pack(enumerate(documents), packing))


def test_a_prompt_has_a_row_even_if_it_is_empty() -> None:
    packing = Packing(mode="document", context_length=4, begin_batch=1, pad=9, keeps_empty=True)
    documents = [np.array(ids, np.int32) for ids in ([5], [], [1, 6], [])]
    rows = packed(documents, packing)
    assert rows.tokens.tolist() == [[1, 5, 9, 9], [1, 9, 9, 9], [1, 6, 9, 9], [1, 9, 9, 9]]
    assert rows.lengths.tolist() == [2, 1, 2, 1]
    assert rows.documents[:, 0].tolist() == [-1, 1, 2, 3]
    doubled = packed(documents, replace(packing, always_begins=True))
    assert doubled.tokens[2].tolist() == [1, 1, 6, 9]
    with pytest.raises(TokensError, match="document 1 is empty, and no token is put before it"):
        list(pack(enumerate(documents), replace(packing, begin_batch=None)))


@pytest.mark.parametrize("mode", ["concat", "document"])
def test_max_rows_are_the_first_rows_and_no_more_documents_are_read(
    mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pack.__globals__, "BLOCK_TOKENS", 4 * 10)
    documents = random_documents(np.random.default_rng(3), 10, 200)
    cut: Any = "right" if mode == "document" else None
    packing = Packing(mode=mode, context_length=10, begin_batch=0, separator=0, pad=0, truncate=cut)
    everything = packed(documents, packing)
    for n in (1, 4, 7, 8):
        read: list[int] = []

        def numbered(read: list[int] = read) -> Iterator[tuple[int, Ids]]:
            for number, ids in enumerate(documents):
                read.append(number)
                yield number, ids

        rows = together(pack(numbered(), packing, max_rows=n))
        np.testing.assert_array_equal(rows.tokens, everything.tokens[:n])
        np.testing.assert_array_equal(rows.documents, everything.documents[:n])
        # At most one document more is read, whose separator ends the last row.
        passed = documents[rows.documents.max() + 1 : read[-1]]
        assert not any(len(ids) for ids in passed)


def test_the_documents_own_numbers_are_kept() -> None:
    documents = [(4, np.array([5, 6], np.int32)), (10**12, np.array([7, 8], np.int32))]
    rows = together(pack(documents, Packing(context_length=2)))
    assert rows.documents.tolist() == [[4, 4], [10**12, 10**12]]


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_other_integer_types_are_taken(dtype: Any) -> None:
    rows = packed([np.arange(4).astype(dtype)], Packing(context_length=4))
    assert rows.tokens.dtype == np.int32
    assert rows.tokens.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("ids", "vocab_size", "message"),
    [
        (
            np.array([1, -5], np.int32),
            None,
            "document 1 has the token id -5 at offset 1, but ids must be 0 to",
        ),
        (np.array([1, 7], np.int32), 7, "document 1 has the token id 7 at offset 1, but ids must be 0 to 6"),
        (np.array([2**40], np.int64), None, "document 1 has the token id 1099511627776 at offset 0"),
    ],
)
def test_bad_ids_are_named(ids: Any, vocab_size: int | None, message: str) -> None:
    documents = [np.array([1], np.int32), ids]
    with pytest.raises(TokensError, match=message):
        list(pack(enumerate(documents), Packing(context_length=1), vocab_size=vocab_size))


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "the source has nothing to pack: it has no documents"),
        ([[], []], "the source has nothing to pack: there is no token in its 2 documents"),
        ([[1] * 57], "the text packs to 0 rows of 128 tokens: it has only 57 tokens; give more text"),
    ],
)
def test_no_rows_is_an_error(documents: list[list[int]], message: str) -> None:
    with pytest.raises(TokensError, match=message):
        list(pack(enumerate(np.array(ids, np.int32) for ids in documents), Packing(context_length=128)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_length": 0}, "context_length is 0; it must be 1 or more"),
        ({"context_length": 4, "mode": "rows"}, "the packing mode is 'rows'; choose concat or document"),
        ({"context_length": 4, "mode": "document"}, "needs a pad id"),
        ({"context_length": 1, "begin_batch": 0}, "context_length is 1, .* choose 2 or more"),
        ({"context_length": 1, "mode": "document", "pad": 0, "begin_sequence": 0}, "context_length is 1"),
    ],
)
def test_impossible_packings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TokensError, match=message):
        Packing(**options)


def test_max_rows_must_be_positive_and_says_so_at_once() -> None:
    with pytest.raises(TokensError, match="max_rows is 0; it must be 1 or more"):
        pack([], Packing(context_length=4), max_rows=0)
