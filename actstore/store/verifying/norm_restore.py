"""Making the norm shard of a segment again from its activations."""

from actstore.errors import StorageError
from actstore.storage.blobs import BlobReader
from actstore.store.format.batches import batches_of
from actstore.store.format.plan import Plan
from actstore.store.format.shard import encode
from actstore.store.format.shard_reader import decode
from actstore.store.format.sizes import Sizes
from actstore.store.records.commit import read_commit
from actstore.store.statistics.moments import recompute
from actstore.store.statistics.norms import side_by_side


def restored_norms(blobs: BlobReader, plan: Plan, index: int, sizes: Sizes) -> bytes | None:
    """Make the committed norm shard again; None if the result differs, as it can on another machine than the
    original's.

    Args:
        blobs: the storage of the store.
        plan: the plan of a run that stores norms.
        index: the number of a segment with intact record and activations.
        sizes: how much of each sequence of the plan there is.
    """
    segment, norms = plan.segment(index), {}
    here = sizes[segment.start : segment.stop]
    batches = batches_of(plan.request, here.lengths)
    try:
        record = read_commit(blobs, plan, index)
        for hook in plan.norm_hooks:
            rows = decode(plan.activations(hook), index, blobs.read(record.shards[hook.name].key))
            _, norms[hook.name] = recompute(hook, rows, plan.request.dtype, here.counts, batches)
    except StorageError:
        return None
    layout = plan.norm_array()
    data = b"".join(bytes(part) for part in encode(layout, index, side_by_side(plan, index, norms)).parts)
    return data if record.norms is not None and record.norms.is_of(data) else None
