"""The files that a spec names."""

import os
from pathlib import Path

import fsspec
import pytest

from actstore.errors import TokensError
from actstore.tokens.files import locate


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")


def names(spec: str, folder: Path) -> list[str]:
    return [os.path.relpath(file.path, folder) for file in locate(spec)]


def test_a_file_a_glob_and_a_directory(tmp_path: Path) -> None:
    touch(tmp_path, "b.txt", "a.txt.gz", "sub/c.TXT", "sub/deep/d.txt.zst")
    assert names(f"{tmp_path}/b.txt", tmp_path) == ["b.txt"]
    assert names(f"file://{tmp_path}/b.txt", tmp_path) == ["b.txt"]
    assert names(f"{tmp_path}/*", tmp_path) == ["a.txt.gz", "b.txt"]
    assert names(f"{tmp_path}/**/[bd].txt*", tmp_path) == ["b.txt", "sub/deep/d.txt.zst"]
    assert names(f"{tmp_path}", tmp_path) == ["a.txt.gz", "b.txt", "sub/c.TXT", "sub/deep/d.txt.zst"]
    (file,) = locate(f"{tmp_path}/b.txt")
    assert (file.public.url, file.public.nbytes) == (f"{tmp_path}/b.txt", 4)


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "b.txt")
    monkeypatch.chdir(tmp_path)
    assert names("b.txt", tmp_path) == ["b.txt"]
    assert names("*.txt", tmp_path) == ["b.txt"]
    assert names(".", tmp_path) == ["b.txt"]


def test_a_name_with_glob_characters_is_that_file(tmp_path: Path) -> None:
    touch(tmp_path, "a[1].txt", "a1.txt")
    assert names(f"{tmp_path}/a[1].txt", tmp_path) == ["a[1].txt"]


def test_a_directory_is_read_without_what_does_not_belong(tmp_path: Path) -> None:
    touch(tmp_path, "data-1.arrow", "cache-0f.arrow", "state.json", ".hidden.txt", "_SUCCESS", "README.md")
    assert names(f"{tmp_path}", tmp_path) == ["data-1.arrow"]


def test_a_url_keeps_its_protocol() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/tokens-files/a.txt", b"text")
    memory.pipe("/tokens-files/b.txt", b"")
    assert [(file.public.url, file.public.nbytes) for file in locate("memory://tokens-files/*.txt")] == [
        ("memory:///tokens-files/a.txt", 4),
        ("memory:///tokens-files/b.txt", 0),
    ]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "the token source is an empty string; give a file"),
        ("{}/no.txt", "nothing is found at .*no.txt; give a file, a directory, a glob or hf:org/name"),
        ("{}/no*.txt", r"nothing is found at .*no\*.txt"),
        (
            "{}/sub/a.csv",
            r"a.csv has a suffix that is not supported; supported are .txt and .jsonl.*; read others with pandas",
        ),
        ("{}/a.parquet.gz", "a.parquet.gz has a suffix that is not supported"),
        ("{}/.gz", ".gz has a suffix that is not supported"),
        ("{}/sub/*", "sub/a.csv has a suffix that is not supported"),
        ("{}/sub", "the directory .*sub holds only others such as a.csv; supported are .txt"),
        ("{}/empty", "the directory .*empty holds no files at all"),
        ("{}/mixed", r"mixed mixes jsonl \(.*a.jsonl\) and text \(.*b.txt\) files; give a glob"),
        (
            "nosuch://bucket/a.txt",
            "nosuch://bucket/a.txt is not a path or URL that fsspec knows: Protocol not known",
        ),
    ],
)
def test_what_is_not_there_or_not_supported(tmp_path: Path, spec: str, message: str) -> None:
    touch(tmp_path, "sub/a.csv", "a.parquet.gz", ".gz", "mixed/a.jsonl", "mixed/b.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokensError, match=message) as caught:
        locate(spec.format(tmp_path))
    assert "\n" not in str(caught.value)
