"""Options whose value is a number of bytes."""

from collections.abc import Callable

import click


def byte_size(minimum: int = 1) -> Callable[[str | int], int]:
    """The type of an option that is a whole number of bytes, with or without a unit: ``1073741824``, ``1GiB``, ``1.5
    GB``.

    Args:
        minimum: the smallest number of bytes that makes sense.
    """

    def size(value: str | int) -> int:
        from pydantic import ByteSize, TypeAdapter, ValidationError

        try:
            nbytes = int(TypeAdapter(ByteSize).validate_python(value))
        except (ValidationError, OverflowError) as error:
            raise click.BadParameter(
                f"{value!r} is not a number of bytes; write one such as 1073741824, 1GiB or 1GB"
            ) from error
        if nbytes < minimum:
            raise click.BadParameter(f"{value!r} is too little; the least is {minimum} bytes")
        return nbytes

    return size
