"""Cells computed as whole rows: a full forward over every prompt for each cell. Slow, and right for any model."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from actstore.hooks.capture.hook_point import HookPoint
from actstore.hooks.model import HookedModel
from actstore.hooks.naming.names import join
from actstore.patching.engine.bounds import tokens_of_forward
from actstore.patching.engine.cells import PATTERNS, Cells
from actstore.patching.engine.metric import Metric, measured

if TYPE_CHECKING:
    import torch


def whole_rows(
    model: HookedModel,
    tokens: "torch.Tensor",
    cells: Cells,
    metric: Metric,
    positions: Sequence[int],
    max_tokens: int,
) -> Iterator[tuple[slice, "torch.Tensor"]]:
    """Compute cells, several in one forward where they are of one layer and memory allows it.

    Args:
        model: the model; functions on its hooks are called.
        tokens: corrupted prompts [prompt, position].
        cells: what to compute, in ascending order of layers.
        metric: takes logits of ``positions`` [prompt, position, d_vocab].
        positions: positions that the metric sees.
        max_tokens: tokens on the way at once, which bound those of one forward; at least those of one cell.

    Yields:
        (cells, their metric [cell, 1] or [cell, prompt]).
    """
    import torch

    n_at_once = max(1, tokens_of_forward(model, max_tokens) // tokens.numel())
    layers = cells.layers.tolist()
    first = 0
    while first < len(layers):
        last = first + 1
        while last < len(layers) and last - first < n_at_once and layers[last] == layers[first]:
            last += 1
        part = slice(first, last)
        logits = model.run_with_hooks(
            tokens.repeat(last - first, 1),
            fwd_hooks=[(join(layers[first], cells.leaf), _Edit(cells, part, len(tokens)))],
        )[:, list(positions)]
        by_cell = logits.view(last - first, len(tokens), *logits.shape[1:])
        yield part, torch.stack([measured(metric, its_logits) for its_logits in by_cell])
        first = last


class _Edit:
    """The function on the hook of one layer, over the rows of some of its cells."""

    def __init__(self, cells: Cells, part: slice, n_prompts: int) -> None:
        self._cells = cells
        self._part = part
        self._n_prompts = n_prompts

    def __call__(self, value: "torch.Tensor", /, *, hook: HookPoint) -> None:
        cells, part = self._cells, self._part
        new = cells.new(hook.layer())
        for index, cell in enumerate(range(part.start, part.stop)):
            rows = slice(index * self._n_prompts, (index + 1) * self._n_prompts)
            head = slice(None) if cells.heads is None else int(cells.heads[cell])
            positions = slice(int(cells.starts[cell]), int(cells.stops[cell]))
            if cells.leaf in PATTERNS:
                source = slice(None) if cells.sources is None else int(cells.sources[cell])
                value[rows, head, positions, source] = new[:, head, positions, source]
            elif cells.heads is None:
                value[rows, positions] = new[:, positions]
            else:
                value[rows, positions, head] = new[:, positions, head]
