"""Pictures of principal components: explained variance, and rows along the first two."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.geometry.principal.components import Components
from actstore.analysis.geometry.principal.sampled_rows import SampledRows
from actstore.analysis.geometry.showing.pictures import figure_of, plain, write

_MOST_HOOKS: Final = 12
"""Hooks whose rows are drawn, spread over all of them."""
_MOST_VALUES: Final = 9
"""Values of a column that have a colour of their own, the most frequent ones."""
_ACROSS: Final = 4


def draw(every: Sequence[Components], sample: SampledRows | None, path: Path | None) -> Any:
    """Draw the explained variance of hooks, and rows along their first two components if there are any.

    Args:
        every: components of each hook.
        sample: rows to draw.
        path: PNG file to write; None for none.

    Returns:
        The figure of matplotlib.
    """
    shown: list[Components] = []
    if sample is not None:
        places = np.unique(np.linspace(0, len(every) - 1, min(len(every), _MOST_HOOKS)).round().astype(int))
        shown = [every[place] for place in places]
    n_panels = 1 + len(shown)
    across = min(n_panels, _ACROSS)
    down = -(-n_panels // across)
    figure = figure_of(4.2 * across, 3.6 * down)
    _variances(figure.add_subplot(down, across, 1), every)
    for number, one in enumerate(shown):
        assert sample is not None
        _rows(figure, figure.add_subplot(down, across, number + 2), one, sample)
    write(figure, path)
    return figure


def _variances(axes: Any, every: Sequence[Components]) -> None:
    from matplotlib import colormaps

    colors = colormaps["viridis"](np.linspace(0, 0.9, len(every)))
    for one, colour in zip(every, colors, strict=True):
        numbers = np.arange(1, one.n_components + 1)
        share = np.cumsum(one.explained_variance_ratio)
        axes.plot(numbers, share, marker=".", color=colour, label=plain(one.hook))
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("components")
    axes.set_ylabel("share of the variance")
    axes.set_title("explained variance", fontsize=9)
    axes.legend(fontsize=6, loc="lower right")


def _rows(figure: Any, axes: Any, one: Components, sample: SampledRows) -> None:
    values = sample.store[one.hook].at(sample.sequences, sample.positions)
    is_finite = values.flatten(1).isfinite().all(1).numpy()
    places = one.transform(values[is_finite]).numpy()[:, :2]
    of_rows = sample.values[is_finite]
    if _is_number(of_rows):
        drawn = axes.scatter(*places.T, c=of_rows.astype(np.float64), s=4, cmap="viridis", linewidths=0)
        figure.colorbar(drawn, ax=axes, label=plain(sample.color))
    else:
        names = _names(of_rows)
        for number, name in enumerate(dict.fromkeys(sorted(names))):
            mask = names == name
            axes.scatter(*places[mask].T, s=4, color=f"C{number}", label=plain(name[:24]), linewidths=0)
        axes.legend(fontsize=6, markerscale=3, title=plain(sample.color), title_fontsize=7)
    shares = one.explained_variance_ratio
    axes.set_xlabel(f"component 0 ({shares[0]:.0%})")
    axes.set_ylabel(f"component 1 ({shares[1]:.0%})")
    axes.set_title(plain(one.hook), fontsize=9)


def _is_number(values: NDArray[Any]) -> bool:
    return all(isinstance(value, int | float | np.number) and not isinstance(value, bool) for value in values)


def _names(values: NDArray[Any]) -> NDArray[np.str_]:
    """Values as text; those beyond the most frequent ones are ``other``."""
    texts = ["none" if value is None else str(value) for value in values]
    frequent = {text for text, _ in Counter(texts).most_common(_MOST_VALUES)}
    return np.array([text if text in frequent else "other" for text in texts])
