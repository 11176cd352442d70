"""One sweep over the layers of a model for many cells: each joins at its layer, with the positions that it changes.

A cell changes nothing before its layer and its first position. So its rows begin there, with the residual stream of the
recorded run, and attend to the recorded keys and values of the positions before. Rows of all cells that are on the way
go through a layer together, as one batch of tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from actstore.hooks.naming.hook_points import BY_LEAF
from actstore.hooks.packing.packed_run import Edit, Group, PackedRun
from actstore.patching.engine.bounds import tokens_at_once
from actstore.patching.engine.cells import PATTERNS, Cells
from actstore.patching.engine.measuring import Ends, Measuring

if TYPE_CHECKING:
    import torch

_CONTROL: Final = -1
"""Number of the cell that changes nothing, which each wave computes beside the others."""


class _Live:
    """Rows from one position on, in the order in which they join: variants of one prompt for one cell each."""

    def __init__(
        self,
        start: int,
        stop: int,
        columns: "tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]",
        like: "torch.Tensor",
        n_layers: int,
    ) -> None:
        """
        Args:
            start: first position of the rows.
            stop: position behind the last one.
            columns: cell, prompt, layer and end of the edit of each row [row]; layers ascend.
            like: a tensor [..., d_model] of the dtype and device of the stream.
            n_layers: number of layers.
        """
        import torch

        self.start = start
        self.stop = stop
        self.cells, self.prompts, layers, self.stops = columns
        self.first_of: list[int] = torch.searchsorted(layers, torch.arange(n_layers + 1)).tolist()
        """The first row that enters at each layer or later."""
        self.n_joined = 0
        self.stream = like.new_empty(len(layers), stop - start, like.shape[-1])
        """Residual stream of each row [row, position, d_model]; rows from ``n_joined`` on are not there yet."""

    def entering(self, layer: int) -> range:
        """The rows that enter at a layer."""
        return range(self.first_of[layer], self.first_of[layer + 1])


@dataclass(frozen=True)
class _Piece:
    """Some of the rows from one position on, up to some position."""

    live: _Live
    rows: slice
    stop: int

    @property
    def n_tokens(self) -> int:
        n_rows: int = self.rows.stop - self.rows.start
        return n_rows * (self.stop - self.live.start)

    def group(self, has_own_keys: bool) -> Group:
        return Group(self.live.prompts[self.rows], self.live.start, self.stop, has_own_keys)


def sweep(
    run: PackedRun,
    cells: Cells,
    changed: "torch.Tensor",
    measuring: Measuring,
    max_tokens: int,
) -> "Iterator[tuple[slice, torch.Tensor]]":
    """Compute cells in waves of at most ``max_tokens`` tokens.

    Args:
        run: the corrupted run.
        cells: what to compute, in ascending order of layers.
        changed: whether a cell changes a prompt [cell, prompt]; other prompts keep their logits.
        measuring: takes the metric of cells.
        max_tokens: tokens on the way at once, at least those of one cell.

    Yields:
        (cells of the wave, their metric, float64 [cell, 1] or [cell, prompt]).

    Raises:
        ModelError: unpatched rows have not ended where the recorded run did.
    """
    stop = max(measuring.positions) + 1
    costs = ((stop - cells.starts).clamp(min=0)[:, None] * changed).sum(1)
    for part in _waves(costs, max_tokens):
        yield part, _Wave(run, cells, changed, part, measuring.positions).swept(measuring)


def _waves(costs: "torch.Tensor", max_tokens: int) -> Iterator[slice]:
    """Parts of the cells that fit into the tokens."""
    first, tokens = 0, 0
    for cell, cost in enumerate(costs.tolist()):
        if tokens and tokens + cost > max_tokens:
            yield slice(first, cell)
            first, tokens = cell, 0
        tokens += cost
    if len(costs):
        yield slice(first, len(costs))


class _Wave:
    """Cells that go through the layers together."""

    def __init__(
        self, run: PackedRun, cells: Cells, changed: "torch.Tensor", part: slice, positions: list[int]
    ) -> None:
        import torch

        self._run = run
        self._cells = cells
        self._part = part
        self._positions = positions
        self._stop = max(positions) + 1
        self._reach = BY_LEAF[cells.leaf].reach
        indices, prompts = changed[part].nonzero(as_tuple=True)
        numbers = indices + part.start
        is_seen = cells.starts[numbers] < self._stop
        numbers, prompts = numbers[is_seen], prompts[is_seen]
        layers, starts = cells.layers[numbers], cells.starts[numbers]
        self._first_layer = int(layers.min()) if len(layers) else 0
        first_start = int(starts.min()) if len(starts) else 0
        every = torch.arange(changed.shape[1])
        numbers = torch.cat([torch.full_like(every, _CONTROL), numbers])
        prompts = torch.cat([every, prompts])
        layers = torch.cat([torch.full_like(every, self._first_layer), layers])
        starts = torch.cat([torch.full_like(every, first_start), starts])
        stops = torch.where(numbers == _CONTROL, starts, cells.stops[numbers].clamp(max=self._stop))
        self._live: list[_Live] = []
        for start in sorted(set(starts.tolist())):
            is_here = starts == start
            columns = (numbers[is_here], prompts[is_here], layers[is_here], stops[is_here])
            n_layers = len(run.streams) - 1
            self._live.append(_Live(start, self._stop, columns, run.streams[0], n_layers))

    def swept(self, measuring: Measuring) -> "torch.Tensor":
        """Run all layers, and measure the cells [cell, 1] or [cell, prompt]."""
        n_layers = len(self._run.streams) - 1
        for layer in range(self._first_layer, n_layers):
            pieces = [piece for live in self._live for piece in self._joined_before(live, layer)]
            for chunk in _chunks([_Piece(live, slice(0, live.n_joined), live.stop) for live in self._live]):
                self._advance(layer, chunk)
            for chunk in _chunks(pieces):
                self._enter(layer, chunk)
        return self._measured(measuring)

    def _joined_before(self, live: _Live, layer: int) -> list[_Piece]:
        """Let rows join whose edit is in the stream into the layer, and give the others, which enter within it."""
        rows = live.entering(layer)
        first, last = rows.start, rows.stop
        if self._reach != "stream":
            first += int((live.cells[first:last] == _CONTROL).sum())
        joining = slice(rows.start, first if self._reach != "stream" else last)
        if joining.stop > joining.start:
            self._join(live, joining, layer)
        if joining.stop == last:
            return []
        entering = slice(joining.stop, last)
        end = live.stop if self._reach == "keys" else int(live.stops[entering].max())
        return [_Piece(live, entering, end)]

    def _join(self, live: _Live, rows: slice, layer: int) -> None:
        """Add rows with the recorded stream into a layer, edited if that is what their cells edit."""
        assert rows.start == live.n_joined
        recorded = self._run.streams[layer]
        stream = live.stream[rows]
        stream.copy_(recorded[live.prompts[rows], live.start : live.stop])
        live.n_joined = rows.stop
        if self._reach == "stream":
            row, position = self._edited(live, rows, live.stop)
            prompts = live.prompts[rows][row]
            stream[row, position] = self._cells.new(layer)[prompts, position + live.start]

    def _edited(self, live: _Live, rows: slice, stop: int) -> "tuple[torch.Tensor, torch.Tensor]":
        """(row, position) of the values that cells of these rows replace, both counted from the first one."""
        import torch

        positions = torch.arange(live.start, stop)
        row, position = (positions < live.stops[rows][:, None]).nonzero(as_tuple=True)
        return row, position

    def _advance(self, layer: int, pieces: list[_Piece]) -> None:
        """Run a layer over rows that are on the way."""
        import torch

        streams = [piece.live.stream[piece.rows].flatten(0, 1) for piece in pieces]
        groups = [piece.group(has_own_keys=True) for piece in pieces]
        if layer == len(self._run.streams) - 2 and len(self._positions) == 1:
            # Nobody looks at the other positions behind the last layer.
            ends = self._run.layer_at_end(layer, torch.cat(streams), groups)
            for piece, end in zip(pieces, torch.split(ends, [group.n_rows for group in groups]), strict=True):
                piece.live.stream[piece.rows, -1] = end
            return
        for piece, out in zip(pieces, self._through(layer, streams, groups, {}), strict=True):
            piece.live.stream[piece.rows].copy_(out)

    def _enter(self, layer: int, pieces: list[_Piece]) -> None:
        """Run a layer over rows that are edited within it, and let them join behind it."""
        recorded = self._run.streams[layer]
        has_own_keys = self._reach == "keys"
        streams = [
            recorded[piece.live.prompts[piece.rows], piece.live.start : piece.stop].flatten(0, 1)
            for piece in pieces
        ]
        groups = [piece.group(has_own_keys) for piece in pieces]
        edits: dict[str, Edit] = {self._cells.leaf: self._edit(layer, pieces)}
        for piece, out in zip(pieces, self._through(layer, streams, groups, edits), strict=True):
            live = piece.live
            assert piece.rows.start == live.n_joined
            stream = live.stream[piece.rows]
            stream.copy_(self._run.streams[layer + 1][live.prompts[piece.rows], live.start : live.stop])
            stream[:, : out.shape[1]] = out
            live.n_joined = piece.rows.stop

    def _through(
        self, layer: int, streams: "list[torch.Tensor]", groups: list[Group], edits: dict[str, Edit]
    ) -> "list[torch.Tensor]":
        """The stream out of a layer of each group [row, position, d_model]."""
        import torch

        stream = streams[0] if len(streams) == 1 else torch.cat(streams)
        out = self._run.layer(layer, stream, groups, edits)
        parts = torch.split(out, [group.n_tokens for group in groups])
        return [
            part.view(group.n_rows, group.n_positions, -1) for part, group in zip(parts, groups, strict=True)
        ]

    def _edit(self, layer: int, pieces: list[_Piece]) -> Edit:
        """The function that puts new values into the values of a hook over packed rows."""
        new, cells = self._cells.new(layer), self._cells

        def edit_pattern(value: "torch.Tensor", number: int, part: slice) -> None:
            piece = pieces[number]
            live, first = piece.live, piece.rows.start
            rows = slice(first + part.start, first + part.stop)
            row, position = self._edited(live, rows, piece.stop)
            prompts, numbers = live.prompts[rows][row], live.cells[rows][row]
            heads = slice(None) if cells.heads is None else cells.heads[numbers]
            sources = slice(0, value.shape[-1]) if cells.sources is None else cells.sources[numbers]
            changed = new[prompts, heads, position + live.start, sources]
            value[row, heads, position, sources] = changed.to(value.dtype)  # scores are float32 in any model

        def edit(value: "torch.Tensor", _number: int, _rows: slice) -> None:
            offset = 0
            for piece in pieces:
                live, rows = piece.live, piece.rows
                row, position = self._edited(live, rows, piece.stop)
                prompts, numbers = live.prompts[rows][row], live.cells[rows][row]
                tokens = offset + row * (piece.stop - live.start) + position
                if cells.heads is None:
                    value[tokens] = new[prompts, position + live.start]
                else:
                    heads = cells.heads[numbers]
                    value[tokens, heads] = new[prompts, position + live.start, heads]
                offset += piece.n_tokens

        return edit_pattern if cells.leaf in PATTERNS else edit

    def _measured(self, measuring: Measuring) -> "torch.Tensor":
        """The metric of all cells."""
        places: dict[int, list[tuple[_Live, int]]] = {}
        for live in self._live:
            for row, cell in enumerate(live.cells.tolist()):
                places.setdefault(cell, []).append((live, row))
        # Cells that change nothing have no rows, and exactly the metric of the recorded run.
        numbers = measuring.corrupted.repeat(self._part.stop - self._part.start, 1)
        moved = [cell for cell in range(self._part.start, self._part.stop) if cell in places]
        ends = (self._ends(places[cell]) for cell in moved)
        for cell, number in zip(moved, measuring.numbers(self._ends(places[_CONTROL]), ends), strict=True):
            numbers[cell - self._part.start] = number
        return numbers

    def _ends(self, places: "list[tuple[_Live, int]]") -> Ends:
        """Where the rows of one cell end."""
        import torch

        streams, prompts, seen = [], [], []
        for live, row in places:
            its_seen = [number for number, position in enumerate(self._positions) if position >= live.start]
            streams.append(live.stream[row, [self._positions[number] - live.start for number in its_seen]])
            prompts += [int(live.prompts[row])] * len(its_seen)
            seen += its_seen
        return Ends(torch.cat(streams), prompts, seen)


def _chunks(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces that go through a layer in one call, cut where they are too large."""
    if not pieces:
        return
    chunk: list[_Piece] = []
    n_at_once = tokens_at_once(pieces[0].live.stream.device)
    room = n_at_once
    for piece in pieces:
        n_positions = piece.stop - piece.live.start
        first = piece.rows.start
        while first < piece.rows.stop:
            n_rows = min(piece.rows.stop - first, max(1, room // n_positions))
            if chunk and n_rows * n_positions > room:
                yield chunk
                chunk, room = [], n_at_once
                continue
            chunk.append(_Piece(piece.live, slice(first, first + n_rows), piece.stop))
            first += n_rows
            room -= n_rows * n_positions
    if chunk:
        yield chunk
