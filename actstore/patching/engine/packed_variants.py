"""Variants as packed rows: each joins at its first edit, and later edits are made on the way."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actstore.hooks.packing.packed_run import Edit, Group, PackedRun
from actstore.patching.engine.bounds import tokens_at_once
from actstore.patching.engine.measuring import Ends, Measuring

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class VariantEdit:
    """One value that a variant replaces, at all positions."""

    layer: int
    leaf: str
    """The hook, such as ``attn.hook_q``: one within a layer, not an attention pattern."""
    head: int | None
    """The head whose value is replaced; None for the whole value."""
    start: int
    """First position whose value is replaced."""
    value: "torch.Tensor"
    """What is put in [prompt, position from ``start`` on, ...], without an axis of heads if there is a head."""

    def put(self, rows: "torch.Tensor", first: int) -> None:
        """Edit values [prompt, position, ...], which begin at a position up to ``start``, in place.

        Args:
            rows: the values.
            first: their first position.
        """
        edited = rows[:, self.start - first :]
        n_positions = min(edited.shape[1], self.value.shape[1])
        edited = edited[:, :n_positions]
        if self.head is not None:
            edited = edited[:, :, self.head]
        edited.copy_(self.value[:, :n_positions])


def packed_variants(
    run: PackedRun,
    edits: Sequence[Sequence[VariantEdit]],
    numbers: Sequence[int],
    measuring: Measuring,
    max_tokens: int,
) -> "Iterator[tuple[list[int], torch.Tensor]]":
    """Compute variants in waves of at most ``max_tokens`` tokens.

    Args:
        run: the corrupted run.
        edits: the edits of every variant.
        numbers: the variants to compute; each has an edit.
        measuring: takes the metric of variants.
        max_tokens: tokens on the way at once, at least those of one variant.

    Yields:
        (variants of the wave, their metric, float64 [variant, 1] or [variant, prompt]).

    Raises:
        ModelError: unpatched rows have not ended where the recorded run did.
    """
    if not numbers:
        return
    stop = max(measuring.positions) + 1
    # All rows begin at one position: where prompts differ, paths differ.
    start = min(edit.start for number in numbers for edit in edits[number])
    ordered = sorted(numbers, key=lambda number: _first_layer(edits[number]))
    n_at_once = max(1, max_tokens // (len(run.streams[0]) * (stop - start)))
    for first in range(0, len(ordered), n_at_once):
        part = ordered[first : first + n_at_once]
        wave = _Wave(run, [edits[number] for number in part], start, measuring.positions)
        yield part, wave.swept(measuring)


def _first_layer(edits: Sequence[VariantEdit]) -> int:
    return min(edit.layer for edit in edits)


class _Wave:
    """Variants that go through the layers together. The first one is the corrupted run itself."""

    def __init__(
        self, run: PackedRun, edits: Sequence[Sequence[VariantEdit]], start: int, positions: list[int]
    ) -> None:
        self._run = run
        self._edits: list[Sequence[VariantEdit]] = [(), *edits]
        self._start = start
        self._positions = positions
        self._n_prompts = len(run.streams[0])
        first = _first_layer(edits[0])
        self._first_layers = [first, *(_first_layer(its) for its in edits)]
        n_positions = max(positions) + 1 - start
        self._stream = run.streams[0].new_empty(
            len(self._edits), self._n_prompts, n_positions, run.streams[0].shape[-1]
        )
        """Residual stream of each variant [variant, prompt, position, d_model]."""

    def swept(self, measuring: Measuring) -> "torch.Tensor":
        """Run all layers, and measure the variants [variant, 1] or [variant, prompt]."""
        import torch

        n_layers = len(self._run.streams) - 1
        stop = self._start + self._stream.shape[2]
        n_at_once = max(1, tokens_at_once(self._stream.device) // self._stream[0, ..., 0].numel())
        n_joined = 0
        for layer in range(self._first_layers[0], n_layers):
            n_before = n_joined
            while n_joined < len(self._edits) and self._first_layers[n_joined] <= layer:
                n_joined += 1
            self._stream[n_before:n_joined] = self._run.streams[layer][:, self._start : stop]
            for first in range(0, n_joined, n_at_once):
                self._advance(layer, slice(first, min(first + n_at_once, n_joined)))
        unpatched, *ends = map(self._ends, self._stream)
        return torch.stack(list(measuring.numbers(unpatched, ends)))

    def _advance(self, layer: int, part: slice) -> None:
        """Run a layer over some of the variants."""
        import torch

        stream = self._stream[part]
        n_variants, _, n_positions, _ = stream.shape
        prompts = torch.arange(self._n_prompts).repeat(n_variants)
        groups = [Group(prompts, self._start, self._start + n_positions, has_own_keys=True)]
        edits = self._edits_at(layer, part)
        tokens = stream.flatten(0, 2)
        if layer == len(self._run.streams) - 2 and len(self._positions) == 1 and not edits:
            # Nobody looks at the other positions behind the last layer.
            ends = self._run.layer_at_end(layer, tokens, groups)
            stream[:, :, -1] = ends.view(n_variants, self._n_prompts, -1)
            return
        stream.copy_(self._run.layer(layer, tokens, groups, edits).view(stream.shape))

    def _edits_at(self, layer: int, part: slice) -> Mapping[str, Edit]:
        """Functions that make the edits of these variants in a layer, by leaf."""
        by_leaf: dict[str, list[tuple[int, VariantEdit]]] = {}
        for index, its in enumerate(self._edits[part]):
            for edit in its:
                if edit.layer == layer:
                    by_leaf.setdefault(edit.leaf, []).append((index, edit))

        def edit_of(numbered: list[tuple[int, VariantEdit]]) -> Edit:
            def put_all(value: "torch.Tensor", _number: int, _rows: slice) -> None:
                rows = value.view(-1, self._n_prompts, self._stream.shape[2], *value.shape[1:])
                for index, edit in numbered:
                    edit.put(rows[index], self._start)

            return put_all

        return {leaf: edit_of(numbered) for leaf, numbered in by_leaf.items()}

    def _ends(self, stream: "torch.Tensor") -> Ends:
        """Where one variant ends, whose stream is [prompt, position, d_model]."""
        seen = [number for number, position in enumerate(self._positions) if position >= self._start]
        offsets = [self._positions[number] - self._start for number in seen]
        prompts = [prompt for prompt in range(self._n_prompts) for _ in seen]
        return Ends(stream[:, offsets].flatten(0, 1), prompts, seen * self._n_prompts)
