"""The schemas in the repository are those of the models, and are complete."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

from actstore.query.wire import PROBLEM

FOLDER = Path(__file__).parents[2] / "schemas"
KINDS = ("job", "patchjob", "plan", "tokens", "commit", "statistics", "manifest")


def _export() -> dict[str, str]:
    files: Callable[[], dict[str, str]] = runpy.run_path(str(FOLDER / "export.py"))["files"]
    return files()


def _records(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The schema and its parts, except the arbitrary JSON of a model's configuration."""
    parts: dict[str, dict[str, Any]] = schema.get("$defs", {})
    return [schema, *(part for name, part in parts.items() if name != "JsonValue")]


def test_schemas_are_those_of_the_models() -> None:
    for name, text in _export().items():
        path = FOLDER / name
        assert path.read_text(encoding="utf-8") == text, f"run `python schemas/export.py`: {name} has drifted"


def test_every_schema_is_exported() -> None:
    assert {path.name for path in FOLDER.glob("*.json")} == _export().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_schema_is_valid_and_closed(kind: str) -> None:
    schema = json.loads((FOLDER / f"{kind}.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    assert schema["$id"] == f"urn:actstore:schema:{kind}:1"
    for record in _records(schema):
        assert record["additionalProperties"] is False


# Fields that earlier versions lacked may be left out.
_OF_PLANS = {"norms", "n_slots", "n_rows", "n_truncated", "n_tokens_cut"}
_CAN_LACK = {
    "actstore plan": _OF_PLANS,
    "Plan": _OF_PLANS,
    "Request": {"batching"},
    "SourceFileIdentity": {"crc32c"},
    "TokensIdentity": {"chat", "keep", "truncate", "positions", "token_roles"},
    "actstore tokens record": {"tables"},
    "actstore commit record": {"norms"},
    "Golden": {"reference"},
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "job" not in kind])
def test_every_field_of_a_store_document_is_required(kind: str) -> None:
    schema: dict[str, Any] = json.loads((FOLDER / f"{kind}.schema.json").read_text(encoding="utf-8"))
    for record in _records(schema):
        fields = set(record["properties"])
        assert set(record["required"]) == fields - _CAN_LACK.get(record["title"].split(",")[0], set())


@pytest.fixture(scope="module")
def openapi() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((FOLDER / "openapi.json").read_text(encoding="utf-8"))
    return document


def _operations(openapi: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Operations by method and path."""
    return {
        f"{method.upper()} {path}": operation
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    }


def test_openapi_is_valid(openapi: dict[str, Any]) -> None:
    assert openapi["openapi"].startswith("3.1")
    OPENAPI_31_VALIDATOR.validate(openapi)
    for schema in openapi["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    assert "HTTPValidationError" not in json.dumps(openapi)


def test_every_operation_says_what_it_does(openapi: dict[str, Any]) -> None:
    operations = _operations(openapi)
    names = [operation["operationId"] for operation in operations.values()]
    assert len(set(names)) == len(names)
    for label, operation in operations.items():
        assert operation["operationId"].isidentifier(), label
        assert all(operation[field] for field in ("summary", "description", "tags")), label
        assert {tag["name"] for tag in openapi["tags"]}.issuperset(operation["tags"]), label
        assert all(parameter["description"] for parameter in operation.get("parameters", ())), label
        is_open = operation["operationId"] in ("healthz", "readyz")
        assert operation.get("security") == (None if is_open else [{"HTTPBearer": []}]), label
        assert ("401" in operation["responses"]) is not is_open, label


def test_every_reply_has_a_type(openapi: dict[str, Any]) -> None:
    for label, operation in _operations(openapi).items():
        for status, reply in operation["responses"].items():
            assert reply["description"], (label, status)
            if status >= "400":
                schema = {"$ref": "#/components/schemas/ProblemDocument"}
                assert reply["content"] == {PROBLEM: {"schema": schema}}, (label, status)
            elif status != "304":
                assert all(media_type["schema"] for media_type in reply["content"].values()), (label, status)
