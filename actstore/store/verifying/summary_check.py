"""Checking the two files of a finished run against the records that they summarise."""

from actstore.errors import StorageError
from actstore.store.format.plan import Plan
from actstore.store.records.commit import CommitRecord, ObjectRecord, TokensRecord
from actstore.store.records.manifest import FinishedRun, RunStatistics
from actstore.store.records.seal import merging
from actstore.store.records.shards_table import from_parquet, shards_table, to_parquet
from actstore.store.verifying.inspection import Inspection


class RecordSums:
    """The sums of the records of a run, kept without the records."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._shards: dict[int, tuple[ObjectRecord, ...]] = {}
        """The shards of each segment, as in `CommitRecord.objects`."""
        self._statistics = merging(plan)
        self.tokens: TokensRecord | None = None
        """The record of the tokens, for a run that brings tokens."""

    def add(self, record: CommitRecord) -> None:
        """Add a record that fits the plan."""
        self._shards[record.segment] = record.objects(self._plan)
        for name, hook_statistics in record.statistics.items():
            self._statistics[name].add(hook_statistics)

    @property
    def is_whole(self) -> bool:
        """Whether all segments, and the tokens if the run brings any, were added."""
        return (
            len(self._shards) == self._plan.n_segments
            and (self.tokens is not None) == self._plan.has_own_tokens
        )

    def is_in(self, key: str, data: bytes) -> bool:
        """Whether a file of the manifest agrees with the sums.

        Raises:
            StorageError: the file cannot be read, or the sum of the records is impossible.
        """
        if not key.endswith(".parquet"):
            statistics = {name: total.record() for name, total in self._statistics.items()}
            return data == RunStatistics(hooks=statistics).to_bytes()
        expected = shards_table(self._plan, self._shards, self.tokens)
        if data == to_parquet(expected):
            return True
        # Another version of pyarrow writes other bytes.
        return bool(expected.equals(from_parquet(data, n_rows=expected.num_rows)))


def check_summary(inspection: Inspection, finished: FinishedRun, sums: RecordSums) -> None:
    """Check the files of a finished run; their content only if all records are intact.

    Args:
        inspection: collects the findings.
        finished: the run's entry in the manifest.
        sums: the sums of the records of the run.
    """
    where = {"run": finished.plan.run}
    for record in (finished.shards, finished.statistics):
        try:
            data = bytes(inspection.read(record.key))
            if not record.is_of(data):
                inspection.report(record.key, "is not what the manifest points to", **where)
            elif sums.is_whole and not sums.is_in(record.key, data):
                inspection.report(record.key, "does not say what the commit records say", **where)
        except StorageError as error:
            inspection.report_error(record.key, error, **where)
