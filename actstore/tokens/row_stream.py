"""Taking packed rows in other amounts than the blocks they come in."""

from collections.abc import Iterable, Iterator

from actstore.tokens.pack import Rows


class RowStream:
    """A stream that gives each row once, in order."""

    def __init__(self, blocks: Iterable[Rows]) -> None:
        self._blocks = iter(blocks)
        self._left: Rows | None = None

    def take(self, n_rows: int) -> Iterator[Rows]:
        """Yield the next ``n_rows`` rows, or all that are left if they are fewer, in blocks."""
        while n_rows and (block := self._next()) is not None:
            if len(block) > n_rows:
                block, self._left = block[:n_rows], block[n_rows:]
            n_rows -= len(block)
            yield block

    def rest(self) -> Iterator[Rows]:
        """Yield all further rows, in blocks."""
        while (block := self._next()) is not None:
            yield block

    def _next(self) -> Rows | None:
        block, self._left = self._left, None
        return next(self._blocks, None) if block is None else block
