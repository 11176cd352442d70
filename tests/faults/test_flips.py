"""A thousand bits, flipped one by one all over a store: verify finds every one."""

import random
import uuid

import pytest

from actstore.storage.blobs import Blobs
from actstore.storage.opening import open_blobs
from actstore.store.records.manifest import MANIFEST_KEY, shards_key, statistics_key
from actstore.store.records.seal import seal, unseal
from tests.store.runs import MLP_OUT, bytes_below, hooks_run, write_run
from tests.store.verifying.test_verify import checked, make_store, overwrite

KINDS = {
    "activations": "/c.",
    "tokens": "tokens/c.",
    "index": "/c.",
    "commit record": "/commits/",
    "tokens record": "/tokens.json",
    "plan": "/plan.json",
    "metadata": "zarr.json",
    "table of shards": shards_key("0000"),
    "statistics": statistics_key("0001"),
    "manifest": MANIFEST_KEY,
}
"""What the keys of each kind contain."""
FLIPS = 100
"""Flips of each kind."""


@pytest.fixture(scope="module")
def blobs() -> Blobs:
    """A sealed store of two runs."""
    made = open_blobs(f"memory://{uuid.uuid4().hex}")
    make_store(made)
    unseal(made)
    write_run(made, hooks_run("0001", MLP_OUT))
    seal(made)
    assert not any(finding.severity == "damage" for finding in checked(made).findings)
    return made


def place(kind: str, key: str, nbytes: int, rng: random.Random) -> int:
    """Choose a bit of an object where this kind of flip goes."""
    index_nbytes = 16 + 4  # for shards of one chunk, like those of activations here
    if kind == "index":
        return rng.randrange((nbytes - index_nbytes) * 8, nbytes * 8)
    if kind == "activations":
        return rng.randrange((nbytes - index_nbytes) * 8)
    assert key
    return rng.randrange(nbytes * 8)


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_is_found(blobs: Blobs, kind: str) -> None:
    rng = random.Random(kind)
    whole = bytes_below(blobs)
    in_acts = kind in ("activations", "index")
    keys = [key for key in sorted(whole) if KINDS[kind] in key and key.startswith("acts/") >= in_acts]
    assert keys
    n_found = 0
    for _ in range(FLIPS):
        key = rng.choice(keys)
        data = bytearray(whole[key])
        bit = place(kind, key, len(data), rng)
        data[bit // 8] ^= 1 << bit % 8
        overwrite(blobs, key, bytes(data))
        damage = [finding for finding in checked(blobs).findings if finding.severity == "damage"]
        assert [finding.key for finding in damage] == [key], f"bit {bit} of {key}: {damage}"
        n_found += 1
        overwrite(blobs, key, whole[key])
    assert n_found == FLIPS
    assert bytes_below(blobs) == whole
