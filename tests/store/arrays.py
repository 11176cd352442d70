"""Single arrays with values of any bits, written without a plan or a run."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.storage.blobs import Blobs
from actstore.store.format.dtypes import dtype
from actstore.store.format.layout import ArrayLayout, to_json
from actstore.store.format.shard import Shard, encode


def random_bits(layout: ArrayLayout, seed: int = 0) -> NDArray[Any]:
    """Any bit patterns at all, NaNs of every kind among them."""
    data = np.random.default_rng(seed).bytes(layout.shape[0] * layout.row_nbytes)
    return np.frombuffer(data, dtype(layout.dtype).storage).reshape(layout.shape)


def bits(values: Any) -> NDArray[Any]:
    """An array or tensor as unsigned integers: two are the same if their bits are, NaN or not."""
    array = np.ascontiguousarray(values)
    return array.view(f"<u{array.dtype.itemsize}").reshape(array.shape)


def encoded(layout: ArrayLayout, shard: int, values: NDArray[Any]) -> Shard:
    """One shard of an array that is whole in memory."""
    start = shard * layout.shard_rows
    stored = np.zeros((layout.chunks_in(shard) * layout.chunk_rows, *layout.shape[1:]), values.dtype)
    stored[: layout.rows_in(shard)] = values[start : start + layout.rows_in(shard)]
    return encode(layout, shard, stored)


def write_array(
    blobs: Blobs, layout: ArrayLayout, values: NDArray[Any], shards: Iterable[int] | None = None
) -> None:
    """Metadata and shards of one array; all of them, or only some."""
    assert blobs.create(layout.metadata_key, [to_json(layout.metadata())])
    for shard in range(layout.n_shards) if shards is None else shards:
        made = encoded(layout, shard, values)
        assert blobs.create(made.key, made.parts)
