"""The keyword arguments of `Store.loader`, typed for functions that pass them on."""

import os
from collections.abc import Sequence
from typing import Any, Required, TypedDict

import torch

from actstore.loader.options import Shuffle


class ReadArguments(TypedDict, total=False):
    """The arguments without the size of a batch."""

    seed: int
    shuffle: Shuffle | None
    window_rows: int
    drop: Sequence[str | int]
    seqpos: slice | Sequence[int] | None
    max_norm: float | None
    mask: Any
    epochs: int | None
    drop_last: bool
    rank: int
    world_size: int
    dtype: torch.dtype | str | None
    provenance: bool
    prefetch: int
    cache_dir: str | os.PathLike[str] | None
    cache_limit: int | None
    device: torch.device | str | None


class LoaderArguments(ReadArguments, total=False):
    """All arguments."""

    batch_size: Required[int]
