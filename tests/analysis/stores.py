"""Small stores for analyses, with values of the test's choice, and the rows that a scan must take."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import actstore
from actstore.demo import MODEL_PATH, TEXT_PATH
from actstore.facade import Store
from actstore.storage.local import LocalBlobs
from actstore.store.format.plan import Plan
from tests.store.example import HOOKS, example_plan, write_store

HOOK = HOOKS[0]
D = 16


def plan_of(n_sequences: int, **changes: Any) -> Plan:
    """A plan of a store with so many sequences of 8 tokens."""
    return example_plan(n_sequences=n_sequences, n_tokens=n_sequences * 8, **changes)


def store_of(folder: Path, values: NDArray[np.float32], **changes: Any) -> Store:
    """A store of one hook with these values, [n_sequences, 8, 16]; the other hooks are made up."""
    plan = plan_of(len(values), **changes)
    columns = {
        hook.name: np.zeros((len(values), 8, *hook.shape), values.dtype) for hook in plan.request.hooks
    } | {HOOK: values}
    blobs = LocalBlobs(folder)
    write_store(blobs, plan, columns, range(plan.n_segments))
    return actstore.open(blobs.url)


SHAKESPEARE_HOOK = "blocks.1.hook_resid_post"


def shakespeare(folder: Path) -> Store:
    """A store of the bundled model over a little of the bundled text: real tokens, real values, and short documents."""
    job = actstore.plan(
        model=str(MODEL_PATH),
        tokens=str(TEXT_PATH),
        documents="paragraph",
        packing="document",
        truncate="right",
        hooks=["blocks.*.hook_resid_post"],
        context_length=32,
        max_tokens=3000,
        out=str(folder / "store"),
    )
    actstore.extract(job)
    return actstore.open(str(folder / "store"))


def saved_sae(folder: Path, d_in: int, d_sae: int = 24) -> Any:
    """A TopK SAE of SAELens with random weights, saved in the folder."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from what SAELens imports
        from sae_lens import TopKSAE, TopKSAEConfig

    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=d_sae, k=4, dtype="float32", device="cpu"))
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    sae.save_model(folder)
    return sae
