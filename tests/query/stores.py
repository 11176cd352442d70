"""The stores of the tests: whole, compressed, grown and unfinished ones."""

from collections.abc import Callable
from typing import Final

import numpy as np

from actstore.storage.blobs import Blobs
from actstore.store.format.plan import Plan
from actstore.store.records.seal import seal
from tests.store.example import LENGTH, N, example_plan, example_values, write_store
from tests.store.kept import write_kept_store
from tests.store.runs import ATTN_OUT, MLP_OUT, hooks_run, write_run
from tests.store.slots import Ragged, ragged, ragged_plan, write_ragged

WHOLE: Final = "whole.bf16"
"""A sealed store in bfloat16, with norms."""
COMPRESSED: Final = "compressed"
"""A sealed store in float32, with lz4."""
GROWN: Final = "grown"
"""A store of three runs; one added hooks, and one tokens, both unfinished."""
KEPT: Final = "kept"
"""A sealed store in float32, of which columns are kept."""
SLOTS: Final = "slots"
"""A sealed store of chosen positions of sequences of different lengths, which are `TEXT`."""
NAMES: Final = (WHOLE, COMPRESSED, GROWN)


def _text() -> Ragged:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, LENGTH + 1, N).tolist()
    return ragged(lengths, [rng.permutation(n)[: rng.integers(0, 4)].tolist() for n in lengths], LENGTH)


TEXT: Final = _text()


def write_all(at: Callable[[str], Blobs]) -> None:
    """Write all stores, each to the storage for its name."""
    for name, plan in (
        (WHOLE, example_plan("bfloat16", norms=True)),
        (COMPRESSED, example_plan("float32", "lz4")),
    ):
        blobs = at(name)
        write_store(blobs, plan, example_values(plan), range(plan.n_segments))
        seal(blobs)
    write_kept_store(at(KEPT))
    seal(at(KEPT))
    write_ragged(at(SLOTS), TEXT, ragged_plan(TEXT, is_chosen=True, segment_size=16))
    seal(at(SLOTS))
    blobs = at(GROWN)
    write_run(blobs, example_plan("float16"))
    write_run(blobs, hooks_run("0001", MLP_OUT, ATTN_OUT, over=example_plan("float16")), (0, 2))
    write_run(blobs, _more_tokens(), (1,))


def _more_tokens() -> Plan:
    return example_plan("float16", run="0002", tokens_of="0002", n_sequences=N - 4, n_tokens=(N - 4) * LENGTH)
