"""What every kind of storage must do, run against a folder, fsspec's memory and an S3 server."""

import numpy as np
import pytest

from actstore.errors import StorageError
from actstore.store.blobs import BlobNotFoundError, Blobs, check_writable, open_blobs
from actstore.store.local import LocalBlobs
from actstore.store.remote import RemoteBlobs
from tests.store.race import N_RACERS, racers

DIGITS = b"0123456789"


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("runs/a", LocalBlobs),
        ("/runs/a", LocalBlobs),
        ("file:///runs/a", LocalBlobs),
        ("local:///runs/a", LocalBlobs),
        ("memory://a", RemoteBlobs),
        ("s3://bucket/a", RemoteBlobs),
    ],
)
def test_url_decides_the_storage(url: str, kind: type) -> None:
    assert isinstance(open_blobs(url), kind)


def test_file_urls_are_folders() -> None:
    assert open_blobs("file:///runs/a").url == "/runs/a"


def test_unknown_scheme_is_named() -> None:
    with pytest.raises(StorageError, match="ftps3://x cannot be opened: Protocol not known: ftps3"):
        open_blobs("ftps3://x")


def test_created_blob_reads_back(blobs: Blobs) -> None:
    assert blobs.create("a/b/c", [DIGITS])
    assert bytes(blobs.read("a/b/c")) == DIGITS
    assert blobs.size("a/b/c") == 10


def test_parts_are_written_one_after_the_other(blobs: Blobs) -> None:
    data = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8)
    frozen = data[:100].copy()
    frozen.flags.writeable = False
    assert blobs.create("parts", [data, b"", frozen, DIGITS])
    assert bytes(blobs.read("parts")) == data.tobytes() + frozen.tobytes() + DIGITS


def test_second_create_loses_and_changes_nothing(blobs: Blobs) -> None:
    assert blobs.create("a", [DIGITS])
    assert not blobs.create("a", [b"other"])
    assert not blobs.create("a", [DIGITS])
    assert bytes(blobs.read("a")) == DIGITS


def test_key_can_be_created_again_after_delete(blobs: Blobs) -> None:
    assert blobs.create("a/b", [b"first"])
    blobs.delete("a/b")
    assert blobs.create("a/b", [b"second"])
    assert bytes(blobs.read("a/b")) == b"second"


@pytest.mark.parametrize(("start", "nbytes"), [(0, 10), (0, 1), (3, 4), (9, 1), (0, None), (4, None)])
def test_ranges(blobs: Blobs, start: int, nbytes: int | None) -> None:
    blobs.create("a", [DIGITS])
    stop = None if nbytes is None else start + nbytes
    assert bytes(blobs.read("a", start, nbytes)) == DIGITS[start:stop]


@pytest.mark.parametrize(("start", "nbytes"), [(0, 11), (8, 5), (10, 1), (80, 5)])
def test_range_past_the_end_is_damage(blobs: Blobs, start: int, nbytes: int) -> None:
    blobs.create("short", [DIGITS])
    with pytest.raises(StorageError, match="short") as caught:
        blobs.read("short", start, nbytes)
    assert not isinstance(caught.value, BlobNotFoundError)


@pytest.mark.parametrize(("start", "nbytes"), [(0, None), (3, 4)])
def test_missing_blob_is_told_from_other_failures(blobs: Blobs, start: int, nbytes: int | None) -> None:
    blobs.create("there", [DIGITS])
    with pytest.raises(BlobNotFoundError, match="a/gone does not exist"):
        blobs.read("a/gone", start, nbytes)
    assert blobs.size("a/gone") is None
    blobs.delete("a/gone")  # fine


def test_deleted_blob_is_gone(blobs: Blobs) -> None:
    blobs.create("a/b", [DIGITS])
    blobs.delete("a/b")
    assert blobs.size("a/b") is None
    assert blobs.names("a") == []
    with pytest.raises(BlobNotFoundError):
        blobs.read("a/b")


def test_names_are_those_directly_below(blobs: Blobs) -> None:
    for key in ("a/2", "a/10", "a/sub/x", "ab/y", "z"):
        blobs.create(key, [DIGITS])
    assert blobs.names("a") == ["10", "2", "sub"]
    assert blobs.names("nothing") == []
    assert blobs.names("a/2") == []


def test_names_show_what_another_client_wrote(blobs: Blobs) -> None:
    blobs.create("a/1", [DIGITS])
    assert blobs.names("a") == ["1"]
    open_blobs(blobs.url).create("a/2", [DIGITS])
    assert blobs.names("a") == ["1", "2"]


def test_writable_storage_is_left_as_it_was(blobs: Blobs) -> None:
    check_writable(blobs)
    assert blobs.names("_actstore/probe") == []


@pytest.mark.parametrize(("kind", "n_rounds"), [("local", 30), pytest.param("s3", 5, marks=pytest.mark.s3)])
def test_one_of_eight_creators_wins(
    kind: str, n_rounds: int, tmp_path: object, request: pytest.FixtureRequest
) -> None:
    url = str(tmp_path) if kind == "local" else request.getfixturevalue("s3_url")
    blobs = open_blobs(url)
    with racers("create", url) as race:
        for i in range(n_rounds):
            answers = race.run(f"round/{i}")
            assert sorted(answers) == ["False"] * (N_RACERS - 1) + ["True"]
            winner = str(answers.index("True")).encode()
            assert bytes(blobs.read(f"round/{i}")) == winner * 100_000 + b"."


@pytest.mark.parametrize(("kind", "n_rounds"), [("local", 30), pytest.param("s3", 5, marks=pytest.mark.s3)])
def test_eight_can_probe_at_once(
    kind: str, n_rounds: int, tmp_path: object, request: pytest.FixtureRequest
) -> None:
    url = str(tmp_path) if kind == "local" else request.getfixturevalue("s3_url")
    with racers("probe", url) as race:
        for _ in range(n_rounds):
            assert race.run("") == ["done"] * N_RACERS
