"""`swaa-flex eval`: from a model, tasks and recipes to a table, a summary and a picture."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from conftest import jsonl
from rich.console import Console
from tiny_models import words_model
from tiny_tokenizers import words_tokenizer
from typer.testing import CliRunner

from swaa_flex import ConfigError, SWAAConfig, adapt, recipes
from swaa_flex.cli import app, checkpoint
from swaa_flex.cli import eval as eval_cli
from swaa_flex.evaluation import report, scoring, settings
from swaa_flex.evaluation.statistics import Interval
from swaa_flex.evaluation.summary import Cell, Comparison, Summary
from swaa_flex.tuning import Example, TuningConfig, finetune

torch.set_num_threads(1)
MINE = SWAAConfig(4, 1, (1,), True, 2)


def run(*arguments, **environment):
    environment = {"COLUMNS": "100", "NO_COLOR": "1", **environment}
    return CliRunner(env=environment).invoke(app, ["eval", *map(str, arguments)], catch_exceptions=False)


def answered(*arguments, **environment):
    done = run(*arguments, **environment)
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    words_model().save_pretrained(folder / "model")
    words_tokenizer().save_pretrained(folder / "model")
    (folder / "mine.json").write_text(MINE.to_json())
    (folder / "text.txt").write_text("red green blue one two three two one " * 300)
    rows = [{"prompt": f"red {word} green", "answer": word} for word in ("blue", "one", "two", "three")]
    jsonl(folder / "rows.jsonl", *rows, {"prompt": ""})
    return folder


@pytest.fixture
def given(folder, tmp_path):
    """The arguments of most tests."""
    tasks = f"qa:{folder / 'rows.jsonl'},ppl"
    options = ("--tasks", tasks, "--text", folder / "text.txt", "--lengths", "300", "--samples", 3)
    return (folder / "model", "--recipes", f"full,naive,{folder / 'mine.json'}", *options, "--out", tmp_path / "out")


def test_eval_prints_a_table_and_writes_summary_and_picture(given, folder, tmp_path):
    pytest.importorskip("matplotlib")
    done = answered(*given)
    assert "1 rows of qa:rows are left out:" in done.stderr and "row 4" in done.stderr
    assert "naive: the window covers all of 300, so there is nothing to measure" in done.stderr
    assert f"wrote summary.json and summary.png to {tmp_path / 'out'}" in done.stderr
    assert (tmp_path / "out" / "summary.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary["configs"]) == ["full", "naive", "mine.json"]
    assert summary["configs"]["naive"] == recipes.get("naive").to_dict()
    assert summary["configs"]["mine.json"] == MINE.to_dict()
    found = {(cell["task"], cell["config"]): cell for cell in summary["cells"]}
    assert len(found) == 6
    assert all(cell["samples"] == 3 and cell["length"] == 300 for cell in found.values())
    # The window of `naive` is longer than the texts, so it is full attention; the other one is not.
    assert found["ppl", "naive"]["value"] == pytest.approx(found["ppl", "full"]["value"], rel=1e-5)
    mine = found["ppl", "mine.json"]
    assert abs(mine["against_full"]["difference"]) > 1e-3
    assert f"{mine['value']:.2f} [{mine['interval'][0]:.2f}, {mine['interval'][1]:.2f}]" in done.stdout
    assert f"p = {mine['against_full']['p']:.3f}" in done.stdout
    assert "qa:rows" in done.stdout and "300, n 3" in done.stdout and "mine.json" in done.stdout


def test_files_of_one_name_are_told_apart_by_their_paths(tmp_path):
    paths = [tmp_path / name / "mine.json" for name in ("a", "b")]
    for size, path in enumerate(paths, 4):
        path.parent.mkdir()
        path.write_text(replace(MINE, sliding_window=size).to_json())
    found = eval_cli._recipes(",".join(map(str, paths)), None, None, None)
    assert {name: config.sliding_window for name, config in found.items()} == {"mine.json": 4, str(paths[1]): 5}


def test_json_is_the_summary_in_one_line_and_nothing_else(given, tmp_path):
    done = answered(*given, "--json")
    assert json.loads(done.stdout) == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert done.stdout.count("\n") == 1


def test_a_second_run_computes_nothing(given, monkeypatch):
    first = answered(*given).stdout
    monkeypatch.setattr(scoring, "results", lambda *_: pytest.fail("computed again"))
    assert answered(*given).stdout == first


def test_windows_and_sinks_shrink_for_small_models(folder, given, tmp_path):
    names = f"full,naive,quality,{folder / 'mine.json'}"
    summary = json.loads(answered(*given, "--recipes", names, "--window", 16, "--sinks", 3, "--json").stdout)
    sizes = {name: (config["sliding_window"], config["sink_tokens"]) for name, config in summary["configs"].items()}
    assert sizes == {"full": (None, 0), "naive": (16, 0), "quality": (64, 3), "mine.json": (4, 1)}


def test_without_matplotlib_there_is_a_line_about_it(given, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = answered(*given)
    assert "no picture: the picture needs matplotlib: pip install 'swaa-flex[plot]'\n" in done.stderr
    assert "wrote summary.json to" in done.stderr


def test_the_model_of_the_demo_is_the_default(given, folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "installed", lambda: str(folder / "model"))
    assert answered(*given[1:]).stdout == answered(*given).stdout


def test_an_adapter_is_measured_on_its_model(given, folder, tmp_path):
    pytest.importorskip("peft")
    examples = [Example([6, 7, 8, 9, 10, 3], [False] * 4 + [True] * 2)] * 4
    config = TuningConfig(max_steps=2, gradient_accumulation=1, learning_rate=0.1)
    model = adapt(checkpoint.load(str(folder / "model"))[0], MINE)
    finetune(model, examples, tmp_path / "run", config=config, quiet=True)
    plain = json.loads(answered(*given, "--json").stdout)
    tuned = json.loads(answered(*given, "--adapter", tmp_path / "run" / "adapter", "--json").stdout)
    of_plain, of_tuned = ([c["value"] for c in found["cells"] if c["task"] == "ppl"] for found in (plain, tuned))
    assert all(abs(a - b) > 1e-3 for a, b in zip(of_plain, of_tuned, strict=True))


# --- settings of the reference implementation ---------------------------------------------------------------


def reference(window, sinks=0, decode=False, full=(), models=("a",)):
    values = {"sliding_window_size": window, "keep_first": sinks, "force_fa_decode": decode}
    return {"swaa_config": {**values, "non_sliding_layers": list(full)}, "model_list": list(models)}


def written(path, entries):
    path.write_text(json.dumps(entries))
    return path


def test_settings_are_read_by_model(tmp_path):
    path = written(tmp_path / "s.json", [reference(None, models=["a", "b"]), reference(2000, 10, models=["b"])])
    found = settings.read_settings(path)
    assert list(found) == ["a", "b"]
    assert found["a"] == [reference(None)["swaa_config"]]
    assert found["b"] == [reference(None)["swaa_config"], reference(2000, 10)["swaa_config"]]


def test_settings_have_names_that_tell_them_apart():
    entries = [
        reference(None),
        reference(2000),
        reference(2048),
        reference(2000, 100, True, range(1, 48, 2)),
        reference(2000, 100, True, range(1, 48, 4)),
        reference(2000, 0, [0, 3], [0, 5]),
        reference(2000),
    ]
    found = settings.named([entry["swaa_config"] for entry in entries], 36)
    assert list(found) == [
        "full",
        "W 2000",
        "W 2048",
        "W 2000, K 100, D, full 1::2",
        "W 2000, K 100, D, full 1::4",
        "W 2000, D 0 3, full 0 5",
    ]
    assert found["W 2000, K 100, D, full 1::2"] == SWAAConfig(2000, 100, tuple(range(1, 36, 2)), True, 0)


def test_settings_run_on_their_models_or_on_the_one_given(folder, given, tmp_path):
    models = [str(folder / "model"), str(folder / "model") + "/"]
    path = written(tmp_path / "s.json", [reference(None, models=models), reference(4, 1, True, [1, 3], models=models)])
    model, _, _, *given = given  # settings are in place of --recipes
    done = answered(*given, "--settings", path, "--json")
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["cells"] == second["cells"]
    assert list(first["configs"]) == ["full", "W 4, K 1, D, full 1::1"] and first["baseline"] == "full"
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["1-model", "2-model"]
    on_given = json.loads(answered(model, *given, "--settings", path, "--json", "--out", tmp_path / "one").stdout)
    assert on_given["cells"] == first["cells"]


@pytest.mark.parametrize(
    "entries", [{}, [], [{"swaa_config": {}}], [{"model_list": ["a"]}], ["a"], [reference(1, models=[])]]
)
def test_other_files_are_no_settings(entries, tmp_path):
    with pytest.raises(ConfigError, match="expected"):
        settings.read_settings(written(tmp_path / "s.json", entries))


# --- tables --------------------------------------------------------------------------------------------------


def shown(summary, width):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        for table in report.tables(summary, width):
            console.print(table)
    return capture.get()


def test_a_table_has_value_interval_difference_and_p():
    less = Comparison(-0.1, Interval(-0.152, -0.047), 0.0004)
    more = Comparison(1.0, Interval(0.5, 1.5), 0.0213)
    cells = (
        Cell("full", "niah", 2048, "score", 200, 0.86, Interval(0.805, 0.901), None),
        Cell("fast", "niah", 2048, "score", 200, 0.76, Interval(0.696, 0.814), less),
        Cell("full", "ppl", 3000, "perplexity", 50, 14.5, Interval(13.0, 16.25), None),
        Cell("fast", "ppl", 3000, "perplexity", 50, 15.5, Interval(14.0, 17.0), more),
    )
    summary = Summary("m", 0, {"full": {}, "fast": {}}, "full", cells)
    lines = [line.rstrip() for line in shown(summary, 80).splitlines()]
    assert lines[0].split() == ["niah", "ppl"]
    assert lines[1].split("  ")[0] == "recipe" and "2k, n 200" in lines[1] and "3000, n 50" in lines[1]
    row = lines.index(next(line for line in lines if line.startswith("fast")))
    assert lines[row].split(maxsplit=1)[1].startswith("76.0 [69.6, 81.4]") and "15.50 [14.00, 17.00]" in lines[row]
    assert "-10.0 [-15.2, -4.7]" in lines[row + 1] and "+1.00 [+0.50, +1.50]" in lines[row + 1]
    assert "p < 0.001" in lines[row + 2] and "p = 0.021" in lines[row + 2]
    wide = replace(summary, cells=tuple(replace(c, task=f"qa:{c.task}[bold] of a long name") for c in cells))
    for width in (30, 60, 100):  # a column that does not fit is cut, the names of the recipes are not
        lines = shown(wide, width).splitlines()
        assert sum(line.startswith("fast ") for line in lines) == (1 if width == 100 else 2)
    assert "[bold] of a long name" in shown(wide, 100)
    narrow = shown(summary, 45)
    assert narrow.count("recipe") == 2 and max(map(len, narrow.splitlines())) <= 45
    assert "fast\n" not in narrow and "not corrected" in report.notes(summary)


def test_without_full_attention_the_notes_say_so():
    summary = Summary("m", 0, {"fast": {}}, None, ())
    assert "Without full attention among the configurations" in report.notes(summary)


# --- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (("--recipes", "full,qality"), "did you mean 'quality'"),
        (("--recipes", "nowhere.json"), "--recipes nowhere.json: "),
        (("--tasks", "nia"), "did you mean 'niah'"),
        (("--lengths", "4m"), "--lengths 4m: expected a number of tokens such as 3000, or 4k for 4096"),
        (("--lengths", "1k,4k"), "length 4096: expected 1 to 2048 tokens"),
        (("--window", "0"), "--window 0: expected at least 1 token"),
        (("--samples", "0"), "count=0: expected at least 1"),
        (("--out", __file__), f"--out {__file__}: it is a file; expected a folder"),
        (("--settings", "nowhere.json"), "and --settings: expected one of them"),
        (("--judge", "exact", "--tasks", "ppl"), "--judge exact: it is for answers to qa:FILE"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(changed, problem, given, tmp_path):
    done = run(*given, *changed)
    assert done.exit_code == 1
    error = next(line for line in done.stderr.splitlines() if line.startswith("Error: "))
    assert problem in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changed", [("--recipes", "full,qality"), ("--tasks", "nia"), ("--lengths", "4m")])
def test_it_is_said_before_the_model_is_loaded(changed, given, monkeypatch):
    monkeypatch.setattr(checkpoint, "load", lambda name: pytest.fail("loaded"))
    assert run(*given, *changed).exit_code == 1
