"""What ``--json`` prints."""

import json
import math
from typing import Any

import click


def print_json(document: Any, *, indent: int | None = 2, err: bool = False) -> None:
    """Print a document as JSON. Numbers that are not finite become null, since JSON has none of them.

    Args:
        document: dictionaries, lists, tuples, text, numbers and None.
        indent: spaces of each level; None for one line.
        err: whether it goes to stderr.
    """
    click.echo(json.dumps(_plain(document), indent=indent, allow_nan=False), err=err)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
