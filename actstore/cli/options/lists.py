"""Options that take several values, separated by commas."""

from collections.abc import Iterable
from typing import Any

import click


def listed(given: Iterable[str]) -> list[str]:
    """The values of an option that can be repeated, each of which can be several, separated by commas."""
    return [name.strip() for part in given for name in part.split(",") if name.strip()]


class Numbers(click.ParamType[list[float]]):
    """Numbers, separated by commas."""

    name = "N[,N]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        if isinstance(value, list):
            return value
        try:
            return [float(part) for part in listed([str(value)])]
        except ValueError:
            return self.fail(
                f"{value!r} is not numbers; write one, or several separated by commas", param, ctx
            )
