"""The spool compared with the rows that were written to it."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from actstore.errors import StorageError, TokensError
from actstore.tokens import Packing, Rows, order, pack, spool

DOCUMENTS = [np.arange(n, dtype=np.int32) + 1 for n in (9, 0, 3, 40, 1, 1, 8)]
PACKING = Packing(context_length=4, begin_batch=0, separator=0)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pack.__globals__, "BLOCK_TOKENS", 12)


def test_holds_every_block_in_order(tmp_path: Path) -> None:
    blocks = list(pack(enumerate(DOCUMENTS), PACKING))
    assert len(blocks) > 3
    spooled = spool(iter(blocks), tmp_path / "a" / "b")
    for name in ("tokens", "lengths", "documents", "offsets"):
        whole = np.concatenate([getattr(rows, name) for rows in blocks])
        np.testing.assert_array_equal(getattr(spooled, name), whole)
        assert getattr(spooled, name).dtype == whole.dtype
        assert not getattr(spooled, name).flags.writeable
    assert spooled.n_sequences == len(spooled.tokens)
    assert spooled.n_tokens == 4 * spooled.n_sequences
    documents = np.unique(spooled.documents)
    assert spooled.n_documents == len(documents[documents >= 0]) == 6
    assert spooled.sha256 == hashlib.sha256(np.concatenate([r.tokens for r in blocks]).tobytes()).hexdigest()
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [
        "documents.i64",
        "lengths.i32",
        "offsets.i32",
        "tokens.i32",
    ]


def test_padding_is_not_counted_as_tokens(tmp_path: Path) -> None:
    packing = Packing(mode="document", context_length=4, pad=0, truncate="left")
    spooled = spool(pack(enumerate(DOCUMENTS), packing), tmp_path)
    assert spooled.lengths.tolist() == [4, 3, 4, 1, 1, 4]
    assert (spooled.n_sequences, spooled.n_tokens, spooled.n_documents) == (6, 17, 6)


def test_an_earlier_spool_is_replaced(tmp_path: Path) -> None:
    spool(pack(enumerate(DOCUMENTS), PACKING), tmp_path)
    again = spool(pack(enumerate(DOCUMENTS), PACKING, max_rows=2), tmp_path)
    assert again.n_sequences == 2


def test_no_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TokensError, match="the source packs to 0 rows"):
        spool([], tmp_path)
    with pytest.raises(TokensError, match="packs to 0 rows of 4 tokens: it has only 1 tokens"):
        spool(pack([(0, np.array([1], np.int32))], PACKING), tmp_path)


def test_a_folder_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"the packed tokens cannot be written to .*file: "):
        spool(pack(enumerate(DOCUMENTS), PACKING), tmp_path / "file")


def test_a_failure_of_the_documents_is_not_taken_for_one_of_the_folder(tmp_path: Path) -> None:
    def failing() -> Iterator[Rows]:
        yield from pack(enumerate(DOCUMENTS), PACKING, max_rows=1)
        raise TokensError("line 3 of a.jsonl is not JSON")

    with pytest.raises(TokensError, match="line 3"):
        spool(failing(), tmp_path)


def test_order_is_a_fixed_permutation() -> None:
    assert order(5, None) is None
    golden = order(10, 0)
    assert golden is not None
    assert golden.dtype == np.int64
    assert golden.tolist() == GOLDEN
    assert sorted(order(1000, 7).tolist()) == list(range(1000))  # type: ignore[union-attr]


GOLDEN = [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]
