"""The options of a loader: name, type, default and meaning of each. `Store.loader`, HTTP and commands take them from
here.
"""

import inspect
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypedDict, TypeVar, get_args

from actstore.loader.ordering.order import WINDOW_ROWS

if TYPE_CHECKING:
    import torch

Shuffle = Literal["global", "window"]
SHUFFLES: Final[Mapping[str, Shuffle | None]] = {"global": "global", "window": "window", "none": None}
"""Each order by its name in queries and on the command line."""
_Method = TypeVar("_Method", bound=Callable[..., Any])


@dataclass(frozen=True)
class Option:
    """What is known of an option beside its name and type."""

    meaning: str
    default: Any = ...
    """``...`` where it must be given."""


class ReadArguments(TypedDict, total=False):
    """The keyword arguments of `Store.loader` without the size of a batch, for functions that pass them on."""

    seed: Annotated[int, Option("Seed of the shuffle, 0 to 2^64 - 1.", 0)]
    shuffle: Annotated[
        Shuffle | None,
        Option(
            "`global`, any row anywhere, for files or with a cache; `window`, whole shards in random order and the "
            "rows of a window of them among each other, for object stores; None, as stored.",
            "global",
        ),
    ]
    window_rows: Annotated[
        int,
        Option(
            "The least number of stored rows that `window` shuffles together, including rows that are dropped. Where "
            "files are not mapped, two windows are held in memory, the current and the next one.",
            WINDOW_ROWS,
        ),
    ]
    drop: Annotated[
        Sequence[str | int],
        Option(
            "Rows to leave out: `bos`, `eos`, `sep`, `pad`, or token ids; of chats, the roles `template`, `system`, "
            "`user`, `assistant`, `tool`; `nonfinite`, rows with NaN or infinity in one of the hooks, for which the "
            "segments that have any are read.",
            (),
        ),
    ]
    seqpos: Annotated[slice | Sequence[int] | None, Option("Positions to keep, a slice or a list.", None)]
    max_norm: Annotated[
        float | None,
        Option(
            "Largest Euclidean norm of a row of the first hook; rows above it are left out. The norms of the hook are "
            "read for this, or all of its values where norms are not stored.",
            None,
        ),
    ]
    mask: Annotated[
        Any, Option("Bool [n_sequences, positions] (or slots) or [n_sequences], True for rows to keep.", None)
    ]
    epochs: Annotated[int | None, Option("How often every row comes; None for no end.", 1)]
    drop_last: Annotated[
        bool, Option("Whether to leave out the last batch of an epoch where it is smaller.", False)
    ]
    rank: Annotated[int, Option("Which part of each batch is given.", 0)]
    world_size: Annotated[int, Option("Number of ranks, which is the number of parts of each batch.", 1)]
    dtype: Annotated[
        "torch.dtype | str | None",
        Option("Type of the batches, such as `float32`; None keeps the stored one.", None),
    ]
    provenance: Annotated[
        bool,
        Option("Whether to add `sequences`, `positions` and `tokens` of the rows; gives a `Batch`.", False),
    ]
    prefetch: Annotated[
        int,
        Option("Number of batches made ahead in a thread; 0 makes them when they are requested.", 2),
    ]
    cache_dir: Annotated[
        str | os.PathLike[str] | None,
        Option(
            "Folder on a local disk that keeps shards of remote stores, for later epochs and other processes; with "
            "all of a hook there, `global` works for such a store, too. Local stores ignore it.",
            None,
        ),
    ]
    cache_limit: Annotated[
        int | None, Option("The most bytes of the cache folder, for all stores together.", None)
    ]
    device: Annotated[
        "torch.device | str | None",
        Option(
            "Device of the batches; None for host memory. They are copied ahead to a GPU, from pinned memory and on "
            "their own stream.",
            None,
        ),
    ]


class LoaderArguments(ReadArguments):
    """All keyword arguments of `Store.loader`."""

    batch_size: Annotated[int, Option("Rows of a batch, all ranks together.")]


_ANNOTATIONS: Final = {
    "batch_size": LoaderArguments.__annotations__["batch_size"]
} | LoaderArguments.__annotations__
OPTIONS: Final[Mapping[str, Option]] = {name: get_args(kind)[1] for name, kind in _ANNOTATIONS.items()}


def shows_options(method: _Method) -> _Method:
    """Show every option in the signature and docstring of a method that takes them as ``**options``.

    Args:
        method: a method whose docstring has a line ``options:`` among its arguments.
    """
    signature = inspect.signature(method)
    *others, _ = signature.parameters.values()
    for name, kind in _ANNOTATIONS.items():
        default = OPTIONS[name].default
        others.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if default is ... else default,
                annotation=getattr(get_args(kind)[0], "__forward_arg__", get_args(kind)[0]),
            )
        )
    method.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
    listed = "\n".join(
        textwrap.fill(f"{name}: {option.meaning}", 120, initial_indent=" " * 12, subsequent_indent=" " * 16)
        for name, option in OPTIONS.items()
    )
    method.__doc__ = (method.__doc__ or "").replace("            options: see `LoaderArguments`.", listed)
    return method
