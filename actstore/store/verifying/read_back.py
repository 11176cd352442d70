"""Reading back from storage that a run is complete, before that is reported."""

from actstore.errors import IncompleteError, StorageError
from actstore.storage.blobs import BlobNotFoundError, Blobs
from actstore.store.format.plan import Plan
from actstore.store.records.commit import TokensRecord, committed, read_commits, read_plan, tokens_key
from actstore.store.records.manifest import FinishedRun, RunStatistics, read_manifest


def read_back(blobs: Blobs, plan: Plan, *, are_records_read: bool = False) -> RunStatistics:
    """Check in storage that a run is complete: plan, tokens record, every commit record, the manifest and its two
    files.

    Args:
        blobs: the storage of the store.
        plan: the plan of the run.
        are_records_read: whether every commit record was just read and was intact; they are then only listed.

    Returns:
        The statistics of the run.

    Raises:
        IncompleteError: something is missing.
        StorageError: something is damaged, or storage failed.
    """
    try:
        _read_documents(blobs, plan)
        missing = sorted(set(range(plan.n_segments)) - committed(blobs, plan))
        if missing:
            raise IncompleteError(
                f"{len(missing)} of {plan.n_segments} segments of run {plan.run} at {blobs.url} have no commit record, "
                f"first of them segment {missing[0]}; {_removed(blobs, plan)}"
            )
        if not are_records_read:
            for _ in read_commits(blobs, plan, range(plan.n_segments)):
                pass
        return _statistics(blobs, plan)
    except BlobNotFoundError as error:
        raise IncompleteError(f"run {plan.run} is not complete: {error}; {_removed(blobs, plan)}") from error


def _removed(blobs: Blobs, plan: Plan) -> str:
    """What happened, and what to do about it."""
    text = "something removed what was written before, so run the same command again"
    if _entry(blobs, plan) is None:
        return text
    return f"{text}, after `actstore verify {blobs.url} --repair`, for the manifest calls the run finished"


def _read_documents(blobs: Blobs, plan: Plan) -> None:
    if read_plan(blobs, plan.run) != plan:
        raise IncompleteError(
            f"the plan of run {plan.run} at {blobs.url} is gone, or another one; {_removed(blobs, plan)}"
        )
    if plan.has_own_tokens:
        TokensRecord.read(blobs, tokens_key(plan.run))


def _entry(blobs: Blobs, plan: Plan) -> FinishedRun | None:
    manifest = read_manifest(blobs)
    runs = () if manifest is None else manifest.runs
    return next((finished for finished in runs if finished.plan.run == plan.run), None)


def _statistics(blobs: Blobs, plan: Plan) -> RunStatistics:
    """The statistics that the manifest points to."""
    finished = _entry(blobs, plan)
    if finished is None or finished.plan != plan:
        raise IncompleteError(
            f"the manifest of {blobs.url} does not name run {plan.run}, or names another plan; "
            "something changed it, so run the same command again"
        )
    for record in (finished.shards, finished.statistics):
        info = blobs.head(record.key)
        if info is None or info.nbytes != record.nbytes:
            raise StorageError(
                f"{blobs.url}/{record.key} is not what the manifest points to; run `actstore verify {blobs.url} "
                "--repair`, then the same command again"
            )
    return RunStatistics.read(blobs, finished.statistics.key)
