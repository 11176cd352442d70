"""Reading directions from files of other programs."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import JobError, StorageError
from actstore.reason import reason


def read_directions(path: Path | str) -> NDArray[np.float32]:
    """Directions [n_features, d] of a file: an array of a ``.npy``, or the only tensor of a ``.safetensors``.

    Raises:
        JobError: the file holds something else.
        StorageError: the file cannot be read.
    """
    file = Path(path)
    if file.suffix not in (".npy", ".safetensors"):
        raise JobError(
            f"{file} is neither .npy nor .safetensors; save directions [n_features, d] as one of them"
        )
    try:
        values = _npy(file) if file.suffix == ".npy" else _safetensors(file)
    except OSError as error:
        raise StorageError(f"{file} cannot be read: {reason(error)}") from error
    if values.ndim not in (1, 2) or values.dtype.kind not in "fiu" or not values.size:
        raise JobError(
            f"{file} holds {values.dtype} of shape {values.shape}; directions are numbers [n_features, d]"
        )
    return np.atleast_2d(values).astype(np.float32)


def _npy(file: Path) -> NDArray[Any]:
    try:
        values = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise JobError(f"{file} is no .npy of numbers: {reason(error)}") from error
    assert isinstance(values, np.ndarray)
    return values


def _safetensors(file: Path) -> NDArray[Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise JobError(f"{file} is no .safetensors: {reason(error)}") from error
    if len(tensors) != 1:
        raise JobError(
            f"{file} holds {len(tensors)} tensors ({', '.join(list(tensors)[:8])}); save the directions alone"
        )
    (values,) = tensors.values()
    return values.float().numpy()
