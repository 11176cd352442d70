"""Small stores written without a model, through the same functions that extraction uses."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.store.blobs import Blobs
from actstore.store.commit import (
    PLAN_KEY,
    TOKENS_KEY,
    CommitRecord,
    Environment,
    ShardRecord,
    TokensRecord,
    commit_key,
    put,
)
from actstore.store.dtypes import dtype
from actstore.store.layout import ROOT_METADATA, ArrayLayout, group_metadata, to_json
from actstore.store.plan import HookArray, ModelIdentity, Plan, Request, TokensIdentity
from actstore.store.shard import Shard, encode

N, LENGTH, D_MODEL, SEGMENT = 37, 8, 16, 16
"""Three segments; the last has 5 of 16 sequences."""
HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.1.attn.hook_z")
ENVIRONMENT = Environment(actstore="0", torch="2.9.0", transformers="5.9.0", device="cpu", attention="sdpa")

Columns = Mapping[str, NDArray[Any]]
"""Arrays by name: of each hook, or of the tokens."""


def example_plan(dtype: Any = "float32", **changes: Any) -> Plan:
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
        seed=None,
    )
    request = Request(model=model, tokens=tokens, hooks=(*residuals, heads), dtype=dtype, batch_size=8)
    fields: dict[str, Any] = {
        "n_sequences": N,
        "n_tokens": N * LENGTH,
        "n_documents": 3,
        "tokens_sha256": "0" * 64,
        "segment_size": SEGMENT,
    }
    return Plan(request=request, **(fields | changes))


def random_bits(layout: ArrayLayout, seed: int = 0) -> NDArray[Any]:
    """Any bit patterns at all, NaNs of every kind among them."""
    data = np.random.default_rng(seed).bytes(layout.shape[0] * layout.row_nbytes)
    return np.frombuffer(data, dtype(layout.dtype).storage).reshape(layout.shape)


def bits(values: Any) -> NDArray[Any]:
    """An array or tensor as unsigned integers: two are the same if their bits are, NaN or not."""
    array = np.ascontiguousarray(values)
    return array.view(f"<u{array.dtype.itemsize}").reshape(array.shape)


def example_values(plan: Plan) -> Columns:
    return {
        hook.name: random_bits(plan.activations(hook), seed) for seed, hook in enumerate(plan.request.hooks)
    }


def example_tokens(plan: Plan) -> Columns:
    shape = (plan.n_sequences, plan.context_length)
    return {
        "tokens": np.arange(math.prod(shape), dtype="<i4").reshape(shape),
        "lengths": np.full(shape[0], shape[1], dtype="<i4"),
        "documents": np.full(shape, -1, dtype="<i8"),
        "offsets": np.full(shape, -1, dtype="<i4"),
    }


def encoded(layout: ArrayLayout, shard: int, values: NDArray[Any]) -> Shard:
    """One shard of an array that is whole in memory."""
    start = shard * layout.shard_rows
    stored = np.zeros((layout.chunks_in(shard) * layout.chunk_rows, *layout.shape[1:]), values.dtype)
    stored[: layout.rows_in(shard)] = values[start : start + layout.rows_in(shard)]
    return encode(layout, shard, stored)


def write_array(
    blobs: Blobs, layout: ArrayLayout, values: NDArray[Any], shards: Iterable[int]
) -> list[ShardRecord]:
    """Metadata and some of the shards of one array."""
    blobs.create(layout.metadata_key, [to_json(layout.metadata())])
    return [put(blobs, encoded(layout, shard, values)) for shard in shards]


def commit_segment(blobs: Blobs, plan: Plan, index: int, values: Columns) -> CommitRecord:
    shards = {
        hook.name: put(blobs, encoded(plan.activations(hook), index, values[hook.name]))
        for hook in plan.request.hooks
    }
    record = CommitRecord(
        segment=index,
        n_sequences=plan.segment(index).n_sequences,
        shards=shards,
        environment=ENVIRONMENT,
    )
    assert blobs.create(commit_key(index), [record.to_bytes()])
    return record


def write_store(blobs: Blobs, plan: Plan, values: Columns, segments: Iterable[int]) -> None:
    """A store of which only these segments are committed."""
    blobs.create(PLAN_KEY, [plan.to_bytes()])
    blobs.create(ROOT_METADATA, [to_json(group_metadata({}))])
    for group in ("acts", "_actstore"):
        blobs.create(f"{group}/{ROOT_METADATA}", [to_json(group_metadata({}))])
    for hook in plan.request.hooks:
        write_array(blobs, plan.activations(hook), values[hook.name], shards=())
    records: list[ShardRecord] = []
    for layout in plan.token_arrays():
        records += write_array(blobs, layout, example_tokens(plan)[layout.path], range(layout.n_shards))
    blobs.create(TOKENS_KEY, [TokensRecord(shards=tuple(records)).to_bytes()])
    for index in segments:
        commit_segment(blobs, plan, index, values)
