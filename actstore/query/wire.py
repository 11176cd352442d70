"""Names that server and client share: headers, media types, and arrays that are no hooks."""

from typing import Final

SHAPE: Final = "Actstore-Shape"
"""Header of raw bytes: sizes of the axes, joined by commas."""
DTYPE: Final = "Actstore-Dtype"
"""Header of raw bytes: name of the type of the elements, which are little-endian."""
N_BATCHES: Final = "Actstore-Batches"
"""Header of a batch: how many batches an epoch has."""
STORE: Final = "Actstore-Store"
"""Header of every reply of a store: identifies the store, and stays the same while the store grows."""
CONTENTS: Final = "Actstore-Contents"
"""Header of every reply of a store: label of its contents, from `actstore.store.reading.identity.label_of`."""
N_HERE: Final = "Actstore-Batches-Here"
"""Header of batches: how many of them the reply has, one after the other."""
ORDER: Final = "Actstore-Order"
"""Header of a batch: the version of the order that it belongs to."""

RAW: Final = "application/octet-stream"
SAFETENSORS: Final = "application/x-safetensors"
NPY: Final = "application/x-npy"
ARROW: Final = "application/vnd.apache.arrow.stream"
JSON: Final = "application/json"
SAFETENSORS_DTYPES: Final = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "int8": "I8",
    "int32": "I32",
    "int64": "I64",
}
"""Names of the types in safetensors."""
PROBLEM: Final = "application/problem+json"

TOKEN_ARRAYS: Final = ("tokens", "lengths", "documents", "offsets", "roles", "turns", "positions")
"""Arrays that describe the sequences; requests can name them like hooks. Only stores of chats have roles and turns, and
only those of chosen positions have positions.
"""

SEQUENCES, POSITIONS, TOKENS = "sequences", "positions", "tokens"
"""Tensors beside the hooks in a batch: where each row comes from."""

OPTIONS_AS_THEY_ARE: Final = (
    "batch_size",
    "seed",
    "window_rows",
    "drop_last",
    "rank",
    "world_size",
    "provenance",
)
"""Options of a loader that have the same names and values in a query. The others are written as text."""
