"""The conformance suite against a folder, fsspec's memory and an S3 server through both clients; races of processes."""

import re
import sys
from pathlib import Path

import fsspec
import pytest

from actstore.errors import MissingExtraError, StorageError
from actstore.storage.blobs import Blobs
from actstore.storage.fsspec_files import RemoteBlobs
from actstore.storage.local import LocalBlobs
from actstore.storage.opening import open_blobs
from actstore.storage.probing import probe
from actstore.storage.s3_fsspec import S3fsBlobs
from actstore.storage.s3_obstore import ObjectBlobs
from actstore.testing.blobs import BlobsConformance
from tests.storage.race import N_RACERS, racers

RACES = [
    ("local", 20),
    *(pytest.param(client, 4, marks=pytest.mark.s3) for client in ("s3fs", "obstore")),
]


class TestConformance(BlobsConformance):
    @pytest.fixture
    def blobs(self, blobs: Blobs) -> Blobs:
        return blobs


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("runs/a", LocalBlobs),
        ("/runs/a", LocalBlobs),
        ("file:///runs/a", LocalBlobs),
        ("local:///runs/a", LocalBlobs),
        ("memory://a", RemoteBlobs),
        ("s3://bucket/a", ObjectBlobs),
        ("s3a://bucket/a", ObjectBlobs),
    ],
)
def test_url_decides_the_storage(url: str, kind: type) -> None:
    assert isinstance(open_blobs(url), kind)


@pytest.mark.parametrize(("client", "kind"), [("s3fs", S3fsBlobs), ("obstore", ObjectBlobs)])
def test_environment_decides_the_client(client: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTSTORE_S3", client)
    assert isinstance(open_blobs("s3://bucket/a"), kind)


def test_unknown_client_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTSTORE_S3", "boto9")
    with pytest.raises(StorageError, match="ACTSTORE_S3 is 'boto9'; expected 's3fs' or 'obstore'"):
        open_blobs("s3://bucket/a")


@pytest.fixture
def without_obstore(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide obstore from Python's search path, as if the extra were not installed."""
    fsspec.get_filesystem_class("s3")  # it lies in the same folder
    monkeypatch.delitem(sys.modules, "obstore", raising=False)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if not (Path(place) / "obstore").is_dir()])


@pytest.mark.usefixtures("without_obstore")
def test_s3fs_is_taken_where_obstore_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_blobs("s3://bucket/a"), S3fsBlobs)
    monkeypatch.setenv("ACTSTORE_S3", "obstore")
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'actstore[s3-fast]'")):
        open_blobs("s3://bucket/a")


def test_file_urls_are_folders() -> None:
    assert open_blobs("file:///runs/a").url == "/runs/a"


def test_unknown_scheme_is_named() -> None:
    with pytest.raises(StorageError, match="ftps3://x cannot be opened: Protocol not known: ftps3"):
        open_blobs("ftps3://x")


def test_listings_show_what_another_client_wrote(blobs: Blobs) -> None:
    blobs.create("a/1", [b"1"])
    assert blobs.names("a") == ["1"]
    open_blobs(blobs.url).create("a/2", [b"22"])
    assert blobs.names("a") == ["1", "2"]
    assert blobs.sizes("a") == {"1": 1, "2": 2}


class Forgetful(LocalBlobs):
    """Storage that takes a second create for an overwrite, or gives back something else."""

    def __init__(self, root: Path, gives: bytes | None) -> None:
        super().__init__(root)
        self.gives = gives

    def create(self, key: str, parts: object, *, metadata: object = None) -> bool:  # noqa: ARG002
        self.delete(key)
        return super().create(key, [self.gives] if self.gives else parts)  # type: ignore[arg-type]


def test_probe_sees_that_creates_overwrite(tmp_path: Path) -> None:
    blobs = Forgetful(tmp_path, None)
    assert probe(blobs) is False
    assert list(tmp_path.iterdir()) == []


def test_probe_sees_that_other_bytes_come_back(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="gives b'junk!' where b'probe' was written"):
        probe(Forgetful(tmp_path, b"junk!"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "n_rounds"), RACES)
def test_one_of_eight_processes_wins(
    kind: str, n_rounds: int, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind != "local":
        monkeypatch.setenv("ACTSTORE_S3", kind)  # racers inherit it
    url = str(tmp_path) if kind == "local" else request.getfixturevalue("s3_url")
    blobs = open_blobs(url)
    with racers(url) as race:
        for i in range(n_rounds):
            winner = _winner(race.run(f"create round/{i}"))
            assert bytes(blobs.read(f"round/{i}")) == winner * 100_000 + b"."
        for _ in range(n_rounds):
            before = blobs.head("round/0")
            assert before is not None
            # Each turn writes something else, so that the ETag is another one.
            winner = _winner(race.run(f"replace round/0 {before.tag}"))
            assert bytes(blobs.read("round/0")) == winner * 100_000 + b"." + before.tag.encode()
        for _ in range(n_rounds):
            assert race.run("probe") == ["True"] * N_RACERS
    assert blobs.names("_actstore/probe") == blobs.names("_actstore/partial") == []


def _winner(answers: list[str]) -> bytes:
    """The name of the only process that was told that it wrote."""
    assert sorted(answers) == ["False"] * (N_RACERS - 1) + ["True"]
    return str(answers.index("True")).encode()
