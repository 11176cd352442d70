"""Principal components in files: safetensors, which are read again, and tables for other programs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from actstore.analysis.geometry.principal.components import Components
from actstore.errors import JobError
from actstore.reason import reason

_KEY: Final = "actstore.pca"
_ARRAYS: Final = ("components", "explained_variance", "mean")


def write_safetensors(path: Path, every: Sequence[Components]) -> None:
    """Write components of some hooks, with what they are of in the metadata."""
    from safetensors.numpy import save_file

    arrays = {
        f"{i}.{name}": np.ascontiguousarray(getattr(one, name))
        for i, one in enumerate(every)
        for name in _ARRAYS
    }
    documents = [
        {
            "hook": one.hook,
            "shape": list(one.shape),
            "total_variance": one.total_variance,
            "count": one.count,
            "n_not_finite": one.n_not_finite,
            "is_from_statistics": one.is_from_statistics,
        }
        for one in every
    ]
    save_file(arrays, path, metadata={_KEY: json.dumps(documents)})


def read_safetensors(path: Path) -> list[dict[str, Any]]:
    """Read the fields of what `write_safetensors` wrote.

    Raises:
        JobError: the file is none of these.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            documents = json.loads((file.metadata() or {})[_KEY])
            found = []
            for i, document in enumerate(documents):
                arrays = {name: np.asarray(file.get_tensor(f"{i}.{name}"), np.float64) for name in _ARRAYS}
                shape = tuple(document.pop("shape"))
                found.append({**document, **arrays, "shape": shape})
                _check(Components(**found[-1]))
            return found
    except FileNotFoundError:
        raise JobError(f"there is no file {path}") from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise JobError(
            f"{path} holds no principal components, which PCA.save writes as .safetensors: {reason(error)}"
        ) from error


def _check(read: Components) -> None:
    k, size = read.components.shape
    if read.explained_variance.shape != (k,) or read.mean.shape != (size,) or np.prod(read.shape) != size:
        raise ValueError(f"arrays of {read.hook} do not fit each other")


def write_parquet(path: Path, every: Sequence[Components]) -> None:
    """Write a line for each component: hook, number, variance, share of the total variance, and direction."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = [(one, i) for one in every for i in range(one.n_components)]
    table = pa.table(
        {
            "hook": [one.hook for one, _ in numbers],
            "component": pa.array([i for _, i in numbers], pa.int32()),
            "explained_variance": [float(one.explained_variance[i]) for one, i in numbers],
            "explained_variance_ratio": [float(one.explained_variance_ratio[i]) for one, i in numbers],
            "direction": [one.components[i].tolist() for one, i in numbers],
        }
    )
    pq.write_table(table, path)
