"""Writes the tables of docs/benchmarks.md from the committed JSON.

python benchmarks/report.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    page = DOCS / "benchmarks.md"
    page.write_text(written(page.read_text()))


def written(text: str) -> str:
    """The page with each `<!-- table: NAMES -->` followed by the table of those JSON files."""

    def replace(match: re.Match[str]) -> str:
        reports = [json.loads((DOCS / "benchmarks" / f"{name}.json").read_text()) for name in match[1].split()]
        return f"<!-- table: {match[1]} -->\n{decode_table(reports)}\n<!-- end -->"

    return re.sub(r"<!-- table: (.+?) -->\n.*?<!-- end -->", replace, text, flags=re.S)


def decode_table(reports: list[dict[str, Any]]) -> str:
    results = [result for report in reports for result in report["results"]]
    contexts = sorted({result["context"] for result in results})
    lines = [
        "| batch | method | recipe | " + " | ".join(f"{context:,} tokens" for context in contexts) + " | cache GiB |",
        "|---|---|---|" + "---:|" * (len(contexts) + 1),
    ]
    for key in dict.fromkeys((r["batch"], r["method"], r["recipe"]) for r in results):
        row = {r["context"]: r for r in results if (r["batch"], r["method"], r["recipe"]) == key}
        cells = [cell(row.get(context)) for context in contexts]
        memory = next((r["cache_gib"] for r in row.values() if r["cache_gib"]), None)
        lines.append("| " + " | ".join([*map(str, key), *cells, f"{memory:.1f}" if memory else ""]) + " |")
    made = {(r["machine"], r["versions"]["torch"], r["versions"]["transformers"], r["date"]) for r in reports}
    where = "; ".join(
        f"{machine}, torch {torch}, transformers {hf}, {date}" for machine, torch, hf, date in sorted(made)
    )
    return "\n".join([*lines, "", f"Milliseconds per token, in brackets the ratio to the floor. {where}."])


def cell(result: dict[str, Any] | None) -> str:
    if result is None:
        return "not run"
    if result["ms_per_token"] is None:
        return result["note"]
    return f"{result['ms_per_token']:.2f} ({result['ms_per_token'] / result['floor_ms']:.2f})"


if __name__ == "__main__":
    main()
