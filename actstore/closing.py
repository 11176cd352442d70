"""What is closed at the end of a ``with`` block."""

from types import TracebackType
from typing import Self


class Closing:
    """Gives a class with `close` the two methods of a context."""

    def close(self) -> None:
        """Give back what is held."""
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
