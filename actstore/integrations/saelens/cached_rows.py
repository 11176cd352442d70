"""A folder of cached activations in SAELens' format, mapped and read without the library that wrote it."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from actstore.errors import StorageError
from actstore.reason import reason
from actstore.storage.urls import local_path

TOKENS: Final = "token_ids"


class CachedRows:
    """The rows of one hook and their token ids. Files are mapped, so only what is read takes memory."""

    def __init__(self, folder: Path, files: Sequence[Path], table: pa.Table, hook: str, state: bytes) -> None:
        """
        Args:
            folder: the absolute path of the folder.
            files: the files with the rows, in order.
            table: the table of all files.
            hook: the name of the column with activations.
            state: the content of its ``state.json``.
        """
        self.folder = folder
        self.files = files
        """Paths of the files, in the order of their rows."""
        self.hook = hook
        """Name of the column with activations."""
        self.shape = _shape(folder, hook, table.column(hook))
        """Shape of the activations, (n_sequences, context_size, d_in)."""
        self._table = table
        self._state = state

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Open a folder. Only its first row is read.

        Raises:
            StorageError: the folder is no cache, or cannot be read.
        """
        where = local_path(folder, "the folder of the cache")
        try:
            state = (where / "state.json").read_bytes()
            names = [str(file["filename"]) for file in json.loads(state)["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{where} is not a folder of cached activations: it has no state.json that names its files; give the "
                "cached_activations_path that SAELens wrote to"
            ) from error
        files = [where / Path(name).name for name in names]
        try:
            tables = [pa.ipc.open_stream(pa.memory_map(str(file))).read_all() for file in files]
            table = pa.concat_tables(tables)
        except (OSError, pa.ArrowException) as error:
            raise StorageError(f"the cache {where} cannot be read: {reason(error)}; make it again") from error
        hooks = [name for name in table.column_names if name != TOKENS]
        if len(hooks) != 1 or TOKENS not in table.column_names:
            raise StorageError(
                f"the cache {where} has the columns {', '.join(table.column_names)}; it must have one named after a "
                f"hook, and {TOKENS}: make it again with a newer SAELens"
            )
        if not len(table):
            raise StorageError(f"the cache {where} has no rows; make it again")
        return cls(where, files, table, hooks[0], state)

    @property
    def fingerprint(self) -> str:
        """A hash that differs between caches, wherever they lie: of the description, the sizes of the files, and the
        first and last values.
        """
        digest = hashlib.sha256(self._state)
        digest.update(json.dumps([file.stat().st_size for file in self.files]).encode())
        for row in (0, self.shape[0] - 1):
            digest.update(self.values(row, row + 1).tobytes())
        return digest.hexdigest()[:16]

    def tokens(self, start: int, stop: int) -> NDArray[np.int32]:
        """Token ids of rows start to stop - 1, [stop - start, context_size].

        Raises:
            StorageError: a row has another number of token ids.
        """
        ids = self._dense(TOKENS, start, stop, self.shape[1:2])
        if not np.issubdtype(ids.dtype, np.integer):
            raise StorageError(f"{TOKENS} of the cache {self.folder} are {ids.dtype}; they must be integers")
        return ids.astype(np.int32)

    def values(self, start: int, stop: int) -> NDArray[Any]:
        """Activations of rows start to stop - 1, [stop - start, context_size, d_in], float32 or float16 as they were
        written.

        Raises:
            StorageError: a row has another shape or type.
        """
        acts = self._dense(self.hook, start, stop, self.shape[1:])
        if acts.dtype not in (np.float32, np.float16):
            raise StorageError(
                f"{self.hook} of the cache {self.folder} is {acts.dtype}; it must be float32 or float16"
            )
        return acts

    def _dense(self, column: str, start: int, stop: int, inner: tuple[int, ...]) -> NDArray[Any]:
        parts = []
        for chunk in self._table.column(column).slice(start, stop - start).chunks:
            if len(chunk):
                lists = _storage(chunk)
                for size in inner:
                    if not _is_list(lists.type) or not _has_size(lists, size):
                        raise StorageError(
                            f"{column} of the cache {self.folder} does not have the shape {list(inner)} in all of the "
                            f"rows {start}:{stop}, as it has in its first one; make the cache again"
                        )
                    lists = lists.flatten()
                if lists.null_count:
                    raise StorageError(
                        f"{column} of the cache {self.folder} has no value somewhere in the rows {start}:{stop}; make "
                        "the cache again"
                    )
                parts.append(lists.to_numpy(zero_copy_only=False).reshape(-1, *inner))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _shape(folder: Path, hook: str, column: Any) -> tuple[int, int, int]:
    """The shape of the first row, after the number of rows."""
    first = _storage(column.slice(0, 1).combine_chunks())
    sizes = []
    for _ in range(2):
        if not _is_list(first.type) or not len(first) or not first[0].is_valid or not len(first[0]):
            raise StorageError(
                f"{hook} of the cache {folder} is {first.type} in its first row; it must be a matrix of positions and "
                "elements"
            )
        sizes.append(len(first[0]))
        first = first.flatten()
    return (len(column), sizes[0], sizes[1])


def _storage(array: Any) -> Any:
    """The storage of an extension type, which pyarrow knows only if the library that defines it is imported."""
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0)
    return array.storage if isinstance(array, pa.ExtensionArray) else array


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _has_size(lists: Any, size: int) -> bool:
    return lists.null_count == 0 and bool((np.asarray(pc.list_value_length(lists)) == size).all())
