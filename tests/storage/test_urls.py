"""URLs of storage: one place for every client, or a refusal in one sentence that says what to write."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import actstore
from actstore.cli.main import cli
from actstore.errors import ActstoreError, StorageError
from actstore.loader.cache.disk_cache import DiskCache
from actstore.storage.blobs import Blobs
from actstore.storage.local import LocalBlobs
from actstore.storage.opening import open_blobs
from actstore.storage.probing import probe
from actstore.storage.urls import check_url, local_path
from tests.conftest import S3Server

REFUSED = {
    "": "is empty",
    " ": "is empty",
    "s3://": "names no place",
    "s3:///a": "a URL with '' in the place of its bucket",
    "s3:/bucket/a": "write s3:// for a URL, or ./s3:/bucket/a for a folder of that name",
    "gs:/bucket/a": "write gs:// for a URL",
    "S3://bucket/a": "write s3://bucket/a",
    "s3://bucket/a//b": "two slashes in a row",
    "s3://bucket//a": "two slashes in a row",
    "s3a://bucket/./a": "the part '.'",
    "s3://bucket/a/../b": "the part '..'",
    "s3://bucket/..": "the part '..'",
    "s3://bucket/a\\b": "use slashes",
    "s3://bucket/a?versionId=b": "leave out ?versionId=",
    "s3://bucket/a\tb": "a character that names cannot have",
    "s3://bucket/a\n": "a character that names cannot have",
    "s3://bücket/a": "'bücket' in the place of its bucket",
    "s3://key:word@bucket/a": "a URL with credentials in the place of its bucket",
    "memory://": "names no place",
    "http://": "names no place",
    "memory://a//b": "two slashes in a row",
    "gs://bucket/a/../b": "the part '..'",
    "simplecache::s3://bucket/a//b": "two slashes in a row",
    "a\\b": "use slashes",
    "a\0b": "a character that names cannot have",
    "a\ud800b": "a character that names cannot have",
    "~nobody-of-this-name/a": "there is no such user; write ./~nobody-of-this-name/a",
    "a" * 300: "File name too long",
}


@pytest.mark.parametrize("url", REFUSED, ids=[ascii(url)[:40] for url in REFUSED])
def test_url_that_clients_would_take_for_different_places(url: str) -> None:
    with pytest.raises(StorageError) as caught:
        open_blobs(url)
    text = str(caught.value)
    assert REFUSED[url] in text
    assert len(text.splitlines()) == 1
    assert "word" not in text


SAME = {
    "s3://bucket/a/": "s3://bucket/a",
    "s3://bucket": "s3://bucket",
    "s3://bucket/": "s3://bucket",
    "memory:///a/": "memory:///a",
    "gs://bucket/a b/ü?#": "gs://bucket/a b/ü?#",
    "simplecache::s3://bucket/a": "simplecache::s3://bucket/a",
}


@pytest.mark.parametrize("url", SAME)
def test_urls_that_are_one_place(url: str) -> None:
    assert check_url(url) == SAME[url]


@pytest.mark.parametrize("url", ["a", "./a/", "b/../a", "file://a", "FILE://a", "local://a"])
def test_paths_are_what_they_are_to_the_shell(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").mkdir()
    blobs = open_blobs(url)
    assert isinstance(blobs, LocalBlobs)
    blobs.create("k", [b"x"])
    assert (tmp_path / "a" / "k").exists()


Use = Callable[[str, Path], object]


def _extract(url: str, _: Path) -> object:
    fields: dict[str, Any] = {"model": "none", "tokens": "none", "hooks": "none", "context_length": 8}
    return actstore.plan(out=url, **fields)  # nothing of it is looked at before the URL


USES: dict[str, Use] = {
    "open": lambda url, _: actstore.open(url),
    "out": _extract,
    "verify": lambda url, _: actstore.verify(url),
    "cache_dir": lambda url, folder: DiskCache(LocalBlobs(folder), url, "id", None),
    "local path": lambda url, _: local_path(url),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("url", ["s3://bucket/a//b", "s3:/bucket/a", "s3://"])
def test_every_way_in_refuses_it(use: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError) as caught:
        USES[use](url, tmp_path)
    assert url in str(caught.value)
    assert os.listdir(tmp_path) == []  # noqa: PTH208


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "s3://bucket/a//b"],
        ["verify", "s3://bucket/a//b"],
        ["serve", "--root", "s3://bucket/a//b"],
        ["serve", "name=s3://bucket/a//b"],
        ["slice", "s3://bucket/a//b", "hook"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_every_command_refuses_it(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli, arguments)
    assert isinstance(result.exception, ActstoreError)
    assert "s3://bucket/a//b has two slashes in a row" in str(result.exception)


NAMES = [
    "a b",
    "a?b",
    "a#b",
    "a%2eb",
    "%2e%2e",
    "%",
    "a+b",
    "a:b",
    "a=b&c",
    "a*[b]",
    "~",
    "...",
    "ü",
    "u\u0308",
]


def test_what_is_allowed_is_the_same_object_for_all_clients(
    s3_url: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at(url: str) -> Sequence[Blobs]:
        clients = []
        for client in ("s3fs", "obstore"):
            monkeypatch.setenv("ACTSTORE_S3", client)
            clients.append(open_blobs(url))
        return clients

    all_of_them = "/".join(NAMES)
    above, below = at(s3_url), at(f"{s3_url}/{all_of_them}/")
    for name in NAMES:
        for i in (0, 1):
            assert above[i].create(f"{name}/acts/{i}", [name.encode()])
            assert not above[1 - i].create(f"{name}/acts/{i}", [b"other"])
            assert bytes(above[1 - i].read(f"{name}/acts/{i}")) == name.encode()
        assert all(blobs.names(f"{name}/acts") == ["0", "1"] for blobs in above)
    assert all(blobs.names("") == sorted(NAMES) for blobs in above)
    for i in (0, 1):
        assert below[i].create(str(i), [b"deep"])
        assert bytes(below[1 - i].read(str(i))) == b"deep"
        assert bytes(above[1 - i].read(f"{all_of_them}/{i}")) == b"deep"
    pages = s3_server.client().list_objects_v2(Bucket=s3_server.bucket, Prefix=s3_url.rpartition("/")[2])
    keys = {item["Key"].split("/", 1)[1] for item in pages["Contents"]}
    assert keys == {f"{name}/acts/{i}" for name in NAMES for i in (0, 1)} | {
        f"{all_of_them}/{i}" for i in (0, 1)
    }


@pytest.mark.parametrize("name", NAMES)
def test_what_is_allowed_works_on_a_disk(name: str, tmp_path: Path) -> None:
    blobs = open_blobs(f"{tmp_path}/{name}/")
    assert probe(blobs)
    blobs.create("k", [b"x"])
    assert os.listdir(tmp_path) == [name]  # noqa: PTH208
