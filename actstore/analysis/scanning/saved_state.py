"""States of finished units as safetensors, with a checksum, so that a scan goes on where it was stopped."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
from crc32c import crc32c
from safetensors import SafetensorError
from safetensors.numpy import load, save

from actstore.analysis.scanning.reduction import Arrays
from actstore.errors import StorageError
from actstore.storage.blobs import Bytes

_CHECKSUM = "checksum"


def folder_of(store: str, identities: Sequence[str], rows: str) -> str:
    """Name of the folder with the states of a scan: all that decides them, hashed.

    Args:
        store: what tells the contents of the store from others.
        identities: identities of the reductions.
        rows: which rows are taken.
    """
    text = json.dumps([store, list(identities), rows])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def key_of(folder: str, unit: int) -> str:
    return f"{folder}/{unit:08d}.safetensors"


def to_bytes(states: Sequence[Arrays]) -> bytes:
    """The states of all reductions of a unit."""
    arrays = {
        f"{i}.{name}": np.ascontiguousarray(a) for i, one in enumerate(states) for name, a in one.items()
    }
    arrays[_CHECKSUM] = np.array([_checksum(arrays)], np.uint32)
    return save(arrays)


def from_bytes(data: Bytes, n_states: int, where: str) -> list[Arrays]:
    """The states that `to_bytes` wrote.

    Raises:
        StorageError: the bytes are damaged.
    """
    try:
        arrays = load(bytes(data))
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise damaged_state(where) from error
    checksum = arrays.pop(_CHECKSUM, None)
    if checksum is None or checksum.tolist() != [_checksum(arrays)]:
        raise damaged_state(where)
    return [
        {name.partition(".")[2]: values for name, values in arrays.items() if name.startswith(f"{i}.")}
        for i in range(n_states)
    ]


def damaged_state(where: str) -> StorageError:
    """The error for bytes that are not what was kept."""
    return StorageError(f"{where} is damaged: it is not a state of this scan; delete it, and run again")


def _checksum(arrays: Arrays) -> int:
    value = 0
    for name in sorted(arrays):
        values = np.ascontiguousarray(arrays[name])
        head = f"{name} {values.dtype.str} {values.shape}".encode()
        value = crc32c(values.reshape(-1).view(np.uint8).data, crc32c(head, value))
    return value
