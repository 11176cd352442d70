"""Searches and scans of stores of chosen positions: what NumPy finds in the text, said in positions."""

from typing import Any

import numpy as np
import pytest

import actstore
from actstore.analysis.search import sequence_sha256
from actstore.analysis.top.top_activations import top_activations
from actstore.facade import Store
from actstore.storage.local import LocalBlobs
from actstore.store.records.seal import seal
from tests.store.slots import RESID, ragged, ragged_plan, write_ragged

LENGTH = 8
_RNG = np.random.default_rng(0)
_LENGTHS = _RNG.integers(1, LENGTH + 1, 40).tolist()
TEXT = ragged(_LENGTHS, [_RNG.permutation(n)[: _RNG.integers(0, 4)].tolist() for n in _LENGTHS], LENGTH)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Store]:
    """A store of all positions, and one of the chosen ones."""
    stores = []
    for is_chosen in (False, True):
        blobs = LocalBlobs(tmp_path_factory.mktemp("slots") / "store")
        write_ragged(blobs, TEXT, ragged_plan(TEXT, is_chosen=is_chosen, segment_size=16))
        seal(blobs)
        stores.append(actstore.open(blobs.url))
    return stores[0], stores[1]


def test_tokens_are_found_wherever_they_are(both: tuple[Store, Store]) -> None:
    whole, some = both
    needle = TEXT.tokens[5, :2]
    places = [
        (i, p)
        for i, n in enumerate(TEXT.lengths)
        for p in range(n - 1)
        if (TEXT.tokens[i, p : p + 2] == needle).all()
    ]
    for store in both:
        matches = store.locate(tokens=needle)
        assert list(zip(*map(np.ndarray.tolist, matches), strict=True)) == places
        assert store.find(tokens=needle).tolist() == sorted({i for i, _ in places})
        digest = sequence_sha256(TEXT.tokens[7, : TEXT.lengths[7]])
        assert 7 in store.find(sha=digest)
    matches = some.locate(tokens=needle)
    stored = some.is_stored(*matches)
    assert stored.tolist() == [p in TEXT.chosen[i] for i, p in places]
    assert whole.is_stored(*matches).all()
    rows = some[RESID].at(matches.sequences[stored], matches.positions[stored]).numpy()
    np.testing.assert_array_equal(
        rows, TEXT.values[RESID][matches.sequences[stored], matches.positions[stored]]
    )


@pytest.mark.parametrize("per", ["row", "sequence"])
@pytest.mark.parametrize("options", [{}, {"seqpos": slice(1, 6)}, {"drop": [3, 4]}], ids=str)
def test_top_activations(both: tuple[Store, Store], per: Any, options: dict[str, Any]) -> None:
    _, some = both
    places = np.array([(i, p) for i, row in enumerate(TEXT.chosen) for p in row])
    kept = np.ones(len(places), bool)
    if "seqpos" in options:
        kept &= (places[:, 1] >= 1) & (places[:, 1] < 6)
    if "drop" in options:
        kept &= ~np.isin(TEXT.tokens[places[:, 0], places[:, 1]], options["drop"])
    places = places[kept]
    k, neurons = 5, [0, 3]
    top = top_activations(some, RESID, neurons, k, per=per, **options)
    for feature, neuron in enumerate(neurons):
        values = TEXT.values[RESID][places[:, 0], places[:, 1], neuron]
        order = np.argsort(-values, kind="stable")
        if per == "sequence":
            order = np.array([i for n, i in enumerate(order) if places[i, 0] not in places[order[:n], 0]])
        order = order[:k]
        np.testing.assert_array_equal(top.values[feature], values[order])
        np.testing.assert_array_equal(top.sequences[feature], places[order, 0])
        np.testing.assert_array_equal(top.positions[feature], places[order, 1])
        np.testing.assert_array_equal(top.documents[feature], places[order, 0])
    assert top.n_rows == len(places)
