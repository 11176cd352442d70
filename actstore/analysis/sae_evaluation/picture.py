"""Figures of SAEs as a picture: over training, or explained variance against L0."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actstore.analysis.sae_evaluation.figures import SaeFigures
from actstore.errors import MissingExtraError


def picture(hook: str, saes: Sequence[SaeFigures], path: Path | None) -> Any:
    """Draw the figures, and write them as PNG if there is a path.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("a picture needs matplotlib: pip install 'actstore[plot]'") from error

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(f"SAEs of {hook}".replace("$", r"\$"), fontsize=9)
    axes.set_ylabel("explained variance")
    explained = [one.explained_variance for one in saes]
    trained_on = [one.n_samples for one in saes if one.n_samples is not None]
    if len(saes) > 1 and len(set(trained_on)) == len(saes):
        lines = axes.plot(trained_on, explained, marker="o", markersize=3, label="explained variance")
        axes.set_xlabel("rows trained on")
        beside = axes.twinx()
        lines += beside.plot(
            trained_on, [one.l0 for one in saes], marker="s", markersize=3, color="tab:orange", label="L0"
        )
        beside.set_ylabel("L0")
        beside.set_ylim(0, 1.25 * max(one.l0 for one in saes) or 1)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.legend(handles=lines, fontsize=8, loc="lower right")
    else:
        axes.scatter([one.l0 for one in saes], explained, s=16)
        for one in saes:
            axes.annotate(
                one.name.replace("$", r"\$"),
                (one.l0, one.explained_variance),
                textcoords="offset points",
                xytext=(4, 4),
                fontsize=7,
            )
        axes.set_xlabel("L0")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
