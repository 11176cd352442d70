"""Documents of JSON Lines files."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from actstore.errors import TokensError
from actstore.tokens import open_source

RECORDS = [
    {"text": None, "ids": []},
    {"text": "one", "ids": [1, 2]},
    {"text": "", "ids": None},
    {"text": "naïve 🦜\n", "ids": [2**31 - 1], "more": {}},
]
TEXTS = ["", "one", "", "naïve 🦜\n"]
IDS = [[], [1, 2], [], [2**31 - 1]]


def write(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return str(path)


def read(spec: str, column: str | None = None) -> list[Any]:
    """All documents, arrays as lists; their numbers must run from 0 on without gaps."""
    documents: list[Any] = []
    for first, batch in open_source(spec, column=column).batches():
        assert first == len(documents)
        documents += [
            document.tolist() if isinstance(document, np.ndarray) else document for document in batch
        ]
    return documents


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst"])
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    data = Path(write(tmp_path / "plain", RECORDS)).read_bytes().replace(b"\n{", b"\n\n{")
    if suffix.endswith("gz"):
        data = gzip.compress(data)
    if suffix.endswith("zst"):
        data = zstandard.ZstdCompressor().compress(data)
    (tmp_path / f"a{suffix}").write_bytes(data)
    assert read(f"{tmp_path}/a{suffix}") == TEXTS
    assert read(f"{tmp_path}/a{suffix}", "text") == TEXTS
    assert read(f"{tmp_path}/a{suffix}", "ids") == IDS


@pytest.mark.parametrize(
    ("record", "chosen"),
    [
        ({"text": "a", "tokens": [1], "input_ids": [2]}, ("input_ids", "tokens")),
        ({"text": "a", "tokens": [1]}, ("tokens", "tokens")),
        ({"text": "a", "tokens": ["the"]}, ("text", "text")),
    ],
)
def test_the_key_chosen_by_default(tmp_path: Path, record: dict[str, Any], chosen: tuple[str, str]) -> None:
    source = open_source(write(tmp_path / "a.jsonl", [record]))
    assert (source.column, source.kind) == chosen


def test_nulls_before_the_first_value_do_not_hide_the_key(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", [{"n": 1, "text": None}, {"n": 2, "text": "a"}])
    assert read(spec) == ["", "a"]
    spec = write(tmp_path / "b.jsonl", [{"text": "a", "input_ids": []}, {"text": "b", "input_ids": [1]}])
    assert read(spec) == [[], [1]]
    spec = write(tmp_path / "c.jsonl", [{"text": "a", "input_ids": None}] * 2)
    assert read(spec) == ["a", "a"]
    assert read(spec, "input_ids") == [[], []]


def test_an_empty_file_has_no_documents(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.jsonl", [])) == []


@pytest.mark.parametrize(
    ("record", "column", "message"),
    [
        ({"messages": "hi"}, None, "column messages of .*a.jsonl does not hold chats .*role and content"),
        ({"text": 3, "body": "a"}, None, r"column text of .*a.jsonl does not hold strings; .*: text, body"),
        ({"body": "a", "n": 1}, None, "a.jsonl has no column input_ids or tokens .*: body, n"),
        ({"body": "a"}, "txt", "a.jsonl has no column txt; its columns are: body"),
        ({"n": 1}, "n", "column n of .*a.jsonl holds neither strings nor lists of integers"),
    ],
)
def test_a_missing_key_fails_on_opening(
    tmp_path: Path, record: dict[str, Any], column: str | None, message: str
) -> None:
    with pytest.raises(TokensError, match=message):
        open_source(write(tmp_path / "a.jsonl", [record]), column=column)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"ids": [1]', "line 3 of .*a.jsonl is not JSON: "),
        ("[1]", "line 3 of .*a.jsonl is a JSON list, not an object with keys"),
        ("{}", "line 3 of .*a.jsonl has no key ids; its keys are: none"),
        ('{"ids": "a"}', "ids in line 3 of .*a.jsonl is not a list of integers"),
        ('{"ids": [1, 2.5]}', "ids in line 3 of .*a.jsonl is not a list of integers"),
        ('{"ids": [true]}', "ids in line 3 of .*a.jsonl is not a list of integers"),
        ('{"ids": [-1]}', "ids in line 3 of .*a.jsonl has a token id outside 0 to 2147483647"),
        ('{"ids": [99999999999999999999999]}', "ids in line 3 of .*a.jsonl has a token id outside 0 to"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"ids": [1]}\n\n' + line + "\n")
    with pytest.raises(TokensError, match=message) as caught:
        read(f"{tmp_path}/a.jsonl", "ids")
    assert "\n" not in str(caught.value)


def test_a_value_that_is_no_string_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokensError, match=r"text in line 2 of .*a.jsonl is a list where the records before"):
        read(write(tmp_path / "a.jsonl", [{"text": "a"}, {"text": [1]}]))


def test_half_a_surrogate_pair_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "ok \\ud83e\\udd9c"}\n{"text": "no \\ud83e"}\n')
    with pytest.raises(
        TokensError, match=r"text in line 2 of .*a.jsonl has half a surrogate pair at character 3"
    ):
        read(f"{tmp_path}/a.jsonl")


def test_bytes_that_are_not_utf8_are_named_by_offset(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(TokensError, match=r"a.jsonl is not UTF-8: byte 0xff at byte offset 24"):
        read(f"{tmp_path}/a.jsonl")


def test_key_that_is_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "n": 1, "n": 2}\n{"text": "b", "text": "c"}\n')
    with pytest.raises(
        TokensError, match=r"line 2 of .*a\.jsonl has the key text more than once; name each key"
    ):
        list(open_source(str(path)).batches())
