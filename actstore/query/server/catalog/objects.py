"""Decides by key which objects of a store clients may read."""

import json
import re
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Final

from actstore.query.problem import Problem
from actstore.store.committed_store import CommittedStore
from actstore.store.format.layout import ArrayLayout

_DOCUMENTS: Final = re.compile(
    r"_actstore/(manifest\.json|runs/[0-9]{4}/((plan|tokens|statistics)\.json|shards\.parquet|commits/[0-9]{8}\.json"
    r"|columns/[0-9]{8}\.parquet))"
)
_METADATA: Final = "zarr.json"


def check_readable(store: CommittedStore, key: str) -> None:
    """Check that clients may read a key: metadata, records, and shards that are committed.

    Raises:
        Problem: clients may not read it. Only a key that a Zarr reader may treat as missing is "not found", as a
            shard that is not committed yet would then read as fill values.
    """
    path, _, name = key.rpartition("/")
    if key == _METADATA or _DOCUMENTS.fullmatch(key) or (name == _METADATA and path in _paths(store)):
        return
    array = _arrays(store).get(path)
    number = re.fullmatch(r"c\.([0-9]{1,18})(?:\.0)*", name)
    if array is None or number is None:
        raise _no_object(key)
    layout, is_committed = array
    shard = int(number[1])
    if shard >= layout.n_shards or layout.key(shard) != key:
        raise _no_object(key)
    if not is_committed(shard):
        raise Problem(409, "not-committed", f"segment {shard} of {path} is not committed yet")


def _no_object(key: str) -> Problem:
    return Problem(404, "not-found", f"there is no object {key[:200]!r} in this store")


@lru_cache(maxsize=64)
def _arrays(store: CommittedStore) -> dict[str, tuple[ArrayLayout, Callable[[int], bool]]]:
    """Layout of every array that a run writes, and whether a shard of it is committed; by path.

    The store object is replaced by a new one when it grows, so the cache never goes stale.
    """
    arrays: dict[str, tuple[ArrayLayout, Callable[[int], bool]]] = {}
    for run in store.runs:
        for layout in run.plan.segment_arrays():
            arrays[layout.path] = layout, run.committed.__contains__
        for layout in run.plan.token_arrays() if run.plan.has_own_tokens else ():
            arrays[layout.path] = layout, partial(_all_or_none, run.has_tokens)
    return arrays


def _all_or_none(are_there: bool, _shard: int) -> bool:
    return are_there


@lru_cache(maxsize=64)
def _paths(store: CommittedStore) -> frozenset[str]:
    """Paths of all Zarr nodes below the root."""
    groups = (group for run in store.runs for group in run.plan.groups)
    return frozenset((*groups, *_arrays(store), "_actstore"))


@lru_cache(maxsize=64)
def consolidated(store: CommittedStore) -> bytes:
    """Metadata of the root group, with that of all nodes below in it, as zarr-python reads it: HTTP has no listing.

    Raises:
        StorageError: a document is missing or cannot be read.
    """
    root = _document(store, _METADATA)
    nodes = {path: _document(store, f"{path}/{_METADATA}") for path in sorted(_paths(store) - {"_actstore"})}
    root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": nodes}
    return json.dumps(root, indent=2).encode()


def _document(store: CommittedStore, key: str) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(bytes(store.blobs.read(key)))
    return fields
