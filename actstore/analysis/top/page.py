"""Rows of features as HTML for notebooks: no scripts, and readable on light and dark pages."""

from html import escape
from typing import Final

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.top.contexts import TokenTexts, windows
from actstore.analysis.top.found import FoundRows
from actstore.errors import ActstoreError

_FEATURES: Final = 8
_ROWS: Final = 8
"""Features, and rows of each, that are shown at most."""
_BEFORE: Final = 12
_AFTER: Final = 8


def html_of(top: FoundRows) -> str:
    """A table with some contexts, in which the row's token is the darker, the nearer its value is to the largest."""
    shown = top.sequences[:_FEATURES, :_ROWS]
    feature, rank = np.nonzero(shown >= 0)
    contexts = _contexts(top, feature, rank)
    head = (
        f"<p>{len(top.values):,} features of <code>{escape(top.hook)}</code>, up to {top.values.shape[1]} rows of "
        f"each, of {top.n_rows:,} rows</p><table><thead><tr><th>feature</th><th>value</th><th>sequence</th>"
        "<th>position</th><th style='text-align:left'>context</th></tr></thead><tbody>"
    )
    parts = [head]
    for one, place, context in zip(feature.tolist(), rank.tolist(), contexts, strict=True):
        parts.append(
            f"<tr><td>{one}</td><td>{top.values[one, place]:.4g}</td><td>{top.sequences[one, place]}</td>"
            f"<td>{top.positions[one, place]}</td><td style='text-align:left;white-space:pre-wrap'>{context}</td></tr>"
        )
    parts.append("</tbody></table>")
    if len(top.values) > _FEATURES or top.values.shape[1] > _ROWS:
        parts.append(f"<p>up to {_FEATURES} features and {_ROWS} rows of each are shown</p>")
    return "".join(parts)


def _contexts(top: FoundRows, feature: NDArray[np.int64], rank: NDArray[np.int64]) -> list[str]:
    """The context of each row as HTML; a sentence in its place where the store's text is not known."""
    contexts = [""] * len(feature)
    at = (feature, rank)
    values = top.values[at]
    with np.errstate(invalid="ignore", divide="ignore"):
        strengths = np.nan_to_num(
            values / np.nanmax(np.abs(top.values), axis=1)[feature], posinf=1, neginf=-1
        )
    try:
        texts = TokenTexts(top.store)
        for row, ids, place in windows(top.store, top.sequences[at], top.positions[at], _BEFORE, _AFTER):
            tokens = [escape(texts[token]).replace("\n", "↵") for token in ids]
            tokens[place] = _marked(tokens[place], float(strengths[row]))
            contexts[row] = "".join(tokens)
    except ActstoreError as error:
        return [f"<i>{escape(str(error))}</i>"] * len(feature)
    return contexts


def _marked(token: str, strength: float) -> str:
    """A token on orange, or on blue if the value is negative."""
    colour = "255,140,0" if strength >= 0 else "70,130,255"
    opacity = 0.15 + 0.6 * min(1.0, abs(strength))
    return f"<b style='background:rgba({colour},{opacity:.2f});border-radius:3px'>{token}</b>"
