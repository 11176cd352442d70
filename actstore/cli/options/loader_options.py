"""Options of commands that are options of a loader."""

from collections.abc import Callable
from typing import Any

import click

from actstore.loader.arguments import OPTIONS


def loader_option(name: str, more: str = "", **attributes: Any) -> Callable[[Any], Any]:
    """The option of a command that sets an option of a loader, with the same default unless another is given.

    Args:
        name: the name of the option of the loader.
        more: text behind what the option means.
        attributes: as for `click.option`.
    """
    option = OPTIONS[name]
    known: dict[str, Any] = {
        "default": None if option.default in (..., ()) else option.default,
        "show_default": True,
        "help": option.meaning.replace("`", "") + more,
    }
    return click.option(f"--{name.replace('_', '-')}", **known | attributes)
