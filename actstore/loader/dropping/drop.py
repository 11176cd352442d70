"""Choosing rows to leave out, by name, token, position, norm or mask; applied when a store is read."""

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import LoaderError
from actstore.loader.dropping.norm_limit import BLOCK_NBYTES, NormLimit
from actstore.loader.dropping.valid_rows import AllRows, MarkedRows, SamePositions, ValidRows
from actstore.store.reading.entries import Entries
from actstore.store.statistics.moments import has_statistics
from actstore.store.statistics.not_finite import is_masked_by_design
from actstore.tokens.chats.chat import ROLES

if TYPE_CHECKING:
    from actstore.store.committed_store import CommittedStore

PAD: Final = "pad"
NONFINITE: Final = "nonfinite"
_SPECIAL: Final = {"bos": "bos_token_id", "eos": "eos_token_id", "sep": "sep_token_id"}
Watch = Callable[[Iterator[NDArray[np.bool_]]], Iterator[NDArray[np.bool_]]]


@dataclass(frozen=True)
class Drop:
    """The rows to drop: a row is dropped if any of these fields names it."""

    tokens: tuple[int, ...] = ()
    """Token ids whose rows are dropped."""
    roles: tuple[str, ...] = ()
    """Roles in chats whose rows are dropped, ascending by number."""
    is_padding_dropped: bool = False
    """Whether to drop positions behind the end of their sequence, whatever token they hold."""
    is_nonfinite_dropped: bool = False
    """Whether to drop rows of tokens that have NaN or infinity in any hook of the loader. Padding is not looked at."""
    positions: tuple[int, ...] | None = None
    """Positions that are kept; None keeps all."""
    max_norm: float | None = None
    """Largest Euclidean norm, in the first hook of the loader, of a row that is kept."""
    mask: NDArray[np.bool_] | None = None
    """True where a row is kept, [n_sequences, entries]."""

    def looks_at_rows(self, entries: Entries) -> bool:
        """Whether rows have to be looked at one by one, rather than counted by position.

        Args:
            entries: entries of the store.
        """
        if entries.are_slots and (self.positions is not None or not entries.is_full):
            return True  # sequences have different positions
        is_by_value = self.is_nonfinite_dropped or self.max_norm is not None or self.mask is not None
        return bool(self.tokens or self.roles) or self.is_padding_dropped or is_by_value


def parse(
    store: "CommittedStore",
    drop: Sequence[str | int] = (),
    seqpos: slice | Sequence[int] | None = None,
    max_norm: float | None = None,
    mask: Any = None,
) -> Drop:
    """Parse what the caller wants dropped; names become token ids of the model.

    Args:
        store: the store that the rows are in.
        drop: ``bos``, ``eos``, ``sep``, ``pad``, ``nonfinite``, or token ids; padding that is not finite is dropped by
            ``pad`` alone. Of chats also ``template``, ``system``, ``user``, ``assistant`` and ``tool``.
        seqpos: positions to keep, counted as in a list of all positions of the context.
        max_norm: see `Drop`.
        mask: [n_sequences, entries] or [n_sequences], True where rows are kept.

    Raises:
        LoaderError: an unknown name, or one that the model has no token for, or a role where there are no chats;
            positions that do not exist; a mask of another shape or type.
    """
    drop = _named(drop)
    roles = tuple(role for role in ROLES if role in drop)
    if roles and not store.plan.request.tokens.has_roles:
        raise LoaderError(
            f"drop names {roles[0]!r}, and {store.url} holds no chats; roles are known of chats only"
        )
    tokens: list[int] = []
    for one in drop:
        if hasattr(one, "__index__") and not isinstance(one, bool):
            tokens.append(operator.index(one))
        elif one not in (PAD, NONFINITE, *ROLES):
            tokens += _ids(store, one)
    length = store.plan.context_length
    return Drop(
        tokens=tuple(sorted(set(tokens))),
        roles=roles,
        is_padding_dropped=PAD in drop,
        is_nonfinite_dropped=NONFINITE in drop,
        positions=None if seqpos is None else _positions(seqpos, length),
        max_norm=max_norm,
        mask=None if mask is None else _mask(mask, store.shape),
    )


def _named(drop: Any) -> tuple[Any, ...]:
    """The names and ids to drop, as a tuple: a generator can be iterated over only once."""
    if isinstance(drop, str) or hasattr(drop, "__index__"):
        return (drop,)
    if not isinstance(drop, Iterable):
        raise LoaderError(f"drop is {drop!r}; it must be a list of names and token ids")
    return tuple(drop)


def _ids(store: "CommittedStore", name: Any) -> list[int]:
    if not isinstance(name, str) or name not in _SPECIAL:
        roles = ROLES if store.plan.request.tokens.has_roles else ()
        known = ", ".join(repr(one) for one in (*_SPECIAL, PAD, NONFINITE, *roles))
        raise LoaderError(f"drop names {name!r}; it can be {known}, or token ids")
    configured = store.plan.request.model.config.get(_SPECIAL[name])
    ids = configured if isinstance(configured, list) else [configured]
    if not ids or not all(isinstance(one, int) for one in ids):
        raise LoaderError(
            f"the configuration of the model has no {_SPECIAL[name]}; give the id itself in drop"
        )
    return ids  # type: ignore[return-value]


def _positions(seqpos: slice | Sequence[int], length: int) -> tuple[int, ...]:
    if not isinstance(seqpos, slice | Iterable):
        raise LoaderError(f"seqpos is {seqpos!r}; it must be a slice, or a list of positions")
    if isinstance(seqpos, slice):
        positions = tuple(range(*seqpos.indices(length)))
    else:
        if any(not -length <= position < length for position in seqpos):
            raise LoaderError(f"seqpos is {list(seqpos)}; sequences have positions 0 to {length - 1}")
        positions = tuple(position % length for position in seqpos)
    return tuple(sorted(set(positions)))


def _mask(mask: Any, shape: tuple[int, int]) -> NDArray[np.bool_]:
    values = np.asarray(mask)
    if values.dtype != bool or values.shape not in (shape, shape[:1]):
        raise LoaderError(
            f"mask is {values.dtype} of shape {values.shape}; it must be bool of shape {shape} or {shape[:1]}, "
            "True where rows are kept"
        )
    return np.broadcast_to(values if values.ndim == 2 else values[:, None], shape)


def valid_rows(
    store: "CommittedStore", drop: Drop, hooks: Sequence[str], *, watch: Watch | None = None
) -> ValidRows:
    """The rows that are not dropped. Slots that are not in use are no rows.

    Where all positions are stored, positions alone are known without a read. To drop tokens, all token ids of the store
    are read, in pieces; to drop by norm, all norms of the hook, or all its values where norms are not stored; to drop
    rows that are not finite, the segments of each hook that have any. Where only chosen positions are stored, all of
    these are read to drop by position, or if sequences have different numbers of them.

    Args:
        store: the store that the rows are in.
        drop: the rows to drop.
        hooks: the hooks of the loader; norms are those of the first one.
        watch: passes on the masks of rows, piece by piece; it may raise an error to stop.

    Raises:
        LoaderError: no row is left.
        NotCommittedError: what must be read is not committed.
        StorageError: it cannot be read.
    """
    n_sequences, width = store.shape
    entries = store.entries
    by_position = np.ones(store.plan.context_length, bool)
    if drop.positions is not None:
        by_position[:] = False
        by_position[list(drop.positions)] = True
    not_finite = _not_finite_sequences(store, hooks) if drop.is_nonfinite_dropped else {}
    kept: ValidRows
    by_token = drop.tokens or drop.roles or (drop.is_padding_dropped and not entries.are_slots) or not_finite
    by_slot = entries.are_slots and not (entries.is_full and by_position.all())
    if by_token or by_slot or drop.max_norm is not None or drop.mask is not None:
        masks = _masks(store, entries, drop, hooks[0], not_finite, by_position)
        kept = MarkedRows(n_sequences * width, masks if watch is None else watch(masks))
    elif by_position.all():
        kept = AllRows(n_sequences * width)
    else:
        kept = SamePositions(n_sequences, by_position)
    if not kept.n_valid:
        raise LoaderError(f"all {kept.n_rows} rows of {store.url} are dropped; drop fewer of them")
    return kept


def _not_finite_sequences(store: "CommittedStore", hooks: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """The sequences that may hold NaN or infinity, [n_sequences] by hook; hooks without any are left out."""
    sequences_by_hook = {}
    for hook in hooks:
        if has_statistics(store.array_of(hook)):
            ranges = [sequences for sequences, _ in store.not_finite(hook)]
        else:
            ranges = [range(store.shape[0])]  # without statistics, any sequence may
        if ranges:
            sequences_by_hook[hook] = np.zeros(store.shape[0], bool)
            for sequences in ranges:
                sequences_by_hook[hook][sequences.start : sequences.stop] = True
    return sequences_by_hook


def _masks(
    store: "CommittedStore",
    entries: Entries,
    drop: Drop,
    hook: str,
    not_finite: Mapping[str, NDArray[np.bool_]],
    by_position: NDArray[np.bool_],
) -> Iterator[NDArray[np.bool_]]:
    n_sequences, length = store.shape[0], store.plan.context_length
    limit = None if drop.max_norm is None else NormLimit(store, hook, drop.max_norm)
    largest = max((store[name].nbytes for name in not_finite), default=0)
    row_nbytes = largest // max(1, n_sequences) + 1 if not_finite else length * 4
    step = max(1, BLOCK_NBYTES // row_nbytes)
    if limit is not None:
        step = min(step, limit.n_at_once)
    tokens, counts = store.tokens, entries.counts
    for start in range(0, n_sequences, step):
        rows = slice(start, min(start + step, n_sequences))
        if entries.are_slots:
            positions = entries.positions(rows)
            mask = by_position[positions] & (positions >= 0)
        else:
            mask = np.tile(by_position, (rows.stop - start, 1))
            if drop.is_padding_dropped:
                mask &= entries.in_use(rows)
        if drop.mask is not None:
            mask &= drop.mask[rows]
        if drop.tokens:
            ids = entries.of_tokens(tokens, rows)
            for token in drop.tokens:
                mask &= ids != token
        if drop.roles:
            roles = entries.of_tokens(store.roles, rows)
            for role in drop.roles:
                mask &= roles != ROLES[role]
        for name, is_looked_at in not_finite.items():
            some = np.flatnonzero(is_looked_at[rows])
            if len(some):
                # Statistics do not count padding, so a segment whose only such rows are padding is not read; nor is
                # padding here.
                is_padding = np.arange(entries.width) >= counts[rows][some][:, None]
                mask[some] &= is_padding | _is_finite(store, name, start + some)
        if limit is not None:
            limit.apply(rows, mask)
        yield mask


def _is_finite(store: "CommittedStore", hook: str, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether all elements of a row are finite, [n, entries]. Attention scores may hold -Inf, which masks."""
    values = store[hook][rows].flatten(2)
    is_finite = values.isfinite()
    if is_masked_by_design(hook):
        is_finite |= values == -math.inf
    is_row_finite: NDArray[np.bool_] = is_finite.all(-1).numpy()
    return is_row_finite
