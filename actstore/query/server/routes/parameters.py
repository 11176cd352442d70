"""What a request asks for of a store, found in the store."""

from collections import deque
from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import Path, Query
from pydantic import BaseModel, ConfigDict, Field

from actstore.errors import JobError
from actstore.query.cut import Cut
from actstore.query.documents import Axis, Hook, Inner, Select
from actstore.query.problem import Problem
from actstore.query.selection import Indices, indices_of, parse_axis, parse_inner
from actstore.query.server.catalog.catalog import NAME
from actstore.query.server.sending.formats import MEDIA
from actstore.query.wire import TOKEN_ARRAYS
from actstore.store.committed_store import CommittedStore
from actstore.store.reading.rows import Rows

StoreName = Annotated[str, Path(pattern=NAME, description="Name of a store.", examples=["run"])]
HookPath = Annotated[
    str,
    Path(
        min_length=1,
        max_length=200,
        description="A hook, in any spelling without `/`; or `tokens`, `lengths`, `documents`, `offsets`.",
    ),
]
Dropped = Annotated[str, Field(pattern=r"^(bos|eos|sep|pad|nonfinite|-?[0-9]{1,9})$")]
Format = Literal["raw", "safetensors", "npy", "arrow", "json"]


class SliceQuery(BaseModel):
    """A part of one hook."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    seq: Axis = ":"
    """Sequences: a slice, a number, or numbers joined by commas, as in Python."""
    pos: Axis = ":"
    """Positions, likewise."""
    inner: Inner | None = None
    """Of the axes behind the positions: a slice or a number for each, joined by commas."""
    format: Format | None = None
    """In the place of `Accept`."""


SliceOf = Annotated[SliceQuery, Query()]


class BatchQuery(BaseModel):
    """An order of rows, as of `Store.loader`."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    hook: Annotated[list[Hook], Field(min_length=1, max_length=100)]
    """One, or several with their rows aligned; globs, too."""
    batch_size: Annotated[int, Field(ge=1, le=1 << 24)]
    """Rows, all ranks together."""
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] = 0
    """Of the order."""
    shuffle: Literal["global", "window", "none"] = "global"
    """Over all rows, within windows of neighbouring rows, or not at all."""
    window_rows: Annotated[int, Field(ge=1, le=1 << 48)] = 1 << 20
    """Rows of a window."""
    drop: Annotated[list[Dropped], Field(max_length=100)] = []
    """`bos`, `eos`, `sep`, `pad`, or token ids."""
    seqpos: Axis = ":"
    """Positions to keep."""
    max_norm: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Rows with a larger norm are left out."""
    drop_last: bool = False
    """Whether an epoch ends before a batch that would be smaller."""
    rank: Annotated[int, Field(ge=0, le=1 << 24)] = 0
    """Whose part of each batch is given."""
    world_size: Annotated[int, Field(ge=1, le=1 << 24)] = 1
    """Parts of each batch."""
    dtype: Literal["bfloat16", "float16", "float32", "float64"] | None = None
    """That values are converted to; else they are as stored."""
    provenance: bool = False
    """Also `sequences`, `positions` and `tokens` of the rows."""


BatchOf = Annotated[BatchQuery, Query()]


def array(store: CommittedStore, name: str) -> tuple[str, Rows]:
    """A hook under its stored name, or an array of the tokens.

    Raises:
        HookError: the store does not hold it.
    """
    if name in TOKEN_ARRAYS:
        found: Rows = getattr(store, name)
        return name, found
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

    Raises:
        HookError: the store does not hold it.
        Problem: there are no such rows, positions or elements.
        JobError: what is asked for has more axes than the array, or is no text of an index.
        NotCommittedError: a row is not committed.
    """
    found, stored = array(store, name)
    rows = _along(sequences, stored.shape[0], "sequences")
    if not store.is_complete:
        # Before anything is sent: later it could only be told by cutting the reply off.
        deque(stored.committed_pieces(rows), maxlen=0)
    if len(stored.shape) == 1:
        if positions != ":" or inner is not None:
            raise JobError(f"{found} has one number for each sequence; ask for sequences only")
        return Cut(found, stored, rows, ())
    at = _along(positions, stored.shape[1], "positions")
    elements = parse_inner(inner or ":", stored.shape[2:]) if inner or stored.shape[2:] else ()
    return Cut(found, stored, rows, (at, *elements))


def _along(asked: str | Sequence[int], size: int, axis: str) -> Indices:
    return parse_axis(asked, size, axis) if isinstance(asked, str) else indices_of(asked, size, axis)


def cuts(store: CommittedStore, select: Select) -> list[Cut]:
    """The parts of all arrays of a selection, each array once.

    Raises:
        HookError: the store does not hold one.
        Problem: there are no such rows, positions or elements.
        JobError: an array has fewer axes than what is asked for.
        NotCommittedError: a row is not committed.
    """
    names: dict[str, None] = {}
    for each in select.hooks:
        for name in [each] if each in TOKEN_ARRAYS else store.matching(each):
            names[name] = None
    # Arrays of tokens beside hooks have no elements to choose from.
    return [
        cut(
            store,
            name,
            select.sequences,
            ":" if name == "lengths" else select.positions,
            None if name in TOKEN_ARRAYS else select.inner,
        )
        for name in names
    ]


def form(asked: Format | None, accept: str | None) -> Format:
    """The format of a reply: what the query says, or what ``Accept`` likes best of those that there are.

    Raises:
        Problem: it accepts none of them.
    """
    if asked is not None:
        return asked
    names: dict[str, Format] = {media: name for name, media in MEDIA.items()}  # type: ignore[misc]
    liked: list[tuple[float, int, Format]] = []
    for place, each in enumerate((accept or "*/*").split(",")):
        media, *parameters = (part.strip().lower() for part in each.split(";"))
        quality = next((_quality(one) for one in parameters if one.startswith("q=")), 1.0)
        if media in ("*/*", "application/*"):
            liked.append((-quality, place, "raw"))
        elif media in names:
            liked.append((-quality, place, names[media]))
    found = min((one for one in liked if one[0] < 0), default=None)
    if found is None:
        raise Problem(
            406, "not-acceptable", f"accepted is {(accept or '')[:100]!r}; there are {', '.join(names)}"
        )
    return found[2]


def _quality(parameter: str) -> float:
    try:
        return float(parameter.removeprefix("q="))
    except ValueError:
        return 1.0
