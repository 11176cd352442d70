"""Small stores, written without a model by the functions that extraction uses."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.storage.blobs import Blobs
from actstore.store.format.batches import batches_of
from actstore.store.format.layout import ArrayLayout
from actstore.store.format.plan import HookArray, ModelIdentity, Plan, Request, TokensIdentity
from actstore.store.format.shard import encode
from actstore.store.records.commit import (
    CommitRecord,
    Environment,
    Golden,
    ObjectRecord,
    TokensRecord,
    commit_key,
    has_golden,
    plan_key,
    tokens_key,
)
from actstore.store.records.shard_writer import put
from actstore.store.records.zarr_documents import zarr_documents
from actstore.store.statistics.moments import has_statistics, recompute
from actstore.store.statistics.norms import side_by_side
from tests.store.arrays import encoded, random_bits

N, LENGTH, D_MODEL, SEGMENT = 37, 8, 16, 16
"""These make three segments; the last one has 5 of 16 sequences."""
HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.1.attn.hook_z")
ENVIRONMENT = Environment(
    actstore="0",
    engine="transformers",
    torch="2.9.0",
    transformers="5.9.0",
    device="cpu",
    attention="sdpa",
    batch=(8, LENGTH),
)

Columns = Mapping[str, NDArray[Any]]
"""Arrays by name of the hook or of the token array."""


def example_plan(dtype: Any = "float32", compression: Any = None, **changes: Any) -> Plan:
    heads = HookArray(name=HOOKS[2], shape=(2, D_MODEL // 2), axes=("head", "d_head"))
    residuals = [HookArray(name=name, shape=(D_MODEL,), axes=("d_model",)) for name in HOOKS[:2]]
    model = ModelIdentity(
        name="tiny",
        revision=None,
        fingerprint="crc32c:0",
        model_type="gpt2",
        n_layers=2,
        config={"model_type": "gpt2", "n_embd": D_MODEL, "n_head": 2, "n_layer": 2},
    )
    tokens = TokensIdentity(
        source="text.txt",
        files=(),
        column=None,
        documents="file",
        tokenizer="tiny",
        tokenizer_sha256="0" * 64,
        packing="concat",
        context_length=LENGTH,
        begin_batch_token=0,
        begin_sequence_token=None,
        separator_token=0,
        pad_token=None,
        max_tokens=None,
        skip_sequences=0,
        seed=None,
    )
    request = Request(
        model=model,
        tokens=tokens,
        hooks=(*residuals, heads),
        dtype=dtype,
        batch_size=8,
        compression=compression,
        covariance=False,
    )
    fields: dict[str, Any] = {
        "run": "0000",
        "tokens_of": "0000",
        "n_sequences": N,
        "n_tokens": N * LENGTH,
        "n_documents": 3,
        "tokens_sha256": tokens_sha256(),
        "segment_size": SEGMENT,
    }
    return Plan(request=request, **(fields | changes))


def example_values(plan: Plan) -> Columns:
    return {
        hook.name: random_bits(plan.activations(hook), seed) for seed, hook in enumerate(plan.request.hooks)
    }


def tokens_sha256() -> str:
    return hashlib.sha256(np.arange(N * LENGTH, dtype="<i4").tobytes()).hexdigest()


def example_tokens(plan: Plan) -> Columns:
    shape = (plan.n_sequences, plan.context_length)
    return {
        "tokens": np.arange(math.prod(shape), dtype="<i4").reshape(shape),
        "lengths": np.full(shape[0], shape[1], dtype="<i4"),
        "documents": np.full(shape, -1, dtype="<i8"),
        "offsets": np.full(shape, -1, dtype="<i4"),
    }


def write_array(
    blobs: Blobs, layout: ArrayLayout, values: NDArray[Any], shards: Iterable[int]
) -> list[ObjectRecord]:
    """Write some of the shards of one array."""
    return [put(blobs, layout, shard, encoded(layout, shard, values)).record for shard in shards]


def commit_segment(blobs: Blobs, plan: Plan, index: int, values: Columns) -> CommitRecord:
    segment = plan.segment(index)
    hooks = plan.request.hooks
    lengths = example_tokens(plan)["lengths"][segment.start : segment.stop]
    shards = {}
    for hook in hooks:
        layout = plan.activations(hook)
        shards[hook.name] = put(blobs, layout, index, encoded(layout, index, values[hook.name])).record
    of_hooks = {
        hook.name: recompute(
            hook,
            values[hook.name][segment.start : segment.stop],
            plan.request.dtype,
            lengths,
            batches_of(plan.request, lengths),
        )
        for hook in hooks
        if has_statistics(hook)
    }
    norms = None
    if plan.norms:
        side = side_by_side(plan, index, {name: hook_norms for name, (_, hook_norms) in of_hooks.items()})
        norms = put(blobs, plan.norm_array(), index, encode(plan.norm_array(), index, side)).record
    record = CommitRecord(
        segment=index,
        n_sequences=segment.n_sequences,
        n_tokens=int(lengths.sum()),
        shards=shards,
        norms=norms,
        statistics={name: statistics for name, (statistics, _) in of_hooks.items()},
        golden=Golden(sequence=segment.start, errors={}) if has_golden(index) else None,
        environment=ENVIRONMENT,
    )
    assert blobs.create(commit_key(plan.run, index), [record.to_bytes()])
    return record


def write_store(blobs: Blobs, plan: Plan, values: Columns, segments: Iterable[int]) -> None:
    """Write a store in which only these segments are committed."""
    blobs.create(plan_key(plan.run), [plan.to_bytes()])
    for key, data in zarr_documents(plan).items():
        blobs.create(key, [data])
    records: list[ObjectRecord] = []
    for layout in plan.token_arrays():
        records += write_array(blobs, layout, example_tokens(plan)[layout.path], range(layout.n_shards))
    blobs.create(tokens_key(plan.run), [TokensRecord(shards=tuple(records)).to_bytes()])
    for index in segments:
        commit_segment(blobs, plan, index, values)
