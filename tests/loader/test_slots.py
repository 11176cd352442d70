"""Loaders of stores of chosen positions: their rows are the slots in use, said in positions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actstore
from actstore.errors import LoaderError
from actstore.facade import Store
from actstore.loader.batches.batch import Batch
from actstore.loader.loader import Loader
from actstore.pairing import aligned, paired
from actstore.storage.local import LocalBlobs
from actstore.store.records.seal import seal
from tests.store.example import HOOKS
from tests.store.slots import Ragged, ragged, ragged_plan, write_ragged

A, B, _ = HOOKS
LENGTH = 12


def text(seed: int = 0) -> Ragged:
    """60 sequences of 1 to 12 tokens; the chosen positions are 0 to 4 of each, at random."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, LENGTH + 1, 60).tolist()
    chosen = [rng.permutation(n)[: rng.integers(0, 5)].tolist() for n in lengths]
    made = ragged(lengths, chosen, LENGTH, seed)
    one = next(i for i, row in enumerate(made.chosen) if len(row) > 1)
    made.values[A][one, made.chosen[one][1]] = np.nan
    return made


TEXT = text()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return written(tmp_path_factory.mktemp("slots"), TEXT)


def written(folder: Path, made: Ragged, **changes: Any) -> Store:
    blobs = LocalBlobs(folder / "store")
    write_ragged(blobs, made, ragged_plan(made, is_chosen=True, segment_size=16, **changes))
    seal(blobs)
    return actstore.open(folder / "store")


def places() -> list[tuple[int, int]]:
    """All stored rows, sequence and position, in stored order."""
    return [(i, p) for i, row in enumerate(TEXT.chosen) for p in row]


def given_by(loader: Loader) -> list[tuple[int, int]]:
    """The rows of an epoch, once each of them was compared with the text."""
    found: list[tuple[int, int]] = []
    for k, batch in enumerate(loader):
        assert isinstance(batch, Batch)
        sequences, positions = batch.sequences.numpy(), batch.positions.numpy()
        np.testing.assert_array_equal(batch.tokens.numpy(), TEXT.tokens[sequences, positions])
        rows = batch.values
        assert isinstance(rows, torch.Tensor)
        np.testing.assert_array_equal(rows.numpy(), TEXT.values[A][sequences, positions])
        for ours, theirs in zip(loader.rows(k), (sequences, positions), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        found += zip(sequences.tolist(), positions.tolist(), strict=True)
    return found


@pytest.mark.filterwarnings("ignore:.*holds NaN or infinity")
@pytest.mark.parametrize("shuffle", ["global", "window", None])
def test_rows_are_the_slots_in_use(store: Store, shuffle: Any) -> None:
    loader = store.loader(A, batch_size=16, shuffle=shuffle, window_rows=40, epochs=1, provenance=True)
    assert loader.n_rows == len(places()) < len(TEXT.lengths) * TEXT.n_slots
    found = given_by(loader)
    assert sorted(found) == places()
    assert (found == places()) == (shuffle is None)


KEPT: dict[str, tuple[dict[str, Any], Any]] = {
    "positions": ({"seqpos": slice(2, 9, 3)}, lambda i, p: p in (2, 5, 8)),
    "one position": ({"seqpos": [-1, 0]}, lambda i, p: p in (0, LENGTH - 1)),
    "tokens": ({"drop": [3, 5]}, lambda i, p: TEXT.tokens[i, p] not in (3, 5)),
    "padding": ({"drop": ["pad"]}, lambda i, p: True),
    "not finite": ({"drop": ["nonfinite"]}, lambda i, p: np.isfinite(TEXT.values[A][i, p]).all()),
    "norms": ({"max_norm": 4.0}, lambda i, p: np.linalg.norm(TEXT.values[A][i, p].astype("f8")) <= 4.0),
    "sequences": ({"mask": np.arange(60) % 3 == 0}, lambda i, p: i % 3 == 0),
    "both": ({"seqpos": slice(1, None), "drop": [4]}, lambda i, p: p > 0 and TEXT.tokens[i, p] != 4),
}


@pytest.mark.filterwarnings("ignore:.*holds NaN or infinity")
@pytest.mark.parametrize("kind", KEPT)
def test_what_is_dropped_is_said_in_positions(store: Store, kind: str) -> None:
    options, is_kept = KEPT[kind]
    loader = store.loader(A, batch_size=16, epochs=1, provenance=True, **options)
    expected = [(i, p) for i, p in places() if is_kept(i, p)]
    assert len(expected) > 0
    assert (kind == "padding") == (expected == places())
    assert sorted(given_by(loader)) == expected


def test_a_mask_of_slots(store: Store) -> None:
    mask = np.random.default_rng(3).random((60, TEXT.n_slots)) < 0.5
    loader = store.loader(B, batch_size=8, mask=mask, drop_last=False, epochs=1)
    expected = [
        TEXT.values[B][i, p] for i, row in enumerate(TEXT.chosen) for s, p in enumerate(row) if mask[i, s]
    ]
    rows = torch.cat(list(loader)).numpy()
    assert sorted(map(bytes, rows)) == sorted(map(bytes, expected))
    with pytest.raises(LoaderError, match=rf"it must be bool of shape \(60, {TEXT.n_slots}\) or \(60,\)"):
        store.loader(B, batch_size=8, mask=np.ones((60, LENGTH), bool))


def test_ranks_share_the_rows_and_a_state_goes_on(store: Store) -> None:
    options: dict[str, Any] = {"batch_size": 16, "drop": ["nonfinite"], "provenance": True, "epochs": 1}
    whole = given_by(store.loader(A, **options))
    ranks = [given_by(store.loader(A, **options, rank=rank, world_size=2)) for rank in (0, 1)]
    assert sorted(ranks[0] + ranks[1]) == sorted(whole)
    loader = store.loader(A, **options)
    next(loader)
    state = loader.state_dict()
    again = store.loader(A, **options)
    again.load_state_dict(state)
    assert torch.equal(next(again).sequences, next(loader).sequences)


def test_slots_that_are_all_in_use_need_no_search(tmp_path: Path) -> None:
    full = ragged([5, 7, 9], [[4], [6], [8]], LENGTH)
    store = written(tmp_path, full, batch_size=16)
    loader = store.loader(A, batch_size=2, drop_last=False, epochs=1, provenance=True, shuffle=None)
    assert type(loader.valid_rows).__name__ == "AllRows"
    batches = list(loader)
    assert torch.cat([batch.positions for batch in batches]).tolist() == [4, 6, 8]
    assert (
        torch.cat([batch.tokens for batch in batches]).tolist() == full.tokens[range(3), [4, 6, 8]].tolist()
    )


def test_stores_of_other_positions_are_no_pair(tmp_path: Path) -> None:
    one = ragged([5, 7, 9], [[4], [6], [8]], LENGTH)
    same = written(tmp_path / "same", one, batch_size=16)
    copy = written(tmp_path / "copy", one, batch_size=16)
    loader = paired([(same, A), (copy, B)], batch_size=3, shuffle=None, epochs=1)
    ours, theirs = next(loader)
    assert isinstance(ours, torch.Tensor)
    assert isinstance(theirs, torch.Tensor)
    np.testing.assert_array_equal(ours.numpy(), one.values[A][range(3), [4, 6, 8]])
    np.testing.assert_array_equal(theirs.numpy(), one.values[B][range(3), [4, 6, 8]])
    moved = ragged([5, 7, 9], [[4], [5], [8]], LENGTH)
    other = written(tmp_path / "other", moved, batch_size=16)
    with pytest.raises(LoaderError, match="have different positions of the same tokens"):
        paired([(same, A), (other, B)], batch_size=3)
    with pytest.raises(LoaderError, match="only chosen positions; align stores of all positions"):
        aligned((same, A), (other, B), batch_size=3)
