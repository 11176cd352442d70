"""Packed rows in plain files, read back as memory maps, so that any corpus takes bounded memory."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import StorageError, TokensError
from actstore.reason import reason
from actstore.tokens.pack import Rows
from actstore.tokens.selection.slots import SlotSpool

_FILES = {"tokens": "<i4", "lengths": "<i4", "documents": "<i8", "offsets": "<i4"}
_CHAT_FILES = {"roles": "<i1", "turns": "<i4"}


@dataclass(frozen=True)
class Spool:
    """All packed rows, N of L tokens, as read-only memory maps of little-endian files."""

    tokens: NDArray[np.int32]
    """Token ids, [N, L], in tokens.i32."""
    lengths: NDArray[np.int32]
    """Tokens of each row before its padding, [N], in lengths.i32."""
    documents: NDArray[np.int64]
    """Document numbers, [N, L], in documents.i64."""
    offsets: NDArray[np.int32]
    """Offsets in documents, [N, L], in offsets.i32."""
    n_tokens: int
    """Sum of lengths: inserted tokens count, padding does not."""
    n_documents: int
    """Documents with at least one token in a row."""
    sha256: str
    """Hex SHA-256 of tokens.i32, which holds all token rows in packed order."""
    n_truncated: int = 0
    """Documents that were cut."""
    n_tokens_cut: int = 0
    """Tokens that were cut off them."""
    positions: NDArray[np.int32] | None = None
    """Chosen positions, [N, n_slots], ascending, then -1; None if all are."""
    n_rows: int | None = None
    """Number of chosen positions; None if all are."""
    roles: NDArray[np.int8] | None = None
    """Roles in chats, [N, L], in roles.i8; None if documents are no chats."""
    turns: NDArray[np.int32] | None = None
    """Numbers of messages in chats, [N, L], in turns.i32; None if documents are no chats."""

    @property
    def n_slots(self) -> int | None:
        """Slots of a sequence for chosen positions; None if all are."""
        return None if self.positions is None else self.positions.shape[1]

    @property
    def n_sequences(self) -> int:
        return len(self.tokens)


def spool(
    rows: Iterable[Rows],
    folder: Path,
    *,
    has_roles: bool = False,
    choose: Callable[[Rows], NDArray[np.int32]] | None = None,
    n_slots: int = 1,
) -> Spool:
    """Write the blocks that `pack` yields to `folder`, in order, replacing an earlier spool there.

    Document numbers must not descend; those of one source do not. Raises TokensError if there is not one row, and
    StorageError if the folder cannot be written.

    `has_roles` says that the blocks have roles and turns. `choose` gives the chosen positions of a block, [n, slots],
    ascending, then -1; None if all are. There are `n_slots` slots, or more if a sequence needs them.
    """
    digest = hashlib.sha256()
    n_sequences = n_tokens = n_documents = n_truncated = n_tokens_cut = length = 0
    last = -1
    types = _FILES | (_CHAT_FILES if has_roles else {})
    paths = {name: folder / f"{name}.i{8 * np.dtype(dtype).itemsize}" for name, dtype in types.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            files = {name: stack.enter_context(path.open("wb")) for name, path in paths.items()}
            chosen = None if choose is None else stack.enter_context(contextlib.closing(SlotSpool(folder)))
            for block in rows:
                for name, dtype in types.items():
                    files[name].write(_little_endian(getattr(block, name), dtype))
                if choose is not None and chosen is not None:
                    chosen.add(choose(block))
                digest.update(_little_endian(block.tokens, _FILES["tokens"]))
                n_sequences, length = n_sequences + len(block), block.tokens.shape[1]
                n_tokens += int(block.lengths.sum(dtype=np.int64))
                new, last = _count_after(block.documents, last)
                n_documents += new
                n_truncated += int(np.count_nonzero(block.cut))
                n_tokens_cut += int(block.cut.sum(dtype=np.int64))
        positions = chosen.finish(n_slots) if chosen is not None and n_sequences else None
    except TokensError:
        raise
    except OSError as error:
        raise StorageError(f"the packed tokens cannot be written to {folder}: {reason(error)}") from error
    if n_sequences == 0:
        raise TokensError("there is nothing to spool: the source packs to 0 rows; give more text")
    shapes = {"lengths": (n_sequences,)}
    maps = {
        name: np.memmap(path, np.dtype(types[name]), "r", shape=shapes.get(name, (n_sequences, length)))
        for name, path in paths.items()
    }
    return Spool(
        **maps,
        n_tokens=n_tokens,
        n_documents=n_documents,
        sha256=digest.hexdigest(),
        positions=positions,
        n_rows=None if chosen is None else chosen.n_rows,
        n_truncated=n_truncated,
        n_tokens_cut=n_tokens_cut,
    )


def order(n: int, seed: int | None) -> NDArray[np.int64] | None:
    """The permutation [n] of rows given by `seed`: stored row i is packed row order[i].

    It is `numpy.random.Generator(numpy.random.PCG64(seed)).permutation(n)`, or None without a seed, for stored order.
    """
    if seed is None:
        return None
    return np.random.Generator(np.random.PCG64(seed)).permutation(n)


def _little_endian(values: NDArray[Any], dtype: str) -> memoryview:
    return np.ascontiguousarray(values, dtype).reshape(-1).view(np.uint8).data


def _count_after(documents: NDArray[np.int64], last: int) -> tuple[int, int]:
    """(how many different document numbers above `last` there are, the highest number)."""
    flat = documents.reshape(-1)
    numbers = flat[flat > last]
    if not len(numbers):
        return 0, last
    return 1 + int(np.count_nonzero(numbers[1:] != numbers[:-1])), int(numbers[-1])
