"""Reads the tensors of a safetensors reply straight into their memory."""

import http.client
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from actstore.query.client.bounds import announced, shown, unexpected
from actstore.query.client.connections import read_into
from actstore.query.wire import SAFETENSORS_DTYPES

if TYPE_CHECKING:
    import torch

_MAX_HEADER: Final = 1 << 12
_MAX_ENTRY: Final = 1 << 10
"""Bytes of the header, without and for each tensor, at most."""
_ITEMSIZES: Final = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "int8": 1,
    "int32": 4,
    "int64": 8,
}

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Type and shape of tensors by name."""


def read_header(reply: http.client.HTTPResponse, where: str, expected: Tensors) -> list[str]:
    """Read the names of the tensors, in the order in which their bytes follow, and check that they are those expected.

    Args:
        reply: reply to read from.
        where: URL of the request, for the error.
        expected: all tensors that the reply must have.

    Raises:
        RequestError: the reply was cut off.
        StorageError: the reply is no safetensors, or has other tensors.
    """
    length = announced(reply, where)
    size = np.empty(8, np.uint8)
    if length < len(size):
        raise unexpected(where, f"{length} bytes", "safetensors")
    read_into(reply, size)
    nbytes = int(size.view("<u8")[0])
    if nbytes > _MAX_HEADER + _MAX_ENTRY * len(expected):
        raise unexpected(where, f"a header of {nbytes} bytes", f"safetensors of {_named(expected)}")
    data_nbytes = sum(_nbytes(*kind) for kind in expected.values())
    if length != len(size) + nbytes + data_nbytes:
        raise unexpected(
            where, f"{length} bytes", f"{len(size) + nbytes + data_nbytes} of {_named(expected)}"
        )
    text = np.empty(nbytes, np.uint8)
    read_into(reply, text)
    return _checked(text.tobytes(), where, expected)


def _checked(text: bytes, where: str, expected: Tensors) -> list[str]:
    try:
        pairs: list[tuple[str, Any]] = json.loads(text, object_pairs_hook=list)
        names, end = [], 0
        for name, fields in pairs:
            dtype, shape = expected[name]
            field = dict(fields)
            entry = (field["dtype"], list(field["shape"]), list(field["data_offsets"]))
            stop = end + _nbytes(dtype, shape)
            if entry != (SAFETENSORS_DTYPES[dtype], list(shape), [end, stop]):
                raise ValueError(f"{name} as {entry}")
            names.append(name)
            end = stop
        if len(names) != len(expected) or set(names) != set(expected):
            raise ValueError(", ".join(names))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        came = f"a header that says {shown(error)}" if str(error) else "another header"
        raise unexpected(where, came, f"safetensors of {_named(expected)}") from error
    return names


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * _ITEMSIZES[dtype]


def _named(expected: Tensors) -> str:
    return shown(", ".join(f"{name} {dtype} {list(shape)}" for name, (dtype, shape) in expected.items()))


def read_tensors(reply: http.client.HTTPResponse, where: str, expected: Tensors) -> "dict[str, torch.Tensor]":
    """Read all tensors, by name.

    Raises:
        RequestError: the reply was cut off.
        StorageError: the reply is no safetensors, or has other tensors.
    """
    import torch

    tensors = {}
    for name in read_header(reply, where, expected):
        dtype, shape = expected[name]
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        if math.prod(shape):
            read_into(reply, tensor.view(-1).view(torch.uint8).numpy())
        tensors[name] = tensor
    return tensors
