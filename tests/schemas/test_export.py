"""The schemas in the repository are those of the models, and say themselves where they hold."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

FOLDER = Path(__file__).parents[2] / "schemas"
KINDS = ("job", "plan", "tokens", "commit", "statistics", "manifest")


def _export() -> dict[str, str]:
    files: Callable[[], dict[str, str]] = runpy.run_path(str(FOLDER / "export.py"))["files"]
    return files()


def _records(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The schema and its parts; but not any JSON at all, which a model's configuration is made of."""
    parts: dict[str, dict[str, Any]] = schema.get("$defs", {})
    return [schema, *(part for name, part in parts.items() if name != "JsonValue")]


def test_schemas_are_those_of_the_models() -> None:
    for name, text in _export().items():
        path = FOLDER / name
        assert path.read_text(encoding="utf-8") == text, f"run `python schemas/export.py`: {name} has drifted"


def test_every_schema_is_exported() -> None:
    assert {path.name for path in FOLDER.glob("*.schema.json")} == _export().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_schema_is_valid_and_closed(kind: str) -> None:
    schema = json.loads((FOLDER / f"{kind}.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    assert schema["$id"] == f"urn:actstore:schema:{kind}:1"
    for record in _records(schema):
        assert record["additionalProperties"] is False


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "job"])
def test_every_field_of_a_store_document_is_required(kind: str) -> None:
    schema: dict[str, Any] = json.loads((FOLDER / f"{kind}.schema.json").read_text(encoding="utf-8"))
    for record in _records(schema):
        assert set(record["required"]) == set(record["properties"])
