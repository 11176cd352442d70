"""Options that take a number of bytes."""

from typing import Any

import click


class ByteSize(click.ParamType[int]):
    """A whole number of bytes, also with a unit: ``1073741824``, ``1GiB`` and ``1.5 GB``."""

    name = "size"

    def __init__(self, minimum: int = 1) -> None:
        """
        Args:
            minimum: fewest bytes that make sense.
        """
        self._minimum = minimum

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """As click has it: the number of bytes, or a usage error."""
        from pydantic import ByteSize as Bytes
        from pydantic import TypeAdapter, ValidationError

        try:
            nbytes = int(TypeAdapter(Bytes).validate_python(value))
        except (ValidationError, OverflowError):
            self.fail(
                f"{value!r} is no number of bytes; write one such as 1073741824, 1GiB or 1GB", param, ctx
            )
        if nbytes < self._minimum:
            self.fail(f"{value!r} is too little; the least is {self._minimum} bytes", param, ctx)
        return nbytes
