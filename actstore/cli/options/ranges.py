"""Options that choose sequences or positions."""

from typing import Any

import click


class Slice(click.ParamType[slice]):
    """A range of sequences or positions in Python's slice notation; a number is a slice of one."""

    name = "A:B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> slice:
        if isinstance(value, slice):
            return value
        try:
            parts = [int(part) if part else None for part in str(value).split(":")]
        except ValueError:
            parts = []
        if len(parts) == 1 and parts[0] is not None:
            return slice(parts[0], parts[0] + 1 or None)
        if len(parts) in (2, 3) and parts[2:] != [0]:
            return slice(*parts)
        return self.fail(f"{value!r} is not a range; write A:B, A: or :B, or one number", param, ctx)


class Places(click.ParamType[slice | list[int]]):
    """A range in Python's slice notation, or numbers separated by commas."""

    name = "A:B|N,N"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> slice | list[int]:
        if isinstance(value, slice | list):
            return value
        if ":" in str(value):
            return Slice().convert(value, param, ctx)
        try:
            return [int(part) for part in str(value).split(",")]
        except ValueError:
            return self.fail(f"{value!r} is neither a range A:B nor numbers such as 1,5,9", param, ctx)
