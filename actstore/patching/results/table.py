"""Results as Parquet: one line for each cell, and all else in the metadata of the file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from actstore.errors import PatchError
from actstore.patching.results.panels import Axis
from actstore.reason import reason

if TYPE_CHECKING:
    import torch

_KEY: Final = b"actstore.patching"
_PLAIN: Final = ("hook", "model_name", "engine", "noise_floor", "n_skipped", "seconds")
_OF_ESTIMATES: Final = ("method", "n_sampled", "correlation", "recall")


def write_table(path: Path, fields: Mapping[str, Any], columns: "Mapping[str, torch.Tensor]") -> None:
    """Write a result.

    Args:
        path: the file.
        fields: the fields of a result by name.
        columns: numbers of the cells, each shaped like the grid, under the names of their columns; ``value`` is one.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    axes: Sequence[Axis] = fields["axes"]
    shape = tuple(len(axis.labels) for axis in axes)
    table: dict[str, Any] = {}
    for axis, index in zip(axes, np.indices(shape).reshape(len(shape), -1), strict=True):
        table[axis.name] = index.astype(np.int32)
        table[f"{axis.name}_label"] = pa.DictionaryArray.from_arrays(
            index.astype(np.int32), pa.array(axis.labels, pa.string())
        )
    table |= {name: numbers.flatten().cpu().numpy() for name, numbers in columns.items()}
    document = {name: fields[name] for name in (*_PLAIN, *_OF_ESTIMATES) if name in fields}
    document["axes"] = [[axis.name, list(axis.labels)] for axis in axes]
    document |= {
        name: None if fields[name] is None else fields[name].tolist() for name in ("corrupted", "clean")
    }
    written = pa.table(table).replace_schema_metadata({_KEY: json.dumps(document).encode()})
    pq.write_table(written, path)


def read_table(path: Path) -> dict[str, Any]:
    """The fields of a result that was written.

    Raises:
        PatchError: the file is not such a table.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise PatchError(f"there is no file {path}") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise PatchError(f"{path} cannot be read as Parquet: {reason(error)}") from error
    metadata = (table.schema.metadata or {}).get(_KEY)
    if metadata is None:
        raise PatchError(f"{path} is no result of patching; write one with PatchResult.save")
    try:
        document = json.loads(metadata)
        axes = tuple(Axis(str(name), tuple(map(str, labels))) for name, labels in document["axes"])
        shape = tuple(len(axis.labels) for axis in axes)
        values = torch.from_numpy(table["value"].to_numpy().astype(np.float32)).view(shape)
        clean = document["clean"]
        own: dict[str, Any] = {name: document[name] for name in _OF_ESTIMATES if name in document}
        if own:
            own["estimate"] = torch.from_numpy(table["estimate"].to_numpy().astype(np.float32)).view(shape)
            own["is_exact"] = torch.from_numpy(table["is_exact"].to_numpy().astype(np.bool_)).view(shape)
        return {
            "values": values,
            "axes": axes,
            "corrupted": torch.tensor(document["corrupted"]),
            "clean": None if clean is None else torch.tensor(clean),
            **{name: document[name] for name in _PLAIN},
            **own,
        }
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise PatchError(f"{path} is damaged as a result of patching: {reason(error)}") from error
