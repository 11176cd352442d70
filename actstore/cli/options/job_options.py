"""The options that describe a job, shared by ``extract`` and ``plan``: one for each field of `Job`."""

from typing import Any, Final

from actstore.cli.options.model_options import given_fields, options_of
from actstore.extraction.planning.job import Job

_METAVARS: Final = {
    "tokens": "SRC",
    "chat_template": "FILE",
    "tools": "FILE",
    "chat_template_arguments": "JSON",
    "keep": "NAME[,NAME]",
    "hooks": "GLOB[,GLOB]",
    "context_length": "N|auto",
    "out": "URL",
}
job_options: Final = options_of(Job, _METAVARS)


def job_fields(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of a job that were given on the command line."""
    return given_fields(Job, options)
