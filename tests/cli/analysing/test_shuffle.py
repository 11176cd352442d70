"""``actstore stats --shuffle``: text, JSON and wrong usage."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import actstore
from actstore.analysis.shuffle_quality import shuffle_quality
from actstore.cli.main import cli
from actstore.storage.local import LocalBlobs
from tests.commands import command_here
from tests.store.example import HOOKS, LENGTH, N
from tests.store.verifying.test_verify import make_store

A = HOOKS[0]


@pytest.fixture
def url(tmp_path: Path) -> str:
    blobs = LocalBlobs(tmp_path / "store")
    make_store(blobs)
    return blobs.url


def run(*args: str) -> str:
    done = CliRunner().invoke(cli, ["stats", *args], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("shuffle", ["global", "window", "none"])
def test_json_is_what_the_library_says(url: str, shuffle: str) -> None:
    order = ["--shuffle", shuffle, "--batch-size", "16", "--seed", "3", "--window-rows", "90"]
    printed = json.loads(run(url, A, *order, "--batches", "5", "--json"))
    loader = actstore.open(url).loader(
        A,
        batch_size=16,
        seed=3,
        window_rows=90,
        shuffle=None if shuffle == "none" else shuffle,  # type: ignore[arg-type]
    )
    assert printed == shuffle_quality(loader, 5).to_dict()


def test_text(url: str) -> None:
    lines = run(url, A, "--shuffle", "none", "--batch-size", str(LENGTH)).splitlines()
    assert lines[0] == f"{N} batches of {LENGTH} rows, of {N * LENGTH} rows in {N} sequences"
    assert [line.split()[-2] for line in lines[3:]] == ["1", "8", "8", "0"]
    assert [line[:26].strip() for line in lines[3:]] == [
        "sequences in a batch",
        "rows per sequence",
        "most rows of one sequence",
        "normalised entropy",
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            [A, "--shuffle", "global"],
            "--shuffle is about batches of one HOOK; give the hook and --batch-size",
        ),
        (["--shuffle", "global", "--batch-size", "8"], "--shuffle is about batches of one HOOK"),
        ([A, "--window-rows", "8"], "--window-rows is about a shuffle; give --shuffle with it"),
        ([A, "--shuffle", "local", "--batch-size", "8"], "'local' is not one of"),
    ],
)
def test_wrong_usage(url: str, args: list[str], message: str) -> None:
    done = CliRunner().invoke(cli, ["stats", url, *args])
    assert done.exit_code == 2
    assert message in done.output


def test_an_error_is_one_sentence(url: str) -> None:
    done = command_here("stats", url, A, "--shuffle", "global", "--batch-size", "8", "--seed", str(2**64))
    assert done.returncode == 1
    assert done.stderr.startswith("error: seed is 18446744073709551616; it must be")
