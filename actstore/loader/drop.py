"""Which rows are left out, asked for by name, token, position, norm or mask, and applied when a store is read."""

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import LoaderError
from actstore.loader.valid_rows import AllRows, MarkedRows, SamePositions, ValidRows

if TYPE_CHECKING:
    from actstore.store.store import Store

PAD: Final = "pad"
_SPECIAL: Final = {"bos": "bos_token_id", "eos": "eos_token_id", "sep": "sep_token_id"}
_BLOCK_NBYTES: Final = 1 << 24
"""Of the tokens, or activations, that are looked at together."""


@dataclass(frozen=True)
class Drop:
    """What is asked for. Rows that any of it names are dropped."""

    tokens: tuple[int, ...] = ()
    """Ids, wherever they are."""
    is_padding_dropped: bool = False
    """Positions behind the length of their sequence, whatever token is there."""
    positions: tuple[int, ...] | None = None
    """Those that are kept; None keeps all."""
    max_norm: float | None = None
    """Rows whose Euclidean norm is larger, in the first hook of the loader."""
    mask: NDArray[np.bool_] | None = None
    """[n_sequences, context_length] True where a row is kept."""


def parse(
    store: "Store",
    drop: Sequence[str | int] = (),
    seqpos: slice | Sequence[int] | None = None,
    max_norm: float | None = None,
    mask: Any = None,
) -> Drop:
    """What a user asked for, with names turned into token ids of the model.

    Args:
        store: whose rows they are.
        drop: ``bos``, ``eos``, ``sep``, ``pad``, or token ids.
        seqpos: positions to keep, counted as in a list.
        max_norm: see `Drop`.
        mask: [n_sequences, context_length] or [n_sequences], True where rows are kept.

    Raises:
        LoaderError: an unknown name, or one that the model has no token for; positions that there are not; a mask of
            another shape or type.
    """
    if isinstance(drop, str | int):
        drop = (drop,)
    tokens: list[int] = []
    for one in drop:
        if hasattr(one, "__index__") and not isinstance(one, bool):
            tokens.append(operator.index(one))
        elif one != PAD:
            tokens += _ids(store, one)
    length = store.shape[1]
    return Drop(
        tokens=tuple(sorted(set(tokens))),
        is_padding_dropped=PAD in drop,
        positions=None if seqpos is None else _positions(seqpos, length),
        max_norm=max_norm,
        mask=None if mask is None else _mask(mask, store.shape),
    )


def _ids(store: "Store", name: Any) -> list[int]:
    if name not in _SPECIAL:
        known = ", ".join(repr(one) for one in (*_SPECIAL, PAD))
        raise LoaderError(f"drop names {name!r}; it can be {known}, or token ids")
    found = store.plan.request.model.config.get(_SPECIAL[name])
    ids = found if isinstance(found, list) else [found]
    if not ids or not all(isinstance(one, int) for one in ids):
        raise LoaderError(
            f"the configuration of the model has no {_SPECIAL[name]}; give the id itself in drop"
        )
    return ids  # type: ignore[return-value]


def _positions(seqpos: slice | Sequence[int], length: int) -> tuple[int, ...]:
    if not isinstance(seqpos, slice | Iterable):
        raise LoaderError(f"seqpos is {seqpos!r}; it must be a slice, or a list of positions")
    if isinstance(seqpos, slice):
        found = tuple(range(*seqpos.indices(length)))
    else:
        if any(not -length <= position < length for position in seqpos):
            raise LoaderError(f"seqpos is {list(seqpos)}; sequences have positions 0 to {length - 1}")
        found = tuple(position % length for position in seqpos)
    return tuple(sorted(set(found)))


def _mask(mask: Any, shape: tuple[int, int]) -> NDArray[np.bool_]:
    values = np.asarray(mask)
    if values.dtype != bool or values.shape not in (shape, shape[:1]):
        raise LoaderError(
            f"mask is {values.dtype} of shape {values.shape}; it must be bool of shape {shape} or {shape[:1]}, "
            "True where rows are kept"
        )
    return np.broadcast_to(values if values.ndim == 2 else values[:, None], shape)


def valid_rows(store: "Store", drop: Drop, hook: str) -> ValidRows:
    """The rows that are left.

    Nothing is read if what is asked for are positions. Token ids have all token ids of the store read, and a norm
    all values of the hook, in pieces.

    Args:
        store: whose rows they are.
        drop: what is left out.
        hook: the one that has the norm.

    Raises:
        LoaderError: nothing is left.
        NotCommittedError: what must be read is not there.
        StorageError: it cannot be read.
    """
    n_sequences, length = store.shape
    by_position = np.ones(length, bool)
    if drop.positions is not None:
        by_position[:] = False
        by_position[list(drop.positions)] = True
    found: ValidRows
    if drop.tokens or drop.is_padding_dropped or drop.max_norm is not None or drop.mask is not None:
        found = MarkedRows(n_sequences * length, _masks(store, drop, hook, by_position))
    elif by_position.all():
        found = AllRows(n_sequences * length)
    else:
        found = SamePositions(n_sequences, by_position)
    if not found.n_valid:
        raise LoaderError(f"all {found.n_rows} rows of {store.url} are dropped; drop fewer of them")
    return found


def _masks(
    store: "Store", drop: Drop, hook: str, by_position: NDArray[np.bool_]
) -> Iterator[NDArray[np.bool_]]:
    n_sequences, length = store.shape
    acts = None if drop.max_norm is None else store[hook]
    row_nbytes = length * 4 if acts is None else acts.nbytes // max(1, n_sequences) + 1
    step = max(1, _BLOCK_NBYTES // row_nbytes)
    tokens, lengths = store.tokens, store.lengths
    for start in range(0, n_sequences, step):
        rows = slice(start, min(start + step, n_sequences))
        mask = np.tile(by_position, (rows.stop - start, 1))
        if drop.mask is not None:
            mask &= drop.mask[rows]
        if drop.is_padding_dropped:
            mask &= np.arange(length) < lengths[rows][:, None]
        if drop.tokens:
            ids = tokens[rows]
            for token in drop.tokens:
                mask &= ids != token
        if acts is not None and drop.max_norm is not None:
            # In float64, whose sums do not differ by the machine in any digit that could matter: ranks must agree.
            values = acts[rows].double().flatten(2)
            # NaN is not below anything, so such rows go, too.
            mask &= (values.square_().sum(-1).sqrt_() <= drop.max_norm).numpy()
        yield mask
