"""The shard of norms of a segment, made again from the activations beside it."""

from typing import Any

from numpy.typing import NDArray

from actstore.errors import StorageError
from actstore.storage.blobs import BlobReader
from actstore.store.format.plan import Plan
from actstore.store.format.shard import encode
from actstore.store.format.shard_reader import decode
from actstore.store.records.commit import read_commit
from actstore.store.statistics.moments import recomputed
from actstore.store.statistics.norms import side_by_side


def restored_norms(blobs: BlobReader, plan: Plan, index: int, lengths: NDArray[Any]) -> bytes | None:
    """The shard that was committed; None where it does not come out again, as on another machine than made it.

    Args:
        blobs: the store.
        plan: of a run that stores norms.
        index: number of a segment whose record and activations are whole.
        lengths: [n_sequences] real tokens of each row of the plan.
    """
    segment, norms = plan.segment(index), {}
    try:
        record = read_commit(blobs, plan, index)
        for hook in plan.norm_hooks:
            rows = decode(plan.activations(hook), index, blobs.read(record.shards[hook.name].key))
            here = lengths[segment.start : segment.stop]
            _, norms[hook.name] = recomputed(hook, rows, plan.request.dtype, here, plan.request.batch_size)
    except StorageError:
        return None
    layout = plan.norm_array()
    data = b"".join(bytes(part) for part in encode(layout, index, side_by_side(plan, index, norms)).parts)
    return data if record.norms is not None and record.norms.is_of(data) else None
