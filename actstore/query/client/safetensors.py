"""Tensors of a safetensors reply, read straight into their memory."""

import http.client
import json
import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from actstore.query.client.connections import read_into
from actstore.query.wire import SAFETENSORS_DTYPES
from actstore.store.storage_errors import Kind, RequestError

if TYPE_CHECKING:
    import torch

_MAX_HEADER: Final = 100 << 20
"""As the format has it."""
_DTYPES: Final = {theirs: ours for ours, theirs in SAFETENSORS_DTYPES.items()}


def read_header(reply: http.client.HTTPResponse) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor, in the order in which their bytes follow.

    Raises:
        RequestError: it is no safetensors, or cut off.
    """
    size = np.empty(8, np.uint8)
    read_into(reply, size)
    nbytes = int(size.view("<u8")[0])
    if nbytes > _MAX_HEADER:
        raise RequestError(Kind.OTHER, "the reply is no safetensors")
    text = np.empty(nbytes, np.uint8)
    read_into(reply, text)
    try:
        fields: dict[str, Any] = json.loads(text.tobytes())
        found, end = {}, 0
        for name, field in fields.items():
            dtype, shape = _DTYPES[field["dtype"]], tuple(field["shape"])
            start, stop = field["data_offsets"]
            if start != end or any(size < 0 for size in shape):
                raise ValueError(name)
            found[name], end = (dtype, shape), stop
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(
            Kind.OTHER, "the reply is no safetensors as a server of actstore sends it"
        ) from error
    return found


def read_tensors(reply: http.client.HTTPResponse) -> "dict[str, torch.Tensor]":
    """All tensors, by name.

    Raises:
        RequestError: it is no safetensors, or cut off.
    """
    import torch

    found = {}
    for name, (dtype, shape) in read_header(reply).items():
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        if math.prod(shape):
            read_into(reply, tensor.view(-1).view(torch.uint8).numpy())
        found[name] = tensor
    return found
