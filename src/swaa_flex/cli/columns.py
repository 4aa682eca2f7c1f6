"""Tables that fit the terminal: what does not is left out by the column, never cut inside a number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

Columns = Mapping[str, Sequence[Text | str]]
"""Cells by heading."""

WRAPPED = 16  # characters that a column of words takes at least
GAP = 2  # characters between columns


def table(
    columns: Columns, width: int, *, left: Iterable[str], words: str | None = None, less: Iterable[str]
) -> Table:
    """A table of as many columns as a terminal takes.

    Args:
        columns: the cells of each.
        width: characters per line.
        left: headings of the columns that are aligned to the left.
        less: headings of the columns that may be left out, the first one first.
        words: heading of the column whose cells may wrap.
    """
    shown = dict(columns)
    for heading in less:
        if _width(shown, words) <= width:
            break
        del shown[heading]
    found = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
    for heading in shown:
        justify = "left" if heading in left else "right"
        found.add_column(heading, justify=justify, no_wrap=heading != words, overflow="fold")  # type: ignore[arg-type]
    for row in zip(*shown.values(), strict=True):
        found.add_row(*row)
    return found


def _width(columns: Columns, words: str | None) -> int:
    widest = {heading: max(map(len, (heading, *cells))) for heading, cells in columns.items()}
    if words in widest:
        widest[words] = min(widest[words], WRAPPED)
    return sum(widest.values()) + GAP * (len(columns) - 1)
