"""Making the tokens record of a run again from the shards that it named."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import StorageError
from actstore.storage.blobs import Blobs
from actstore.store.format.layout import ArrayLayout
from actstore.store.format.plan import Plan
from actstore.store.format.shard import crc32c
from actstore.store.format.shard_reader import decode
from actstore.store.records.commit import ObjectRecord, TokensRecord, columns_folder, columns_key
from actstore.store.verifying.token_check import length_problem

Proven = dict[str, ObjectRecord]
"""Records of shards as they are stored, by key."""


def proven_tokens(blobs: Blobs, plan: Plan, witness: Mapping[str, ObjectRecord]) -> Proven:
    """The token shards and tables of kept columns that something other than their own record proves to be intact.

    A witness gives the size and checksum of each of them. Without a witness, the plan has the hash of all ids and the
    sum of all lengths, and the tokens of a document must be numbered consecutively in ``documents`` and ``offsets``.
    Nothing but a witness can prove a table, chosen positions, or roles and turns.

    Args:
        blobs: the storage of the store.
        plan: the plan of a run that brings tokens.
        witness: the shards by key, from a source that was checked; empty if there is none.
    """
    if witness:
        shards = {
            record.key: record
            for layout in plan.token_arrays()
            for _, record, _ in _present(blobs, layout)
            if witness.get(record.key) == record
        }
        return shards | _tables(blobs, plan, witness)
    tokens, lengths = plan.token_array("tokens"), plan.token_array("lengths")
    documents, offsets = plan.token_array("documents"), plan.token_array("offsets")
    proven = _tokens(blobs, plan, tokens)
    present = {index: (record, rows) for index, record, rows in _present(blobs, lengths)}
    if len(present) != lengths.n_shards:
        return proven
    all_lengths = np.concatenate([present[index][1] for index in range(lengths.n_shards)])
    if length_problem(plan, all_lengths) is not None:
        return proven
    proven |= {record.key: record for record, _ in present.values()}
    names = blobs.sizes(offsets.path)
    are_cut_left = plan.request.tokens.truncate == "left"
    for index, record, rows in _present(blobs, documents):
        other = _shard(blobs, offsets, index) if _name(offsets, index) in names else None
        start = index * documents.shard_rows
        of_shard = all_lengths[start : start + len(rows)]
        if other is not None and counts_on(rows, other[1], of_shard, are_cut_left=are_cut_left):
            proven |= {record.key: record, other[0].key: other[0]}
    return proven


def tokens_record(plan: Plan, proven: Proven) -> TokensRecord | None:
    """The record of proven shards and tables; None if one of them is not proven."""
    layouts = plan.token_arrays()
    n_shards = sum(layout.n_shards for layout in layouts)
    n_tables = len(proven) - n_shards
    if n_tables < 0 or (n_tables > 0) != bool(plan.request.tokens.keep):
        return None
    keys = [layout.key(index) for layout in layouts for index in range(layout.n_shards)]
    keys += [columns_key(plan.run, number) for number in range(n_tables)]
    if not all(key in proven for key in keys):
        return None
    return TokensRecord(
        shards=tuple(proven[key] for key in keys[:n_shards]),
        tables=tuple(proven[key] for key in keys[n_shards:]),
    )


def _tables(blobs: Blobs, plan: Plan, witness: Mapping[str, ObjectRecord]) -> Proven:
    """All tables of kept columns or none: a record that names some of them would seem to be whole."""
    expected = {
        key: record for key, record in witness.items() if key.startswith(f"{columns_folder(plan.run)}/")
    }
    for key, record in expected.items():
        try:
            is_there = record.is_of(blobs.read(key))
        except StorageError:
            is_there = False
        if not is_there:
            return {}
    return expected


def _tokens(blobs: Blobs, plan: Plan, layout: ArrayLayout) -> Proven:
    """All shards of the ids or none: one hash over all rows cannot tell which of them are wrong."""
    ids = hashlib.sha256()
    proven: Proven = {}
    for _, record, rows in _present(blobs, layout):
        ids.update(np.ascontiguousarray(rows).data)
        proven[record.key] = record
    return proven if ids.hexdigest() == plan.tokens_sha256 else {}


def _present(blobs: Blobs, layout: ArrayLayout) -> Iterator[tuple[int, ObjectRecord, NDArray[Any]]]:
    """The number, record and rows of each shard that is present and can be decoded, in order."""
    names = blobs.sizes(layout.path)
    # Not more than are present: a damaged plan can announce more shards than a list can hold.
    for index in range(min(layout.n_shards, len(names))):
        shard = _shard(blobs, layout, index) if _name(layout, index) in names else None
        if shard is not None:
            yield index, *shard


def _shard(blobs: Blobs, layout: ArrayLayout, index: int) -> tuple[ObjectRecord, NDArray[Any]] | None:
    key = layout.key(index)
    try:
        data = np.frombuffer(blobs.read(key), np.uint8)
        rows = decode(layout, index, data)
    except StorageError:
        return None
    if data[rows.nbytes : layout.data_nbytes(index)].any():
        return None  # rows past the end are zeros
    return ObjectRecord(key=key, nbytes=len(data), crc32c=crc32c(data)), rows


def _name(layout: ArrayLayout, index: int) -> str:
    return layout.key(index).removeprefix(f"{layout.path}/")


def counts_on(
    documents: NDArray[Any], offsets: NDArray[Any], lengths: NDArray[Any], *, are_cut_left: bool = False
) -> bool:
    """Whether rows [n, L] are a possible origin of tokens: neighbouring tokens are consecutive in a document, or the
    last of one document and the first of a later one. Cut at the left, a document keeps its own BOS token in front.
    """
    # The token put before an empty document stands for the document.
    is_put = offsets == -1
    is_of_empty = is_put & (documents >= 0)
    if is_of_empty[:, 1:].any() or (is_of_empty[:, 0] & (lengths != 1)).any():
        return False
    is_padding = np.arange(documents.shape[1]) >= lengths[:, None]
    if (~is_put & (documents == -1)).any() or documents.min() < -1 or offsets.min() < -1:
        return False
    if not is_put[is_padding].all():
        return False
    follows = (documents[:, 1:] == documents[:, :-1]) & (offsets[:, 1:] == offsets[:, :-1] + 1)
    if are_cut_left:
        is_kept = (documents[:, 1:2] == documents[:, :1]) & (offsets[:, :1] == 0) & (offsets[:, 1:2] > 0)
        follows[:, :1] |= is_kept
    begins = (documents[:, 1:] > documents[:, :-1]) & (offsets[:, 1:] == 0)
    return bool((follows | begins | is_put[:, 1:] | is_put[:, :-1]).all())
