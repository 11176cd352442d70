"""The metric of cells that went through all layers, from logits of some cells at a time."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

from actstore.hooks.packing.exactness import check_drift
from actstore.hooks.packing.packed_run import PackedRun
from actstore.patching.engine.bounds import logits_at_once
from actstore.patching.engine.metric import Metric, measured

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Ends:
    """Where the rows of a cell end: residual streams out of the last layer, at positions that the metric sees."""

    stream: "torch.Tensor"
    """[row, d_model]"""
    prompts: Sequence[int]
    """The prompt of each row [row]."""
    seen: Sequence[int]
    """The number of its position among those that the metric sees [row]."""


class Measuring:
    """A metric of variants of a recorded run, and what the recorded run itself has."""

    def __init__(self, run: PackedRun, metric: Metric, positions: Sequence[int], max_tokens: int) -> None:
        """
        Args:
            run: the corrupted run.
            metric: takes logits of ``positions`` [prompt, position, d_vocab], which it may change.
            positions: positions that the metric sees.
            max_tokens: tokens on the way at once; logits of cells take no more memory than these, or that of one cell.

        Raises:
            PatchError: the metric gives something else than numbers.
        """
        self._run = run
        self._metric = metric
        self.positions = list(positions)
        first, last = self.positions[0], self.positions[-1]
        is_range = self.positions == list(range(first, last + 1))
        self._recorded = run.logits[:, first : last + 1] if is_range else run.logits[:, self.positions]
        self._n_rows = logits_at_once(run.streams[0], run.logits.shape[-1], max_tokens)
        """Rows of the head at once."""
        self.corrupted = measured(metric, self._recorded.clone(), is_in_turn=True)
        """Metric of the corrupted run, float64 [1] or [prompt]."""
        self.noise_floor = 0.0
        """Largest difference of the metric of unpatched rows from that of the corrupted run."""

    def numbers(self, unpatched: Ends, cells: Iterable[Ends]) -> "Iterator[torch.Tensor]":
        """The metric of each cell, float64 [1] or [prompt].

        Args:
            unpatched: rows that no cell has changed, which are measured beside the others.
            cells: those that changed something; each is asked for when its logits are made.

        Raises:
            ModelError: unpatched rows have not ended where the recorded run did.
        """
        self._check(unpatched)
        every = chain([unpatched], cells)
        n_at_once = max(1, self._n_rows // self._recorded[..., 0].numel())
        is_cell = False
        while part := list(islice(every, n_at_once)):
            for number in self._of(part):
                if is_cell:
                    yield number
                else:
                    self.noise_floor = max(self.noise_floor, float((number - self.corrupted).abs().max()))
                is_cell = True

    def _of(self, cells: Sequence[Ends]) -> "list[torch.Tensor]":
        """The metric of cells whose logits are in memory together, until this returns."""
        return [measured(self._metric, logits, is_in_turn=True) for logits in self._logits(cells)]

    def _logits(self, cells: Sequence[Ends]) -> "torch.Tensor":
        """Logits of cells [cell, prompt, position, d_vocab]."""
        import torch

        n_prompts, n_seen, d_vocab = self._recorded.shape
        places = torch.tensor(
            [
                (cell * n_prompts + prompt) * n_seen + seen
                for cell, ends in enumerate(cells)
                for prompt, seen in zip(ends.prompts, ends.seen, strict=True)
            ]
        )
        stream = torch.cat([ends.stream for ends in cells])
        n_logits = len(cells) * n_prompts * n_seen
        is_every = len(stream) == n_logits
        if is_every and n_logits <= self._n_rows and torch.equal(places, torch.arange(n_logits)):
            return self._run.head(stream).view(len(cells), *self._recorded.shape)
        logits = self._recorded.new_empty(len(cells), *self._recorded.shape)
        if not is_every:
            logits.copy_(self._recorded)  # what a cell does not change has the logits of the recorded run
        rows = logits.view(n_logits, d_vocab)
        for first in range(0, len(stream), self._n_rows):
            part = slice(first, first + self._n_rows)
            rows[places[part].to(rows.device)] = self._run.head(stream[part])
        return logits

    def _check(self, unpatched: Ends) -> None:
        """Check how far unpatched rows have come from the recorded run, as the largest share of a norm."""
        positions = [self.positions[seen] for seen in unpatched.seen]
        recorded = self._run.streams[-1][list(unpatched.prompts), positions].float()
        shares = (unpatched.stream.float() - recorded).norm(dim=-1) / recorded.norm(dim=-1)
        check_drift(self._run, float(shares.max()))
