"""Blocks of packed rows, taken in other amounts than those in which they come."""

from collections.abc import Iterable, Iterator

from actstore.tokens.pack import Rows


class RowStream:
    """Gives each row once, in order."""

    def __init__(self, blocks: Iterable[Rows]) -> None:
        self._blocks = iter(blocks)
        self._left: Rows | None = None

    def take(self, n_rows: int) -> Iterator[Rows]:
        """The next rows, as many as there are up to ``n_rows``, in blocks."""
        while n_rows and (block := self._next()) is not None:
            if len(block) > n_rows:
                block, self._left = block[:n_rows], block[n_rows:]
            n_rows -= len(block)
            yield block

    def rest(self) -> Iterator[Rows]:
        """All further rows, in blocks."""
        while (block := self._next()) is not None:
            yield block

    def _next(self) -> Rows | None:
        block, self._left = self._left, None
        return next(self._blocks, None) if block is None else block
