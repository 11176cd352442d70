"""A store, open for reading."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, reduce
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from actstore.errors import HookError, NotCommittedError, StorageError
from actstore.hooks.naming.names import HookName, each_name, forward_order, long_name, stored_as
from actstore.storage.blobs import BlobReader, Blobs
from actstore.storage.opening import open_blobs
from actstore.storage.pinned import pinned
from actstore.storage.urls import is_served
from actstore.store.format.plan import FIRST_RUN, HookArray, Plan
from actstore.store.reading.activations import Activations
from actstore.store.reading.checksums import Checksums
from actstore.store.reading.identity import Identity, check_same, identity_of
from actstore.store.reading.rows import Rows, Section
from actstore.store.reading.stored_norms import NormsOfPart, StoredNorms
from actstore.store.reading.version import Version
from actstore.store.records.commit import plan_key, read_commits
from actstore.store.records.manifest import FinishedRun, RunStatistics
from actstore.store.records.run import Run, overlap, read_runs
from actstore.store.statistics.hook_statistics import HookStatistics, Statistics
from actstore.store.statistics.merging import Merging
from actstore.store.statistics.moments import has_statistics

if TYPE_CHECKING:
    import torch
    import zarr

    from actstore.analysis.search import Matches
    from actstore.hooks.cache.activation_cache import ActivationCache
    from actstore.hooks.capture.functions import NameFilter
    from actstore.hooks.families.config import HookedConfig
    from actstore.hooks.model import HookedModel
    from actstore.hooks.naming.names import HookNames
    from actstore.loader.dropping.valid_rows import ValidRows
    from actstore.loader.loader import Loader
    from actstore.loader.options import LoaderOptions, Shuffle

Check = Literal["first-use"]
CHECK: Final = "ACTSTORE_CHECK"
"""Environment variable: the check, where none is given."""


class Store:
    """Committed activations of one model over one set of tokens. Open one with `actstore.open`.

    A store that is still being written can be read: what is committed is there, all else raises.
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
            storage: where everything is.
            runs: what is committed.
            look: finds that out again.
            check: as for `open_store`.
        """
        self.url = storage.url
        self._storage = storage
        self._look = look
        self._check = check
        self._set_runs(runs)

    def _set_runs(self, runs: tuple[Run, ...]) -> None:
        self.runs = runs
        """What was extracted, in the order in which it was begun."""
        self._version = Version(self._storage, runs)
        self.blobs = pinned(self._storage, self._version)
        """Where everything is read from: nothing but what belongs to these runs."""
        self.checksums = Checksums(self.blobs, runs)
        """What was committed of each shard."""
        self._activations: dict[str, Activations] = {}
        self._n_not_finite: dict[str, dict[str, int]] = {}
        """By finished run and hook, once it was asked for."""
        self.__dict__.pop("_arrays", None)

    def refresh(self) -> None:
        """Look again at what is committed.

        Raises:
            StorageError: it is not there any more, or cannot be read.
            StoreReplacedError: it is another store.
        """
        self._set_runs(self._grown())

    def newer(self) -> "Store":
        """The same store with what is committed now; itself, if nothing is new.

        Raises:
            StorageError: it is not there any more, or cannot be read.
            StoreReplacedError: it is another store.
        """
        runs = self._grown()
        return self if runs == self.runs else Store(self._storage, runs, self._look, self._check)

    def _grown(self) -> tuple[Run, ...]:
        runs = self._look()
        if not runs:
            raise _no_store(self.url)
        if runs != self.runs:
            self._version.check()  # afterwards: then it is what was found
            check_same(self.url, self.identity, identity_of(runs))
        return runs

    def check_version(self) -> None:
        """See that it is still there, grown or not.

        Raises:
            StorageError: its records cannot be read.
            StoreReplacedError: it is not.
        """
        self._version.check()

    @property
    def identity(self) -> Identity:
        """What tells the contents of this store from all others, wherever they are."""
        return identity_of(self.runs)

    @property
    def plan(self) -> Plan:
        """Of the first run."""
        return self.runs[0].plan

    @property
    def _parts(self) -> tuple[Run, ...]:
        """The runs that brought tokens. Their sequences follow each other."""
        return tuple(run for run in self.runs if run.plan.has_own_tokens)

    def _runs_over(self, part: Run) -> list[Run]:
        return [run for run in self.runs if run.plan.tokens_of == part.plan.run]

    @property
    def hooks(self) -> tuple[str, ...]:
        """Names of the stored hooks, in model order."""
        return tuple(self._arrays)

    @cached_property
    def _arrays(self) -> dict[str, HookArray]:
        """The stored hooks of all runs, by name, in model order."""
        found: dict[str, HookArray] = {}
        for run in self.runs:
            for hook in run.plan.request.hooks:
                found.setdefault(hook.name, hook)
        return {name: found[name] for name in sorted(found, key=forward_order)}

    @property
    def shape(self) -> tuple[int, int]:
        """(sequences, positions) of every array."""
        return sum(part.plan.n_sequences for part in self._parts), self.plan.context_length

    @property
    def metadata(self) -> dict[str, Any]:
        """The plan of the first run as plain data: model, tokens, packing, hooks, dtype, batch shape."""
        return self.plan.model_dump(mode="json")

    @property
    def n_segments(self) -> int:
        """Of all runs."""
        return sum(run.plan.n_segments for run in self.runs)

    @property
    def n_committed(self) -> int:
        """Committed segments, out of `n_segments`."""
        return sum(len(run.committed) for run in self.runs)

    @property
    def n_tokens(self) -> int:
        """Real tokens, without padding."""
        return sum(part.plan.n_tokens for part in self._parts)

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
        first = 0
        for part in self._parts:
            runs = self._runs_over(part)
            here = rows[first : first + part.plan.n_sequences]
            first += part.plan.n_sequences
            if {hook.name for run in runs for hook in run.plan.request.hooks} == self._arrays.keys():
                here[:] = True
                for run in runs:
                    here &= run.committed_rows()
        return rows

    @property
    def n_sequences_committed(self) -> int:
        """How many of `committed_rows` there are; no memory is taken for each row."""
        n_rows = 0
        for part in self._parts:
            runs = self._runs_over(part)
            if {hook.name for run in runs for hook in run.plan.request.hooks} == self._arrays.keys():
                ranges = reduce(overlap, (run.committed_ranges() for run in runs))
                n_rows += sum(len(rows) for rows in ranges)
        return n_rows

    def __getitem__(self, hook: HookName) -> Activations:
        """The activations of a hook, whose name can be spelled as everywhere: ``("resid_post", 5)``, ...

        ``blocks.5.hook_resid_pre`` is served from ``blocks.4.hook_resid_post``, the same tensor.

        Raises:
            HookError: this store does not hold it.
        """
        found = self.array_of(hook)
        if found.name not in self._activations:
            rows = self._rows([self._section(part, found) for part in self._parts])
            norms = StoredNorms(found.name, self.shape, [self._norms(part, found) for part in self._parts])
            self._activations[found.name] = Activations(found.name, rows, norms, self)
        return self._activations[found.name]

    def _rows(self, sections: list[Section]) -> Rows:
        return Rows(self.blobs, sections, self.checksums, check=self._check is not None)

    def _section(self, part: Run, hook: HookArray) -> Section:
        """The rows of a hook over the tokens of one part."""
        for run in self._runs_over(part):
            if run.hook(hook.name) is not None:
                layout = run.plan.activations(hook)
                return Section(
                    layout, run.committed.__contains__, "run the extraction again to complete them"
                )
        why = f"this hook was not extracted over the tokens of run {part.plan.run}; extract it over them"
        return Section(part.plan.activations(hook), lambda _: False, why)

    def _norms(self, part: Run, hook: HookArray) -> NormsOfPart:
        """The norms of a hook over the tokens of one part."""
        for run in self._runs_over(part):
            if run.hook(hook.name) is not None and run.plan.norms and hook.has_norms:
                layout = run.plan.norm_array()
                why = "run the extraction again to complete them"
                section = Section(layout, run.committed.__contains__, why)
                # Not from `_rows`: a server cuts rows of hooks and tokens, and has these as objects.
                rows = Rows(self.blobs, [section], self.checksums, check=self._check is not None)
                return NormsOfPart(part.plan.n_sequences, rows, layout.hooks.index(hook.name))
        return NormsOfPart(part.plan.n_sequences, None, 0)

    def stats(self, hook: HookName) -> Statistics:
        """Statistics of a hook over all committed tokens, padding left out; no activations are read.

        Raises:
            HookError: this store does not hold it, or has no statistics of it (attention scores and patterns).
            NotCommittedError: nothing of it is committed yet.
            StorageError: a record is damaged.
        """
        return self.merged_stats(hook, None)

    def merged_stats(self, hook: HookName, look: Callable[[int], None] | None) -> Statistics:
        """As `stats`, where somebody is told of the tokens of each record that is read, and may raise something to
        stop: a store that is not finished has a record for each segment.
        """
        found = self.array_of(hook)
        if not has_statistics(found):
            raise HookError(f"{found.name} has no statistics: its values are not those of one token alone")
        merging = Merging(found.shape)
        n_records = 0
        for run in self.runs:
            if run.hook(found.name) is not None:
                for record in self._records(run, found.name):
                    merging.add(record)
                    n_records += 1
                    if look is not None:
                        look(record.count)
        if not n_records:
            raise NotCommittedError(
                f"nothing of {found.name} is committed in {self.url} yet; run the extraction again to complete it"
            )
        return Statistics(merging.record(), found.shape)

    def not_finite(
        self, hook: HookName, *, most_segments: int | None = None, most_records: int | None = None
    ) -> list[tuple[range, int]]:
        """Where a hook has NaN or infinity, from what its statistics count; no activations are read.

        Args:
            hook: one that has statistics.
            most_segments: stop after so many segments that have some.
            most_records: read at most so many commit records of a run. Those of a run that has no such token, as its
                statistics say, are not read at all.

        Returns:
            Sequences of each segment that has such tokens, and how many tokens; those of one that was not looked at for
            ``most_records`` are counted with the rest of their run.

        Raises:
            HookError: this store does not hold it, or has no statistics of it (attention scores and patterns).
            StorageError: a record is damaged.
        """
        found = self.array_of(hook)
        if not has_statistics(found):
            raise HookError(f"{found.name} has no statistics: its values are not those of one token alone")
        where: list[tuple[range, int]] = []
        first = 0
        for part in self._parts:
            for run in self._runs_over(part):
                if run.hook(found.name) is not None:
                    left = None if most_segments is None else most_segments - len(where)
                    where += self._not_finite_of(run, found.name, first, left, most_records)
            first += part.plan.n_sequences
        return where

    def _not_finite_of(
        self, run: Run, hook: str, first: int, most_segments: int | None, most_records: int | None
    ) -> list[tuple[range, int]]:
        n_left = self._count_not_finite(run, hook)
        where: list[tuple[range, int]] = []
        if n_left == 0:
            return where
        n_segments = len(run.committed)
        in_order = iter(run.committed if isinstance(run.committed, range) else sorted(run.committed))
        looked_at = list(islice(in_order, most_records))
        for record in read_commits(self.blobs, run.plan, looked_at):
            if n_left == 0 or (most_segments is not None and len(where) >= most_segments):
                return where
            if hook not in record.statistics:
                raise self._without_statistics(run, hook)
            n_tokens = record.statistics[hook].n_not_finite
            if n_tokens:
                segment = run.plan.segment(record.segment)
                where.append((range(first + segment.start, first + segment.stop), n_tokens))
                n_left = None if n_left is None else n_left - n_tokens
        if not n_left:
            return where
        if n_left < 0 or len(looked_at) == n_segments:
            raise StorageError(
                f"{self.url} is damaged: the statistics of run {run.plan.run} do not count as many tokens of {hook} "
                f"that are not finite as its commit records; run `actstore verify {self.url} --repair`, then the "
                "extraction again"
            )
        rest = run.plan.segment(next(in_order)).start
        where.append((range(first + rest, first + run.plan.n_sequences), n_left))
        return where

    def _count_not_finite(self, run: Run, hook: str) -> int | None:
        """How many tokens of a finished run are not finite; None for others, of which nobody knows yet."""
        if run.finished is None:
            return None
        counts = self._n_not_finite.get(run.plan.run)
        if counts is None:
            merged = self._summed_up(run.finished)
            counts = {name: record.n_not_finite for name, record in merged.hooks.items()}
            self._n_not_finite[run.plan.run] = counts
        if hook not in counts:
            raise self._without_statistics(run, hook)
        return counts[hook]

    def _records(self, run: Run, hook: str) -> Iterator[HookStatistics]:
        try:
            if run.finished is not None:
                yield self._summed_up(run.finished).hooks[hook]
                return
            for record in read_commits(self.blobs, run.plan, sorted(run.committed)):
                yield record.statistics[hook]
        except KeyError as error:
            raise self._without_statistics(run, hook) from error

    def _without_statistics(self, run: Run, hook: str) -> StorageError:
        return StorageError(
            f"{self.url} is damaged: run {run.plan.run} has no statistics of {hook}; run `actstore verify "
            f"{self.url} --repair`, then the extraction again"
        )

    def _summed_up(self, finished: FinishedRun) -> RunStatistics:
        record = finished.statistics
        data = bytes(self.blobs.read(record.key))
        if not record.is_of(data):
            raise StorageError(
                f"{self.url}/{record.key} is not the one that the manifest names; it is damaged: run `actstore verify "
                f"{self.url} --repair`, then the extraction again"
            )
        return RunStatistics.from_bytes(data, f"{self.url}/{record.key}")

    def __contains__(self, hook: object) -> bool:
        try:
            self.array_of(hook)  # type: ignore[arg-type]
        except (HookError, TypeError, ValueError):
            return False
        return True

    def __iter__(self) -> Any:
        return iter(self.hooks)

    def array_of(self, hook: HookName) -> HookArray:
        """What the plan says of a hook, whatever it is called.

        Raises:
            HookError: this store does not hold it.
        """
        by_name = self._arrays
        name = stored_as(long_name(hook, self.plan.request.model.n_layers))
        if name not in by_name:
            # Only other spellings need to know the model, which takes transformers.
            with contextlib.suppress(HookError):
                name = stored_as(self.names.one(hook))
        if name not in by_name:
            raise HookError(f"{self.url} does not hold {hook!r}; it holds {', '.join(self.hooks)}")
        return by_name[name]

    def matching(self, pattern: HookName) -> tuple[str, ...]:
        """Names of stored hooks that a name or a glob selects; one at least.

        Raises:
            HookError: there is none.
        """
        return tuple(hook.name for hook in self._matching(pattern))

    def _matching(self, pattern: HookName) -> list[HookArray]:
        if not isinstance(pattern, str) or "*" not in pattern:
            return [self.array_of(pattern)]
        chosen = {stored_as(name) for name in self.names.select(pattern)}
        found = [stored for stored in self._arrays.values() if stored.name in chosen]
        if not found:
            raise HookError(f"{self.url} does not hold {pattern!r}; it holds {', '.join(self.hooks)}")
        return found

    @property
    def names(self) -> "HookNames":
        """All hooks of the model, stored or not."""
        names, _ = self._model_hooks
        return names

    @cached_property
    def _model_hooks(self) -> "tuple[HookNames, HookedConfig]":
        from actstore.hooks.families.stored_config import hooks_of_stored

        return hooks_of_stored(self.plan.request.model.config)

    def cache(
        self,
        sequences: int | slice | Sequence[int],
        *,
        names_filter: "NameFilter | None" = None,
        model: "HookedModel | None" = None,
    ) -> "ActivationCache":
        """The stored values of some sequences, as `HookedModel.run_with_cache` gives them for the same tokens.

        Args:
            sequences: rows of the store.
            names_filter: hooks to read, names, globs, or a function of the name; None for all that are stored.
            model: for methods of the cache that need weights.

        Raises:
            HookError: a hook is not stored.
            NotCommittedError: a row is not committed.
        """
        from actstore.hooks.cache.activation_cache import ActivationCache
        from actstore.hooks.naming.point import point_of

        names, cfg = self._model_hooks
        rows = [sequences] if isinstance(sequences, int) else sequences
        wanted = self.hooks
        if callable(names_filter):
            wanted = tuple(name for name in self.hooks if names_filter(name))
        elif names_filter is not None:
            patterns = each_name(names_filter)
            chosen = {found.name for pattern in patterns for found in self._matching(pattern)}
            wanted = tuple(name for name in self.hooks if name in chosen)
        values = {}
        for name, value in self._several(wanted, rows).items():
            point = point_of(name)
            axis = 1 if point is None else point.position_axis
            values[name] = value.movedim(1, axis)
        return ActivationCache(values, model, names=names, cfg=cfg, kind="activations")

    def _several(self, hooks: Sequence[str], sequences: slice | Sequence[int]) -> "dict[str, torch.Tensor]":
        return {name: self[name][sequences] for name in hooks}

    def find(
        self,
        text: str | None = None,
        *,
        tokens: "Sequence[int] | NDArray[np.integer[Any]] | None" = None,
        sha: str | None = None,
        prefix: bool = False,
        limit: int | None = None,
    ) -> NDArray[np.int64]:
        """Numbers of the sequences that hold a text or token ids, ascending, each once: ``store[hook][rows]``.

        All token ids are read, block by block; padding is never found. Rows are found as soon as their tokens are
        there, and their activations may not be committed yet: see `committed_rows`.

        Args:
            text: made into tokens by the tokenizer of the store, as it is and behind a space, which gives it other ids;
                either counts. Inside of a longer text its ends can have been merged into other tokens, and are not
                found there; ``tokens`` is exact.
            tokens: ids that follow each other.
            sha: of all real tokens of a sequence, from `actstore.analysis.search.sequence_sha256`.
            prefix: only where a sequence begins: at position 0, or at 1 behind a token that packing put in.
            limit: the most sequences; the search ends when it has them.

        Returns:
            [n_found].

        Raises:
            JobError: not one of text, tokens and sha, or not a valid one; a limit below 1.
            NotCommittedError: the tokens of a run are not complete.
            StorageError: they cannot be read.
            TokensError: the text gives no tokens, or the tokenizer is not known, not there, or another one by now.
        """
        return self._matches(text, tokens, sha, prefix, limit, once=True).sequences

    def locate(
        self,
        text: str | None = None,
        *,
        tokens: "Sequence[int] | NDArray[np.integer[Any]] | None" = None,
        sha: str | None = None,
        prefix: bool = False,
        limit: int | None = None,
    ) -> "Matches":
        """Every place where it begins: `find` with positions, and a limit that counts places.

        Returns:
            ``sequences`` [n_matches] and ``positions`` [n_matches], in the order of the store, each place once.
        """
        return self._matches(text, tokens, sha, prefix, limit, once=False)

    def _matches(
        self, text: str | None, tokens: Any, sha: str | None, prefix: bool, limit: int | None, *, once: bool
    ) -> "Matches":
        from actstore.analysis.search import search

        return search(self, text, tokens, sha, prefix, limit, once)

    def loader(
        self,
        hooks: "HookName | Sequence[HookName]",
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: "Shuffle | None" = "global",
        window_rows: int = 1 << 20,
        drop: Sequence[str | int] = (),
        seqpos: slice | Sequence[int] | None = None,
        max_norm: float | None = None,
        mask: Any = None,
        epochs: int | None = 1,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dtype: "torch.dtype | str | None" = None,
        provenance: bool = False,
        prefetch: int = 2,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_limit: int | None = None,
        device: "torch.device | str | None" = None,
    ) -> "Loader":
        """Batches of rows in random order: an iterator for training.

        Which rows are in batch k depends on the seed, the epoch and k alone, so a loader is resumed from two integers
        (``state_dict``), and ranks take disjoint parts of the same batches.

        Args:
            hooks: a name, for batches that are tensors; several, or a glob, for dicts with the rows aligned, one entry
                for each stored tensor, under the name in `hooks`, whichever of its names were given.
            batch_size: rows of a batch, all ranks together.
            seed: of the shuffle, 0 to 2**64 - 1.
            shuffle: ``global``, any row anywhere, for files or with ``cache_dir``; ``window``, whole shards in random
                order and the rows of ``window_rows`` of them among each other, for object stores; None, as stored.
            window_rows: the least number of stored rows that are shuffled together, those that are dropped included.
                Where files are not mapped, a window is held in memory, and the next one with it.
            drop: rows to leave out: ``bos``, ``eos``, ``sep``, ``pad``, or token ids; ``nonfinite``, those with NaN or
                infinity in one of the hooks, for which the segments are read that have any.
            seqpos: positions to keep, a slice or a list.
            max_norm: rows of the first hook with a larger Euclidean norm are left out; its norms are read to find them,
                or all of it where norms are not stored.
            mask: bool [n_sequences, context_length] or [n_sequences], True for rows to keep.
            epochs: how often every row comes; None never ends.
            drop_last: leave out the last batch of an epoch where it is smaller.
            rank: which part of each batch this loader gives.
            world_size: of how many.
            dtype: type of the batches, such as ``float32``; None keeps the stored one.
            provenance: give `Batch`, with the sequence, position and token id of each row.
            prefetch: batches made ahead in a thread; 0 makes them when they are asked for.
            cache_dir: folder on a local disk that keeps shards of remote stores, for later epochs and other processes;
                with all of a hook there, ``global`` works for such a store, too.
            cache_limit: bytes that the folder may take, whatever stores they are of.
            device: where batches are; to a GPU they are copied ahead, from pinned memory and on a stream of their own.

        Raises:
            HookError: a hook is not stored.
            LoaderError: an option that cannot be, or no rows are left.
            NotCommittedError: a row is not committed.
            StorageError: what must be read cannot be.
        """
        from actstore.loader.options import options_of

        options = options_of(
            self,
            hooks,
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            window_rows=window_rows,
            drop=drop,
            seqpos=seqpos,
            max_norm=max_norm,
            mask=mask,
            epochs=epochs,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            dtype=dtype,
            provenance=provenance,
            prefetch=prefetch,
            cache_dir=cache_dir,
            cache_limit=cache_limit,
            device=device,
        )
        return self.loader_of(options)

    def loader_of(self, options: "LoaderOptions", rows: "ValidRows | None" = None) -> "Loader":
        """`loader`, of options that were found in this store.

        Args:
            options: of this store.
            rows: those that are not dropped, where they are known.
        """
        from actstore.loader.loader import Loader

        return Loader(self, options, rows)

    @property
    def tokens(self) -> Rows:
        """Token ids, int32 [n_sequences, context_length], padding included."""
        return self._token_rows("tokens")

    @property
    def lengths(self) -> Rows:
        """Real tokens in each sequence, int32 [n_sequences]."""
        return self._token_rows("lengths")

    @property
    def documents(self) -> Rows:
        """Document each token came from, int64 [n_sequences, context_length]; -1 for inserted tokens."""
        return self._token_rows("documents")

    @property
    def offsets(self) -> Rows:
        """Place of each token in its document, int32 [n_sequences, context_length]; -1 for inserted tokens."""
        return self._token_rows("offsets")

    def _token_rows(self, path: str) -> Rows:
        return self._rows([_token_section(part, path) for part in self._parts])

    @property
    def zarr(self) -> "zarr.Group":
        """The same store through zarr-python. It shows rows that are not committed as NaN."""
        import zarr

        import actstore.store.format.bfloat16  # noqa: F401 - registers the type

        return zarr.open_group(self.url, mode="r")

    def reopened(self) -> "Store":
        """The same store with connections of its own.

        Raises:
            StorageError: it cannot be read.
            StoreReplacedError: it is another store by now.
        """
        return _unpickled(self.url, self._check, self.identity)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.url, self._check, self.identity)

    def __repr__(self) -> str:
        model = self.plan.request.model.name
        n, length = self.shape
        state = "complete" if self.is_complete else f"{self.n_committed}/{self.n_segments} segments"
        return (
            f"<actstore.Store {self.url}: {model}, {len(self.hooks)} hooks, {n} x {length} tokens, {state}>"
        )


def _no_store(url: str) -> StorageError:
    hint = ""
    if url.startswith(("http://", "https://")):
        hint = "; of a server, give the URL of a store, http://host:port/v1/stores/name"
    return StorageError(f"there is no actstore store at {url} ({plan_key(FIRST_RUN)} does not exist){hint}")


def _token_section(part: Run, path: str) -> Section:
    def is_committed(_shard: int) -> bool:
        return part.has_tokens

    return Section(part.plan.token_array(path), is_committed, "run the extraction again to complete them")


def _unpickled(url: str, check: Check | None, identity: Identity) -> Store:
    """A store that was opened before.

    Raises:
        StoreReplacedError: it is another one by now.
    """
    found = open_store(url, check=check)
    check_same(url, identity, found.identity)
    return found


def open_store(
    url: str | os.PathLike[str],
    *,
    token: str | None = None,
    direct: bool | None = None,
    check: Check | None = None,
) -> Store:
    """Open the store below a path or URL; exported as `actstore.open`.

    Args:
        url: a folder, ``s3://bucket/run``, any fsspec URL, or ``http://host:port/v1/stores/name`` of a server.
        token: for a server; the environment variable ACTSTORE_TOKEN, where none is given.
        direct: whether to read the storage behind a server without it: None, for loaders, where it can be reached;
            True, for everything; False, for nothing.
        check: ``first-use`` compares the checksum of every shard when it is first used, which reads all of it; the
            environment variable ACTSTORE_CHECK, where none is given. None compares those that are read as a whole from
            remote storage.

    Raises:
        StorageError: there is no store, or it cannot be read; or an option that is not for it.
    """
    if is_served(str(url)):
        from actstore.query.client.served_store import ServedStore

        if check is not None:
            raise StorageError(
                f"{url} is a server, which checks what it reads; set ACTSTORE_CHECK where it runs, and leave check out"
            )
        return ServedStore(str(url), token, direct)
    if token is not None or direct is not None:
        raise StorageError(
            f"{url} is no server, and token and direct are for one (http://host:port/v1/stores/name); leave them out"
        )
    return store_in(open_blobs(str(url)), check)


def store_in(storage: Blobs, check: Check | None = None) -> Store:
    """The store in some storage; as `open_store`.

    Raises:
        StorageError: there is no store, or it cannot be read.
    """
    check = _check_of(check)

    def look() -> tuple[Run, ...]:
        return read_runs(storage)

    runs = look()
    if not runs:
        raise _no_store(storage.url)
    return Store(storage, runs, look, check)


def _check_of(check: str | None) -> Check | None:
    found = check or os.environ.get(CHECK)
    if not found:
        return None
    if found == "first-use":
        return "first-use"
    name = "check" if check else CHECK
    raise StorageError(f"{name} is {found!r}; it can be 'first-use', or left out")
