"""The store for benchmarks of loaders: one hook, as wide as in a model of two billion parameters."""

from pathlib import Path

import torch

from actstore.storage.local import LocalBlobs
from actstore.store.format.plan import HookArray, Plan
from actstore.store.records.seal import seal
from tests.store.example import example_plan, write_store

HOOK = "blocks.0.hook_resid_post"
LENGTH, D_MODEL, BATCH = 128, 2_048, 4_096
N_SEQUENCES, SEGMENT = 1_024, 64
N_ROWS = N_SEQUENCES * LENGTH


def store_at(folder: Path) -> torch.Tensor:
    """Write a sealed store of one hook; returns its values, bfloat16 [N_ROWS, D_MODEL]."""
    plan = plan_of(N_SEQUENCES)
    values = torch.randn(N_SEQUENCES, LENGTH, D_MODEL, dtype=torch.bfloat16)
    blobs = LocalBlobs(folder)
    write_store(blobs, plan, {HOOK: values.view(torch.uint16).numpy()}, range(plan.n_segments))
    seal(blobs)
    return values.view(N_ROWS, D_MODEL)


def plan_of(n_sequences: int) -> Plan:
    """The plan of a store with residuals as wide as in a model of two billion parameters."""
    plan = example_plan(
        "bfloat16", n_sequences=n_sequences, n_tokens=n_sequences * LENGTH, segment_size=SEGMENT
    )
    hook = HookArray(name=HOOK, shape=(D_MODEL,), axes=("d_model",))
    tokens = plan.request.tokens.model_copy(update={"context_length": LENGTH})
    request = plan.request.model_copy(update={"hooks": (hook,), "tokens": tokens})
    return plan.model_copy(update={"request": request})
