"""A summary as a table for the terminal, and as a picture."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from .statistics import Interval
from .summary import Cell, Summary

GAP = 2  # characters between columns


def tables(summary: Summary, width: int) -> list[Table]:
    """Configurations by task and length, in as many tables as the width takes.

    A cell holds the value with its interval, and under it the difference from full attention with its interval and p.

    Args:
        summary: what an evaluation came to.
        width: characters per line.
    """
    columns = list(dict.fromkeys((cell.task, cell.length) for cell in summary.cells))
    names = _names(summary, width)
    parts: list[list[tuple[str, int | None]]] = [[]]
    room = width - names
    for column in columns:
        taken = GAP + _width(summary, column)
        if parts[-1] and taken > room:
            parts.append([])
            room = width - names
        parts[-1].append(column)
        room -= taken
    return [_table(summary, part, width) for part in parts]


def _names(summary: Summary, width: int) -> int:
    """Characters of the column with the names of the recipes."""
    return max(len("recipe"), min(max(map(len, summary.configs), default=0), width // 2))


def _width(summary: Summary, column: tuple[str, int | None]) -> int:
    """Characters of the longest line of a column."""
    cells = [cell for cell in summary.cells if (cell.task, cell.length) == column]
    lines = [line for cell in cells for line in _text(cell).plain.splitlines()]
    return max(map(len, [*lines, *_heading(cells[0]).plain.splitlines()]))


def notes(summary: Summary) -> str:
    """What the numbers of the table are."""
    text = "Scores in percent; perplexity, lower is better. In brackets: intervals of 95 %."
    if summary.baseline is None:
        return f"{text} Without full attention among the configurations, there is nothing to compare them with."
    return (
        f"{text} Second line: difference from {summary.baseline} on the same samples. p: McNemar's exact test where "
        "all scores are 0 or 100, otherwise a permutation test; not corrected for the number of tests."
    )


def draw(summary: Summary, path: Path) -> None:
    """Writes a picture with a panel per task: values with their intervals over the lengths.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("the picture needs matplotlib: pip install 'swaa-flex[plot]'") from error
    tasks = list(dict.fromkeys(cell.task for cell in summary.cells))
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows + 0.6), dpi=120, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels[len(tasks) :]:
        panel.set_axis_off()
    for task, panel in zip(tasks, panels, strict=False):
        of_task = [cell for cell in summary.cells if cell.task == task]
        lengths = list(dict.fromkeys(cell.length for cell in of_task))
        for number, config in enumerate(summary.configs):
            cells = [cell for cell in of_task if cell.config == config]
            aside = 0.5 * ((number + 0.5) / len(summary.configs) - 0.5)  # so that intervals do not cover each other
            places = [lengths.index(cell.length) + aside for cell in cells]
            values = [_shown(cell, cell.value) for cell in cells]
            low = [value - _shown(cell, cell.interval.low) for value, cell in zip(values, cells, strict=True)]
            high = [_shown(cell, cell.interval.high) - value for value, cell in zip(values, cells, strict=True)]
            errors = [[max(0.0, error) for error in side] for side in (low, high)]
            panel.errorbar(places, values, errors, marker="o", markersize=4, capsize=2, linewidth=1, label=config)
        panel.set_xticks(range(len(lengths)), [_length(length) or "all" for length in lengths])
        panel.set_title(task, fontsize=10)
        panel.set_ylabel("score, %" if of_task[0].metric == "score" else "perplexity", fontsize=8)
        if of_task[0].metric == "perplexity":
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:.3g}")
            panel.yaxis.set_minor_formatter("{x:.3g}")
        panel.grid(alpha=0.3)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=8, ncols=min(4, len(summary.configs)), loc="outside lower center")
    figure.suptitle(summary.model, fontsize=11)
    figure.savefig(path)


def _table(summary: Summary, columns: list[tuple[str, int | None]], width: int) -> Table:
    cells = {(cell.config, cell.task, cell.length): cell for cell in summary.cells}
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP, 0, 0))
    # Where room is short, values wrap between numbers and names fold: nothing is cut.
    names = _names(summary, width)
    table.add_column("recipe", overflow="fold", min_width=names, max_width=names)
    for task, length in columns:
        cell = next(cell for cell in summary.cells if (cell.task, cell.length) == (task, length))
        table.add_column(_heading(cell), overflow="fold")
    for config in summary.configs:
        table.add_row(Text(config, style="bold"), *(_text(cells[config, *column]) for column in columns))
    return table


def _heading(cell: Cell) -> Text:
    below = ", ".join(part for part in (_length(cell.length), f"n {cell.samples}") if part)
    return Text(f"{cell.task}\n{below}")


def _text(cell: Cell) -> Text:
    lines = [f"{_number(cell, cell.value)} {_interval(cell, cell.interval)}"]
    if cell.against_full is not None:
        found = cell.against_full
        lines.append(f"{_number(cell, found.difference, '+')} {_interval(cell, found.interval, '+')}")
        lines.append("p < 0.001" if found.p < 0.001 else f"p = {found.p:.3f}")
    return Text("\n".join(lines))


def _interval(cell: Cell, interval: Interval, sign: str = "") -> str:
    return f"[{_number(cell, interval.low, sign)}, {_number(cell, interval.high, sign)}]"


def _number(cell: Cell, value: float, sign: str = "") -> str:
    return f"{_shown(cell, value):{sign}.{1 if cell.metric == 'score' else 2}f}"


def _shown(cell: Cell, value: float) -> float:
    return 100 * value if cell.metric == "score" else value


def _length(length: int | None) -> str:
    if length is None:
        return ""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
