"""Tables of results for notebooks."""

import html
from collections.abc import Sequence


def table_html(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table as a piece of HTML, in the colours of the page that it is shown in.

    Args:
        title: text above it.
        head: text above each column.
        lines: cells of each line; the first one is its name.
    """
    parts = [f"<table><caption style='text-align:left'>{html.escape(title)}</caption><thead><tr>"]
    parts += [f"<th>{html.escape(text)}</th>" for text in head]
    parts.append("</tr></thead><tbody>")
    for name, *cells in lines:
        shown = "".join(f"<td style='text-align:right'>{html.escape(cell)}</td>" for cell in cells)
        parts.append(f"<tr><th style='text-align:left'>{html.escape(name)}</th>{shown}</tr>")
    return "".join([*parts, "</tbody></table>"])
