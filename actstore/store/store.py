"""A store, open for reading."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import HookError, NotCommittedError, StorageError
from actstore.hooks.names import HookName, each_name, forward_order, long_name, stored_as
from actstore.store.activations import Activations
from actstore.store.blobs import Blobs, open_blobs
from actstore.store.commit import plan_key, read_commits
from actstore.store.manifest import RunStatistics
from actstore.store.merging import Merging
from actstore.store.moments import has_statistics
from actstore.store.plan import FIRST_RUN, HookArray, Plan
from actstore.store.rows import Rows, Section
from actstore.store.run import Run, overlap, read_runs
from actstore.store.statistics import HookStatistics, Statistics

if TYPE_CHECKING:
    import torch
    import zarr

    from actstore.hooks.cache import ActivationCache
    from actstore.hooks.config import HookedConfig
    from actstore.hooks.model import HookedModel
    from actstore.hooks.names import HookNames
    from actstore.loader.loader import Loader
    from actstore.loader.options import Shuffle


class Store:
    """Committed activations of one model over one set of tokens. Open one with `actstore.open`.

    A store that is still being written can be read: what is committed is there, all else raises.
    """

    def __init__(self, blobs: Blobs, runs: tuple[Run, ...]) -> None:
        self.url = blobs.url
        self._blobs = blobs
        self.runs = runs
        """What was extracted, in the order in which it was begun."""

    def refresh(self) -> None:
        """Look again at what is committed."""
        self.runs = read_runs(self._blobs)

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

    @property
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
        found = self._find(hook)
        sections = [self._section(part, found) for part in self._parts]
        return Activations(found.name, Rows(self._blobs, sections), self._blobs.url)

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

    def stats(self, hook: HookName) -> Statistics:
        """Statistics of a hook over all committed tokens, padding left out; no activations are read.

        Raises:
            HookError: this store does not hold it, or has no statistics of it (attention scores and patterns).
            NotCommittedError: nothing of it is committed yet.
            StorageError: a record is damaged.
        """
        found = self._find(hook)
        if not has_statistics(found):
            raise HookError(f"{found.name} has no statistics: its values are not those of one token alone")
        merging = Merging(found.shape)
        n_records = 0
        for run in self.runs:
            if run.hook(found.name) is not None:
                for record in self._records(run, found.name):
                    merging.add(record)
                    n_records += 1
        if not n_records:
            raise NotCommittedError(
                f"nothing of {found.name} is committed in {self.url} yet; run the extraction again to complete it"
            )
        return Statistics(merging.record(), found.shape)

    def _records(self, run: Run, hook: str) -> Iterator[HookStatistics]:
        try:
            if run.finished is not None:
                yield RunStatistics.read(self._blobs, run.finished.statistics.key).hooks[hook]
                return
            for record in read_commits(self._blobs, run.plan, sorted(run.committed)):
                yield record.statistics[hook]
        except KeyError as error:
            raise StorageError(
                f"{self.url} is damaged: run {run.plan.run} has no statistics of {hook}; run `actstore verify "
                f"{self.url} --repair`, then the extraction again"
            ) from error

    def __contains__(self, hook: object) -> bool:
        try:
            self._find(hook)  # type: ignore[arg-type]
        except (HookError, TypeError, ValueError):
            return False
        return True

    def __iter__(self) -> Any:
        return iter(self.hooks)

    def _find(self, hook: HookName) -> HookArray:
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
            return [self._find(pattern)]
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
        from actstore.hooks.stored_config import hooks_of_stored

        return hooks_of_stored(self.plan.request.model.config)

    def cache(
        self,
        sequences: int | slice | Sequence[int],
        *,
        names_filter: "HookName | Sequence[HookName] | None" = None,
        model: "HookedModel | None" = None,
    ) -> "ActivationCache":
        """The stored values of some sequences, as `HookedModel.run_with_cache` gives them for the same tokens.

        Args:
            sequences: rows of the store.
            names_filter: hooks to read, names or globs; None for all that are stored.
            model: for methods of the cache that need weights.

        Raises:
            HookError: a hook is not stored.
            NotCommittedError: a row is not committed.
        """
        from actstore.hooks.cache import ActivationCache
        from actstore.hooks.point import point_of

        names, cfg = self._model_hooks
        rows = [sequences] if isinstance(sequences, int) else sequences
        wanted = self.hooks
        if names_filter is not None:
            patterns = each_name(names_filter)
            chosen = {found.name for pattern in patterns for found in self._matching(pattern)}
            wanted = tuple(name for name in self.hooks if name in chosen)
        values = {}
        for name in wanted:
            point = point_of(name)
            axis = 1 if point is None else point.position_axis
            values[name] = self[name][rows].movedim(1, axis)
        return ActivationCache(values, names=names, cfg=cfg, model=model)

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
            drop: rows to leave out: ``bos``, ``eos``, ``sep``, ``pad``, or token ids.
            seqpos: positions to keep, a slice or a list.
            max_norm: rows of the first hook with a larger Euclidean norm are left out; all of it is read to find them.
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
        from actstore.loader.drop import parse
        from actstore.loader.loader import Loader
        from actstore.loader.options import LoaderOptions, chosen_hooks, torch_device, torch_dtype

        chosen, is_single = chosen_hooks(self, hooks)
        options = LoaderOptions(
            hooks=chosen,
            is_single=is_single,
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            window_rows=window_rows,
            drop=parse(self, drop, seqpos, max_norm, mask),
            epochs=epochs,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            dtype=torch_dtype(dtype),
            provenance=provenance,
            prefetch=prefetch,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            cache_limit=cache_limit,
            device=torch_device(device),
        )
        return Loader(self, options)

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
        return Rows(self._blobs, [_token_section(part, path) for part in self._parts])

    @property
    def zarr(self) -> "zarr.Group":
        """The same store through zarr-python. It shows rows that are not committed as NaN."""
        import zarr

        import actstore.store.bfloat16  # noqa: F401 - registers the type

        return zarr.open_group(self.url, mode="r")

    def __repr__(self) -> str:
        model = self.plan.request.model.name
        n, length = self.shape
        state = "complete" if self.is_complete else f"{self.n_committed}/{self.n_segments} segments"
        return (
            f"<actstore.Store {self.url}: {model}, {len(self.hooks)} hooks, {n} x {length} tokens, {state}>"
        )


def _token_section(part: Run, path: str) -> Section:
    def is_committed(_shard: int) -> bool:
        return part.has_tokens

    return Section(part.plan.token_array(path), is_committed, "run the extraction again to complete them")


def open_store(url: str) -> Store:
    """Open the store below a path or URL; exported as `actstore.open`.

    Raises:
        StorageError: there is no store, or it cannot be read.
    """
    blobs = open_blobs(str(url))
    runs = read_runs(blobs)
    if not runs:
        raise StorageError(
            f"there is no actstore store at {blobs.url} ({plan_key(FIRST_RUN)} does not exist)"
        )
    return Store(blobs, runs)
