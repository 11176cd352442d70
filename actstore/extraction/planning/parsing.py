"""Making a job from its fields: every problem at once, with the field and what it may be."""

import difflib
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from actstore.counted import counted
from actstore.errors import JobError
from actstore.reason import reason

AnyJob = TypeVar("AnyJob", bound=BaseModel)


def parsed(kind: type[AnyJob], fields: Mapping[str, Any], where: str, expected: Mapping[str, str]) -> AnyJob:
    """Make a job from its fields.

    Args:
        kind: the model of the job.
        fields: its fields.
        where: what the fields are of, for messages.
        expected: what a field should be, by name, for fields that can be one of several things: pydantic reports what
            each of them expects, and this is one sentence for all.

    Raises:
        JobError: a field is wrong; the message lists every problem with its location.
    """
    try:
        # Through JSON, so that Python, YAML and the schema agree on what a list or an integer is.
        text = json.dumps(dict(fields), default=_not_json)
    except (ValueError, RecursionError, TypeError) as error:
        # A list inside of itself, or nested a thousand deep; a number of a million digits; a key that JSON lacks.
        raise JobError(f"{where} has a value that no field can have: {reason(error)}") from error
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        lines = list({problem["loc"][:1]: _problem(problem, expected, kind) for problem in problems}.values())
        count = counted(len(lines), "problem")
        raise JobError(f"{where}: {count}: {'; '.join(lines)}") from error


def _not_json(value: Any) -> dict[str, str]:
    """A value that no field accepts, in place of a type that JSON lacks (a date in YAML, a set in Python)."""
    return {type(value).__name__: str(value)}


_KINDS = {"missing": "is required", "extra_forbidden": "is not a field of a job"}


def _problem(problem: Any, expected: Mapping[str, str], kind: type[BaseModel]) -> str:
    """One line about a problem: the field, what is expected, and its value."""
    if not problem["loc"]:
        return reason(problem["msg"])
    field = str(problem["loc"][0])
    if problem["type"] in _KINDS:
        near = (
            difflib.get_close_matches(field, kind.model_fields)
            if problem["type"] == "extra_forbidden"
            else []
        )
        return f"{field}: {_KINDS[problem['type']]}" + (f" (the nearest is {near[0]})" if near else "")
    text = expected.get(field) or problem["msg"][0].lower() + problem["msg"][1:]
    value = repr(problem["input"])
    return f"{field}: {text}, got {value if len(value) <= 80 else value[:77] + '...'}"
