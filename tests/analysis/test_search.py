"""Searching sequences by text, token ids or hash, compared with a search by hand, and searches that are refused."""

import hashlib
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import AutoTokenizer

import actstore
from actstore.analysis import search
from actstore.analysis import text as text_module
from actstore.analysis.search import Matches, sequence_sha256
from actstore.errors import JobError, NotCommittedError, StorageError, TokensError
from actstore.storage.blobs import Blobs
from actstore.storage.local import LocalBlobs
from actstore.store.records.commit import TokensRecord, plan_key, tokens_key
from actstore.store.records.zarr_documents import zarr_documents
from tests.conftest import TinyModel
from tests.store.example import (
    HOOKS,
    LENGTH,
    SEGMENT,
    N,
    example_plan,
    example_values,
    write_array,
    write_store,
)
from tests.store.slots import ragged, ragged_plan, write_ragged

Part = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]
"""Token ids [n, L], lengths [n] and documents [n, L]."""


@pytest.fixture
def local(tmp_path: Path) -> LocalBlobs:
    """An empty folder."""
    return LocalBlobs(tmp_path / "store")


def part(rows: Sequence[Sequence[int]], lengths: Sequence[int], inserted: Sequence[int]) -> Part:
    """Rows of one document each, in which packing inserted the first tokens, ``inserted`` of them."""
    tokens, numbers = np.array(rows, np.int32), np.arange(len(rows), dtype=np.int64)
    positions = np.arange(tokens.shape[1])
    inside = (positions >= np.array(inserted)[:, None]) & (positions < np.array(lengths)[:, None])
    return tokens, np.array(lengths, np.int32), np.where(inside, numbers[:, None], -1)


def write_part(
    blobs: Blobs, run: str, part: Part, *, is_there: bool = True, model: Any = None, **changes: Any
) -> None:
    """Write a run with these tokens, or without them, and without activations."""
    tokens, lengths, documents = part
    first = example_plan()
    identity = {"context_length": tokens.shape[1]} | changes
    request = first.request.model_copy(
        update={
            "tokens": first.request.tokens.model_copy(update=identity),
            "model": first.request.model.model_copy(update=model or {}),
        }
    )
    fields = {
        "run": run,
        "tokens_of": run,
        "n_sequences": len(tokens),
        "n_tokens": max(1, int(lengths.sum())),
    }
    plan = first.model_copy(update={"request": request} | fields)
    assert blobs.create(plan_key(run), [plan.to_bytes()])
    for key, data in zarr_documents(plan).items():
        blobs.create(key, [data])
    offsets = np.full(tokens.shape, -1, np.int32)
    records = []
    arrays: tuple[NDArray[Any], ...] = (tokens, lengths, documents, offsets)
    for layout, values in zip(plan.token_arrays(), arrays, strict=True):
        records += write_array(blobs, layout, values, range(layout.n_shards))
    if is_there:
        assert blobs.create(tokens_key(run), [TokensRecord(shards=tuple(records)).to_bytes()])


def store_of(root: Path, *parts: Part, **changes: Any) -> actstore.Store:
    blobs = LocalBlobs(root)
    for number, rows_of_part in enumerate(parts):
        write_part(blobs, f"{number:04d}", rows_of_part, **changes)
    return actstore.open(str(root))


def by_hand(parts: Sequence[Part], needle: Sequence[int], *, prefix: bool = False) -> list[tuple[int, int]]:
    """Every (sequence, position) where the ids begin."""
    places_by_hand, first = [], 0
    for tokens, lengths, documents in parts:
        for row, length in enumerate(lengths.tolist()):
            real = tokens[row].tolist()[:length]
            begins = [0, 1] if documents[row, 0] == -1 else [0]
            for position in begins if prefix else range(length):
                if real[position : position + len(needle)] == list(needle):
                    places_by_hand.append((first + row, position))
        first += len(tokens)
    return places_by_hand


def places(matches: search.Matches) -> list[tuple[int, int]]:
    assert matches.sequences.dtype == matches.positions.dtype == np.int64
    return list(zip(matches.sequences.tolist(), matches.positions.tolist(), strict=True))


@st.composite
def parts_and_needles(draw: st.DrawFn) -> tuple[list[Part], list[int]]:
    """Few different ids, so that matches overlap, and continue in the next row and in the padding."""
    length, n_ids = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    parts = []
    for n_rows in draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)):
        rows, lengths = rng.integers(0, n_ids, (n_rows, length)), rng.integers(0, length + 1, n_rows)
        parts.append(part(rows.tolist(), lengths.tolist(), rng.integers(0, 3, n_rows).tolist()))
    needle = draw(st.lists(st.integers(0, n_ids - 1), min_size=1, max_size=min(4, length + 1)))
    return parts, needle


@settings(max_examples=60, deadline=None, derandomize=True)
@given(parts_and_needles(), st.booleans(), st.integers(1, 4), st.integers(1, 12))
def test_ids_are_found_where_a_search_by_hand_finds_them(
    made: tuple[list[Part], list[int]], prefix: bool, rows_in_block: int, limit: int
) -> None:
    parts, needle = made
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        store = store_of(Path(folder), *parts)
        patch.setattr(search, "BLOCK_NBYTES", rows_in_block * 4 * store.shape[1])
        expected = by_hand(parts, needle, prefix=prefix)
        sequences = sorted({sequence for sequence, _ in expected})
        assert places(store.locate(tokens=needle, prefix=prefix)) == expected
        assert store.find(tokens=needle, prefix=prefix).tolist() == sequences
        assert places(store.locate(tokens=needle, prefix=prefix, limit=limit)) == expected[:limit]
        assert store.find(tokens=needle, prefix=prefix, limit=limit).tolist() == sequences[:limit]


def test_stores_of_chosen_positions_are_searched_whole(local: LocalBlobs) -> None:
    """Their arrays of activations are narrower than their sequences."""
    text = ragged([5, 8, 3], [[4], [0], [1]], 8)
    write_ragged(local, text, ragged_plan(text, is_chosen=True))
    store = actstore.open(local.url)
    needle = text.tokens[1, 5:8].tolist()
    expected = by_hand([(text.tokens, text.lengths, text.documents)], needle)
    assert places(store.locate(tokens=needle)) == expected
    assert (1, 5) in expected
    sha = sequence_sha256(text.tokens[2, :3])
    assert store.find(sha=sha).tolist() == [2]


def test_ids_at_the_ends_of_a_block(tmp_path: Path) -> None:
    """The rare id in the middle of a match, so that the match begins before the block or ends behind it."""
    rows = [[5, 0, 0, 0], [0, 5, 0, 0], [0, 0, 0, 5]]
    store = store_of(tmp_path, part(rows, [4, 4, 4], [0, 0, 0]))
    assert places(store.locate(tokens=[0, 5, 0])) == [(1, 0)]


def test_places_that_several_needles_share_are_found_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(tmp_path, part([[1, 2, 3], [4, 1, 2]], [3, 3], [0, 0]))
    needles = [np.array(ids, np.int32) for ids in ([1, 2, 3], [1, 2])]
    monkeypatch.setattr(search, "_encoded", lambda store, text: needles)
    assert places(store.locate("one two")) == [(0, 0), (1, 1)]
    assert places(store.locate("one two", limit=2)) == [(0, 0), (1, 1)]


def test_matches_end_with_their_sequence(local: LocalBlobs) -> None:
    plan = example_plan()
    write_store(local, plan, example_values(plan), range(plan.n_segments))
    store = actstore.open(local.url)
    assert places(store.locate(tokens=[LENGTH - 2, LENGTH - 1])) == [(0, LENGTH - 2)]
    assert places(store.locate(tokens=[LENGTH - 1, LENGTH])) == []  # the last of row 0, the first of row 1
    assert store.find(tokens=range(LENGTH)).tolist() == [0]
    assert store.find(tokens=range(LENGTH + 1)).tolist() == []


def test_prefix_is_at_the_beginning_or_behind_an_inserted_token(tmp_path: Path) -> None:
    rows = [[0, 5, 6, 7], [5, 6, 7, 5], [0, 5, 6, 7], [0, 0, 5, 6]]
    store = store_of(tmp_path, part(rows, [4, 4, 4, 4], [1, 0, 0, 2]))
    assert places(store.locate(tokens=[5, 6], prefix=True)) == [(0, 1), (1, 0)]
    assert places(store.locate(tokens=[0], prefix=True)) == [(0, 0), (2, 0), (3, 0), (3, 1)]
    assert store.find(tokens=[0], prefix=True).tolist() == [0, 2, 3]


def test_documents_are_read_only_of_sequences_that_they_decide_about(tmp_path: Path) -> None:
    store = store_of(tmp_path, part([[0, 5, 6], [5, 6, 7]], [3, 3], [1, 0]))
    LocalBlobs(tmp_path).delete(store.plan.token_array("documents").key(0))
    assert store.find(tokens=[5, 6, 7], prefix=True).tolist() == [1]
    assert store.find(tokens=[5, 6]).tolist() == [0, 1]
    with pytest.raises(StorageError, match=r"documents/\S+ is committed but missing"):
        store.find(tokens=[5, 6], prefix=True)


def test_sha_is_of_the_real_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[7, -2, 300, 0], [7, -2, 300, 9], [7, -2, 300, 0], [7, -2, 0, 0]]
    parts = part(rows, [3, 3, 4, 2], [0, 0, 0, 0]), part([[300, 7, -2, 300], [7, -2, 300, 4]], [4, 3], [0, 0])
    store = store_of(tmp_path, *parts)
    monkeypatch.setattr(search, "BLOCK_NBYTES", 2 * 4 * 4)
    sha = hashlib.sha256(struct.pack("<3i", 7, -2, 300)).hexdigest()
    assert sequence_sha256([7, -2, 300]) == sequence_sha256(store.tokens[1][:3]) == sha
    assert places(store.locate(sha=sha.upper())) == [(0, 0), (1, 0), (5, 0)]
    assert store.find(sha=sha, prefix=True).tolist() == [0, 1, 5]
    assert store.find(sha=sha, limit=2).tolist() == [0, 1]
    assert store.find(sha=sequence_sha256([7])).tolist() == []


def test_search_ends_at_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after the limit is not read: here it does not exist."""
    rows = part([[1, 1, 2], [1, 3, 1]], [3, 3], [0, 0])
    store_of(tmp_path, rows)
    write_part(LocalBlobs(tmp_path), "0001", rows, is_there=False)
    store = actstore.open(str(tmp_path))
    monkeypatch.setattr(search, "BLOCK_NBYTES", 2 * 3 * 4)
    assert store.find(tokens=[1], limit=2).tolist() == [0, 1]
    all_places = [(0, 0), (0, 1), (1, 0), (1, 2)]
    for n in (1, 2, 3, 4):  # also within a block
        assert places(store.locate(tokens=[1], limit=n)) == all_places[:n]
    assert store.find(tokens=[1], limit=1).tolist() == [0]
    assert store.find(sha=sequence_sha256([1, 3, 1]), limit=1).tolist() == [1]
    for limit in (3, None):
        with pytest.raises(
            NotCommittedError, match=r"sequences 2:4 of parts/0001/tokens .* are not committed"
        ):
            store.find(tokens=[1], limit=limit)


def test_rows_are_found_before_their_activations_are_committed(local: LocalBlobs) -> None:
    plan = example_plan()
    write_store(local, plan, example_values(plan), [0, 2])
    store = actstore.open(local.url)
    rows = store.find(tokens=[SEGMENT * LENGTH])
    assert rows.tolist() == [SEGMENT]
    assert not store.committed_rows()[rows].any()
    with pytest.raises(NotCommittedError):
        store[HOOKS[0]][rows]
    np.testing.assert_array_equal(store[HOOKS[0]][store.find(tokens=[0])], store[HOOKS[0]][:1])
    assert store[HOOKS[0]][store.find(tokens=[N * LENGTH])].shape == (0, *store[HOOKS[0]].shape[1:])


def test_ids_are_found_without_torch_and_transformers(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", part([[0, 5, 6]], [3], [1]))
    script = f"""
import sys, actstore
found = actstore.open({store.url!r}).find(tokens=[5], prefix=True)
print(found, [name for name in ("torch", "transformers", "ray", "zarr") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "[0] []"


@pytest.fixture(scope="module")
def extracted(
    tiny_model: TinyModel, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> actstore.Store:
    """A store of real text that grew by half: a BOS before each row of 32 tokens."""
    fields: dict[str, Any] = {
        "model": str(tiny_model("llama")),
        "tokens": str(text_file),
        "documents": "paragraph",
        "hooks": ["blocks.1.hook_resid_post"],
        "context_length": 32,
        "batch_size": 8,
        "out": str(tmp_path_factory.mktemp("search") / "store"),
    }
    actstore.extract(actstore.plan(**fields, max_tokens=64 * 32))
    actstore.extract(actstore.plan(**fields, max_tokens=96 * 32, append=True))
    return actstore.open(fields["out"])


def tokens_of(store: actstore.Store) -> Part:
    return store.tokens[:], store.lengths[:], store.documents[:]


def test_text_is_found_as_it_is_and_behind_a_space(extracted: actstore.Store) -> None:
    tokenizer = AutoTokenizer.from_pretrained(extracted.plan.request.model.name)
    rows = [tokens_of(extracted)]
    assert len(extracted.runs) == 2
    expected = []
    for text in ("the", " the"):
        expected.append(by_hand(rows, tokenizer(text, add_special_tokens=False).input_ids))
        assert expected[-1]
        assert expected[-1][-1][0] >= 64  # in the part that was added, too
    assert not set(expected[0]) & set(expected[1])
    matches = places(extracted.locate("the"))
    assert matches == sorted(expected[0] + expected[1])
    assert extracted.find("the").tolist() == sorted({row for row, _ in matches})
    for row, position in matches:
        assert tokenizer.decode(extracted.tokens[row][position:]).lstrip().startswith("the")
    assert places(extracted.locate(" the")) == expected[1]
    np.testing.assert_array_equal(
        extracted["resid_post", 1][extracted.find("the", limit=3)],
        extracted["resid_post", 1][:][extracted.find("the")[:3].tolist()],
    )


def test_no_space_is_put_before_white_space(extracted: actstore.Store, tmp_path: Path) -> None:
    identity = extracted.plan.request.tokens
    tokenizer = AutoTokenizer.from_pretrained(identity.tokenizer)
    ids = tokenizer("of  the", add_special_tokens=False).input_ids
    (end,) = tokenizer(" the", add_special_tokens=False).input_ids
    assert ids[-2:] == [*tokenizer(" ", add_special_tokens=False).input_ids, end]
    named = {"tokenizer": identity.tokenizer, "tokenizer_sha256": identity.tokenizer_sha256}
    store = store_of(tmp_path, part([ids], [len(ids)], [0]), **named)
    assert places(store.locate(" the")) == [(0, len(ids) - 1)]


def test_text_at_the_beginning_of_a_sequence(extracted: actstore.Store) -> None:
    tokenizer = AutoTokenizer.from_pretrained(extracted.plan.request.model.name)
    assert extracted.tokens[70][0] == tokenizer.bos_token_id
    text = tokenizer.decode(extracted.tokens[70][1:9])
    assert (70, 1) in places(extracted.locate(text, prefix=True))
    inside = tokenizer.decode(extracted.tokens[70][5:20])
    assert (70, 5) in places(extracted.locate(inside))
    assert 70 not in extracted.find(inside, prefix=True)


def test_tokenizer_is_loaded_once(extracted: actstore.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from actstore.tokens import tokenizer

    loaded, load = [], tokenizer.load_tokenizer

    def loading(name: str, revision: str | None) -> Any:
        loaded.append(name)
        return load(name, revision)

    monkeypatch.setattr(tokenizer, "load_tokenizer", loading)
    text_module._tokenizer.cache_clear()
    for text in ("the", "you"):
        actstore.open(extracted.url).find(text)
    assert loaded == [extracted.plan.request.tokens.tokenizer]


ROW = part([[1, 2, 3]], [3], [0])


def test_tokenizer_that_is_another_one_by_now(tmp_path: Path, tiny_model: TinyModel) -> None:
    folder = str(tiny_model("llama"))
    store = store_of(tmp_path, ROW, tokenizer=folder, tokenizer_sha256="0" * 64, model={"name": folder})
    with pytest.raises(TokensError) as caught:
        store.find("the")
    assert str(caught.value).startswith(
        f"{store.url} has tokens without a text: the tokenizer {folder} has SHA"
    )
    assert str(caught.value).endswith(f"that of the store had {'0' * 64}; give tokens instead of text")
    assert store.find(tokens=[2]).tolist() == [0]


def test_tokenizer_named_from_another_working_folder(
    extracted: actstore.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    known = extracted.plan.request.tokens.tokenizer_sha256
    model = {"name": extracted.plan.request.model.name}
    rows = tokens_of(extracted)
    store = store_of(tmp_path / "a", rows, tokenizer="./model", tokenizer_sha256=known, model=model)
    assert store.find("the").tolist() == extracted.find("the").tolist()


def test_model_has_the_tokenizer_of_a_store_made_of_ids(extracted: actstore.Store, tmp_path: Path) -> None:
    model = {"name": extracted.plan.request.model.name}
    rows = tokens_of(extracted)
    store = store_of(tmp_path / "a", rows, tokenizer=None, tokenizer_sha256=None, model=model)
    assert store.find("the").tolist() == extracted.find("the").tolist()


def test_store_without_a_known_tokenizer(tmp_path: Path) -> None:
    none: dict[str, Any] = {"tokenizer": None, "tokenizer_sha256": None}
    store = store_of(tmp_path / "a", ROW, model={"name": "unknown", "model_type": "unknown"}, **none)
    with pytest.raises(TokensError) as caught:
        store.find("the")
    assert str(caught.value) == (
        f"{store.url} has tokens without a text: it names no tokenizer; give tokens instead of text"
    )
    gone = str(tmp_path / "gone")
    store = store_of(tmp_path / "b", ROW, model={"name": gone}, **none)
    with pytest.raises(
        TokensError, match=f"it names no tokenizer, and the tokenizer {gone} cannot be loaded"
    ):
        store.find("the")


def test_parts_made_with_different_tokenizers(extracted: actstore.Store, tmp_path: Path) -> None:
    tokenizer = extracted.plan.request.tokens.tokenizer
    known = extracted.plan.request.tokens.tokenizer_sha256
    model = {"name": tokenizer}
    for number, sha in enumerate((known, None, "0" * 64)):
        write_part(
            LocalBlobs(tmp_path), f"{number:04d}", ROW, tokenizer=tokenizer, tokenizer_sha256=sha, model=model
        )
        store = actstore.open(str(tmp_path))
        if number < 2:
            assert store.find("the").tolist() == []
    with pytest.raises(TokensError, match="its parts were made with 2 tokenizers; give tokens"):
        store.find("the")


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        ({}, JobError, "the search is for nothing; give one of text, tokens and sha"),
        (
            {"text": "a", "tokens": [1]},
            JobError,
            "the search is for text and tokens; give one of text, tokens and sha",
        ),
        ({"tokens": []}, JobError, "tokens is empty, .*; give one token id at least"),
        ({"tokens": [2**31]}, JobError, r"tokens is \[2147483648\]; it must be .* within int32"),
        ({"tokens": [2**32 + 1]}, JobError, "it must be a list of token ids, each within int32"),
        ({"tokens": [-(2**31) - 1]}, JobError, "each within int32"),
        ({"tokens": [2**80]}, JobError, "each within int32"),
        ({"tokens": [1.0]}, JobError, r"tokens is \[1.0\]"),
        ({"tokens": [[1, 2]]}, JobError, r"tokens is \[\[1, 2\]\]"),
        ({"tokens": [[1], [1, 2]]}, JobError, r"tokens is \[\[1\], \[1, 2\]\]"),
        ({"tokens": [True]}, JobError, r"tokens is \[True\]"),
        ({"tokens": "the"}, JobError, "tokens is the; it must be a list of token ids"),
        ({"tokens": 7}, JobError, "tokens is 7; it must be a list of token ids"),
        ({"tokens": [1], "limit": 0}, JobError, "limit is 0; it must be 1 or more, or None for all matches"),
        ({"sha": "ab"}, JobError, "sha is 'ab'; it must be 64 hex digits"),
        ({"sha": "g" * 64}, JobError, "it must be 64 hex digits, as sequence_sha256 gives them"),
        (
            {"text": ""},
            TokensError,
            "text is '', and the tokenizer makes no tokens of it; give a longer text",
        ),
        ({"text": "a\ud800"}, TokensError, r"text is 'a\\ud800'; it must be a str of valid Unicode"),
        ({"text": b"the"}, TokensError, "text is b'the'; it must be a str"),
    ],
)
def test_what_is_no_search(
    extracted: actstore.Store, query: dict[str, Any], error: type[Exception], message: str
) -> None:
    for method in (extracted.find, extracted.locate):
        with pytest.raises(error, match=message) as caught:
            method(**query)
        assert type(caught.value) is error


def test_matches_show_their_places() -> None:
    matches = Matches(np.arange(10), np.arange(10) * 2)
    assert (
        repr(matches)
        == "<Matches: 10 places, sequence:position 0:0, 1:2, 2:4, 3:6, 4:8, 5:10, 6:12, 7:14, ...>"
    )
    assert repr(Matches(np.empty(0, int), np.empty(0, int))) == "<Matches: 0 places, sequence:position none>"
    assert "<td style='text-align:left'>7</td><td style='text-align:left'>14</td>" in matches._repr_html_()
