"""Figures as text and as HTML, one line an SAE."""

import html
from collections.abc import Callable, Sequence
from typing import Final

from actstore.analysis.sae_evaluation.figures import SaeFigures

_COLUMNS: Final[Sequence[tuple[str, Callable[[SaeFigures], str]]]] = (
    ("SAE", lambda one: one.name),
    ("expl. var.", lambda one: f"{one.explained_variance:.4f}"),
    ("legacy", lambda one: f"{one.explained_variance_legacy:.4f}"),
    ("MSE", lambda one: f"{one.mse:.4g}"),
    ("cosine", lambda one: f"{one.cosine_similarity:.4f}"),
    ("bias", lambda one: f"{one.relative_reconstruction_bias:.4f}"),
    ("L0", lambda one: f"{one.l0:.4g}"),
    ("L1", lambda one: f"{one.l1:.4g}"),
    ("dead", lambda one: f"{len(one.dead_features):,}"),
    ("dense", lambda one: f"{len(one.dense_features):,}"),
    ("latents", lambda one: f"{one.d_sae:,}"),
)
_LOSSES: Final[Sequence[tuple[str, Callable[[SaeFigures], str]]]] = (
    ("recovered", lambda one: "" if one.losses is None else f"{one.losses.recovered:.4f}"),
    ("CE with SAE", lambda one: "" if one.losses is None else f"{one.losses.loss_with_sae:.4f}"),
    ("CE", lambda one: "" if one.losses is None else f"{one.losses.loss:.4f}"),
    ("KL", lambda one: "" if one.losses is None else f"{one.losses.kl_with_sae:.4f}"),
)
_STYLE: Final = (
    "<style>.actstore-table td, .actstore-table th { text-align: right; padding: 2px 8px; }</style>"
)


def text_table(saes: Sequence[SaeFigures]) -> str:
    """A table with a line for each SAE below its head."""
    lines = _cells(saes)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    )


def html_table(title: str, saes: Sequence[SaeFigures]) -> str:
    """The same as HTML, for a notebook."""
    head, *lines = [[html.escape(cell) for cell in line] for line in _cells(saes)]
    rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
    heads = "".join(f"<th>{cell}</th>" for cell in head)
    return (
        f"{_STYLE}<p>{html.escape(title)}</p>"
        f"<table class='actstore-table'><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _cells(saes: Sequence[SaeFigures]) -> list[list[str]]:
    has_losses = any(one.losses is not None for one in saes)
    columns = [*_COLUMNS, *(_LOSSES if has_losses else ())]
    return [[name for name, _ in columns], *([cell(one) for _, cell in columns] for one in saes)]
