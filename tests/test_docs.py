"""The code in the documentation runs.

The python blocks of a page run in order and share their variables. An HTML comment on the line above a block takes
it out, with the reason for the reader of the source: `<!-- not run: ... -->` for good, `<!-- slow: ... -->` from
all but the tests marked as slow.
"""

import importlib
import re
from pathlib import Path
from typing import NamedTuple

import pytest

import swaa_flex
from swaa_flex import SWAAConfig, recipes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- (?P<kept>not run|slow): \S.*? -->\n)?```python\n(?P<code>.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    code: str
    kept: str | None  # from which runs, if any


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in BLOCK.finditer(text):
        lines_above = text.count("\n", 0, match.start("code"))  # for tracebacks that point into the page
        found.append(Block("\n" * lines_above + match["code"], match["kept"]))
    return found


def run(page: Path, *, slow: bool) -> None:
    namespace: dict[str, object] = {"__name__": page.stem}
    for block in blocks(page):
        if block.kept is None or (block.kept == "slow" and slow):
            exec(compile(block.code, page, "exec"), namespace)


def pages(kept: str | None) -> list[object]:
    found = [page for page in PAGES if any(block.kept == kept for block in blocks(page))]
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in found]


@pytest.mark.parametrize("page", pages(None))
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages("slow"))
def test_the_slow_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page, slow=True)


def test_every_python_block_is_found():
    """A comment that is spelled otherwise, or an indented block, would not run and nobody would notice."""
    for page in PAGES:
        text = page.read_text()
        assert len(blocks(page)) == text.count("```py"), page
        assert len(re.findall(r"^<!-- (?:not run|slow)", text, re.M)) == sum(b.kept is not None for b in blocks(page))


def test_the_table_of_recipes_in_the_readme_is_that_of_the_code():
    cell = {"–": None, "none": (), "half": "1::2", "a quarter": "1::4", "yes": True, "no": False}
    rows = re.findall(r"^\| `(\w+)`( \(default\))? \|(.*)\|$", (ROOT / "README.md").read_text(), re.M)
    assert [name for name, _, _ in rows] == list(recipes.names())
    assert [name for name, default, _ in rows if default] == [recipes.DEFAULT]
    for name, _, cells in rows:
        window, sinks, layers, decode, tail, purpose = (text.strip() for text in cells.split("|"))
        assert purpose
        if name == "full":  # nothing but the window matters
            assert (window, sinks, layers, decode, tail) == ("–", "–", "all", "–", "–")
            assert recipes.get(name).sliding_window is None
        else:
            config = SWAAConfig(int(window), int(sinks), cell[layers], cell[decode], int(tail))
            assert recipes.get(name) == config, name


def test_the_public_names_are_sorted_complete_and_in_the_reference():
    assert swaa_flex.__all__ == sorted(swaa_flex.__all__)
    assert all(hasattr(swaa_flex, name) for name in swaa_flex.__all__)
    imported = re.findall(r"^from \.\S* import (.*)$", Path(swaa_flex.__file__).read_text(), re.M)
    assert sorted(name for line in imported for name in line.split(", ")) == swaa_flex.__all__
    reference = (ROOT / "docs" / "reference.md").read_text()
    for name in set(swaa_flex.__all__) - {"__version__"}:
        module = getattr(getattr(swaa_flex, name), "__module__", f"swaa_flex.{name}")
        assert re.search(rf"\b{name}\b", reference) or f"::: {module}\n" in reference, name


def test_the_tables_of_measurements_are_those_of_the_committed_data(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    report = importlib.import_module("report")
    for page in report.PAGES:
        text = (ROOT / "docs" / page).read_text()
        assert "<!-- table:" in text
        assert report.written(text) == text, page


def test_no_test_module_imports_another():
    for path in Path(__file__).parent.glob("*.py"):
        imported = re.findall(r"^\s*(?:from|import) (test_\w+)", path.read_text(), re.M)
        assert {*imported} <= {path.stem}, path.name
