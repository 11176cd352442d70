"""The rows that ``actstore slice`` prints, and the tokens beside them."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from actstore.cli.main import cli, run
from actstore.errors import TokensError
from actstore.storage.local import LocalBlobs
from tests.analysis.stores import HOOK, SHAKESPEARE_HOOK, D, shakespeare, store_of
from tests.store.example import HOOKS, LENGTH, N, example_plan, example_tokens, example_values, write_store
from tests.store.slots import ragged, ragged_plan, write_ragged

PLAN = example_plan()
TEXT = ragged([5, 1, 8, 3, 6, 8], [[0, 4], [], [1, 2, 7], [2], [0, 2, 4], [7]], 8)


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


@pytest.fixture(scope="module", params=[False, True], ids=["all positions", "chosen positions"])
def ragged_store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[list[int]]]:
    """The URL of a store, and the positions of each sequence that are stored."""
    blobs = LocalBlobs(tmp_path_factory.mktemp("slots") / "store")
    write_ragged(blobs, TEXT, ragged_plan(TEXT, is_chosen=request.param))
    return blobs.url, TEXT.chosen if request.param else [list(range(8))] * 6


def lines(out: str) -> list[tuple[int, ...]]:
    """Sequence, position and token of each line."""
    return [tuple(map(int, line.split()[:3])) for line in out.splitlines()[2:]]


@pytest.mark.parametrize("pos", [":", "2", "2:5", "-1", "::2"])
def test_positions_of_a_ragged_store(
    ragged_store: tuple[str, list[list[int]]], pos: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url, stored = ragged_store
    assert run(["slice", url, HOOKS[0], "--seq=0:6", f"--pos={pos}"]) == 0
    ends = [int(part) if part else None for part in pos.split(":")]
    wanted = range(8)[slice(*ends) if len(ends) > 1 else slice(ends[0], (ends[0] or 0) + 1 or None)]
    expected = [(i, p, TEXT.tokens[i, p]) for i in range(6) for p in stored[i] if p in wanted]
    assert lines(capsys.readouterr().out) == expected


def test_the_last_token_of_each(
    ragged_store: tuple[str, list[list[int]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, stored = ragged_store
    is_real = [[p for p in row if p < n] for row, n in zip(stored, TEXT.lengths, strict=True)]
    ends = [(i, row[-1]) for i, row in enumerate(is_real) if row]
    assert run(["slice", url, HOOKS[0], "--seq=:", "--last"]) == 0
    assert lines(capsys.readouterr().out) == [(i, p, TEXT.tokens[i, p]) for i, p in ends]
    file = tmp_path / "last.safetensors"
    assert run(["slice", url, HOOKS[0], "--seq=:", "--last", "-o", str(file)]) == 0
    saved = load_file(file)
    sequences, positions = map(list, zip(*ends, strict=True))
    np.testing.assert_array_equal(saved[HOOKS[0]], TEXT.values[HOOKS[0]][sequences, positions][:, None])
    np.testing.assert_array_equal(saved["positions"], np.array(positions)[:, None])
    np.testing.assert_array_equal(saved["tokens"], TEXT.tokens[sequences, positions][:, None])
    assert run(["slice", url, HOOKS[0], "--last", "--pos=3"]) == 1
    assert "--last and --pos both say which positions" in capsys.readouterr().err


def test_rows_of_different_numbers_are_no_array(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blobs = LocalBlobs(tmp_path / "store")
    write_ragged(blobs, TEXT, ragged_plan(TEXT, is_chosen=True))
    save = ["slice", blobs.url, HOOKS[0], "-o", str(tmp_path / "some.npy")]
    assert run([*save, "--seq=2:4"]) == 1
    assert "the sequences have 1 to 3 rows each, and an array has equally many" in capsys.readouterr().err
    assert run([*save, "--seq=2:4", "--pos=2"]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "some.npy"), TEXT.values[HOOKS[0]][2:4, 2:3])
    assert run([*save, "--seq=1"]) == 1
    assert (
        "the slice is empty; the store has sequences 0:6 and positions 0:8 of which every:2"
        in capsys.readouterr().err
    )


def test_text_of_each_token(tmp_path: Path) -> None:
    store = shakespeare(tmp_path)
    for args, shows in (([], False), (["--text"], True), (["--no-text"], False)):
        done = CliRunner().invoke(
            cli, ["slice", store.url, SHAKESPEARE_HOOK, "--seq", "2:4", "--pos", "1:5", *args]
        )
        lines = done.stdout.splitlines()[1:]
        assert ("  text  " in lines[0]) == shows
        for line, (sequence, position) in zip(
            lines[1:], ((s, p) for s in (2, 3) for p in range(1, 5)), strict=True
        ):
            assert line.split()[:2] == [str(sequence), str(position)]
            assert (f"  {store.str_tokens(sequence)[position]!r} " in line) == shows
        assert len({line.index(".") for line in lines[1:]}) == 1, "columns are aligned"


def test_text_that_is_not_known(tmp_path: Path) -> None:
    store = store_of(tmp_path, np.ones((5, 8, D), np.float32))
    done = CliRunner().invoke(cli, ["slice", store.url, HOOK, "--text"])
    assert isinstance(done.exception, TokensError)
    assert CliRunner().invoke(cli, ["slice", store.url, HOOK]).exit_code == 0
