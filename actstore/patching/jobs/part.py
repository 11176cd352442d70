"""Computing one part, the same bytes wherever and whenever it is done.

Pairs of one length are patched together, in batches that follow from the lengths in the part alone.
"""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.hooks.model import HookedModel
from actstore.patching.grid import grid
from actstore.patching.jobs.metrics import metric_of
from actstore.patching.jobs.pairs import Pairs
from actstore.patching.jobs.plan import PatchPlan

_BATCH: Final = 16
"""The most pairs that are patched together; more are no faster."""
_BATCH_TOKENS: Final = 2048
"""The most tokens of the corrupted prompts of a batch of several pairs: their values in all layers are in memory."""
FIGURES: Final = b"actstore.patching"
"""Key of the metadata of the table of a part with its `Figures`."""


@dataclass
class Figures:
    """What is known of a part besides its numbers."""

    engines: Counter[str] = field(default_factory=Counter)
    """Pairs that each engine has computed; see `PatchResult.engine`."""
    noise_floor: float = 0.0
    """The largest of its batches; see `PatchResult.noise_floor`."""
    n_skipped: int = 0
    """Cells that change nothing in any pair of their batch, and were not run; those of a batch of pairs count once
    for each pair.
    """

    def to_bytes(self) -> bytes:
        return json.dumps(vars(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Figures":
        fields = json.loads(data)
        return cls(**fields | {"engines": Counter(fields["engines"])})


@dataclass(frozen=True)
class _Grid:
    """The results of one pair."""

    values: NDArray[np.float32]
    """Metric of each cell, with the axes of the grid."""
    clean: float
    corrupted: float


def batches(numbers: Sequence[int], lengths: NDArray[np.int64]) -> Iterator[list[int]]:
    """Groups of pairs of one length, shorter ones first, each in the order of the pairs.

    Args:
        numbers: the pairs of a part.
        lengths: tokens of each pair of the job [pair].
    """
    for length in sorted({int(lengths[pair]) for pair in numbers}):
        same = [pair for pair in numbers if lengths[pair] == length]
        size = max(1, min(_BATCH, _BATCH_TOKENS // length))
        yield from (same[start : start + size] for start in range(0, len(same), size))


def compute_part(
    model: HookedModel, plan: PatchPlan, pairs: Pairs, index: int, check: Callable[[], None]
) -> bytes:
    """Compute the table of one part.

    Args:
        model: the model of the plan.
        plan: the plan.
        pairs: all pairs of the plan.
        index: number of the part.
        check: called now and then; it may raise to end the work.

    Returns:
        The bytes of a Parquet file: one line for each cell of each pair, in order, the last axis fastest.
    """
    numbers = plan.part(index)
    grids: dict[int, _Grid] = {}
    figures = Figures()
    for batch in batches(numbers, pairs.lengths):
        grids |= patched(model, plan, pairs, batch, figures, check)
    return _table(plan, [(pair, grids[pair]) for pair in numbers], figures)


def patched(
    model: HookedModel,
    plan: PatchPlan,
    pairs: Pairs,
    batch: Sequence[int],
    figures: Figures,
    check: Callable[[], None],
) -> dict[int, _Grid]:
    """Patch pairs of one length together, and add up their figures."""
    import torch

    clean, corrupted = (
        torch.from_numpy(np.stack(rows)).long().to(model.device)
        for rows in zip(*map(pairs.prompts, batch), strict=True)
    )
    answers, wrong = (torch.from_numpy(ids[list(batch)]).long() for ids in (pairs.answers, pairs.wrong))
    result = grid(
        model,
        corrupted,
        clean,
        metric_of(plan.metric, answers, wrong),
        plan.hook,
        plan.axes,
        positions=plan.positions,
        max_tokens=plan.max_tokens,
        progress=lambda _done, _total: check(),
    )
    figures.engines[result.engine] += len(batch)
    figures.noise_floor = max(figures.noise_floor, result.noise_floor)
    figures.n_skipped += result.n_skipped * len(batch)
    assert result.clean is not None
    # A single pair has no axis of prompts.
    values = result.values.view(len(batch), *result.values.shape[-len(plan.axes) :]).cpu().numpy()
    metrics = [numbers.reshape(-1).tolist() for numbers in (result.clean, result.corrupted)]
    return {pair: _Grid(*numbers) for pair, *numbers in zip(batch, values, *metrics, strict=True)}


def _table(plan: PatchPlan, grids: Sequence[tuple[int, _Grid]], figures: Figures) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sizes = [grid.values.size for _, grid in grids]
    indices = [np.indices(grid.values.shape, np.int32).reshape(len(plan.axes), -1) for _, grid in grids]

    def repeated(numbers: Sequence[float], dtype: Any) -> NDArray[Any]:
        """A number of each pair, for each of its cells."""
        return np.repeat(np.array(numbers, dtype), sizes)

    value = np.concatenate([grid.values.reshape(-1) for _, grid in grids])
    clean = repeated([grid.clean for _, grid in grids], np.float32)
    corrupted = repeated([grid.corrupted for _, grid in grids], np.float32)
    whole = clean - corrupted
    effect = np.divide(value - corrupted, whole, out=np.zeros_like(value), where=whole != 0)
    table = pa.table(
        {"pair": repeated([pair for pair, _ in grids], np.int32)}
        | dict(zip(plan.axes, np.concatenate(indices, axis=1), strict=True))
        | {
            "value": value,
            "effect": pa.array(effect, mask=whole == 0),
            "clean": clean,
            "corrupted": corrupted,
        }
    ).replace_schema_metadata({FIGURES: figures.to_bytes()})
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="zstd")
    return stream.getvalue()
