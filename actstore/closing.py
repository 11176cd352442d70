"""The base class of objects that a ``with`` block closes."""

from types import TracebackType
from typing import Self


class Closing:
    """Makes a class with `close` a context manager."""

    def close(self) -> None:
        """Release what the object holds."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
