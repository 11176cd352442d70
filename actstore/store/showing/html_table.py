"""Tables in HTML, which read well on light and dark pages."""

from collections.abc import Iterable, Sequence
from html import escape


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts, which are escaped.

    Args:
        head: names of the columns; all empty for none.
        rows: cells of each row.
    """
    names = "".join(f"<th style='text-align:left'>{escape(name)}</th>" for name in head)
    lines = [
        "<tr>" + "".join(f"<td style='text-align:left'>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    ]
    top = f"<thead><tr>{names}</tr></thead>" if any(head) else ""
    return f"<table>{top}<tbody>{''.join(lines)}</tbody></table>"
