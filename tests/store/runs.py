"""Further runs of the small stores, which add hooks over the same tokens, or add tokens."""

from collections.abc import Iterable
from typing import Any

from actstore.storage.blobs import Blobs
from actstore.store.format.plan import HookArray, Plan
from actstore.store.records.commit import TokensRecord, plan_key, tokens_key
from actstore.store.records.zarr_documents import zarr_documents
from tests.store.example import (
    D_MODEL,
    Columns,
    commit_segment,
    example_plan,
    example_tokens,
    example_values,
    write_array,
)

MLP_OUT, ATTN_OUT = "blocks.0.hook_mlp_out", "blocks.0.hook_attn_out"


def with_hooks(plan: Plan, *names: str) -> Plan:
    """The plan with other hooks, each as wide as the model."""
    hooks = tuple(HookArray(name=name, shape=(D_MODEL,), axes=("d_model",)) for name in names)
    return plan.model_copy(update={"request": plan.request.model_copy(update={"hooks": hooks})})


def hooks_run(run: str, *names: str, over: Plan | None = None, **changes: Any) -> Plan:
    """The plan of a run that adds hooks over the tokens of another one."""
    over = over or example_plan()
    return with_hooks(over, *names).model_copy(update={"run": run, "tokens_of": over.run} | changes)


def tokens_run(run: str, *names: str, **changes: Any) -> Plan:
    """The plan of a run that adds tokens, with the hooks of the first run or others."""
    plan = example_plan(run=run, tokens_of=run, **changes)
    return with_hooks(plan, *names) if names else plan


def begin_run(blobs: Blobs, plan: Plan) -> None:
    """Write everything of a run except its segments."""
    assert blobs.create(plan_key(plan.run), [plan.to_bytes()])
    for key, data in zarr_documents(plan).items():
        blobs.create(key, [data])
    if plan.has_own_tokens:
        records = []
        for layout in plan.token_arrays():
            name = layout.path.rsplit("/", 1)[-1]
            records += write_array(blobs, layout, example_tokens(plan)[name], range(layout.n_shards))
        assert blobs.create(tokens_key(plan.run), [TokensRecord(shards=tuple(records)).to_bytes()])


def write_run(blobs: Blobs, plan: Plan, segments: Iterable[int] | None = None) -> Columns:
    """Write a whole run, or these of its segments; returns the values of its hooks."""
    begin_run(blobs, plan)
    values = example_values(plan)
    for index in range(plan.n_segments) if segments is None else segments:
        commit_segment(blobs, plan, index, values)
    return values


def bytes_below(blobs: Blobs, folder: str = "") -> dict[str, bytes]:
    """Every object below a folder, by key, on any storage."""
    files = blobs.sizes(folder)
    contents = {}
    for name in blobs.names(folder):
        key = f"{folder}/{name}" if folder else name
        if name in files:
            contents[key] = bytes(blobs.read(key))
        else:
            contents |= bytes_below(blobs, key)
    return contents
