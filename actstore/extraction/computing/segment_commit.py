"""Writing a segment: the shards of all hooks in parallel, then the record that makes them part of the store."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import StorageError
from actstore.extraction.computing.adoption import is_same_computation
from actstore.storage.blobs import Blobs
from actstore.storage.look_first import LookFirst
from actstore.store.format.batches import Batch
from actstore.store.format.plan import HookArray, Plan, Segment
from actstore.store.format.shard import crc32c, encode
from actstore.store.locking.lease import Lease, lease
from actstore.store.reading.rows import Rows, Section
from actstore.store.records.commit import CommitRecord, commit_key, read_commit
from actstore.store.records.shard_writer import Put, put
from actstore.store.statistics.hook_statistics import HookStatistics
from actstore.store.statistics.moments import has_statistics, recompute
from actstore.store.statistics.norms import difference, side_by_side

_THREADS: Final = 4
_STRICT_ATTEMPTS: Final = 3

Values = Mapping[str, NDArray[Any]]
Norms = Mapping[str, NDArray[np.float32]]


class SegmentWriter:
    """Writes segments; several threads may use it, each with a segment of its own."""

    def __init__(
        self,
        blobs: Blobs,
        plan: Plan,
        *,
        is_strict: bool,
        is_conditional: bool,
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            blobs: storage of the store.
            plan: plan of the run.
            is_strict: whether all shards of a segment must be of one attempt.
            is_conditional: whether storage refuses to create a key twice.
            fence: called before the shards of a segment, and again before its record, are created. It raises if this
                process must not write any more.
        """
        self._blobs = blobs if is_conditional else LookFirst(blobs)
        self._plan = plan
        self._plan_checksum = crc32c(plan.to_bytes())
        self._is_strict = is_strict
        self._fence = fence
        self.is_conditional = is_conditional
        """Whether storage refuses to create a key twice. If not, the caller must write the record."""
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="write")

    def write(
        self,
        segment: Segment,
        values: Values,
        norms: Norms,
        record: CommitRecord,
        counts: NDArray[Any],
        batches: Sequence[Batch],
    ) -> CommitRecord:
        """Write every hook's shard, then that of the norms, then the record.

        Args:
            segment: the segment.
            values: rows by hook, in the storage type, padded to whole inner chunks.
            norms: norms by hook, [n_sequences, width] as they are stored, if the plan has norms.
            record: the record without its shards.
            counts: number of entries in use of each sequence of the segment.
            batches: the batches that the values were computed in.

        Returns:
            The record with the shards that are stored.

        Raises:
            BusyError: this process was paused, and a repair took over; or the store was deleted.
            StorageError: writing failed; or there are shards of another run in their place; or, in strict mode, another
                worker took the segment over.
        """
        self._fence()  # a new store of the same shapes could adopt our shards
        with self._lease(segment) as held:
            key = commit_key(self._plan.run, segment.index)
            if held is not None and self._blobs.head(key) is not None:
                # The previous holder of the lease has committed it.
                return read_commit(self._blobs, self._plan, segment.index)
            puts = self._put_all(segment, held, lambda: self._put(segment, values))
            adopted = self._adopt(segment, values, counts, puts)
            again = {
                name: self._recompute(name, rows, counts, batches)
                for name, rows in adopted.items()
                if name in record.statistics
            }
            changes: dict[str, Any] = {
                "shards": {name: done.record for name, done in puts.items()},
                "statistics": record.statistics | {name: moments for name, (moments, _) in again.items()},
            }
            if self._plan.norms:
                # Norms come last: the stored activations will not change any more.
                norms = {**norms, **{name: row_norms for name, (_, row_norms) in again.items()}}
                changes["norms"] = self._put_norms(segment, norms, held).record
            record = record.model_copy(update=changes)
            if self.is_conditional:
                self._fence()
                if held is not None:
                    held.check()
                # Another worker may have been first. Its record names the same objects, since none is ever replaced.
                self._blobs.create(key, [record.to_bytes()])
        return record

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def _lease(self, segment: Segment) -> contextlib.AbstractContextManager[Lease | None]:
        if not self._is_strict:
            return contextlib.nullcontext()
        return lease(self._blobs, f"{self._plan.run}-{segment.index:08d}")

    def _put(self, segment: Segment, values: Values) -> dict[str, Put]:
        def write(hook: HookArray) -> Put:
            layout = self._plan.activations(hook)
            shard = encode(layout, segment.index, values[hook.name])
            return put(self._blobs, layout, segment.index, shard, plan_checksum=self._plan_checksum)

        writes = {hook.name: self._threads.submit(write, hook) for hook in self._plan.request.hooks}
        # Wait for all, also when one fails: the buffers must not be filled again while one is still being read.
        wait(writes.values())
        return {name: done.result() for name, done in writes.items()}

    def _put_norms(self, segment: Segment, norms: Norms, held: Lease | None) -> Put:
        """Write the norms of the stored values, or adopt those that were there before if they are equal up to rounding.

        Raises:
            StorageError: other norms were there before.
        """
        layout = self._plan.norm_array()
        shard = encode(layout, segment.index, side_by_side(self._plan, segment.index, norms))
        (done,) = self._put_all(
            segment,
            held,
            lambda: {
                layout.path: put(self._blobs, layout, segment.index, shard, plan_checksum=self._plan_checksum)
            },
        ).values()
        if done.is_own:
            return done
        stored = Rows(self._blobs, [Section(layout, lambda _: True)])[segment.start : segment.stop]
        for number, hook in enumerate(layout.hooks):
            if difference(np.ascontiguousarray(stored[:, number]), norms[hook]) is not None:
                self._fence()
                raise StorageError(
                    f"{self._blobs.url}/{done.record.key} was there before, and holds other norms than the stored "
                    f"values of {hook} have; run `actstore verify {self._blobs.url} --repair` and the same command "
                    "again"
                )
        return done

    def _put_all(
        self, segment: Segment, held: Lease | None, write: Callable[[], dict[str, Put]]
    ) -> dict[str, Put]:
        """Write some shards; with a lease, until all are of this attempt. Nobody else writes this segment meanwhile, so
        other shards are left from an attempt that was given up.

        Raises:
            StorageError: shards of another process appear again and again.
        """
        for _ in range(_STRICT_ATTEMPTS):
            puts = write()
            foreign = [name for name, done in puts.items() if not done.is_own]
            if held is None or not foreign:
                return puts
            for name in foreign:
                # While this process was paused, another may have taken the lease over and committed its shards.
                held.check()
                if self._blobs.head(commit_key(self._plan.run, segment.index)) is None:
                    self._blobs.delete(puts[name].record.key)
        raise StorageError(
            f"shards of segment {segment.index} in {self._blobs.url} keep coming back from another process; stop it, "
            "and run the same command again"
        )

    def _adopt(
        self, segment: Segment, values: Values, counts: NDArray[Any], puts: Mapping[str, Put]
    ) -> dict[str, NDArray[Any]]:
        """The stored rows of shards that were there before, by hook.

        Raises:
            StorageError: they differ from what was computed here, so another run has left them.
        """
        adopted = {}
        for hook in self._plan.request.hooks:
            done = puts[hook.name]
            if done.is_own:
                continue
            layout = self._plan.activations(hook)
            stored = Rows(self._blobs, [Section(layout, lambda _: True)])[segment.start : segment.stop]
            computed = values[hook.name][: segment.n_sequences]
            if not is_same_computation(hook.name, stored, computed, counts, layout.dtype):
                self._fence()  # this process may be the one that must not write
                raise StorageError(
                    f"{self._blobs.url}/{done.record.key} was there before, and holds other values than this run "
                    f"computes: another run has left it; run `actstore verify {self._blobs.url} --repair` and the same "
                    "command again, or choose another out"
                )
            adopted[hook.name] = stored
        return adopted

    def _recompute(
        self, name: str, rows: NDArray[Any], counts: NDArray[Any], batches: Sequence[Batch]
    ) -> tuple[HookStatistics, NDArray[np.float32]]:
        """Statistics and norms of rows that were adopted."""
        hook = next(hook for hook in self._plan.request.hooks if hook.name == name)
        assert has_statistics(hook)
        request = self._plan.request
        return recompute(
            hook,
            rows,
            request.dtype,
            counts,
            batches,
            covariance=request.covariance,
        )
