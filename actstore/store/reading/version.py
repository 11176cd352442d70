"""Checks whether a URL still has the store that was opened."""

import itertools
import threading
from collections.abc import Callable
from typing import Final

from actstore.errors import ActstoreError, StoreReplacedError
from actstore.storage.blobs import BlobInfo, BlobReader
from actstore.store.reading.identity import replaced
from actstore.store.records.commit import plan_key, read_plan
from actstore.store.records.manifest import MANIFEST_KEY, read_manifest
from actstore.store.records.run import Run, plan_tag_of, tag_of

_MAX_PINNED: Final = 1 << 16
"""Number of tags that are kept, some 15 MB. A blob whose tag is not kept is checked again."""
_TRIES: Final = 5
"""Tries to read the records between two changes of them."""


class Version:
    """The runs of a store as they were when it was opened, and the tags of blobs that are known to belong to them.

    A store is written once, so its records vouch for its shards: the manifest for those of finished runs, with a
    checksum over all their checksums; for others the plan, which is the first object of a run that is written, and the
    last one that another store of the same plan could share. If a shard is read *first*, and *afterwards* the records
    are still those that were opened, the shard belongs to them, whatever happened in between. Then its tag is known,
    and nothing else has to be requested as long as that stays the same.

    Threads may share one. A forked process may use one of local files.
    """

    def __init__(self, blobs: BlobReader, runs: tuple[Run, ...]) -> None:
        """
        Args:
            blobs: where the records are; these are not pinned to a version.
            runs: runs that were opened.
        """
        self._blobs = blobs
        self._runs = runs
        self._records = _tags_of_records(runs)
        """Tags of the records that vouch for the runs; None until they are known."""
        self._tags: dict[str, str] = {}
        # Tags of local records take a microsecond to read, and a lock could be held when the process is forked.
        self._lock = None if blobs.is_local else threading.Lock()
        self._clock = itertools.count()
        self._looked_at = -1

    def tag(self, key: str) -> str | None:
        """The tag of a blob that is known to belong to this version; None if it is not known yet."""
        return self._tags.get(key)

    def seen(self, key: str, tag: str | None) -> None:
        """Take note of a blob that was read, or is held open.

        Args:
            key: key of the blob.
            tag: tag of what was read; None where storage has none.

        Raises:
            StoreReplacedError: the blob may be of another version.
        """
        if tag is not None and self._tags.get(key) == tag:
            return
        self.check()
        if tag is not None:
            if len(self._tags) >= _MAX_PINNED:
                self._tags = {}
            self._tags[key] = tag

    def check(self) -> None:
        """Check that all that was read, or opened, until now belongs to this version.

        Raises:
            StorageError: the records cannot be read.
            StoreReplacedError: something may be of another version.
        """
        if self._lock is None:
            self._look()
            return
        asked_at = next(self._clock)
        with self._lock:
            # One check is enough for all threads that came before it began.
            if self._looked_at < asked_at:
                looked_at = next(self._clock)
                self._look()
                self._looked_at = looked_at

    def explain(self, error: Exception) -> None:
        """Check whether an error in reading comes from a store that was replaced, and say so.

        Raises:
            StoreReplacedError: it does.
        """
        if isinstance(error, StoreReplacedError):
            return
        try:
            self.check()
        except StoreReplacedError as reason:
            raise reason from error
        except ActstoreError:
            return  # storage cannot be reached, which the first error says

    def _look(self) -> None:
        if self._records is None or self._read_tags() != self._records:
            self._confirm()

    def _read_tags(self) -> dict[str, str]:
        plans = [plan_key(run.plan.run) for run in self._runs if run.finished is None]
        tags = {key: _tag(self._blobs.head(key), plan_tag_of) for key in plans}
        if len(plans) < len(self._runs):
            tags[MANIFEST_KEY] = _tag(self._blobs.head(MANIFEST_KEY), tag_of)
        return tags

    def _confirm(self) -> None:
        """Compare what the records say now with what was opened: the manifest is replaced when a store grows."""
        for _ in range(_TRIES):
            before = self._read_tags()
            self._compare(before)
            if self._read_tags() == before:
                self._records = before
                return
        raise replaced(self._blobs.url)

    def _compare(self, tags: dict[str, str]) -> None:
        for run in self._runs:
            key = plan_key(run.plan.run)
            if run.finished is not None:
                continue
            # Another store of the same plan can have other values: their last bits depend on the machine.
            known = run.plan_tag if self._records is None else self._records[key]
            if known is not None:
                if tags[key] != known:
                    raise replaced(self._blobs.url)
            elif read_plan(self._blobs, run.plan.run) != run.plan:
                raise replaced(self._blobs.url)
        if MANIFEST_KEY in tags:
            manifest = read_manifest(self._blobs)
            now = {} if manifest is None else {entry.plan.run: entry for entry in manifest.runs}
            for run in self._runs:
                if run.finished is not None and now.get(run.plan.run) != run.finished:
                    raise replaced(self._blobs.url)


def _tags_of_records(runs: tuple[Run, ...]) -> dict[str, str] | None:
    """The tags that the records of runs had when they were read, by key; None if one is not known."""
    tags: dict[str, str] = {}
    for run in runs:
        key, tag = (
            (plan_key(run.plan.run), run.plan_tag)
            if run.finished is None
            else (MANIFEST_KEY, run.manifest_tag)
        )
        if tag is None:
            return None
        tags[key] = tag
    return tags


def _tag(info: BlobInfo | None, of: Callable[[BlobInfo], str]) -> str:
    return "" if info is None else of(info)
