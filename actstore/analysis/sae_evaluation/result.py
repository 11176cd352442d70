"""The figures of all SAEs of an evaluation, as tables and as a picture."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from actstore.analysis.sae_evaluation.figures import SaeFigures
from actstore.analysis.sae_evaluation.picture import picture
from actstore.analysis.sae_evaluation.table import html_table, text_table
from actstore.errors import JobError, MissingExtraError

if TYPE_CHECKING:
    import pandas

_KEY: Final = b"actstore.sae_evaluation"
_ABOUT: Final = ("hook", "n_rows", "n_not_finite", "store_url")
_COUNTS: Final = ("n_samples", "d_sae", "n_rows", "n_dead", "n_dense", "n_tokens")


@dataclass(frozen=True, eq=False, repr=False)
class SaeEvaluation:
    """How good some SAEs are on the same rows. It is a sequence of `SaeFigures`, in the order in which SAEs were given,
    and gives those of a name, too.
    """

    hook: str
    saes: tuple[SaeFigures, ...]
    n_rows: int
    """Rows that each SAE was measured on."""
    n_not_finite: int
    """Rows with NaN or infinity, which were left out; those that are not held out are counted, too."""
    store_url: str
    seconds: float
    """Time that it took."""

    def __len__(self) -> int:
        return len(self.saes)

    def __iter__(self) -> Iterator[SaeFigures]:
        return iter(self.saes)

    def __getitem__(self, which: int | str) -> SaeFigures:
        """The figures of an SAE, by its place or its name.

        Raises:
            IndexError: there is no such place.
            JobError: there is no such name.
        """
        if isinstance(which, int):
            return self.saes[which]
        for one in self.saes:
            if one.name == which:
                return one
        raise JobError(f"no SAE has the name {which}; there are {', '.join(one.name for one in self.saes)}")

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON takes it: figures that are not finite are None, and dead features are listed."""
        about = {name: getattr(self, name) for name in (*_ABOUT, "seconds")}
        return about | {
            "saes": [
                {name: _plain(value) for name, value in one.to_dict().items()}
                | {"dead_features": one.dead_features.tolist()}
                for one in self.saes
            ]
        }

    def to_pandas(self) -> "pandas.DataFrame":
        """One row an SAE: the figures of `SaeFigures.to_dict`.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise MissingExtraError("a table of pandas needs pandas: pip install pandas") from error
        return pd.DataFrame([one.to_dict() for one in self.saes])

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write one row an SAE: the figures of `SaeFigures.to_dict`, and as lists ``dead_features``, ``dense_features``
        and ``density`` (of every feature).
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        records = [one.to_dict() for one in self.saes]
        columns: dict[str, Any] = {name: [record[name] for record in records] for name in records[0]}
        types: dict[str, Any] = {"name": pa.string()} | {name: pa.int64() for name in _COUNTS}
        table: dict[str, Any] = {
            name: pa.array(values, types.get(name, pa.float64())) for name, values in columns.items()
        }
        for name in ("dead_features", "dense_features"):
            table[name] = pa.array([getattr(one, name) for one in self.saes], pa.list_(pa.int32()))
        table["density"] = pa.array([one.density for one in self.saes], pa.list_(pa.float64()))
        about = {name: getattr(self, name) for name in _ABOUT}
        written = pa.table(table).replace_schema_metadata({_KEY: json.dumps(about).encode()})
        pq.write_table(written, Path(path))

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw explained variance over training where all SAEs are checkpoints of it, and against L0 otherwise. It is
        written as PNG if there is a path.

        Returns:
            The figure of matplotlib.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return picture(self.hook, self.saes, None if path is None else Path(path))

    def __repr__(self) -> str:
        return f"{self._title}\n{text_table(self.saes)}"

    def _repr_html_(self) -> str:
        return html_table(self._title, self.saes)

    @property
    def _title(self) -> str:
        left_out = f", {self.n_not_finite:,} more not finite" if self.n_not_finite else ""
        return f"SAEs of {self.hook}, {self.n_rows:,} rows{left_out}"


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
