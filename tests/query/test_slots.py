"""Stores of chosen positions over HTTP, against the arrays that were written."""

from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from actstore.errors import HookError
from actstore.storage.local import LocalBlobs
from actstore.store.records.seal import seal
from tests.query.running import Running, running
from tests.store.slots import RESID, ragged, ragged_plan, write_ragged

CHOSEN = [[0, 4], [0], [1, 2, 7], [2], [0, 2, 4], [7]]
TEXT = ragged([5, 1, 8, 3, 6, 8], CHOSEN, 8)
SEQUENCES, POSITIONS = map(list, zip(*((i, p) for i, row in enumerate(CHOSEN) for p in row), strict=True))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("slots")
    for name, is_chosen in (("some", True), ("whole", False)):
        blobs = LocalBlobs(folder / name)
        write_ragged(blobs, TEXT, ragged_plan(TEXT, is_chosen=is_chosen))
        seal(blobs)
    with running(folder, "--root", str(folder)) as server:
        yield server


def test_positions_and_rows_at_them_are_those_that_were_written(served: Running) -> None:
    store = served.store("some", direct=False)
    acts, values = store[RESID], TEXT.values[RESID]
    assert store.positions is not None
    np.testing.assert_array_equal(store.positions[:], TEXT.positions)
    np.testing.assert_array_equal(store.counts[:], [len(row) for row in CHOSEN])
    np.testing.assert_array_equal(acts.at(SEQUENCES, POSITIONS).numpy(), values[SEQUENCES, POSITIONS])
    last = np.stack([values[i, row[-1]] for i, row in enumerate(CHOSEN)])
    np.testing.assert_array_equal(acts.last().numpy(), last)
    assert store.is_stored([0, 0], [4, 3]).tolist() == [True, False]


def test_searches_are_over_all_tokens(served: Running) -> None:
    store = served.store("some", direct=False)
    needle = TEXT.tokens[2, 5:8].tolist()
    expected = [
        (i, p)
        for i, n in enumerate(TEXT.lengths)
        for p in range(n - 2)
        if TEXT.tokens[i, p : p + 3].tolist() == needle
    ]
    found = store.locate(tokens=needle)
    assert list(zip(found.sequences.tolist(), found.positions.tolist(), strict=True)) == expected
    assert (2, 5) in expected, "it ends behind the last slot"


def test_plain_http_tells_the_position_of_each_slot(served: Running) -> None:
    url = f"{served.url}/v1/stores/some"
    raw = httpx.get(f"{url}/hooks/positions/slice?seq=2:4&format=raw")
    assert (raw.headers["Actstore-Dtype"], raw.headers["Actstore-Shape"]) == ("int32", "2,3")
    assert raw.content == TEXT.positions[2:4].astype("<i4").tobytes()


def test_a_store_of_all_positions_has_no_array_of_them(served: Running) -> None:
    reply = httpx.get(f"{served.url}/v1/stores/whole/hooks/positions/slice?seq=0&format=json")
    assert (reply.status_code, reply.json()["type"]) == (404, "urn:actstore:problem:hook")
    assert "has all positions" in reply.json()["detail"]
    with pytest.raises(HookError):
        _ = served.store("whole")["positions"]
