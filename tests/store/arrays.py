"""Single arrays of random bits, written without a plan or a run."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.storage.blobs import Blobs
from actstore.store.format.dtypes import dtype
from actstore.store.format.layout import ArrayLayout, to_json
from actstore.store.format.shard import Shard, encode


def random_bits(layout: ArrayLayout, seed: int = 0) -> NDArray[Any]:
    """Random bit patterns, with NaNs of every kind among them."""
    data = np.random.default_rng(seed).bytes(layout.shape[0] * layout.row_nbytes)
    return np.frombuffer(data, dtype(layout.dtype).storage).reshape(layout.shape)


def bits(values: Any) -> NDArray[Any]:
    """The bits of an array or tensor as unsigned integers, so that NaNs compare by their bits."""
    array = np.ascontiguousarray(values)
    return array.view(f"<u{array.dtype.itemsize}").reshape(array.shape)


def encoded(layout: ArrayLayout, shard: int, values: NDArray[Any]) -> Shard:
    """One shard of an array that is in memory as a whole."""
    start = shard * layout.shard_rows
    stored = np.zeros((layout.chunks_in(shard) * layout.chunk_rows, *layout.shape[1:]), values.dtype)
    stored[: layout.rows_in(shard)] = values[start : start + layout.rows_in(shard)]
    return encode(layout, shard, stored)


def write_array(
    blobs: Blobs, layout: ArrayLayout, values: NDArray[Any], shards: Iterable[int] | None = None
) -> None:
    """Write the metadata and the shards of one array, or only some of its shards."""
    assert blobs.create(layout.metadata_key, [to_json(layout.metadata())])
    for shard in range(layout.n_shards) if shards is None else shards:
        made = encoded(layout, shard, values)
        assert blobs.create(made.key, made.parts)
