"""Rows by position, in stores of all positions and of chosen ones: what NumPy takes from the values."""

import uuid
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import actstore
from actstore.errors import NotCommittedError, StorageError
from actstore.facade import Store
from actstore.storage.blobs import Blobs
from actstore.storage.opening import open_blobs
from actstore.store.reading.entries import PaddingWarning
from actstore.store.records.seal import seal
from tests.storage.watched import watched
from tests.store.slots import RESID, Ragged, ragged, ragged_plan, write_ragged

PATTERN = "blocks.1.attn.hook_pattern"


@st.composite
def texts(draw: Any) -> Ragged:
    """Ragged texts; some sequences have no chosen position."""
    length = draw(st.integers(1, 9))
    lengths = draw(st.lists(st.integers(1, length), min_size=1, max_size=11))
    chosen = [draw(st.sets(st.integers(0, n - 1), max_size=4)) for n in lengths]
    if not any(chosen):
        chosen[0] = {0}
    return ragged(lengths, [sorted(row) for row in chosen], length)


def opened(text: Ragged, **request: Any) -> tuple[Store, Store]:
    """A store of all positions of a text, and one of the chosen ones."""
    stores = []
    for is_chosen in (False, True):
        blobs = open_blobs(f"memory://{uuid.uuid4().hex}")
        write_ragged(blobs, text, ragged_plan(text, is_chosen=is_chosen, **request))
        seal(blobs)
        stores.append(actstore.open(blobs.url))
    return stores[0], stores[1]


SLOW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@SLOW
@given(texts(), st.randoms(use_true_random=False), st.sampled_from([None, "lz4"]))
def test_rows_at_positions_are_those_of_numpy(text: Ragged, rng: Any, compression: str | None) -> None:
    whole, some = opened(text, compression=compression)
    for hook in (RESID, PATTERN):
        values = text.values[hook]
        every = [(i, p) for i, n in enumerate(text.lengths) for p in range(n)]
        stored = [(i, p) for i, row in enumerate(text.chosen) for p in row]
        for store, places in ((whole, every), (some, stored)):
            picked = [rng.choice(places) for _ in range(rng.randrange(1, 12))]
            signed = [(i, p - int(text.lengths[i]) if rng.random() < 0.3 else p) for i, p in picked]
            sequences, positions = map(list, zip(*signed, strict=True))
            expected = np.stack([values[i, p] for i, p in picked])
            np.testing.assert_array_equal(store[hook].at(sequences, positions).numpy(), expected)
            assert store.is_stored(sequences, positions).all()
        last = np.stack([values[i, n - 1] for i, n in enumerate(text.lengths)])
        np.testing.assert_array_equal(whole[hook].last().numpy(), last)
        rows = [i for i, row in enumerate(text.chosen) if row]
        last = np.stack([values[i, text.chosen[i][-1]] for i in rows])
        np.testing.assert_array_equal(some[hook].last(rows).numpy(), last)
    asked = np.array([(i, p) for i in range(len(text.lengths)) for p in range(-12, 12)])
    n = text.lengths[asked[:, 0]]
    wanted = np.where(asked[:, 1] < 0, asked[:, 1] + n, asked[:, 1])
    is_real = (wanted >= 0) & (wanted < n)
    np.testing.assert_array_equal(whole.is_stored(asked[:, 0], asked[:, 1]), is_real)
    is_chosen = [p in text.chosen[i] for i, p in zip(asked[:, 0], wanted, strict=True)]
    np.testing.assert_array_equal(some.is_stored(asked[:, 0], asked[:, 1]), is_real & is_chosen)


@SLOW
@given(texts())
def test_what_entries_are(text: Ragged) -> None:
    whole, some = opened(text)
    n, length = text.tokens.shape
    every = np.arange(n)
    np.testing.assert_array_equal(whole.entries.positions(every), np.tile(np.arange(length), (n, 1)))
    np.testing.assert_array_equal(some.entries.positions(slice(None)), text.positions)
    np.testing.assert_array_equal(whole.entries.in_use(every), np.arange(length) < text.lengths[:, None])
    np.testing.assert_array_equal(some.entries.in_use(every), text.positions >= 0)
    assert whole.entries.is_full == (text.lengths == length).all()
    assert some.entries.is_full == (text.positions >= 0).all()
    for name in ("tokens", "documents"):
        array = getattr(text, name)
        np.testing.assert_array_equal(whole.entries.of_tokens(getattr(whole, name), every), array)
        there = some.entries.of_tokens(getattr(some, name), every)
        for row, positions in enumerate(text.chosen):
            expected = [*array[row, positions], *[-1] * (text.n_slots - len(positions))]
            assert there[row].tolist() == expected


TEXT = ragged([5, 1, 8, 3, 6, 8], [[0, 4], [], [1, 2, 7], [2], [0, 2, 4], [7]], 8)


@pytest.fixture
def both() -> tuple[Store, Store]:
    return opened(TEXT)


@pytest.mark.parametrize(
    ("which", "sequences", "positions", "message"),
    [
        (
            0,
            [0, 3],
            [4, 3],
            "position 3 of sequence 3 is not stored: the sequence has 3 tokens, positions 0 to 2, or",
        ),
        (0, 1, -2, "position -2 of sequence 1 is not stored: the sequence has 1 tokens"),
        (
            1,
            [2, 0],
            [7, 1],
            "position 1 of sequence 0 is not stored: the store has its positions 0, 4; extract it",
        ),
        (1, [1], [0], "position 0 of sequence 1 is not stored: the store has its positions none"),
        (1, [-2, 0], [2, 5], "position 5 of sequence 0 is not stored: the sequence has 5 tokens"),
        (0, 6, 0, "sequence 6 is out of bounds for 6 sequences"),
        (0, -7, 0, "sequence -7 is out of bounds for 6 sequences"),
        (0, [0.5], [0], "sequences are given by an integer or a list of integers"),
        (0, [0], "last", "positions are given by an integer or a list of integers, not last"),
    ],
)
def test_what_is_not_stored_is_named(
    both: tuple[Store, Store], which: int, sequences: Any, positions: Any, message: str
) -> None:
    with pytest.raises(IndexError, match=message):
        both[which][RESID].at(sequences, positions)


def test_one_number_stands_for_all(both: tuple[Store, Store]) -> None:
    whole, some = both
    values = TEXT.values[RESID]
    assert torch.equal(whole[RESID].at(2, range(8)), torch.from_numpy(values[2]))
    assert torch.equal(whole[RESID].at(range(6), 0), torch.from_numpy(values[:, 0]))
    assert torch.equal(some[RESID].at([2, -1], -1), torch.from_numpy(values[[2, 5], 7]))
    assert whole[RESID].at([], []).shape == (0, 16)
    assert whole[RESID].at([-1], [3]).shape == (1, 16)


def test_the_last_of_nothing(both: tuple[Store, Store]) -> None:
    _, some = both
    with pytest.raises(
        IndexError, match=r"no position of sequence 1 is stored; leave sequences out whose .* are 0"
    ):
        some[RESID].last()
    assert some[RESID].last(slice(2, 4)).shape == (2, 16)
    assert some[RESID].last([]).shape == (0, 16)


@pytest.mark.parametrize("index", [(slice(None), -1), (0, -1), (..., -1, slice(None)), ([3, 1], -1)], ids=str)
def test_the_last_entry_of_a_padded_store_warns(both: tuple[Store, Store], index: Any) -> None:
    for store in both:
        with pytest.warns(PaddingWarning, match=r"acts\.last\(\) gives the last real token of each"):
            values = store[RESID][index]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(values, store[RESID][:][index])


def test_the_last_entry_without_padding_does_not_warn() -> None:
    full = ragged([4, 4, 4], [[1, 3], [0, 1], [2, 3]], 4)
    for store in opened(full):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert store[RESID][:, -1].shape == (3, 16)
            assert store[RESID][..., -1].shape[-1] == store.shape[1]
            assert store[RESID][:, :, -1].shape == (3, store.shape[1])


@pytest.mark.parametrize("is_chosen", [False, True])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_rows_from_any_storage(blobs: Blobs, is_chosen: bool, compression: str | None) -> None:
    rng = np.random.default_rng(1)
    text = ragged(rng.integers(1, 12, 50).tolist(), [[0]] * 50, 12)
    write_ragged(
        blobs, text, ragged_plan(text, is_chosen=is_chosen, segment_size=16, compression=compression)
    )
    seal(blobs)
    acts = actstore.open(blobs.url)[RESID]
    sequences = rng.integers(0, 50, 200)
    positions = np.zeros(200, int) if is_chosen else rng.integers(0, text.lengths[sequences])
    expected = text.values[RESID][sequences, positions]
    np.testing.assert_array_equal(acts.at(sequences, positions).numpy(), expected)


def test_what_is_not_committed_is_not_read(blobs: Blobs) -> None:
    write_ragged(blobs, TEXT, ragged_plan(TEXT, is_chosen=True), segments=[0])
    acts = actstore.open(blobs.url)[RESID]
    assert acts.last([0, 2]).shape == (2, 16)
    with pytest.raises(NotCommittedError, match="segment 1"):
        acts.at([0, 4], [4, 2])


def damage(key: str, blobs: Blobs, change: Callable[[bytearray], object]) -> None:
    data = bytearray(bytes(blobs.read(key)))
    change(data)
    blobs.delete(key)
    blobs.create(key, [bytes(data)])


def test_a_damaged_shard_is_found_at_its_first_use(blobs: Blobs) -> None:
    plan = write_ragged(blobs, TEXT, ragged_plan(TEXT, is_chosen=False))
    seal(blobs)
    key = plan.activations(plan.request.hooks[0]).key(1)
    damage(key, blobs, lambda data: data.__setitem__(0, data[0] ^ 1))
    checked = actstore.open(blobs.url, check="first-use")[RESID]
    assert checked.at([0, 1], 0).shape == (2, 16)
    with pytest.raises(StorageError, match="where .* were committed"):
        checked.at([5], [3])
    blobs.delete(key)
    with pytest.raises(StorageError, match="is committed but missing"):
        actstore.open(blobs.url)[RESID].last()


def test_neighbours_are_read_together_and_no_byte_twice() -> None:
    """The plan of reads: entries that lie close together are one range."""
    text = ragged([8] * 40, [[0]] * 40, 8)
    blobs = open_blobs(f"memory://{uuid.uuid4().hex}")
    write_ragged(blobs, text, ragged_plan(text, is_chosen=False, segment_size=16))
    seal(blobs)
    seen = watched(blobs)
    store = Store.in_storage(seen)
    acts = store[RESID]
    assert acts.at(range(40), [i % 8 for i in range(40)]).shape == (40, 16)
    acts.at(7, 3)
    reads = [key for key in seen.of({"read", "read_into"}) if key.startswith(f"acts/{RESID}/")]
    assert sorted(reads[:3]) == [f"acts/{RESID}/c.{i}.0.0" for i in range(3)]
    assert len(reads) == 4
