"""``--job FILE``: the arguments and options of a command from a YAML file."""

import difflib
from typing import Any

import click

from actstore.errors import JobError


def _read(context: click.Context, _option: click.Parameter, path: str | None) -> None:
    if path is None:
        return
    from actstore.extraction.planning.job_file import read_fields

    fields = {name.replace("-", "_"): value for name, value in read_fields(path).items()}
    # An option is known by what is written on the command line: --json, not as_json.
    params = {_name(param): param for param in context.command.params if param.expose_value}
    if "store" in fields and "url" in fields:
        raise JobError(f"{path} has both store and url, which are the same; keep one of them")
    if "store" in fields:
        fields["url"] = fields.pop("store")
    for name in fields:
        if name not in params:
            near = difflib.get_close_matches(name, params)
            hint = f" (the nearest is {near[0]})" if near else ""
            raise JobError(f"{path}: {name} is not a field of a job of {context.command.name}{hint}")
    context.default_map = {
        params[name].name or name: _given(params[name], value, f"{path}: {name}")
        for name, value in fields.items()
        if value is not None
    }


def _name(param: click.Parameter) -> str:
    """What a parameter is called in a file."""
    if isinstance(param, click.Argument):
        return str(param.name)
    return max(param.opts, key=len).lstrip("-").replace("-", "_")


def _given(param: click.Parameter, value: Any, where: str) -> Any:
    """A value as it would be on the command line.

    Raises:
        JobError: an option that is on or off is given neither true nor false, or another one is.
    """
    is_flag = isinstance(param, click.Option) and param.is_flag
    if isinstance(value, dict) or isinstance(value, bool) != is_flag:
        raise JobError(
            f"{where} is {value!r}; it must be {'true or false' if is_flag else 'text, a number or a list'}"
        )
    listed = [str(one) for one in value] if isinstance(value, list) else None
    if param.multiple or param.nargs == -1:
        return listed if listed is not None else [str(value)]
    if listed is not None:
        return ",".join(listed)
    return value if isinstance(value, bool) else str(value)


job_defaults = click.option(
    "--job",
    metavar="JOB.yaml",
    is_eager=True,
    expose_value=False,
    callback=_read,
    help="File with the options of this command, by name, and store: URL; those on the command line take precedence.",
)
"""Adds ``--job`` to a command."""
