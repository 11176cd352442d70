"""The mean over pairs, cell by cell: a result like that of one grid, which can be drawn."""

import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import MissingExtraError, StorageError
from actstore.hooks.text.prompts import Prompts
from actstore.patching.axes import POSITIONS, sizes_of
from actstore.patching.jobs.part import FIGURES, Figures
from actstore.patching.jobs.plan import part_key
from actstore.patching.jobs.planning import PlannedPatching, tokenizer_of
from actstore.patching.results.panels import Axis
from actstore.patching.results.result import PatchResult
from actstore.reason import reason

_SUFFIXES: Final = (".parquet", ".html", ".png")


@dataclass
class _Sum:
    """Sums over the pairs whose grids have one shape."""

    values: NDArray[np.float64]
    clean: float = 0.0
    corrupted: float = 0.0
    n_pairs: int = 0
    tokens: NDArray[np.int32] | None = None
    """Token that all corrupted prompts have at a position, or -1 [position]; for grids with an axis of positions."""

    def add_prompt(self, ids: NDArray[np.int32]) -> None:
        """Compare a corrupted prompt [position] with those before it."""
        self.tokens = ids if self.tokens is None else np.where(self.tokens == ids, ids, -1)


@dataclass
class Summary:
    """What all parts say together."""

    figures: Figures = field(default_factory=Figures)
    clean: float = 0.0
    """Mean metric of the clean runs."""
    corrupted: float = 0.0
    """Mean metric of the corrupted runs."""
    means: dict[str, tuple[PatchResult, int]] = field(default_factory=dict)
    """Mean grids and the number of their pairs, by the name of their files without suffix: ``summary``, or for each
    length of prompts ``summary-9``, since positions of prompts of other lengths do not mean the same.
    """


def summed_up(planned: PlannedPatching) -> Summary:
    """Read all parts.

    Raises:
        StorageError: a part is gone, or is damaged.
    """
    plan, lengths = planned.plan, planned.pairs.lengths.tolist()
    has_positions = bool({*POSITIONS, "src_pos"} & set(plan.axes))
    shapes = [tuple(sizes_of(planned.cfg, plan.hook, plan.axes, length)) for length in lengths]
    sums = {shape: _Sum(np.zeros(shape)) for shape in shapes}
    summary = Summary()
    for index in range(plan.n_parts):
        columns, figures = _read_part(planned, index)
        summary.figures.engines += figures.engines
        summary.figures.noise_floor = max(summary.figures.noise_floor, figures.noise_floor)
        summary.figures.n_skipped += figures.n_skipped
        start = 0
        for pair in plan.part(index):
            total = sums[shapes[pair]]
            stop = start + total.values.size
            total.values += columns["value"][start:stop].reshape(shapes[pair])
            total.clean += float(columns["clean"][start])
            total.corrupted += float(columns["corrupted"][start])
            total.n_pairs += 1
            if has_positions:
                total.add_prompt(planned.pairs.prompts(pair)[1])
            start = stop
    summary.clean = sum(total.clean for total in sums.values()) / plan.n_pairs
    summary.corrupted = sum(total.corrupted for total in sums.values()) / plan.n_pairs
    tokenizer = tokenizer_of(planned.job) if has_positions else ""
    length_of = dict(zip(shapes, lengths, strict=True))
    for shape, total in sorted(sums.items()):
        name = "summary" if len(sums) == 1 else f"summary-{length_of[shape]}"
        positions = _positions(total.tokens, tokenizer)
        summary.means[name] = (_mean(planned, summary.figures, shape, total, positions), total.n_pairs)
    return summary


def files_of(result: PatchResult) -> Iterator[tuple[str, bytes]]:
    """The files of a mean, by suffix: a table, a page, and a picture if matplotlib is installed."""
    with tempfile.TemporaryDirectory() as folder:
        for suffix in _SUFFIXES:
            path = Path(folder, f"mean{suffix}")
            try:
                result.save(path)
            except MissingExtraError:
                continue
            yield suffix, path.read_bytes()


def _positions(tokens: NDArray[np.int32] | None, tokenizer: Prompts | str) -> tuple[str, ...]:
    """The label of each position: its number, and the token there if it is known and the same in all prompts."""
    if tokens is None:
        return ()
    if isinstance(tokenizer, str):
        return tuple(map(str, range(len(tokens))))
    return tuple(
        str(position) if token < 0 else f"{position}: {tokenizer.to_str_tokens([token])[0]}"
        for position, token in enumerate(tokens.tolist())
    )


def _mean(
    planned: PlannedPatching,
    figures: Figures,
    shape: tuple[int, ...],
    total: _Sum,
    positions: tuple[str, ...],
) -> PatchResult:
    import torch

    plan = planned.plan

    def labels(name: str, size: int) -> tuple[str, ...]:
        return positions if name in (*POSITIONS, "src_pos") else tuple(map(str, range(size)))

    return PatchResult(
        values=torch.from_numpy((total.values / total.n_pairs).astype(np.float32)),
        axes=tuple(Axis(name, labels(name, size)) for name, size in zip(plan.axes, shape, strict=True)),
        hook=plan.hook,
        model_name=plan.model.name,
        corrupted=torch.tensor(total.corrupted / total.n_pairs),
        clean=torch.tensor(total.clean / total.n_pairs),
        engine=max(figures.engines, key=lambda engine: figures.engines[engine]),
        noise_floor=figures.noise_floor,
        n_skipped=figures.n_skipped,
        seconds=None,
    )


def _read_part(planned: PlannedPatching, index: int) -> tuple[dict[str, NDArray[Any]], Figures]:
    """The columns of a part that a mean needs, and its figures."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    plan, blobs = planned.plan, planned.blobs
    where = f"{blobs.url}/{part_key(index)}"
    n_cells = sum(planned.cells_of(int(planned.pairs.lengths[pair])) for pair in plan.part(index))
    try:
        table: pa.Table = pq.read_table(
            io.BytesIO(bytes(blobs.read(part_key(index)))), columns=["value", "clean", "corrupted"]
        )
        figures = Figures.from_bytes((table.schema.metadata or {})[FIGURES])
        if len(table) != n_cells:
            raise ValueError(f"it has {len(table)} lines, and {n_cells} are expected")
    except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{where} is damaged: {reason(error)}; delete it, and run the same command again"
        ) from error
    return {name: table[name].to_numpy() for name in table.column_names}, figures
