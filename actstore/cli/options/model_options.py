"""Options of commands that are the fields of a job: one for each field, with its meaning as help."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import click
from pydantic import BaseModel


def options_of(
    job: type[BaseModel], metavars: Mapping[str, str]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options of a job, and its file as an argument, to a click command.

    Args:
        job: the model of the job.
        metavars: what stands for a value in the help, by field.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for name, schema in reversed(job.model_json_schema()["properties"].items()):
            flag = f"--{name.replace('_', '-')}"
            is_either = _kinds(schema)[0] == "boolean" and schema.get("default") is None
            flags = f"{flag}/--no-{flag[2:]}" if is_either else flag
            command = click.option(flags, **_attributes(schema, metavars.get(name)))(command)
        return click.argument("job_file", metavar="[JOB.yaml]", required=False)(command)

    return decorate


def given_fields(job: type[BaseModel], options: dict[str, Any]) -> dict[str, Any]:
    """The fields of a job that were given on the command line."""
    schemas = job.model_json_schema()["properties"]
    return {name: _value(schemas[name], value) for name, value in options.items() if value not in (None, ())}


def _parts(schema: dict[str, Any]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = schema.get("anyOf", [schema])
    return parts


def _kinds(schema: dict[str, Any]) -> list[str]:
    """The types that a field can have; those of the entries of a list come in ``list of``."""
    return [
        f"list of {part['items']['type']}" if part["type"] == "array" else part["type"]
        for part in _parts(schema)
    ]


def _attributes(schema: dict[str, Any], metavar: str | None) -> dict[str, Any]:
    """The arguments of `click.option` for a field. Without the option, the field is left out."""
    kinds = _kinds(schema)
    values = [
        value
        for part in _parts(schema)
        for value in part.get("enum", [part["const"]] if "const" in part else ())
    ]
    given = schema.get("default")
    shown = ",".join(given) if isinstance(given, list) else given
    default = "" if shown in (None, False) else f" Default: {shown}."
    repeated = " Can be repeated." if "list of string" in kinds else ""
    attributes: dict[str, Any] = {
        "default": None,
        "metavar": metavar,
        "help": schema["description"] + default + repeated,
    }
    if "list of string" in kinds:
        return attributes | {"multiple": True}
    if "list of integer" in kinds:
        return attributes
    if kinds[0] == "boolean":
        return attributes | {"is_flag": True}
    if kinds[0] == "number":
        return attributes | {"type": float}
    if kinds[0] == "integer":
        return attributes | ({"metavar": metavar or "|".join(("ID", *values))} if values else {"type": int})
    return attributes | ({"type": click.Choice(values)} if values else {})


def _value(schema: dict[str, Any], given: Any) -> Any:
    """The value of a field, from what `click` gives."""
    kinds = _kinds(schema)
    if "list of string" in kinds:
        return ",".join(given)
    if kinds[0] == "object":
        return _parsed(given)
    if "list of integer" in kinds:
        numbers = [_number(part.strip()) for part in given.split(",")]
        return numbers if len(numbers) > 1 else numbers[0]
    # A token is an id or a name.
    return int(given) if kinds[0] == "integer" and str(given).isdecimal() else given


def _parsed(text: str) -> Any:
    """A value in JSON; other text is left to the check of the job."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _number(text: str) -> int | str:
    """A number; other text is left to the check of the job."""
    try:
        return int(text)
    except ValueError:
        return text
