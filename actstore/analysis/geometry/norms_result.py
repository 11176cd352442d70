"""Norms of rows by hook, position and token, as numbers and as a picture."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.geometry.showing.pictures import figure_of, plain, write
from actstore.analysis.geometry.showing.tables import table_html
from actstore.analysis.text import tokenizer_of
from actstore.errors import JobError, TokensError

if TYPE_CHECKING:
    from actstore.store.committed_store import CommittedStore

Float64 = NDArray[np.float64]
_TOKENS: Final = 16
"""Tokens in a picture."""


@dataclass(frozen=True)
class TokenNorm:
    """The norms of the rows of one token id."""

    token: int
    text: str
    """Empty where the tokenizer of the store is not at hand."""
    count: int
    mean: float
    largest: float


@dataclass(frozen=True, eq=False, repr=False)
class Norms:
    """Norms of rows by hook, position and token id. They are those of the stored values, rounded to float32."""

    hooks: tuple[str, ...]
    count_by_position: NDArray[np.int64]
    """Rows of each position, [n_positions]."""
    mean_by_position: Float64
    """[n_hooks, n_positions]; NaN where there are no rows."""
    std_by_position: Float64
    """Standard deviation, [n_hooks, n_positions]; NaN where there are no rows."""
    count_by_token: NDArray[np.int64]
    """Rows of each token id, [n_tokens]."""
    mean_by_token: Float64
    """[n_hooks, n_tokens]; NaN where there are no rows."""
    max_by_token: Float64
    """[n_hooks, n_tokens]; NaN where there are no rows."""
    n_not_finite: int
    """Rows with NaN or infinity in one of the hooks, which were left out for all of them."""

    store: "CommittedStore" = field(repr=False)

    @property
    def n_rows(self) -> int:
        return int(self.count_by_position.sum())

    @property
    def mean_by_hook(self) -> Float64:
        """[n_hooks]."""
        weighted = np.nan_to_num(self.mean_by_position) * self.count_by_position
        mean: Float64 = weighted.sum(1) / self.n_rows
        return mean

    def top_tokens(self, hook: str, n: int = 20, *, least: int = 1) -> list[TokenNorm]:
        """The token ids whose rows have the largest mean norm.

        Args:
            hook: name of a hook, as in ``hooks``.
            n: number of token ids.
            least: rows that a token id needs to be counted.

        Raises:
            JobError: there is no such hook.
        """
        if hook not in self.hooks:
            raise JobError(f"there are no norms of {hook}; there are those of {', '.join(self.hooks)}")
        row = self.hooks.index(hook)
        means = np.where(self.count_by_token >= least, self.mean_by_token[row], np.nan)
        order = np.argsort(-means, kind="stable")[:n]
        chosen = [int(token) for token in order if not np.isnan(means[token])]
        texts = self._texts(chosen)
        return [
            TokenNorm(
                token,
                text,
                int(self.count_by_token[token]),
                float(self.mean_by_token[row, token]),
                float(self.max_by_token[row, token]),
            )
            for token, text in zip(chosen, texts, strict=True)
        ]

    def _texts(self, tokens: list[int]) -> list[str]:
        try:
            tokenizer = tokenizer_of(self.store)
        except TokensError:
            return [""] * len(tokens)
        return [str(tokenizer.decode([token])) for token in tokens]

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw the norms by hook, by hook and position, and by hook and token, and write a PNG if there is a path.

        Returns:
            The figure of matplotlib.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        height = min(3.2 + 0.12 * len(self.hooks), 9)
        figure = figure_of(14, height)
        line, by_position, by_token = figure.subplots(1, 3)
        numbers = np.arange(len(self.hooks))
        line.plot(self.mean_by_hook, numbers, marker=".")
        line.set_xscale("log")
        line.set_xlabel("mean norm")
        line.set_yticks(numbers, map(plain, self.hooks), fontsize=6)
        _map(figure, by_position, self.mean_by_position, "position")
        frequent = self.top_tokens(self.hooks[-1], _TOKENS)
        shown = [one.token for one in frequent]
        _map(figure, by_token, self.mean_by_token[:, shown], "tokens with the largest norm in the last hook")
        labels = [plain(one.text[:12]) or f"{one.token}" for one in frequent]
        by_token.set_xticks(range(len(shown)), labels, rotation=60, ha="right", fontsize=7)
        figure.suptitle(f"norms of {self.n_rows:,} rows", fontsize=10)
        write(figure, None if path is None else Path(path))
        return figure

    def __repr__(self) -> str:
        n_positions = int(np.count_nonzero(self.count_by_position))
        n_tokens = int(np.count_nonzero(self.count_by_token))
        return (
            f"<Norms of {len(self.hooks)} hooks over {self.n_rows:,} rows: {n_positions:,} positions, "
            f"{n_tokens:,} token ids>"
        )

    def _repr_html_(self) -> str:
        lines = []
        for hook, mean in zip(self.hooks, self.mean_by_hook, strict=True):
            largest = ", ".join(f"{one.text!r} {one.mean:.4g}" for one in self.top_tokens(hook, 4))
            lines.append([hook, f"{mean:.4g}", largest])
        return table_html(f"Norms of {self.n_rows:,} rows", ["hook", "mean", "largest by token"], lines)


def _map(figure: Any, axes: Any, values: Float64, label: str) -> None:
    """A heat map, hooks upwards. Norms of layers and of first tokens differ by orders of magnitude."""
    with np.errstate(divide="ignore"):
        shown = np.log10(values)
    shown[~np.isfinite(shown)] = np.nan
    image = axes.imshow(shown, origin="lower", aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_yticks([])
    axes.set_xlabel(label)
    figure.colorbar(image, ax=axes, label="log10 of the mean norm")
