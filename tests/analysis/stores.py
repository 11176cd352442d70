"""Small stores for analyses, with values of the test's choice, and the rows that a scan must take."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import actstore
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
        hook.name: np.zeros((len(values), 8, *hook.shape), np.float32) for hook in plan.request.hooks
    } | {HOOK: values}
    blobs = LocalBlobs(folder)
    write_store(blobs, plan, columns, range(plan.n_segments))
    return actstore.open(blobs.url)
