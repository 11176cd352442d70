"""Heat maps as HTML that loads nothing: tables with coloured cells, whose number is shown under the mouse."""

import html
from typing import Final

import numpy as np

from actstore.patching.results.panels import Panels

_STYLE: Final = """
.actstore-grid { font: 12px system-ui, sans-serif; color: #222; background: #fff; overflow-x: auto; }
.actstore-grid table { border-collapse: collapse; display: inline-table; margin: 0 16px 16px 0; vertical-align: top; }
.actstore-grid caption { text-align: left; padding: 4px 0; font-weight: 600; }
.actstore-grid td { min-width: 18px; height: 16px; padding: 0; }
.actstore-grid td:hover { outline: 2px solid #222; }
.actstore-grid th { font-weight: 400; color: #555; padding: 0 6px 0 0; text-align: right; }
.actstore-grid thead th { writing-mode: vertical-rl; padding: 0 0 4px; white-space: pre; }
"""


def table_of(panels: Panels) -> str:
    """The heat maps as a piece of HTML, for a notebook."""
    note = f" ({html.escape(panels.note)})" if panels.note else ""
    legend = f"{html.escape(panels.unit)}{note}; blue is above 0, red below, deepest at {panels.bound:.3g}"
    heading = f"<p><b>{html.escape(panels.title)}</b>: {legend}</p>"
    parts = [f"<style>{_STYLE}</style><div class='actstore-grid'>{heading}"]
    for number, values in enumerate(panels.values):
        title = panels.titles[number] if panels.titles else ""
        head = "".join(f"<th>{html.escape(label)}</th>" for label in panels.columns.labels)
        parts.append(f"<table><caption>{html.escape(title)}</caption>")
        parts.append(f"<thead><tr><th>{html.escape(panels.rows.name)}</th>{head}</tr></thead><tbody>")
        for row in reversed(range(len(values))):  # layers upwards
            cells = "".join(
                _cell(panels, row, column, float(value), title) for column, value in enumerate(values[row])
            )
            parts.append(f"<tr><th>{html.escape(panels.rows.labels[row])}</th>{cells}</tr>")
        parts.append("</tbody></table>")
    return "\n".join([*parts, "</div>"])


def page(panels: Panels) -> str:
    """The heat maps as a page of its own."""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<title>{html.escape(panels.title)}</title></head><body>\n{table_of(panels)}\n</body></html>\n"
    )


def _cell(panels: Panels, row: int, column: int, value: float, title: str) -> str:
    where = f"{panels.rows.name} {panels.rows.labels[row]}"
    if panels.columns.name:
        where += f", {panels.columns.name} {panels.columns.labels[column]}"
    if title:
        where += f", {title}"
    label = html.escape(f"{where}: {value:.4g}", quote=True)
    return f'<td style="background:{_colour(value / panels.bound)}" title="{label}"></td>'


def _colour(share: float) -> str:
    """White at 0, blue at 1, red at -1, grey for what is no number."""
    if not np.isfinite(share):
        return "#999"
    end = np.array([33, 102, 172] if share > 0 else [178, 24, 43])
    red, green, blue = np.rint(255 + (end - 255) * min(abs(share), 1.0)).astype(int)
    return f"rgb({red},{green},{blue})"
