"""The rows that ``actstore slice`` prints, and the tokens beside them."""

from pathlib import Path

import numpy as np
import pytest

from actstore.cli.main import run
from actstore.storage.local import LocalBlobs
from tests.store.example import HOOKS, LENGTH, N, example_plan, example_tokens, example_values, write_store

PLAN = example_plan()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    blobs = LocalBlobs(tmp_path_factory.mktemp("slice") / "store")
    write_store(blobs, PLAN, example_values(PLAN), range(PLAN.n_segments))
    return blobs.url


@pytest.mark.parametrize(
    ("seq", "pos", "sequences", "positions"),
    [
        ("-1", ":", [N - 1], range(LENGTH)),
        ("-2", "-1", [N - 2], [LENGTH - 1]),
        ("3", "5", [3], [5]),
        ("3:5", "2:4", [3, 4], [2, 3]),
        ("-3::2", "::4", [N - 3, N - 1], [0, 4]),
    ],
)
def test_rows_are_those_of_a_slice_of_python(
    url: str,
    seq: str,
    pos: str,
    sequences: list[int],
    positions: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (
        run(["slice", url, HOOKS[0], f"--seq={seq}", f"--pos={pos}", "-o", str(tmp_path / "some.npy")]) == 0
    )
    expected = example_values(PLAN)[HOOKS[0]][np.ix_(sequences, positions)]
    np.testing.assert_array_equal(np.load(tmp_path / "some.npy"), expected)
    assert run(["slice", url, HOOKS[0], f"--seq={seq}", f"--pos={pos}"]) == 0
    tokens = example_tokens(PLAN)["tokens"]
    shown = [tuple(map(int, line.split()[:3])) for line in capsys.readouterr().out.splitlines()[2:]]
    assert shown == [(i, j, tokens[i, j]) for i in sequences for j in positions]
