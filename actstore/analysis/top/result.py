"""Rows of each feature, as `actstore.analysis.top_activations` finds them."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from actstore.analysis.text import str_tokens_of
from actstore.analysis.top.contexts import Context, check_window
from actstore.analysis.top.found import FoundRows
from actstore.counted import counted

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


@dataclass(frozen=True, repr=False)
class TopActivations(FoundRows):
    """The rows with the largest values of each feature, or rows of each quantile; the largest first."""

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        n, k = self.values.shape
        return (
            f"<TopActivations {self.hook}: {n:,} features, up to {k} rows of each, of {self.n_rows:,} rows>"
        )

    def context(self, feature: int, i: int, *, before: int = 20, after: int = 10) -> Context:
        """The text around one of the rows.

        Args:
            feature: number of the feature, as in ``values``.
            i: place among its rows, 0 for the largest.
            before, after: number of tokens on each side.

        Raises:
            IndexError: the feature has no such row, or a number of tokens is below 0.
            TokensError: the tokenizer is unknown or missing, or is not the same any more.
        """
        check_window(before, after)
        n_features, k = self.values.shape
        if not (0 <= feature < n_features and 0 <= i < k) or self.sequences[feature, i] < 0:
            raise IndexError(
                f"feature {feature} has no row {i} of {counted(n_features, 'feature')} with up to "
                f"{counted(k, 'row')} each"
            )
        sequence, position = int(self.sequences[feature, i]), int(self.positions[feature, i])
        tokens = str_tokens_of(self.store, sequence)
        first = max(0, position - before)
        return Context(
            tuple(tokens[first : position + after + 1]),
            position - first,
            float(self.values[feature, i]),
            sequence,
            position,
        )

    def to_arrow(self, *, before: int = 20, after: int = 10, text: bool = True) -> "pa.Table":
        """The rows as a table, one row each, by feature and rank; empty places are left out.

        Columns: ``feature`` and ``rank`` (int32, as in `values`), ``value`` (float32), ``sequence`` (int64),
        ``position`` (int32), ``document`` (int64, null for tokens that packing put in), ``token_id`` (int32),
        ``context_ids`` (list of int32), ``at`` (int32, place of the row's token in the context), of rows by quantile
        ``quantile`` (int32), and, with ``text``, ``token`` (string) and ``context`` (list of string).

        Args:
            before, after: number of tokens of the context on each side.
            text: whether tokens are also given as text.

        Raises:
            JobError: a number of tokens is below 0.
            TokensError: there is to be text, and the tokenizer is unknown or missing, or is not the same any more.
        """
        from actstore.analysis.top.table import table_of

        return table_of(self, before, after, text)

    def to_pandas(self, *, before: int = 20, after: int = 10, text: bool = True) -> "pd.DataFrame":
        """The table of `to_arrow` as a DataFrame."""
        return self.to_arrow(before=before, after=after, text=text).to_pandas()

    def to_parquet(self, path: Path | str, *, before: int = 20, after: int = 10, text: bool = True) -> None:
        """Write the table of `to_arrow` to a Parquet file. Its metadata names the hook and the store.

        Raises:
            JobError, TokensError: as `to_arrow` does.
            StorageError: the file cannot be written.
        """
        from actstore.analysis.top.table import write

        write(self.to_arrow(before=before, after=after, text=text), Path(path))

    def _repr_html_(self) -> str:
        """The first rows of the first features, for notebooks."""
        from actstore.analysis.top.page import html_of

        return html_of(self)
