"""Heat maps as a picture."""

import warnings
from pathlib import Path
from typing import Any, Final

from actstore.errors import MissingExtraError
from actstore.patching.results.panels import Panels

_MOST_COLUMNS: Final = 4
_MOST_LABELS: Final = 40
_LONGEST_LABEL: Final = 20


def picture(panels: Panels, path: Path | None) -> Any:
    """Draw heat maps, and write them as PNG if there is a path.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("a picture needs matplotlib: pip install 'actstore[plot]'") from error

    n_panels, n_rows, n_columns = panels.values.shape
    across = min(n_panels, _MOST_COLUMNS)
    down = -(-n_panels // across)
    width = min(2.0 + 0.32 * n_columns, 12.0 / across + 1)
    height = min(2.4 + 0.16 * n_rows, 7.0)
    figure = Figure(figsize=(width * across, height * down), layout="constrained")
    FigureCanvasAgg(figure)
    note = f"{panels.unit}{', ' if panels.note else ''}{panels.note}"
    figure.suptitle(f"{_plain(panels.title)}\n{_plain(note)}", fontsize=10)
    image: Any = None
    for number in range(n_panels):
        axes = figure.add_subplot(down, across, number + 1)
        image = axes.imshow(
            panels.values[number],
            origin="lower",
            aspect="auto",
            cmap="RdBu",
            vmin=-panels.bound,
            vmax=panels.bound,
            interpolation="nearest",
        )
        if panels.titles:
            axes.set_title(_plain(panels.titles[number]), fontsize=8)
        axes.set_ylabel(_plain(panels.rows.name), fontsize=8)
        axes.set_xlabel(_plain(panels.columns.name), fontsize=8)
        every = -(-n_columns // _MOST_LABELS)
        axes.set_xticks(
            range(0, n_columns, every),
            [_label(label) for label in panels.columns.labels[::every]],
            rotation=60,
            ha="right",
            fontsize=7,
        )
        every = -(-n_rows // _MOST_LABELS)
        axes.set_yticks(
            range(0, n_rows, every), [_label(label) for label in panels.rows.labels[::every]], fontsize=7
        )
    figure.colorbar(image, ax=figure.axes, shrink=0.8)
    if path is not None:
        with warnings.catch_warnings():
            # No font has the characters of all tokens; the table and the page have them.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure.savefig(path, dpi=150)
    return figure


def _label(text: str) -> str:
    """A label that is short enough for a tick."""
    short = text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 1]}\N{HORIZONTAL ELLIPSIS}"
    return _plain(short)


def _plain(text: str) -> str:
    """A text in one line that is drawn as it is: a dollar would begin a formula, and control characters are shown."""
    shown = (mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text)
    return "".join(shown).replace("$", r"\$")
