"""Writing a folder that SAELens reads instead of running the model (``use_cached_activations``)."""

import json
import math
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from actstore.errors import JobError, StorageError
from actstore.facade import Store
from actstore.hooks.naming.names import HookName
from actstore.integrations.saelens.installed import check_installed
from actstore.opening import open_store
from actstore.reason import reason
from actstore.storage.urls import local_path
from actstore.store.reading.activations import Activations

_BLOCK_NBYTES: Final = 1 << 24
"""Bytes of float32 values that are converted and written together."""
_FILE_NBYTES: Final = 1 << 29
"""Approximate bytes of float32 values in one file; readers map the files."""


def export_cache(
    store: Store | str | Path,
    hook: HookName,
    folder: Path | str,
    *,
    on_bytes: Callable[[int], None] | None = None,
) -> int:
    """Write all rows of one hook as a cache of SAELens: float32, with the token ids, in the order of the store.

    The cache has the size of the values in float32; writing takes a few times 16 MB of memory. In SAELens, set
    ``hook_name`` to the stored name of the hook and ``context_size`` to that of the store. Of a store of chosen
    positions, ``context_size`` is the number of slots, all of which must be in use. The file that makes the folder
    readable is written last.

    Args:
        store: an open store, or its path or URL.
        hook: the name of the hook. A value with heads is flattened, as in SAELens.
        folder: a new or empty folder.
        on_bytes: called with the number of bytes after each piece of about 16 MB.

    Returns:
        The number of sequences that were written.

    Raises:
        HookError: the hook is not stored.
        JobError: sequences have different numbers of chosen positions.
        MissingExtraError: SAELens' packages are not installed.
        NotCommittedError: a row is not committed.
        StorageError: the store cannot be read, or the folder cannot be written or is not empty.
    """
    check_installed("datasets")
    opened = store if isinstance(store, Store) else open_store(str(store))
    acts = opened[opened.array_of(hook).name]
    acts.rows.check_committed()
    if opened.positions is not None and not opened.entries.is_full:
        raise JobError(
            f"sequences of {opened.url} have different numbers of chosen positions, and those of a cache of SAELens "
            "have equally many rows; train on the store itself with actstore.integrations.saelens"
        )
    where = local_path(folder, "the folder of the cache")
    try:
        where.mkdir(parents=True, exist_ok=True)
        if any(where.iterdir()):
            raise StorageError(f"{where} is not empty, and a cache has a folder of its own; name a new one")
        return _write(opened, acts, where, on_bytes)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{where} cannot be written: {reason(error)}") from error


def _write(store: Store, acts: Activations, folder: Path, on_bytes: Callable[[int], None] | None) -> int:
    from datasets import Array2D, DatasetInfo, Features, Sequence, Value
    from datasets.arrow_writer import ArrowWriter

    n_sequences, length = store.shape
    row_nbytes = length * math.prod(acts.shape[2:]) * 4
    d_in = math.prod(acts.shape[2:])
    features = Features(
        {
            acts.hook: Array2D(shape=(length, d_in), dtype="float32"),
            "token_ids": Sequence(Value("int32"), length=length),
        }
    )
    per_block = max(1, _BLOCK_NBYTES // row_nbytes)
    per_file = max(1, _FILE_NBYTES // (row_nbytes * per_block)) * per_block
    n_files = math.ceil(n_sequences / per_file)
    names = [f"data-{index:05d}-of-{n_files:05d}.arrow" for index in range(n_files)]
    for index, name in enumerate(names):
        stop = min((index + 1) * per_file, n_sequences)
        with ArrowWriter(features=features, path=str(folder / name)) as writer:
            for table in _tables(store, acts, range(index * per_file, stop, per_block), stop, features):
                writer.write_table(table)
                if on_bytes is not None:
                    on_bytes(table.nbytes)
            writer.finalize()
    DatasetInfo(features=features).write_to_directory(str(folder))
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": uuid.uuid4().hex[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    return n_sequences


def _tables(store: Store, acts: Activations, starts: range, stop: int, features: Any) -> Iterator[pa.Table]:
    """Split the sequences of a file into tables."""
    kind = features[acts.hook]()
    length, d_in = kind.shape
    for start in starts:
        end = min(start + starts.step, stop)
        n = end - start
        values = acts[start:end].float().reshape(-1).numpy()
        rows = pa.ListArray.from_arrays(_offsets(n * length, d_in), pa.array(values))
        storage = pa.ListArray.from_arrays(_offsets(n, length), rows)
        tokens = store.entries.of_tokens(store.tokens, slice(start, end))
        ids = pa.array(tokens.reshape(-1).astype(np.int32, copy=False))
        columns = {
            acts.hook: pa.ExtensionArray.from_storage(kind, storage),
            "token_ids": pa.FixedSizeListArray.from_arrays(ids, length),
        }
        yield pa.table(columns)


def _offsets(n: int, size: int) -> Any:
    return pa.array(np.arange(n + 1, dtype=np.int32) * np.int32(size))
