"""JSON documents: which are refused, and with which message."""

import json
from typing import Any

import pytest

from actstore.errors import StorageError
from actstore.store.format.layout import to_json
from actstore.store.format.plan import Plan
from actstore.store.format.shard import crc32c
from tests.store.example import example_plan

FIELDS: dict[str, Any] = example_plan().model_dump(mode="json")


def with_checksum(fields: dict[str, Any]) -> bytes:
    """An undamaged document with these fields, whether they are right or wrong."""
    body = to_json(fields).removeprefix(b"{\n")
    return b'{\n  "checksum": %d,\n' % crc32c(body) + body


def complaint(data: bytes) -> str:
    with pytest.raises(StorageError) as caught:
        Plan.from_bytes(data, "plan.json")
    return str(caught.value)


def test_documents_read_back() -> None:
    plan = example_plan("float16")
    assert Plan.from_bytes(plan.to_bytes(), "plan.json") == plan


def test_newer_format_says_what_to_do() -> None:
    newer = FIELDS | {"format": 2, "a field of the future": 1}
    assert complaint(json.dumps(newer).encode()) == (
        "plan.json is of store format 2, and this actstore reads up to 1; "
        "upgrade with `pip install -U actstore`"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"segment_size": 0}, "segment_size: Input should be greater than or equal to 1"),
        ({"n_sequences": "many"}, "n_sequences: Input should be a valid integer"),
        ({"surplus": 1}, "surplus: Extra inputs are not permitted"),
        ({"format": 0}, "format: Input should be 1"),
    ],
)
def test_wrong_field_is_named(changes: dict[str, Any], words: str) -> None:
    assert complaint(with_checksum(FIELDS | changes)).startswith(f"plan.json is damaged: {words}")


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xff", b'{"format": 1'])
def test_what_is_not_json_is_damaged(data: bytes) -> None:
    assert complaint(data).startswith("plan.json is damaged: it is not JSON")


@pytest.mark.parametrize("data", [b"[]", b"1", b"null", b"{}", b'{"format": "1"}'])
def test_other_json_is_not_a_document(data: bytes) -> None:
    assert complaint(data) == "plan.json is not an actstore document: it has no integer field 'format'"


def test_every_flipped_bit_is_found() -> None:
    data = example_plan().to_bytes()
    for place in range(0, 8 * len(data), 37):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        assert complaint(bytes(flipped))


def test_content_that_does_not_fit_its_checksum() -> None:
    data = example_plan().to_bytes().replace(b'"n_documents": 3', b'"n_documents": 4')
    assert " is damaged: its checksum is " in complaint(data)


@pytest.mark.parametrize("head", [b'{\n  "checksum": 007,\n', b'{"checksum": 7,\n', b"{\n"])
def test_document_that_does_not_begin_with_its_checksum(head: bytes) -> None:
    rest = example_plan().to_bytes().split(b"\n", 2)[2]
    words = complaint(head + rest)
    assert words.startswith(
        ("plan.json is damaged: it does not begin with its checksum", "plan.json is damaged: it is")
    )


@pytest.mark.parametrize("data", [b"[" * 200_000, b'{"format": ' + b"9" * 5000 + b"}"])
def test_json_that_would_break_the_parser_is_damaged(data: bytes) -> None:
    assert complaint(data).startswith("plan.json is damaged: it is not JSON")
