"""Sizes that a job may leave open: sequences in a forward, and in a segment."""

import math
from collections.abc import Sequence
from typing import Final, Protocol

from actstore.errors import JobError
from actstore.extraction.planning.given import Given
from actstore.extraction.planning.job import Job
from actstore.store.format.compression import check_chunk
from actstore.store.format.dtypes import dtype
from actstore.store.format.layout import segment_size, segment_step
from actstore.store.format.plan import Request
from actstore.store.records.run import Run

_BATCH_TOKENS: Final = 4096
_SEGMENT_TOKENS: Final = 1 << 18
"""About the most tokens of a segment. Where few positions of each sequence are stored, it is this that keeps a segment
small enough to be lost: a minute of a small model on two cores, some seconds on a GPU.
"""
_SORTED_BATCHES: Final = 32
"""Batches that a segment should have where they are sorted by length: the lengths in a batch then differ by a thirtieth
of those in the segment.
"""


def chosen_batch_size(job: Job, context_length: int, given: Given, runs: Sequence[Run]) -> int:
    """Sequences in a forward: as the job says, as in the store, or else a power of two, so that pages are soon filled.

    Segments are whole batches and whole pages. A power of two and a page have a small common multiple; with 273
    sequences in a batch, for instance, a segment could have hundreds of thousands.
    """
    if job.batch_size is not None:
        return job.batch_size
    if runs:
        return runs[0].plan.request.batch_size
    usual = 1 << max(0, (_BATCH_TOKENS // context_length).bit_length() - 1)
    if given.tokens is None:
        return usual
    # Every forward has a whole batch, and prompts may be few.
    return min(usual, 1 << (given.tokens.n_documents - 1).bit_length())


class CountedSequences(Protocol):
    """What the size of a segment depends on: the sequences of a plan, or of a spool."""

    @property
    def n_sequences(self) -> int: ...

    @property
    def n_tokens(self) -> int: ...

    @property
    def n_slots(self) -> int | None: ...


def chosen_segment_size(job: Job, request: Request, sequences: CountedSequences) -> int:
    itemsize = dtype(request.dtype).itemsize
    width = request.tokens.context_length if sequences.n_slots is None else sequences.n_slots
    row_nbytes = [width * math.prod(hook.shape) * itemsize for hook in request.hooks]
    if request.compression is not None:
        check_chunk(max(row_nbytes))
    step = segment_step(row_nbytes, batch_size=request.batch_size)
    if job.segment_size is None:
        return segment_size(
            row_nbytes,
            n_sequences=sequences.n_sequences,
            batch_size=request.batch_size,
            most_sequences=max(1, _SEGMENT_TOKENS * sequences.n_sequences // sequences.n_tokens),
            least_batches=1 if request.batching is None else _SORTED_BATCHES,
        )
    if job.segment_size % step:
        raise JobError(
            f"segment_size {job.segment_size} must be a multiple of {step} (whole batches of "
            f"{request.batch_size} and whole 4 KiB pages); choose {math.ceil(job.segment_size / step) * step}"
        )
    return job.segment_size
