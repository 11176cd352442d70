"""The rows of a store that a scan takes."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import JobError
from actstore.loader.dropping.drop import NONFINITE, PAD, parse
from actstore.tokens.chats.chat import ROLES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from actstore.store.committed_store import CommittedStore


@dataclass(frozen=True)
class ChosenRows:
    """The rows of a scan: those of real tokens, without the dropped ones."""

    sequences: NDArray[np.bool_] | None
    """Sequences that are taken, [n_sequences]; None for all."""
    tokens: tuple[int, ...]
    """Token ids whose rows are left out."""
    positions: NDArray[np.bool_] | None
    """Positions that are taken, [context_length]; None for all."""
    roles: tuple[int, ...] = ()
    """Numbers of the roles in chats whose rows are left out."""

    @classmethod
    def of(
        cls,
        store: "CommittedStore",
        drop: "Sequence[str | int]" = (),
        seqpos: "slice | Sequence[int] | None" = None,
        sequences: Any = None,
    ) -> "ChosenRows":
        """Choose rows.

        Args:
            store: the store that the rows are in.
            drop: ``bos``, ``eos``, ``sep``, token ids, or roles in chats to leave out.
            seqpos: positions to take, a slice or a list.
            sequences: sequences to take: a slice, a list of numbers, or bool [n_sequences]; None for all.

        Raises:
            JobError: the sequences are not in the store, or there are none.
            LoaderError: an unknown name, one that the model has no token for, or a role where there are no chats;
                positions that do not exist.
        """
        names = (drop,) if isinstance(drop, str) else tuple(drop)
        dropped = parse(store, [name for name in names if name not in (PAD, NONFINITE)], seqpos)
        positions = None
        if dropped.positions is not None:
            positions = np.zeros(store.plan.context_length, bool)
            positions[list(dropped.positions)] = True
        roles = tuple(ROLES[role] for role in dropped.roles)
        return cls(_sequences(sequences, store.shape[0]), dropped.tokens, positions, roles)

    def taken(self, store: "CommittedStore", sequences: "slice | NDArray[np.int64]") -> NDArray[np.bool_]:
        """True where a row of these sequences is taken, [n_sequences, entries]."""
        entries = store.entries
        return self.of_block(
            sequences,
            entries.of_tokens(store.tokens, sequences),
            entries.positions(sequences),
            entries.in_use(sequences),
            entries.of_tokens(store.roles, sequences) if self.roles else None,
        )

    def of_block(
        self,
        sequences: "slice | NDArray[np.int64]",
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        in_use: NDArray[np.bool_],
        roles: NDArray[np.int8] | None,
    ) -> NDArray[np.bool_]:
        """True where a row is taken, [n_sequences, entries], from what is known of the sequences.

        Args:
            sequences: their numbers.
            tokens: token id of each entry, [n_sequences, entries].
            positions: its position.
            in_use: whether it is in use.
            roles: role of its token; None where no role is left out.
        """
        taken = in_use.copy()
        if self.sequences is not None:
            taken &= self.sequences[sequences][:, None]
        if self.positions is not None:
            taken &= self.positions[positions]
        for token in self.tokens:
            taken &= tokens != token
        for role in self.roles:
            taken &= roles != role
        return taken

    def identity(self) -> str:
        """A text that differs for other rows."""
        digest = hashlib.sha256()
        for part in (self.sequences, self.positions):
            digest.update(b"all" if part is None else np.packbits(part).tobytes() + str(len(part)).encode())
        digest.update(repr((self.tokens, self.roles)).encode())
        return digest.hexdigest()


def _sequences(sequences: Any, n_sequences: int) -> NDArray[np.bool_] | None:
    if sequences is None:
        return None
    if isinstance(sequences, slice):
        taken = np.zeros(n_sequences, bool)
        taken[sequences] = True
    else:
        given = np.asarray(sequences)
        if given.dtype == bool and given.shape == (n_sequences,):
            taken = given.copy()
        elif given.ndim == 1 and given.dtype.kind in "iu" and given.size:
            if given.min() < -n_sequences or given.max() >= n_sequences:
                raise JobError(
                    f"sequences reach from {given.min()} to {given.max()}, and the store has {n_sequences}"
                )
            taken = np.zeros(n_sequences, bool)
            taken[given] = True
        else:
            raise JobError(
                f"sequences are {given.dtype} of shape {given.shape}; give a slice, a list of numbers, or bool "
                f"[{n_sequences}]"
            )
    if not taken.any():
        raise JobError("sequences name none of the store; a scan needs one at least")
    return taken
