"""Writing a segment: the shards of all hooks side by side, then the record that makes them part of the store."""

import contextlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Final

from numpy.typing import NDArray

from actstore.errors import StorageError
from actstore.store.blobs import Blobs
from actstore.store.commit import CommitRecord, Put, commit_key, put, read_commit
from actstore.store.lease import Lease, lease
from actstore.store.look_first import LookFirst
from actstore.store.moments import has_statistics, of_rows
from actstore.store.plan import HookArray, Plan, Segment
from actstore.store.rows import Rows, Section
from actstore.store.shard import encode
from actstore.store.statistics import HookStatistics

_THREADS: Final = 4
_STRICT_ATTEMPTS: Final = 3

Values = Mapping[str, NDArray[Any]]


class SegmentWriter:
    """May be used by several threads, each with a segment of its own."""

    def __init__(self, blobs: Blobs, plan: Plan, *, is_strict: bool, is_conditional: bool) -> None:
        self._blobs = blobs if is_conditional else LookFirst(blobs)
        self._plan = plan
        self._is_strict = is_strict
        self.is_conditional = is_conditional
        """Whether storage refuses a second create of a key. If not, the record is left to the caller to write."""
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="write")

    def write(
        self, segment: Segment, values: Values, record: CommitRecord, lengths: NDArray[Any]
    ) -> CommitRecord:
        """Write every hook's shard, then the record.

        Args:
            segment: which one.
            values: by hook, its rows in the storage type, padded to whole inner chunks.
            record: all but its shards.
            lengths: real tokens of each sequence of the segment.

        Returns:
            The record, with the shards that are there.

        Raises:
            StorageError: writing failed; or, in strict mode, another worker took the segment over.
        """
        with self._lease(segment) as held:
            key = commit_key(self._plan.run, segment.index)
            if held is not None and self._blobs.head(key) is not None:
                return read_commit(self._blobs, self._plan, segment.index)  # by whoever had the lease before
            puts = self._put(segment, values) if held is None else self._put_strictly(segment, values, held)
            statistics = {
                name: self._statistics(segment, name, lengths, found, puts[name])
                for name, found in record.statistics.items()
            }
            shards = {name: done.record for name, done in puts.items()}
            record = record.model_copy(update={"shards": shards, "statistics": statistics})
            if self.is_conditional:
                if held is not None:
                    held.check()
                # False: another worker was first. Its record names the same objects, for none is ever replaced.
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
            return put(self._blobs, layout, segment.index, shard)

        writes = {hook.name: self._threads.submit(write, hook) for hook in self._plan.request.hooks}
        # All of them, also when one fails: the buffers must not be filled again while another is still reading.
        wait(writes.values())
        return {name: done.result() for name, done in writes.items()}

    def _put_strictly(self, segment: Segment, values: Values, held: Lease) -> dict[str, Put]:
        """Nobody else writes this segment meanwhile, so what differs is left from an attempt that was given up."""
        for _ in range(_STRICT_ATTEMPTS):
            puts = self._put(segment, values)
            foreign = [name for name, done in puts.items() if not done.is_own]
            if not foreign:
                return puts
            for name in foreign:
                # Not those of who took the lease over, and may have committed them, while this process stood still.
                held.check()
                if self._blobs.head(commit_key(self._plan.run, segment.index)) is None:
                    self._blobs.delete(puts[name].record.key)
        raise StorageError(
            f"shards of segment {segment.index} in {self._blobs.url} keep coming back from another process; stop it, "
            "and run the same command again"
        )

    def _statistics(
        self, segment: Segment, name: str, lengths: NDArray[Any], computed: HookStatistics, done: Put
    ) -> HookStatistics:
        """Of what is stored: of our own values, or of those that were adopted."""
        if done.is_own:
            return computed
        hook = next(hook for hook in self._plan.request.hooks if hook.name == name)
        assert has_statistics(hook)
        rows = Rows(self._blobs, [Section(self._plan.activations(hook), lambda _: True)])
        request = self._plan.request
        return of_rows(
            hook,
            rows[segment.start : segment.stop],
            request.dtype,
            lengths,
            request.batch_size,
            covariance=request.covariance,
        )
