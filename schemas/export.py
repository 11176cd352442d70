"""``python schemas/export.py``: writes the JSON Schemas and ``openapi.json`` of this folder from the code."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from actstore.extraction.planning.job import Job
from actstore.patching.jobs.job import PatchJob
from actstore.query.server.app import openapi
from actstore.store.format.plan import Plan
from actstore.store.records.commit import CommitRecord, TokensRecord
from actstore.store.records.manifest import Manifest, RunStatistics

FOLDER = Path(__file__).parent

Mode = Literal["validation", "serialization"]

# A job may leave out fields with a default. Writers of a store write every field, so all of them are required
# there.
_MODELS: dict[str, tuple[type[BaseModel], str, Mode]] = {
    "job": (Job, "actstore job", "validation"),
    "patchjob": (PatchJob, "actstore patching job", "validation"),
    "plan": (Plan, "actstore plan, store format 1", "serialization"),
    "tokens": (TokensRecord, "actstore tokens record, store format 1", "serialization"),
    "commit": (CommitRecord, "actstore commit record, store format 1", "serialization"),
    "statistics": (RunStatistics, "actstore statistics of a run, store format 1", "serialization"),
    "manifest": (Manifest, "actstore manifest, store format 1", "serialization"),
}


# Not a field of the models, since it is about the bytes of the document.
_CHECKSUM = {
    "description": "CRC-32C of all bytes behind the line of this field, which is the second one.",
    "maximum": 2**32 - 1,
    "minimum": 0,
    "title": "Checksum",
    "type": "integer",
}


class _Generator(GenerateJsonSchema):
    """Pydantic's generator, except for documents that are written: pydantic leaves fields with defaults optional there,
    but here only those are optional that can be left out of a document.
    """

    def field_is_required(self, field: Any, total: bool) -> bool:
        is_always_written = self.mode == "serialization" and "serialization_exclude_if" not in field
        return is_always_written or super().field_is_required(field, total)


def schemas() -> dict[str, dict[str, Any]]:
    """The schemas by kind: job, plan, tokens, ..."""
    schema_by_kind = {}
    for kind, (model, title, mode) in _MODELS.items():
        schema = model.model_json_schema(mode=mode, schema_generator=_Generator)
        head = {
            "$schema": GenerateJsonSchema.schema_dialect,
            "$id": f"urn:actstore:schema:{kind}:1",
            "title": title,
        }
        if mode == "serialization":
            schema["properties"] = {"checksum": _CHECKSUM} | schema["properties"]
            schema["required"] = ["checksum", *schema["required"]]
        schema_by_kind[kind] = head | {key: value for key, value in schema.items() if key not in head}
    return schema_by_kind


def files() -> dict[str, str]:
    """The text of each file, by name."""
    texts = {f"{kind}.schema.json": json.dumps(schema, indent=2) + "\n" for kind, schema in schemas().items()}
    return texts | {"openapi.json": json.dumps(openapi(), indent=2, sort_keys=True) + "\n"}


if __name__ == "__main__":
    for name, text in files().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
