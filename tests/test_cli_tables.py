"""The tables of the commands in narrow terminals: what does not fit wraps or is left out, and no number is cut."""

import re
from pathlib import Path

import pytest
from rich.console import Console

from swaa_flex import SWAAConfig
from swaa_flex.analysis import LayerChoice
from swaa_flex.analysis.cost import Cost
from swaa_flex.analysis.recommend import Option, Quality, Recommendation
from swaa_flex.cli import layers, recommend
from swaa_flex.evaluation import report
from swaa_flex.evaluation.statistics import Interval
from swaa_flex.evaluation.summary import Cell, Comparison, Summary


def has(table, number):
    return re.search(rf"(?<!\S){re.escape(number)}(?!\S)", table) is not None


@pytest.mark.parametrize("width", [200, 80, 60])
def test_recommend(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    kept = Quality(0.9512, 0.9311, {})
    options = (
        Option("window 2048, full lazy half", SWAAConfig(2048), True, kept, Cost(1234.5, 0.0123, 123 << 30), 54321.0),
        Option("full attention", SWAAConfig(None), False, Quality(1, 1, {}), Cost(12345.6, 0.12, 456 << 30), 98765.0),
    )
    found = Recommendation(options[0], options, options, 0.95, 131072, 1024, "estimated for H200")
    recommend._print(found, Path("out"))
    table = capsys.readouterr().out.split("Quality:")[0]
    assert max(map(len, table.splitlines())) <= width and "…" not in table
    numbers = ["0.95 (0.93)", "1.23e+03", "1.82 x"] + ["12.3", "5.43e+04", "123.00", "456.00"] * (width >= 80)
    assert all(has(table, number) for number in numbers), table
    assert all(has(table, word) for word in ("configuration", "2048,", "thinking", "<-", "attention"))


@pytest.mark.parametrize("width", [80, 60, 40])
def test_layers(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    scores = (123456.1234, *[0.5] * 11)
    layers._print(LayerChoice("lazy", "share of attention outside sinks and window", scores, (0,), SWAAConfig()))
    table = capsys.readouterr().out.split("full_attention_layers")[0]
    assert max(map(len, table.splitlines())) <= width and "…" not in table
    assert has(table, "123456.1234") and has(table, "0.5000") and has(table, "11")


@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize("name", ["fast", "W 2000, K 100, D 0 3 5 7 9 11 13 15 17 19, full 0 5 7 9 11 13 15"])
def test_eval(width, name):
    less = Comparison(-123456.0, Interval(-234567.0, -12345.0), 0.0004)
    task = "qa:a_file_whose_name_is_rather_long"
    cells = (
        Cell("full", "ppl", 3000, "perplexity", 200, 123456.78, Interval(100000, 1.3e9), None),
        Cell(name, "ppl", 3000, "perplexity", 200, 654321.78, Interval(200000, 2.3e9), less),
        Cell("full", task, None, "score", 200, 1.0, Interval(0.9, 1.0), None),
        Cell(name, task, None, "score", 200, 0.5, Interval(0.4, 0.6), Comparison(-0.5, Interval(-0.6, -0.4), 0.02)),
    )
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        for table in report.tables(Summary("m", 0, {"full": {}, name: {}}, "full", cells), width):
            console.print(table)
    shown = capture.get()
    assert max(map(len, shown.splitlines())) <= width and "…" not in shown
    numbers = "123456.78 [100000.00, 1300000000.00] 654321.78 2300000000.00] -123456.00 [-234567.00, -12345.00] 100.0"
    for number in f"{numbers} [90.0, [40.0, 60.0] -50.0 [-60.0, -40.0]".split():
        assert has(shown, number), shown
    assert all(has(shown, word) for word in name.split())
