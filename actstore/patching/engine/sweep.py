"""One sweep over the layers of a model for many cells: each joins at its layer, with the positions that it changes.

A cell changes nothing before its layer and its first position. So its rows begin there, with the residual stream of the
recorded run, and attend to the recorded keys and values of the positions before. Rows of all cells that are on the way
go through a layer together, as one batch of tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from actstore.hooks.packing.packed_run import Edit, Group, PackedRun
from actstore.patching.engine.bounds import LOGITS_BYTES, TOKENS_AT_ONCE
from actstore.patching.engine.cells import PATTERNS, Cells, reach
from actstore.patching.engine.metric import Metric, measured

if TYPE_CHECKING:
    import torch

_CONTROL: Final = -1
"""Number of the cell that changes nothing, which each wave computes beside the others."""


@dataclass(frozen=True)
class Swept:
    """What a sweep gives."""

    numbers: "torch.Tensor"
    """Metric of each cell, float64 [cell, 1] or [cell, prompt]."""
    controls: "torch.Tensor"
    """Metric of unpatched rows, computed in the same way, [wave, 1] or [wave, prompt]."""
    drift: float
    """Largest distance of unpatched rows out of the last layer from the recorded run, as a share of a norm."""
    n_tokens: int
    """Tokens that went through layers, all layers together."""


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
    metric: Metric,
    positions: Sequence[int],
    max_tokens: int,
) -> Iterator[tuple[slice, Swept]]:
    """Compute cells in waves of at most ``max_tokens`` tokens.

    Args:
        run: the corrupted run.
        cells: what to compute, in ascending order of layers.
        changed: whether a cell changes a prompt [cell, prompt]; other prompts keep their logits.
        metric: takes logits of ``positions`` [prompt, position, d_vocab].
        positions: positions that the metric sees.
        max_tokens: tokens on the way at once, at least those of one cell.

    Yields:
        (cells of the wave, what they give).
    """
    stop = max(positions) + 1
    costs = ((stop - cells.starts).clamp(min=0)[:, None] * changed).sum(1)
    for part in _waves(costs, max_tokens):
        yield part, _Wave(run, cells, changed, part, list(positions)).swept(metric)


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
        self._reach = reach(cells.leaf)
        self._n_tokens = 0
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

    def swept(self, metric: Metric) -> Swept:
        """Run all layers, and measure the cells."""
        n_layers = len(self._run.streams) - 1
        for layer in range(self._first_layer, n_layers):
            pieces = [piece for live in self._live for piece in self._joined_before(live, layer)]
            for chunk in _chunks([_Piece(live, slice(0, live.n_joined), live.stop) for live in self._live]):
                self._advance(layer, chunk)
            for chunk in _chunks(pieces):
                self._enter(layer, chunk)
        return self._measured(metric)

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
            self._n_tokens += sum(group.n_rows for group in groups)
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
        self._n_tokens += len(stream)
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

    def _measured(self, metric: Metric) -> Swept:
        """Logits and metric of all cells."""
        places: dict[int, list[tuple[_Live, int]]] = {}
        for live in self._live:
            for row, cell in enumerate(live.cells.tolist()):
                places.setdefault(cell, []).append((live, row))
        recorded = self._run.logits[:, self._positions]
        n_cells = max(1, LOGITS_BYTES // (recorded.numel() * recorded.element_size()))
        base = measured(metric, recorded.clone(), is_in_turn=True)  # a metric may change its logits
        part = range(self._part.start, self._part.stop)
        numbers = base.repeat(len(part), 1)
        controls = base
        # Cells that change nothing have no rows, and exactly the metric of the recorded run.
        moved = [_CONTROL, *(cell for cell in part if cell in places)]
        for first in range(0, len(moved), n_cells):
            chunk = moved[first : first + n_cells]
            logits = self._logits([places[cell] for cell in chunk], recorded)
            for cell, its_logits in zip(chunk, logits, strict=True):
                value = measured(metric, its_logits, is_in_turn=True)
                if cell == _CONTROL:
                    controls = value
                else:
                    numbers[cell - self._part.start] = value
        return Swept(numbers, controls, self._drift(places[_CONTROL]), self._n_tokens)

    def _logits(self, places: "list[list[tuple[_Live, int]]]", recorded: "torch.Tensor") -> "torch.Tensor":
        """Logits of cells [cell, prompt, position, d_vocab]; ``places`` has the rows of each cell."""
        import torch

        streams, cells, prompts, seen = [], [], [], []
        for cell, rows in enumerate(places):
            for live, row in rows:
                positions = [
                    (index, position - live.start)
                    for index, position in enumerate(self._positions)
                    if position >= live.start
                ]
                streams.append(live.stream[row, [offset for _, offset in positions]])
                cells += [cell] * len(positions)
                prompts += [int(live.prompts[row])] * len(positions)
                seen += [index for index, _ in positions]
        stream = torch.cat(streams)
        if len(stream) == len(places) * recorded.shape[0] * recorded.shape[1]:
            logits = recorded.new_empty(len(places), *recorded.shape)
        else:
            logits = recorded.expand(len(places), *recorded.shape).clone()
        logits[cells, prompts, seen] = self._run.head(stream)
        return logits

    def _drift(self, places: "list[tuple[_Live, int]]") -> float:
        """How far unpatched rows have come from the recorded run, as the largest share of a norm."""
        shares = []
        for live, row in places:
            seen = [position for position in self._positions if position >= live.start]
            recorded = self._run.streams[-1][int(live.prompts[row]), seen].float()
            difference = live.stream[row, [position - live.start for position in seen]].float() - recorded
            shares.append((difference.norm(dim=-1) / recorded.norm(dim=-1)).max())
        return float(max(shares))


def _chunks(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces that go through a layer in one call, cut where they are too large."""
    chunk: list[_Piece] = []
    room = TOKENS_AT_ONCE
    for piece in pieces:
        n_positions = piece.stop - piece.live.start
        first = piece.rows.start
        while first < piece.rows.stop:
            n_rows = min(piece.rows.stop - first, max(1, room // n_positions))
            if chunk and n_rows * n_positions > room:
                yield chunk
                chunk, room = [], TOKENS_AT_ONCE
                continue
            chunk.append(_Piece(piece.live, slice(first, first + n_rows), piece.stop))
            first += n_rows
            room -= n_rows * n_positions
    if chunk:
        yield chunk
