"""Reading activations as a Ray Dataset. Ray's own reader of Zarr refuses version 3, and Arrow has no bfloat16."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from actstore.errors import JobError, MissingExtraError, NotCommittedError
from actstore.facade import Store
from actstore.hooks.naming.names import HookName, each_name
from actstore.opening import open_store
from actstore.store.records.run import overlap
from actstore_workers.cluster import import_ray

import_ray()  # Ray's settings have to be made before it is imported

try:
    import ray.data
    from ray.data.block import Block, BlockAccessor, BlockMetadata
    from ray.data.datasource import Datasource, ReadTask
except ImportError as error:
    raise MissingExtraError(
        "reading into Ray Data needs its dependencies; run `pip install 'ray[data]'`"
    ) from error

ColumnType = Literal["float16", "float32", "float64", "uint16"]
_BLOCK_NBYTES: Final = 32 << 20
_PLACE_NBYTES: Final = 8 + 4 + 4
"""Bytes of a row besides its values: sequence, position and token."""


def read_activations(
    url: str,
    hooks: HookName | Sequence[HookName],
    *,
    dtype: ColumnType | None = None,
    drop_padding: bool = False,
    block_nbytes: int = _BLOCK_NBYTES,
    **read_options: Any,
) -> "ray.data.Dataset":
    """The committed rows of a store, one row per token, with one read task for each group of segments.

    The columns are ``sequence`` int64, ``position`` int32, ``token`` int32, and each hook by its name, a tensor of the
    hook's shape at one position. Rows are in stored order; where only chosen positions are stored, they are those.
    Sequences that are not committed for all of the hooks are left out. A task holds one block of at most
    ``block_nbytes``, or of one sequence if that is more, once as stored and once as returned; Ray may hold several
    blocks in its object store.

    Args:
        url: path or URL of the store; workers must be able to read it, too.
        hooks: one or several names or globs.
        dtype: the type of the hooks' columns. None keeps the stored type, but makes float32 of bfloat16; ``uint16``
            keeps the bits of bfloat16, in half the memory.
        drop_padding: whether to leave out positions behind the end of their sequence.
        block_nbytes: the most bytes of a block.
        read_options: as for `ray.data.read_datasource`, such as ``override_num_blocks`` or ``concurrency``.

    Raises:
        HookError: a hook is not stored.
        JobError: the columns cannot have this type.
        NotCommittedError: no sequence is committed for all of the hooks.
        StorageError: the store cannot be read.
    """
    store = open_store(url)
    names = tuple(dict.fromkeys(name for hook in each_name(hooks) for name in store.matching(hook)))
    if not names:
        raise JobError("no hook is named; name one or more")
    stored = store.plan.request.dtype
    if dtype is not None and dtype not in get_args(ColumnType):
        raise JobError(f"dtype is {dtype!r}; it can be {', '.join(get_args(ColumnType))}")
    if dtype == "uint16" and stored != "bfloat16":
        raise JobError(
            f"dtype='uint16' is for the bits of bfloat16, and {store.url} has {stored}; choose another"
        )
    kept: ColumnType = "float16" if stored == "float16" else "float32"
    spec = ReadSpec(store.url, names, dtype or kept, drop_padding, block_nbytes)
    return ray.data.read_datasource(ActivationsDatasource(store, spec), **read_options)


@dataclass(frozen=True)
class ReadSpec:
    """Everything that a read task needs to know, except its rows."""

    url: str
    hooks: tuple[str, ...]
    dtype: ColumnType
    drop_padding: bool
    block_nbytes: int


class ActivationsDatasource(Datasource):  # type: ignore[misc]
    """Plans the read tasks of a dataset. They run on any worker."""

    def __init__(self, store: Store, spec: ReadSpec) -> None:
        super().__init__()
        self._spec = spec
        self._width = store.shape[1]
        self._drops = drops(store, spec)
        n_values = sum(math.prod(store[hook].shape[2:]) for hook in spec.hooks)
        self._row_nbytes = _PLACE_NBYTES + n_values * np.dtype(spec.dtype).itemsize
        self._segments = committed_segments(store, spec.hooks)
        if not self._segments:
            raise NotCommittedError(
                f"no sequence of {store.url} is committed for {', '.join(spec.hooks)}; run the extraction again"
            )

    def get_name(self) -> str:
        """The name of the source in progress bars."""
        return "Activations"

    def estimate_inmemory_data_size(self) -> int:
        """Approximate bytes of all rows."""
        return sum(len(segment) for segment in self._segments) * self._width * self._row_nbytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """As many read tasks as requested, or as there are segments; each reads neighbouring segments."""
        del data_context
        n_tasks = max(1, min(parallelism, len(self._segments)))
        edges = [len(self._segments) * task // n_tasks for task in range(n_tasks + 1)]
        tasks = []
        for first, end in itertools.pairwise(edges):
            segments = self._segments[first:end]
            n_rows = sum(len(segment) for segment in segments) * self._width
            metadata = BlockMetadata(
                # How many rows remain without padding is not known before they are read.
                num_rows=None if self._drops else n_rows,
                size_bytes=n_rows * self._row_nbytes,
                exec_stats=None,
                input_files=None,
            )
            read = partial(_read, self._spec, segments)
            tasks.append(ReadTask(read, metadata, per_task_row_limit=per_task_row_limit))
        return tasks


def drops(store: Store, spec: ReadSpec) -> bool:
    """Whether entries are left out: padding where that is asked for, and slots that are not in use."""
    return spec.drop_padding or (store.entries.are_slots and not store.entries.is_full)


def committed_segments(store: Store, hooks: Sequence[str]) -> list[range]:
    """Ranges of sequences that are committed for all of these hooks, split where a segment of the first hook ends."""
    segments = []
    first = 0
    for part in (run for run in store.runs if run.plan.has_own_tokens):
        over = [run for run in store.runs if run.plan.tokens_of == part.plan.run]
        having = [[run for run in over if run.hook(hook) is not None] for hook in hooks]
        if part.has_tokens and all(having):
            size = having[0][0].plan.segment_size
            for rows in reduce(overlap, (runs[0].committed_ranges() for runs in having)):
                starts = [rows.start, *range((rows.start // size + 1) * size, rows.stop, size), rows.stop]
                segments += [range(first + start, first + stop) for start, stop in itertools.pairwise(starts)]
        first += part.plan.n_sequences
    return segments


def _read(spec: ReadSpec, segments: Sequence[range]) -> Iterator[Block]:
    store = open_store(spec.url)
    width = store.shape[1]
    n_values = sum(math.prod(store[hook].shape[2:]) for hook in spec.hooks)
    row_nbytes = _PLACE_NBYTES + n_values * np.dtype(spec.dtype).itemsize
    step = max(1, spec.block_nbytes // (width * row_nbytes))
    for segment in segments:
        for start in range(segment.start, segment.stop, step):
            yield _block(store, spec, slice(start, min(start + step, segment.stop)))


def _block(store: Store, spec: ReadSpec, rows: slice) -> Block:
    entries, width = store.entries, store.shape[1]
    n_sequences = rows.stop - rows.start
    columns: dict[str, NDArray[Any]] = {
        "sequence": np.repeat(np.arange(rows.start, rows.stop), width),
        "position": entries.positions(rows).reshape(-1),
        "token": entries.of_tokens(store.tokens, rows).reshape(-1).astype(np.int32, copy=False),
    }
    for hook in spec.hooks:
        acts = store[hook]
        values = acts.rows[rows] if spec.dtype == "uint16" else acts.numpy(rows)
        columns[hook] = values.astype(spec.dtype, copy=False).reshape(n_sequences * width, *acts.shape[2:])
    if drops(store, spec):
        is_real = entries.in_use(rows).reshape(-1)
        if not is_real.all():
            columns = {name: column[is_real] for name, column in columns.items()}
    return BlockAccessor.batch_to_block(columns)
