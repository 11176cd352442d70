"""Writes tensors as raw bytes, safetensors, npy, Arrow or JSON."""

import io
import json
import math
from collections.abc import Sequence
from typing import Any, Final

import ml_dtypes
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actstore.errors import JobError
from actstore.query.cut import Cut
from actstore.query.problem import Problem
from actstore.query.server.sending.body import Body, InMemory, Part, Stored
from actstore.query.wire import ARROW, DTYPE, JSON, NPY, RAW, SAFETENSORS, SAFETENSORS_DTYPES, SHAPE

MEDIA: Final = {"raw": RAW, "safetensors": SAFETENSORS, "npy": NPY, "arrow": ARROW, "json": JSON}
"""Media type by name of a format."""
_MAX_CONVERTED_NBYTES: Final = 64 << 20
"""Bytes of a slice at most, in formats that are made in memory."""
_MAX_SEQUENCES: Final = 1_000_000
_MAX_JSON: Final = 100_000
"""Elements of a slice at most, in JSON."""
_JSON_NBYTES: Final = 100
"""Bytes of memory for each element in JSON: a number of Python in a list, and its digits, twice."""


def safetensors_header(tensors: Sequence[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """The safetensors header, which comes before the data of the tensors.

    Source: https://huggingface.co/docs/safetensors/index#format

    Args:
        tensors: name, type, shape and bytes of each tensor.
    """
    fields, start = {}, 0
    for name, dtype, shape, nbytes in tensors:
        offsets = [start, start + nbytes]
        fields[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": offsets}
        start += nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data is aligned
    return len(text).to_bytes(8, "little") + text


def safetensors_body(cuts: Sequence[Cut]) -> Body:
    """A body of several arrays, each under its name."""
    head = safetensors_header([(cut.name, cut.dtype, cut.shape, cut.nbytes) for cut in cuts])
    return Body([InMemory(head), *(Stored(cut) for cut in cuts)])


def raw_headers(dtype: str, shape: Sequence[int]) -> dict[str, str]:
    """Headers for the type and shape of raw bytes."""
    return {DTYPE: dtype, SHAPE: ",".join(map(str, shape))}


def slice_body(cut: Cut, form: str) -> Body:
    """The body of one array.

    Args:
        cut: part of the array, not too large for `made_nbytes`.
        form: a name in `MEDIA`.

    Raises:
        NotCommittedError: a row is not committed.
        StorageError: a row cannot be read.
    """
    match form:
        case "raw":
            return Body([Stored(cut)])
        case "safetensors":
            return safetensors_body([cut])
        case "npy":
            return Body(_npy(cut))
        case "arrow":
            return Body([InMemory(_arrow(cut))])
        case _:
            return Body([InMemory(_json(cut))])


def made_nbytes(cut: Cut, form: str) -> int:
    """Bytes of memory that `slice_body` takes where it makes the whole body; 0 if the body is read while it is sent.

    Raises:
        Problem: the slice is too large for this format.
    """
    is_widened = cut.dtype == "bfloat16"
    if form in ("raw", "safetensors") or (form == "npy" and not is_widened):
        return 0
    n_elements = math.prod(cut.shape)
    _check_size(cut, form, n_elements)
    values = n_elements * (4 if is_widened else cut.stored.storage.itemsize)
    match form:
        case "json":
            made = values + n_elements * _JSON_NBYTES
        case "arrow":
            made = 2 * (values + 16 * math.prod(cut.shape[:2]))
        case _:
            made = values
    return cut.held_nbytes + made


def _check_size(cut: Cut, form: str, n_elements: int) -> None:
    if form == "json" and n_elements > _MAX_JSON:
        raise _too_large(f"has {n_elements} elements, and JSON is for up to {_MAX_JSON}")
    what = {"npy": "npy of bfloat16, which becomes float32,", "arrow": "Arrow", "json": "JSON"}[form]
    if len(cut.sequences) > _MAX_SEQUENCES:
        raise _too_large(f"has {len(cut.sequences)} sequences, and {what} is for up to {_MAX_SEQUENCES}")
    if cut.nbytes > _MAX_CONVERTED_NBYTES:
        raise _too_large(f"has {cut.nbytes} bytes, and {what} is for up to {_MAX_CONVERTED_NBYTES}")


def _too_large(text: str) -> Problem:
    return Problem(413, "too-large", f"the slice {text}; ask for raw bytes or safetensors, or for less")


def _npy(cut: Cut) -> list[Part]:
    if cut.dtype != "bfloat16":
        return [InMemory(_npy_header(cut.stored.storage, cut.shape)), Stored(cut)]
    values = _values(cut)
    return [InMemory(_npy_header(values.dtype, values.shape)), InMemory(values)]


def _npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def _values(cut: Cut) -> NDArray[Any]:
    """All values in memory. bfloat16 becomes float32, which holds each of its values exactly."""
    is_widened = cut.dtype == "bfloat16"
    values = np.empty(math.prod(cut.shape), np.float32 if is_widened else cut.stored.storage)
    at = 0
    for piece in Stored(cut).pieces(0, cut.nbytes):
        part = np.frombuffer(piece, cut.stored.storage)
        values[at : at + len(part)] = part.view(ml_dtypes.bfloat16) if is_widened else part
        at += len(part)
    return values.reshape(cut.shape)


def _arrow(cut: Cut) -> pa.Buffer:
    """An Arrow stream with a row for each sequence and position, or slot: their numbers, and the values as a list."""
    if 0 in cut.shape[2:]:
        raise JobError("inner is empty, and Arrow has no values without elements; ask for some")
    values = _values(cut)
    sequences = np.asarray(cut.sequences, np.int64)
    columns: dict[str, Any] = {"sequence": sequences}
    if cut.inner:
        entries = np.asarray(cut.inner[0], np.int64)
        columns = {
            "sequence": np.repeat(sequences, len(entries)),
            cut.stored.axes[1]: np.tile(entries, len(sequences)),
        }
    flat = pa.array(values.reshape(-1))
    width = int(np.prod(cut.shape[2:], dtype=np.int64))
    column = pa.FixedSizeListArray.from_arrays(flat, width) if len(cut.shape) > 2 else flat
    metadata = {
        b"actstore.dtype": cut.dtype.encode(),
        b"actstore.shape": ",".join(map(str, cut.shape[2:])).encode(),
    }
    field = pa.field(cut.name, column.type, metadata=metadata)
    schema = pa.schema([*(pa.field(name, pa.int64()) for name in columns), field])
    table = pa.table(
        [*(pa.array(column_numbers) for column_numbers in columns.values()), column], schema=schema
    )
    # The buffer has the right size from the start, as one that grows exists twice each time.
    size = pa.MockOutputStream()
    with pa.ipc.new_stream(size, schema) as writer:
        writer.write_table(table)
    buffer = pa.py_buffer(bytearray(size.size()))
    with pa.FixedSizeBufferWriter(buffer) as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(table)
    return buffer


def _json(cut: Cut) -> bytes:
    values = _values(cut)
    entries = np.asarray(cut.inner[0]).tolist() if cut.inner else None
    are_slots = bool(cut.inner) and cut.stored.axes[1] == "slot"
    fields = {
        "name": cut.name,
        "dtype": cut.dtype,
        "shape": list(cut.shape),
        "sequences": np.asarray(cut.sequences).tolist(),
        "positions": None if are_slots else entries,
        **({"slots": entries} if are_slots else {}),
        "values": _with_strings(values.tolist()) if values.dtype.kind == "f" else values.tolist(),
    }
    return json.dumps(fields, allow_nan=False).encode()


def _with_strings(values: Any) -> Any:
    """Values for JSON, which has no numbers for NaN and infinities: they become strings."""
    if isinstance(values, list):
        return [_with_strings(value) for value in values]
    return values if np.isfinite(values) else {np.inf: "Infinity", -np.inf: "-Infinity"}.get(values, "NaN")
