"""The options that describe a job, shared by ``extract`` and ``plan``: one for each field of `Job`."""

from collections.abc import Callable
from typing import Any, Final

import click

from actstore.extraction.planning.job import Job

_METAVARS: Final = {"tokens": "SRC", "hooks": "GLOB[,GLOB]", "out": "URL"}


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a job to a click command."""
    for name, schema in reversed(Job.model_json_schema()["properties"].items()):
        command = click.option(f"--{name.replace('_', '-')}", **_attributes(name, schema))(command)
    return click.argument("job_file", metavar="[JOB.yaml]", required=False)(command)


def _attributes(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `click.option` for a field. Without the option, the field is left out."""
    parts = schema.get("anyOf", [schema])
    kind, values = parts[0]["type"], [value for part in parts for value in part.get("enum", ())]
    default = f" Default: {schema['default']}." if isinstance(schema.get("default"), str) else ""
    attributes: dict[str, Any] = {
        "default": None,
        "metavar": _METAVARS.get(name),
        "help": schema["description"] + default,
    }
    if name == "hooks":
        return attributes | {"multiple": True, "help": f"{schema['description']} Can be repeated."}
    if kind == "boolean":
        return attributes | {"is_flag": True}
    if kind == "integer":
        return attributes | ({"metavar": "|".join(("ID", *values))} if values else {"type": int})
    return attributes | ({"type": click.Choice(values)} if values else {})


def job_fields(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of a job that were given on the command line."""
    given = {name: value for name, value in options.items() if value not in (None, ())}
    if "hooks" in given:
        given["hooks"] = ",".join(given["hooks"])
    return {
        name: int(value) if name.endswith("_token") and str(value).isdecimal() else value
        for name, value in given.items()
    }
