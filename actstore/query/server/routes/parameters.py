"""Parameters of requests, and the parts of a store that they select."""

from collections import deque
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import Path, Query
from pydantic import BaseModel, ConfigDict, Field

from actstore.errors import HookError, JobError
from actstore.loader.arguments import OPTIONS
from actstore.query.cut import Cut
from actstore.query.documents import Axis, Hook, Inner, Select
from actstore.query.selection import Indices, indices_of, parse_axis, parse_inner
from actstore.query.server.catalog.catalog import NAME
from actstore.query.server.routes.accept import Format
from actstore.query.wire import TOKEN_ARRAYS
from actstore.store.committed_store import CommittedStore
from actstore.store.reading.rows import Rows

StoreName = Annotated[str, Path(pattern=NAME, description="Name of a store.", examples=["run"])]
HookPath = Annotated[
    str,
    Path(
        min_length=1,
        max_length=200,
        description="A hook, in any spelling without `/`; or `tokens`, `lengths`, `documents`, "
        "`offsets`, of chats also `roles`, `turns`, of chosen positions `positions`.",
    ),
]
Dropped = Annotated[
    str, Field(pattern=r"^(bos|eos|sep|pad|nonfinite|template|system|user|assistant|tool|-?[0-9]{1,9})$")
]


class SliceQuery(BaseModel):
    """A part of one hook."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    seq: Axis = ":"
    """Sequences: a slice, a number, or numbers joined by commas, as in Python."""
    pos: Axis = ":"
    """Positions, or slots of hooks and of `positions` where only chosen positions are stored: a slice, a number, or
    numbers joined by commas, as in Python.
    """
    inner: Inner | None = None
    """A slice or a number for each of the axes behind the positions, joined by commas."""
    format: Format | None = None
    """Format of the reply, instead of `Accept`."""


SliceOf = Annotated[SliceQuery, Query()]


def _option(name: str, **field: Any) -> Any:
    """The field of an option of a loader, with what is said of it there."""
    option = OPTIONS[name]
    return Field(**{"default": option.default, "description": option.meaning} | field)


class BatchQuery(BaseModel):
    """An order of rows, with the options of `Store.loader`."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    hook: Annotated[list[Hook], Field(min_length=1, max_length=100)]
    """One hook, or several with their rows aligned; globs, too."""
    batch_size: int = _option("batch_size", ge=1, le=1 << 24)
    seed: int = _option("seed", ge=0, lt=1 << 64)
    shuffle: Literal["global", "window", "none"] = _option("shuffle")
    window_rows: int = _option("window_rows", ge=1, le=1 << 48)
    drop: list[Dropped] = _option("drop", default=[], max_length=100)
    seqpos: Axis = _option("seqpos", default=":")
    max_norm: float | None = _option("max_norm", allow_inf_nan=False)
    drop_last: bool = _option("drop_last")
    rank: int = _option("rank", ge=0, le=1 << 24)
    world_size: int = _option("world_size", ge=1, le=1 << 24)
    dtype: Literal["bfloat16", "float16", "float32", "float64"] | None = _option("dtype")
    provenance: bool = _option("provenance")


BatchOf = Annotated[BatchQuery, Query()]


def array(store: CommittedStore, name: str) -> tuple[str, Rows]:
    """A hook under its stored name, or an array of the tokens.

    Raises:
        HookError: the store does not hold it.
    """
    if name in TOKEN_ARRAYS:
        tokens: Rows | None = getattr(store, name)
        if tokens is None:
            raise HookError(f"{store.url} has all positions of its sequences, so it has no array positions")
        return name, tokens
    acts = store[name]
    return acts.hook, acts.rows


def cut(
    store: CommittedStore,
    name: str,
    sequences: str | Sequence[int],
    positions: str | Sequence[int],
    inner: str | None,
) -> Cut:
    """A part of an array.

    Args:
        store: store of the array.
        name: hook, or array of the tokens.
        sequences: sequences.
        positions: what is wanted of the second axis: positions, or slots if the array has these.
        inner: what is wanted of the axes behind.

    Raises:
        HookError: the store does not hold it.
        Problem: rows, positions or elements are out of bounds.
        JobError: the text of an index is malformed, or names more axes than the array has.
        NotCommittedError: a row is not committed.
    """
    array_name, stored = array(store, name)
    sequence_indices = _axis_indices(sequences, stored.shape[0], "sequences")
    if not store.is_complete:
        # This is checked before anything is sent: later, an error could only cut the reply off.
        deque(stored.committed_pieces(sequence_indices), maxlen=0)
    if len(stored.shape) == 1:
        if positions != ":" or inner is not None:
            raise JobError(f"{array_name} has one number for each sequence; ask for sequences only")
        return Cut(array_name, stored, sequence_indices, ())
    position_indices = _axis_indices(positions, stored.shape[1], f"{stored.axes[1]}s")
    elements = parse_inner(inner or ":", stored.shape[2:]) if inner or stored.shape[2:] else ()
    return Cut(array_name, stored, sequence_indices, (position_indices, *elements))


def _axis_indices(selector: str | Sequence[int], size: int, axis: str) -> Indices:
    return parse_axis(selector, size, axis) if isinstance(selector, str) else indices_of(selector, size, axis)


def cuts(store: CommittedStore, select: Select) -> list[Cut]:
    """The parts of all arrays of a selection, each array once.

    Raises:
        HookError: the store does not hold a hook.
        Problem: rows, positions or elements are out of bounds.
        JobError: an array has fewer axes than the selection names.
        NotCommittedError: a row is not committed.
    """
    names: dict[str, None] = {}
    for pattern in select.hooks:
        for name in [pattern] if pattern in TOKEN_ARRAYS else store.matching(pattern):
            names[name] = None
    axes = {name: _second_axis(store, name) for name in names}
    if select.slots is not None and "slot" not in axes.values():
        raise JobError(
            "slots are of stores in which only chosen positions are stored, and nothing of that kind is asked for; "
            "choose positions"
        )
    if select.slots is None and select.positions != ":" and "slot" in axes.values():
        name = next(name for name, axis in axes.items() if axis == "slot")
        raise JobError(
            f"only chosen positions are stored of {name}, in slots that differ from sequence to sequence; choose "
            "slots, and read the position of each from the array positions"
        )
    wanted = {"position": select.positions, "slot": ":" if select.slots is None else select.slots, None: ":"}
    # Token arrays beside hooks have no elements to choose from.
    return [
        cut(store, name, select.sequences, wanted[axis], None if name in TOKEN_ARRAYS else select.inner)
        for name, axis in axes.items()
    ]


def _second_axis(store: CommittedStore, name: str) -> str | None:
    """``position`` or ``slot``; None if there is one axis."""
    axes = array(store, name)[1].axes
    return axes[1] if len(axes) > 1 else None
