"""The statistics that the records of a store hold, read without its activations."""

from collections.abc import Callable, Iterator
from itertools import islice

from actstore.errors import NotCommittedError, StorageError
from actstore.storage.blobs import BlobReader
from actstore.store.format.plan import HookArray
from actstore.store.records.commit import read_commits
from actstore.store.records.manifest import FinishedRun, RunStatistics
from actstore.store.records.run import Run, runs_over, runs_with_tokens
from actstore.store.statistics.hook_statistics import HookStatistics, Statistics
from actstore.store.statistics.merging import Merging


class StoredStatistics:
    """Reads statistics of the hooks of runs: from one object for a finished run, from each commit record for others."""

    def __init__(self, url: str, blobs: BlobReader, runs: tuple[Run, ...]) -> None:
        """
        Args:
            url: URL of the store, as its user knows it.
            blobs: where the records are.
            runs: all runs of the store.
        """
        self._url = url
        self._blobs = blobs
        self._runs = runs
        self._n_not_finite: dict[str, dict[str, int]] = {}
        """Numbers of tokens that are not finite, by finished run and by hook, kept after their first use."""

    def merged(self, hook: HookArray, look: Callable[[int], None] | None) -> Statistics:
        """Statistics of a hook over all committed tokens.

        Args:
            hook: hook that has statistics.
            look: called with the number of tokens of each record that is read; it may raise an error to stop.

        Raises:
            NotCommittedError: nothing of the hook is committed yet.
            StorageError: a record is damaged.
        """
        merging = Merging(hook.shape)
        n_records = 0
        for run in self._runs:
            if run.hook(hook.name) is not None:
                for record in self._records(run, hook.name):
                    merging.add(record)
                    n_records += 1
                    if look is not None:
                        look(record.count)
        if not n_records:
            raise NotCommittedError(
                f"nothing of {hook.name} is committed in {self._url} yet; run the extraction again to complete it"
            )
        return Statistics(merging.record(), hook.shape)

    def not_finite(
        self, hook: HookArray, most_segments: int | None, most_records: int | None
    ) -> list[tuple[range, int]]:
        """The segments with values of a hook that are not finite, see `CommittedStore.not_finite`.

        Raises:
            StorageError: a record is damaged.
        """
        where: list[tuple[range, int]] = []
        first = 0
        for part in runs_with_tokens(self._runs):
            for run in runs_over(self._runs, part):
                if run.hook(hook.name) is not None:
                    left = None if most_segments is None else most_segments - len(where)
                    where += self._not_finite_of(run, hook.name, first, left, most_records)
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
        for record in read_commits(self._blobs, run.plan, looked_at):
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
                f"{self._url} is damaged: the statistics of run {run.plan.run} do not count as many tokens of {hook} "
                f"that are not finite as its commit records; run `actstore verify {self._url} --repair`, then the "
                "extraction again"
            )
        rest = run.plan.segment(next(in_order)).start
        where.append((range(first + rest, first + run.plan.n_sequences), n_left))
        return where

    def _count_not_finite(self, run: Run, hook: str) -> int | None:
        """The number of tokens that are not finite in a finished run; None for other runs, of which it is not known."""
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
            for record in read_commits(self._blobs, run.plan, sorted(run.committed)):
                yield record.statistics[hook]
        except KeyError as error:
            raise self._without_statistics(run, hook) from error

    def _without_statistics(self, run: Run, hook: str) -> StorageError:
        return StorageError(
            f"{self._url} is damaged: run {run.plan.run} has no statistics of {hook}; run `actstore verify "
            f"{self._url} --repair`, then the extraction again"
        )

    def _summed_up(self, finished: FinishedRun) -> RunStatistics:
        record = finished.statistics
        data = bytes(self._blobs.read(record.key))
        if not record.is_of(data):
            raise StorageError(
                f"{self._url}/{record.key} is not the one that the manifest names; it is damaged: run `actstore verify "
                f"{self._url} --repair`, then the extraction again"
            )
        return RunStatistics.from_bytes(data, f"{self._url}/{record.key}")
