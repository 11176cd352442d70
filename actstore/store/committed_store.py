"""A store, open for reading."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray

from actstore.counted import counted
from actstore.errors import HookError, StorageError
from actstore.hooks.naming.listing import listing
from actstore.hooks.naming.names import HookName, forward_order, long_name, stored_as
from actstore.storage.blobs import BlobReader, Blobs
from actstore.storage.opening import open_blobs
from actstore.storage.pinned import pinned
from actstore.store.format.plan import FIRST_RUN, HookArray, Plan
from actstore.store.reading.activations import Activations
from actstore.store.reading.checksums import Checksums
from actstore.store.reading.counts import Counts
from actstore.store.reading.entries import Entries
from actstore.store.reading.identity import Identity, check_same, identity_of
from actstore.store.reading.kept_columns import KeptColumns
from actstore.store.reading.rows import Rows, Section
from actstore.store.reading.run_sections import hook_section, norm_section, token_section
from actstore.store.reading.stored_norms import NormsOfPart, StoredNorms
from actstore.store.reading.stored_statistics import StoredStatistics
from actstore.store.reading.version import Version
from actstore.store.records.commit import plan_key
from actstore.store.records.run import Run, overlap, read_runs, runs_over, runs_with_tokens
from actstore.store.statistics.hook_statistics import Statistics
from actstore.store.statistics.moments import has_statistics

if TYPE_CHECKING:
    import zarr

    from actstore.hooks.families.config import HookedConfig
    from actstore.hooks.naming.names import HookNames

Check = Literal["first-use"]
CHECK: Final = "ACTSTORE_CHECK"
"""Environment variable with the check to use where none is given."""


class CommittedStore:
    """Committed activations of one model over one set of tokens: what they are, and where every byte of them is.

    `actstore.Store` adds loaders, caches and searches. A store that is still being written can be read: what is
    committed is there, and reading anything else raises.
    """

    def __init__(
        self,
        storage: BlobReader,
        runs: tuple[Run, ...],
        look: Callable[[], tuple[Run, ...]],
        check: Check | None = None,
    ) -> None:
        """
        Args:
            storage: storage of the store.
            runs: runs of the store, with what is committed of each.
            look: reads the runs again, or raises a `StorageError` if there are none any more.
            check: check as in `actstore.open`.
        """
        self.url = storage.url
        self._storage = storage
        self._look = look
        self._check = check
        self._set_runs(runs)

    @classmethod
    def in_storage(cls, storage: Blobs, check: Check | None = None) -> Self:
        """Open the store in some storage.

        Args:
            storage: storage of the store.
            check: check as in `actstore.open`.

        Raises:
            StorageError: there is no store, or it cannot be read; or there is no such check.
        """
        chosen = _check_of(check)

        def look() -> tuple[Run, ...]:
            runs = read_runs(storage)
            if not runs:
                raise _no_store(storage.url)
            return runs

        return cls(storage, look(), look, chosen)

    def _set_runs(self, runs: tuple[Run, ...]) -> None:
        self.runs = runs
        """The runs of extraction that wrote the store, in the order in which they began."""
        self._version = Version(self._storage, runs)
        self.blobs = pinned(self._storage, self._version)
        """The storage of the store, which gives only what belongs to these runs."""
        self.checksums = Checksums(self.blobs, runs)
        """Sizes and checksums of the committed shards."""
        self.kept = KeptColumns(self.blobs, runs)
        """Columns of the source that were kept beside the tokens."""
        self._activations: dict[str, Activations] = {}
        for computed in ("_arrays", "_statistics"):
            self.__dict__.pop(computed, None)

    def refresh(self) -> None:
        """Read again what is committed.

        Raises:
            StorageError: the store does not exist any more, or cannot be read.
            StoreReplacedError: another store is in its place.
        """
        self._set_runs(self._grown())

    def newer(self) -> Self:
        """The same store with what is committed now; this very object, if nothing is new.

        Raises:
            StorageError: the store does not exist any more, or cannot be read.
            StoreReplacedError: another store is in its place.
        """
        runs = self._grown()
        return self if runs == self.runs else type(self)(self._storage, runs, self._look, self._check)

    def _grown(self) -> tuple[Run, ...]:
        runs = self._look()
        if runs != self.runs:
            self._version.check()  # after the runs were read, so that they belong to the opened store
            check_same(self.url, self.identity, identity_of(runs))
        return runs

    def check_version(self) -> None:
        """Check that the store is still the one that was opened, grown or not.

        Raises:
            StorageError: its records cannot be read.
            StoreReplacedError: it was replaced or removed.
        """
        self._version.check()

    @property
    def identity(self) -> Identity:
        """What tells the contents of this store from all others, wherever they are."""
        return identity_of(self.runs)

    @property
    def plan(self) -> Plan:
        """The plan of the first run."""
        return self.runs[0].plan

    @property
    def hooks(self) -> tuple[str, ...]:
        """Names of the stored hooks, in model order."""
        return tuple(self._arrays)

    @cached_property
    def _arrays(self) -> dict[str, HookArray]:
        """The stored hooks of all runs, by name, in model order."""
        arrays: dict[str, HookArray] = {}
        for run in self.runs:
            for hook in run.plan.request.hooks:
                arrays.setdefault(hook.name, hook)
        return {name: arrays[name] for name in sorted(arrays, key=forward_order)}

    @property
    def shape(self) -> tuple[int, int]:
        """(sequences, entries) of every array of activations: its positions, or its slots if only some are stored."""
        return sum(part.plan.n_sequences for part in runs_with_tokens(self.runs)), self.plan.width

    @property
    def metadata(self) -> dict[str, Any]:
        """The plan of the first run as plain data: model, tokens, packing, hooks, dtype, batch shape."""
        return self.plan.model_dump(mode="json")

    @property
    def n_segments(self) -> int:
        """Number of segments of all runs."""
        return sum(run.plan.n_segments for run in self.runs)

    @property
    def n_committed(self) -> int:
        """Number of committed segments, out of `n_segments`."""
        return sum(len(run.committed) for run in self.runs)

    @property
    def n_tokens(self) -> int:
        """Number of real tokens, without padding."""
        return sum(part.plan.n_tokens for part in runs_with_tokens(self.runs))

    @property
    def nbytes(self) -> int:
        """Bytes of all shards, committed or not; for compressed ones the most that they can take."""
        return sum(run.plan.nbytes for run in self.runs)

    @property
    def is_complete(self) -> bool:
        """Whether all that was planned is committed."""
        return all(run.is_complete for run in self.runs)

    def committed_rows(self) -> NDArray[np.bool_]:
        """[n_sequences] True where every hook of the store can be read."""
        rows = np.zeros(self.shape[0], dtype=bool)
        for committed in self._committed_ranges():
            rows[committed.start : committed.stop] = True
        return rows

    @property
    def n_sequences_committed(self) -> int:
        """Number of committed rows, see `committed_rows`; it takes no memory for each row."""
        return sum(len(committed) for committed in self._committed_ranges())

    def _committed_ranges(self) -> Iterator[range]:
        """Ranges of sequences of which every hook of the store is committed, in order."""
        first = 0
        for part in runs_with_tokens(self.runs):
            runs = runs_over(self.runs, part)
            if {hook.name for run in runs for hook in run.plan.request.hooks} == self._arrays.keys():
                for committed in reduce(overlap, (run.committed_ranges() for run in runs)):
                    yield range(first + committed.start, first + committed.stop)
            first += part.plan.n_sequences

    def __getitem__(self, hook: HookName) -> Activations:
        """The activations of a hook, by any spelling of its name, such as ``("resid_post", 5)``.

        ``blocks.5.hook_resid_pre`` is served from ``blocks.4.hook_resid_post``, the same tensor.

        Raises:
            HookError: this store does not hold the hook.
        """
        array = self.array_of(hook)
        if array.name not in self._activations:
            parts = runs_with_tokens(self.runs)
            rows = self._rows([hook_section(self.runs, part, array) for part in parts])
            norms = StoredNorms(array.name, self.shape, [self._norms(part, array) for part in parts])
            self._activations[array.name] = Activations(
                array.name, rows, norms, self.entries, self._open_zarr
            )
        return self._activations[array.name]

    def _rows(self, sections: list[Section]) -> Rows:
        return Rows(self.blobs, sections, self.checksums, check=self._check is not None)

    def _norms(self, part: Run, hook: HookArray) -> NormsOfPart:
        """The norms of a hook over the tokens of one part."""
        stored = norm_section(self.runs, part, hook)
        if stored is None:
            return NormsOfPart(part.plan.n_sequences, None, 0)
        section, column = stored
        # This does not use `_rows`, since a server cuts rows of hooks and tokens only, and sends norms as objects.
        rows = Rows(self.blobs, [section], self.checksums, check=self._check is not None)
        return NormsOfPart(part.plan.n_sequences, rows, column)

    def stats(self, hook: HookName) -> Statistics:
        """Statistics of a hook over all committed tokens, padding left out; no activations are read.

        Raises:
            HookError: this store does not hold the hook, or has no statistics of it (attention scores and patterns).
            NotCommittedError: nothing of the hook is committed yet.
            StorageError: a record is damaged.
        """
        return self.merged_stats(hook, None)

    def merged_stats(self, hook: HookName, look: Callable[[int], None] | None) -> Statistics:
        """Statistics as from `stats`. ``look`` is called with the number of tokens of each record that is read, and may
        raise an error to stop: a store that is not finished has a record for each segment.
        """
        return self._statistics.merged(self._with_statistics(hook), look)

    def not_finite(
        self, hook: HookName, *, most_segments: int | None = None, most_records: int | None = None
    ) -> list[tuple[range, int]]:
        """Where a hook has NaN or infinity, from the counts in its statistics; no activations are read.

        Args:
            hook: hook that has statistics.
            most_segments: number of segments with such tokens after which the search stops; None for no limit.
            most_records: the most commit records that are read of a run; None for no limit. None is read of a run that
                has no such tokens according to its statistics.

        Returns:
            Sequences of each segment that has such tokens, and the number of these tokens. Segments whose records were
            not read because of ``most_records`` come as one range, the rest of their run.

        Raises:
            HookError: this store does not hold the hook, or has no statistics of it (attention scores and patterns).
            StorageError: a record is damaged.
        """
        return self._statistics.not_finite(self._with_statistics(hook), most_segments, most_records)

    def _with_statistics(self, hook: HookName) -> HookArray:
        array = self.array_of(hook)
        if not has_statistics(array):
            raise HookError(f"{array.name} has no statistics: its values are not those of one token alone")
        return array

    @cached_property
    def _statistics(self) -> StoredStatistics:
        return StoredStatistics(self.url, self.blobs, self.runs)

    def __contains__(self, hook: object) -> bool:
        try:
            self.array_of(hook)  # type: ignore[arg-type]
        except (HookError, TypeError, ValueError):
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self.hooks)

    def array_of(self, hook: HookName) -> HookArray:
        """What the plan says of a hook, by any spelling of its name.

        Raises:
            HookError: this store does not hold the hook.
        """
        by_name = self._arrays
        name = stored_as(long_name(hook, self.plan.request.model.n_layers))
        if name not in by_name:
            # Only other spellings need the names of the model, which take an import of transformers.
            with contextlib.suppress(HookError):
                name = stored_as(self.names.one(hook))
        if name not in by_name and "*" in str(hook):
            raise HookError(
                f"{hook!r} can mean several hooks, and one is needed here; it can be of {self._holdings}"
            )
        if name not in by_name:
            raise HookError(f"{self.url} does not hold {hook!r}; it holds {self._holdings}")
        return by_name[name]

    def matching(self, pattern: HookName) -> tuple[str, ...]:
        """Names of the stored hooks that a name or a glob selects, at least one.

        Raises:
            HookError: no stored hook matches.
        """
        if not isinstance(pattern, str) or "*" not in pattern:
            return (self.array_of(pattern).name,)
        chosen = {stored_as(name) for name in self.names.select(pattern)}
        names = tuple(name for name in self._arrays if name in chosen)
        if not names:
            raise HookError(f"{self.url} does not hold {pattern!r}; it holds {self._holdings}")
        return names

    @property
    def _holdings(self) -> str:
        n_layers = self.plan.request.model.n_layers
        return listing(self.hooks, lambda _: n_layers)

    @property
    def names(self) -> "HookNames":
        """The names of all hooks of the model, stored or not."""
        names, _ = self._model_hooks
        return names

    @cached_property
    def _model_hooks(self) -> "tuple[HookNames, HookedConfig]":
        from actstore.hooks.families.stored_config import hooks_of_stored

        return hooks_of_stored(self.plan.request.model.config)

    @property
    def tokens(self) -> Rows:
        """Token ids, int32 [n_sequences, context_length], padding included."""
        return self._token_rows("tokens")

    @property
    def lengths(self) -> Rows:
        """Number of real tokens in each sequence, int32 [n_sequences]."""
        return self._token_rows("lengths")

    @property
    def documents(self) -> Rows:
        """Number of the document of each token, int64 [n_sequences, context_length]; -1 for inserted tokens."""
        return self._token_rows("documents")

    @property
    def offsets(self) -> Rows:
        """Place of each token in its document, int32 [n_sequences, context_length]; -1 for inserted tokens."""
        return self._token_rows("offsets")

    @property
    def roles(self) -> Rows:
        """Role of each token of chats, int8 [n_sequences, context_length]: 0 template, 1 system, 2 user, 3 assistant,
        4 tool, -1 padding.

        Raises:
            HookError: the tokens of the store have no roles.
        """
        return self._chat_rows("roles")

    @property
    def turns(self) -> Rows:
        """Number of the message of each token of chats, int32 [n_sequences, context_length]; -1 for what the template
        writes itself, and for padding.

        Raises:
            HookError: the tokens of the store have no roles.
        """
        return self._chat_rows("turns")

    @property
    def positions(self) -> Rows | None:
        """Position of each slot, int32 [n_sequences, n_slots], ascending, then -1 for slots that are not in use. None
        if all positions are stored.
        """
        return None if self.plan.n_slots is None else self._token_rows("positions")

    @property
    def counts(self) -> Counts:
        """Number of entries of each sequence that are in use, [n_sequences]: its slots in use, or its real tokens."""
        return self.entries.counts

    @property
    def entries(self) -> Entries:
        """What the second axis of all activations is: positions, or slots."""
        plans = [part.plan for part in runs_with_tokens(self.runs)]
        n_rows = sum(plan.n_tokens if plan.n_rows is None else plan.n_rows for plan in plans)
        is_full = n_rows == math.prod(self.shape)
        return Entries(self.plan.context_length, self.lengths, self.positions, is_full=is_full)

    def is_stored(self, sequences: Any, positions: Any) -> NDArray[np.bool_]:
        """Whether activations are stored of positions, as of those that `actstore.Store.locate` finds, [n].

        Args:
            sequences: sequence of each position, [n], from 0 on.
            positions: positions, [n]; negative ones count from the last real token of the sequence back.
        """
        numbers, wanted = np.broadcast_arrays(
            np.atleast_1d(np.asarray(sequences, np.int64)), np.atleast_1d(np.asarray(positions, np.int64))
        )
        return self.entries.find(numbers, wanted) >= 0

    def _chat_rows(self, path: str) -> Rows:
        for part in runs_with_tokens(self.runs):
            if not part.plan.request.tokens.has_roles:
                raise HookError(
                    f"{self.url} holds {part.plan.request.tokens.source}, which are no chats, so its tokens have no "
                    f"{path}; extract from a column of chats (messages), or with token_roles, to have them"
                )
        return self._token_rows(path)

    def _token_rows(self, path: str) -> Rows:
        return self._rows([token_section(part, path) for part in runs_with_tokens(self.runs)])

    def _open_zarr(self) -> "zarr.Group":
        import zarr

        import actstore.store.format.bfloat16  # noqa: F401 - registers the type

        return zarr.open_group(self.url, mode="r")

    @property
    def zarr(self) -> "zarr.Group":
        """The same store through zarr-python. It shows rows that are not committed as NaN."""
        return self._open_zarr()

    def reopened(self) -> Self:
        """The same store with connections of its own.

        Raises:
            StorageError: it cannot be read.
            StoreReplacedError: another store is in its place.
        """
        return self._opened_again(self.url, self._check, self.identity)

    @classmethod
    def _opened_again(cls, url: str, check: Check | None, identity: Identity) -> Self:
        store = cls.in_storage(open_blobs(url), check)
        check_same(url, identity, store.identity)
        return store

    def __reduce__(self) -> tuple[Any, ...]:
        return self._opened_again, (self.url, self._check, self.identity)

    @property
    def _state(self) -> str:
        return "complete" if self.is_complete else f"{self.n_committed}/{counted(self.n_segments, 'segment')}"

    def __repr__(self) -> str:
        model = self.plan.request.model.name
        n, width = self.shape
        unit = "tokens" if self.plan.n_slots is None else f"slots ({self.plan.request.tokens.positions})"
        what = f"{model}, {counted(len(self.hooks), 'hook')}, {n} x {width} {unit}, {self._state}"
        return f"<actstore.Store {self.url}: {what}>"


def _no_store(url: str) -> StorageError:
    hint = ""
    if url.startswith(("http://", "https://")):
        hint = "; of a server, give the URL of a store, http://host:port/v1/stores/name"
    return StorageError(f"there is no actstore store at {url} ({plan_key(FIRST_RUN)} does not exist){hint}")


def _check_of(check: str | None) -> Check | None:
    wanted = check or os.environ.get(CHECK)
    if not wanted:
        return None
    if wanted == "first-use":
        return "first-use"
    raise StorageError(f"{'check' if check else CHECK} is {wanted!r}; it can be 'first-use', or left out")
