"""JSON documents: what is refused, and in which words."""

import json
from typing import Any

import pytest

from actstore.errors import StorageError
from actstore.store.plan import Plan
from tests.store.example import example_plan

FIELDS: dict[str, Any] = json.loads(example_plan().to_bytes())


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
    assert complaint(json.dumps(FIELDS | changes).encode()).startswith(f"plan.json is damaged: {words}")


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xff", b'{"format": 1'])
def test_what_is_not_json_is_damaged(data: bytes) -> None:
    assert complaint(data).startswith("plan.json is damaged: it is not JSON")


@pytest.mark.parametrize("data", [b"[]", b"1", b"null", b"{}", b'{"format": "1"}'])
def test_other_json_is_not_a_document(data: bytes) -> None:
    assert complaint(data) == "plan.json is not an actstore document: it has no integer field 'format'"
