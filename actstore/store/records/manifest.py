"""The manifest: what the finished runs of a store contain, so that readers need not list it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, Literal, Self

from pydantic import model_validator

from actstore.storage.blobs import BlobInfo, BlobReader, Blobs, are_files
from actstore.storage.errors import BlobNotFoundError
from actstore.store.format.document import Document
from actstore.store.format.layout import to_json
from actstore.store.format.plan import RUNS, Plan
from actstore.store.format.remembered import remembered
from actstore.store.records.commit import ObjectRecord
from actstore.store.statistics.hook_statistics import HookStatistics

MANIFEST_KEY = "_actstore/manifest.json"
_N_REMEMBERED: Final = 8
"""Manifests that are kept parsed in this process: some kilobytes for each run in them."""


def shards_key(run: str) -> str:
    return f"{RUNS}/{run}/shards.parquet"


def statistics_key(run: str) -> str:
    return f"{RUNS}/{run}/statistics.json"


class FinishedRun(Document):
    """A run whose segments are all committed."""

    plan: Plan
    shards: ObjectRecord
    """Parquet file with the size and checksum of every shard."""
    statistics: ObjectRecord
    """Statistics of each hook over all segments."""

    @model_validator(mode="after")
    def _own_files(self) -> Self:
        run = self.plan.run
        if (self.shards.key, self.statistics.key) != (shards_key(run), statistics_key(run)):
            raise ValueError(f"run {run} names files that are not its own")
        return self


class RunStatistics(Document):
    """Statistics of a finished run."""

    format: Literal[1] = 1
    hooks: dict[str, HookStatistics]
    """Statistics by hook name; attention scores and patterns have none."""


class Manifest(Document):
    """The pointer to all finished runs: the only object of a store that is ever replaced."""

    format: Literal[1] = 1
    sealed: bool
    """Whether these are all runs of the store. If not, the others are found by listing."""
    runs: tuple[FinishedRun, ...]

    def _json(self) -> bytes:
        """Implements `Document._json`, with the text of each run made once: all of them are in every new manifest."""
        head, rest = to_json(self.model_dump(mode="json", exclude={"runs"}) | {"runs": []}).split(b"[]")
        texts = b",\n".join(_text_of(run) for run in self.runs)
        return head + (b"[\n" + texts + b"\n  ]" if texts else b"[]") + rest

    @model_validator(mode="after")
    def _each_run_once(self) -> Self:
        names = [finished.plan.run for finished in self.runs]
        if names != sorted(set(names)):
            raise ValueError("its runs are not in order, each once")
        return self


@remembered
def _text_of(run: FinishedRun) -> bytes:
    """A run as it is written in the list of a manifest."""
    lines = to_json(run.model_dump(mode="json")).splitlines()
    return b"\n".join(b"    " + line for line in lines)


@lru_cache(maxsize=_N_REMEMBERED)
def _parsed(content: "_Content") -> Manifest:
    return content.manifest or Manifest.from_bytes(content.data, content.where)


@dataclass(frozen=True)
class _Content:
    """The bytes of a manifest, which alone tell it from others."""

    data: bytes
    where: str = field(compare=False)
    manifest: Manifest | None = field(default=None, compare=False)
    """What was written as these bytes, if that was done here."""


def read_manifest(blobs: BlobReader) -> Manifest | None:
    """The manifest of a store; None if no run is finished.

    Raises:
        StorageError: the manifest is damaged or cannot be read.
    """
    return read_manifest_and_head(blobs)[0]


def read_manifest_and_head(blobs: BlobReader) -> tuple[Manifest | None, BlobInfo | None]:
    """The manifest, and its head if storage returns that without another request.

    Raises:
        StorageError: the manifest is damaged or cannot be read.
    """
    try:
        if are_files(blobs):
            data, info = blobs.read_and_head(MANIFEST_KEY)
        else:
            data, info = blobs.read(MANIFEST_KEY), None
    except BlobNotFoundError:
        return None, None
    return _parsed(_Content(bytes(data), f"{blobs.url}/{MANIFEST_KEY}")), info


def update_manifest(blobs: Blobs, change: Callable[[Manifest], Manifest]) -> Manifest:
    """Replace the manifest atomically. Several processes may do so at once.

    Args:
        change: makes the new manifest from the present one; called again if another process was faster.
    """
    while True:
        # The tag is read before the content: if the manifest is replaced in between, our replacement fails.
        info = blobs.head(MANIFEST_KEY)
        where = f"{blobs.url}/{MANIFEST_KEY}"
        present = None if info is None else _parsed(_Content(bytes(blobs.read(MANIFEST_KEY)), where))
        wanted = change(present or Manifest(sealed=False, runs=()))
        if wanted == present:
            return wanted
        data = [wanted.to_bytes()]
        if info is None:
            is_done = blobs.create(MANIFEST_KEY, data)
        else:
            is_done = blobs.replace(MANIFEST_KEY, data, expected=info.tag)
        if is_done:
            _parsed(_Content(data[0], where, wanted))
            return wanted
