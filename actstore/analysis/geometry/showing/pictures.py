"""What the pictures of this folder share: a figure without a display, and texts that are drawn as they are."""

import warnings
from pathlib import Path
from typing import Any

from actstore.errors import MissingExtraError


def figure_of(width: float, height: float) -> Any:
    """An empty figure of matplotlib, in inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("a picture needs matplotlib: pip install 'actstore[plot]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write(figure: Any, path: Path | None) -> None:
    """Write a figure as PNG, if there is a path."""
    if path is None:
        return
    with warnings.catch_warnings():
        # No font has the characters of all tokens.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(path, format="png", dpi=150)


def plain(text: str) -> str:
    """A text in one line that is drawn as it is: a dollar would begin a formula."""
    shown = (mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text)
    return "".join(shown).replace("$", r"\$")
