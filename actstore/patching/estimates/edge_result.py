"""Scores of edges with the names of their ends."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from actstore.errors import PatchError
from actstore.reason import reason

if TYPE_CHECKING:
    import torch

_KEY: Final = b"actstore.patching.edges"
_PLAIN: Final = ("upstream", "downstream", "model_name", "corrupted", "clean", "seconds")


class Edge(NamedTuple):
    """One edge."""

    upstream: str
    """The part that writes: ``input``, ``a3.h0`` (a head), ``m3`` (an MLP)."""
    downstream: str
    """The part that reads: ``a5.h1<q>``, ``a5.kv0<k>`` (keys of query heads that share them), ``m5``, ``logits``."""
    score: float
    """What the metric would gain, to first order, if the reader saw the clean value of the writer."""


@dataclass(frozen=True)
class EdgeScores:
    """The score of every edge, as a matrix with labels."""

    scores: "torch.Tensor"
    """float32 [upstream, downstream]; NaN where there is no edge."""
    upstream: tuple[str, ...]
    """The parts that write; see `Edge`."""
    downstream: tuple[str, ...]
    """The parts that read; see `Edge`."""
    model_name: str
    corrupted: float
    """Metric of the corrupted run, its mean over prompts."""
    clean: float | None
    """Metric of the clean run; None where the clean side was a cache without the last stream."""
    seconds: float

    @property
    def is_edge(self) -> "torch.Tensor":
        """Whether there is an edge, bool [upstream, downstream]."""
        return ~self.scores.isnan()

    def top(self, n: int) -> list[Edge]:
        """The ``n`` edges with the largest scores of either sign, largest first."""
        sizes = self.scores.abs().nan_to_num(nan=-1.0).flatten()
        order = sizes.argsort(descending=True, stable=True)[: min(n, int(self.is_edge.sum()))]
        edges = []
        for flat in order.tolist():
            row, column = divmod(flat, len(self.downstream))
            edges.append(Edge(self.upstream[row], self.downstream[column], float(self.scores[row, column])))
        return edges

    def __getitem__(self, edge: tuple[str, str]) -> float:
        """The score of one edge by the names of its ends.

        Raises:
            PatchError: there is no such edge.
        """
        upstream, downstream = edge
        if upstream in self.upstream and downstream in self.downstream:
            score = self.scores[self.upstream.index(upstream), self.downstream.index(downstream)]
            if not bool(score.isnan()):
                return float(score)
        raise PatchError(
            f"there is no edge from {upstream!r} to {downstream!r}; `upstream` and `downstream` have the names, and "
            "edges lead to what is computed later"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a Parquet file with a line for each edge: ``upstream``, ``downstream``, ``score``.

        Raises:
            PatchError: the suffix is not ``.parquet``.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = Path(path)
        if file.suffix != ".parquet":
            raise PatchError(f"{file.name} ends with {file.suffix or 'no suffix'!r}; choose .parquet")
        rows, columns = self.is_edge.nonzero(as_tuple=True)
        table = pa.table(
            {
                "upstream": pa.DictionaryArray.from_arrays(
                    pa.array(rows.numpy(), pa.int32()), pa.array(self.upstream, pa.string())
                ),
                "downstream": pa.DictionaryArray.from_arrays(
                    pa.array(columns.numpy(), pa.int32()), pa.array(self.downstream, pa.string())
                ),
                "score": self.scores[rows, columns].numpy(),
            }
        )
        document = {name: getattr(self, name) for name in _PLAIN}
        pq.write_table(table.replace_schema_metadata({_KEY: json.dumps(document).encode()}), file)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            PatchError: the file is not such a table.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq
        import torch

        try:
            table = pq.read_table(Path(path))
        except (OSError, pa.ArrowInvalid) as error:
            raise PatchError(f"{path} cannot be read as Parquet: {reason(error)}") from error
        metadata = (table.schema.metadata or {}).get(_KEY)
        if metadata is None:
            raise PatchError(f"{path} holds no scores of edges; write them with EdgeScores.save")
        try:
            document = json.loads(metadata)
            names = {name: tuple(map(str, document[name])) for name in ("upstream", "downstream")}
            places = [[names[name].index(value) for value in table[name].to_pylist()] for name in names]
            scores = torch.full((len(names["upstream"]), len(names["downstream"])), float("nan"))
            scores[places[0], places[1]] = torch.tensor(table["score"].to_pylist(), dtype=torch.float32)
            return cls(scores=scores, **{name: document[name] for name in _PLAIN} | names)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise PatchError(f"{path} is damaged as a table of edges: {reason(error)}") from error

    def __repr__(self) -> str:
        return (
            f"<EdgeScores of {self.model_name}: {int(self.is_edge.sum())} edges from {len(self.upstream)} parts that "
            f"write to {len(self.downstream)} that read, {self.seconds:.2f} s>"
        )
