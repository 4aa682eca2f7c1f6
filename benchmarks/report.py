"""Writes the tables of the documentation from the committed JSON, as the benchmarks printed them, and draws the plots.

python benchmarks/report.py
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

from rich.table import Table

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("benchmarks.md", "performance-log.md")
MARKED = re.compile(r"<!-- table: (\S+) -->\n.*?<!-- end -->", re.S)


def main() -> None:
    for page in PAGES:
        path = DOCS / page
        path.write_text(written(path.read_text()))
    for picture in (DOCS / "benchmarks").glob("*.png"):
        data = json.loads(picture.with_suffix(".json").read_text())
        script(data).plot(data, picture)


def written(text: str) -> str:
    """The page with each `<!-- table: NAME -->` followed by the table of that JSON file."""
    return MARKED.sub(lambda match: f"<!-- table: {match[1]} -->\n{table(match[1])}\n<!-- end -->", text)


def table(name: str) -> str:
    data = json.loads((DOCS / "benchmarks" / f"{name}.json").read_text())
    benchmark = script(data)
    return f"{markdown(benchmark.table(results(benchmark, data)))}\n\n{origin(data)} [Data](benchmarks/{name}.json)."


def script(data: dict[str, Any]) -> Any:
    """The module of the benchmark."""
    name = re.search(r"benchmarks/(\w+)\.py", data["command"])
    assert name, data["command"]
    return importlib.import_module(name[1])


def results(benchmark: Any, data: dict[str, Any]) -> list[Any]:
    lists = {name: tuple(value) for name, value in data["results"][0].items() if isinstance(value, list)}
    return [benchmark.Result(**(r | {name: tuple(r[name]) for name in lists})) for r in data["results"]]


def markdown(view: Table) -> str:
    rows = zip(*(list(column.cells) for column in view.columns), strict=True)
    aligned = ["---:" if column.justify == "right" else "---" for column in view.columns]
    lines = [[str(column.header) for column in view.columns], aligned, *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in cells) + " |" for cells in lines)


def origin(data: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items() if name != "python")
    return f"{data['machine']}, {versions}, {data['date']}, `{data['command']}`."


if __name__ == "__main__":
    main()
