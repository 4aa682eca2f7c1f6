"""`swaa-flex layers`: what it prints, writes and refuses."""

import json
import sys

import pytest
from tiny_tokenizers import passkey_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import swaa_flex
from swaa_flex import ConfigError, SWAAConfig
from swaa_flex.analysis import evaluations
from swaa_flex.cli import app, layers
from swaa_flex.cli import tokens as token_counts

LAYERS = 4
SMALL = ("--window", 6, "--sinks", 2, "--length", 40, "--texts", 2)


def run(*arguments):
    runner = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1"})
    return runner.invoke(app, ["layers", *map(str, arguments)])


@pytest.fixture(autouse=True)
def few_scored_tokens(monkeypatch):
    monkeypatch.setattr(layers, "SCORED", 8)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("lazy", "forwards of 40 tokens: 2"),
        ("sensitivity", "5 losses of 2 texts: 10 forwards of 48 tokens"),
        ("greedy", "8 losses of 2 texts: 16 forwards of 48 tokens"),
    ],
)
def test_each_method_writes_a_configuration_that_the_model_takes(method, said, small_llama, tmp_path):
    pytest.importorskip("matplotlib")
    done = run(small_llama, "--method", method, *SMALL, "--out", tmp_path, "--json")
    assert done.exit_code == 0, done.output
    assert said in done.stderr
    printed = json.loads(done.stdout)
    assert printed == json.loads((tmp_path / "layers.json").read_text())
    assert (printed["method"], len(printed["scores"]), len(printed["order"])) == (method, LAYERS, 2)
    config = SWAAConfig.from_json((tmp_path / "swaa.json").read_text())
    expected = SWAAConfig(sliding_window=6, sink_tokens=2, full_attention_layers=sorted(printed["order"]))
    assert config == expected == SWAAConfig.from_dict(printed["config"])
    assert swaa_flex.adapt(AutoModelForCausalLM.from_pretrained(small_llama), config).config.swaa == config.to_dict()
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert "layers.png" in done.stderr


def test_the_table_has_a_row_per_layer_and_names_the_full_ones(small_llama):
    done = run(small_llama, "--budget", 1, *SMALL)
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    [full] = [row for row in rows if row[1] == "full"]
    assert float(full[2]) == max(float(row[2]) for row in rows)
    assert done.stdout.splitlines()[-1] == f"full_attention_layers=[{full[0]}]"
    assert max(len(line) for line in done.stdout.splitlines()) <= 80


def test_a_search_that_was_interrupted_goes_on(small_llama, tmp_path, monkeypatch):
    calls = []
    real = layers.AnswerLoss.__call__

    def counted(self, model):
        if len(calls) == 3:
            calls.append(None)
            raise OSError("disk full")
        calls.append(tuple(model.config.swaa["full_attention_layers"]))
        return real(self, model)

    monkeypatch.setattr(layers.AnswerLoss, "__call__", counted)
    search = (small_llama, "--method", "greedy", *SMALL, "--out", tmp_path)
    stopped = run(*search)
    assert (stopped.exit_code, stopped.stderr.splitlines()[-1]) == (1, "Error: disk full")
    assert run(*search).exit_code == 0
    asked = [call for call in calls if call is not None]
    assert len(asked) == len(set(asked)) == evaluations("greedy", LAYERS, 2)


def test_other_text_is_another_search(small_llama, tmp_path):
    (tmp_path / "book.txt").write_text("The grass is green. The sky is blue. " * 20, "utf-8")
    search = (small_llama, "--method", "sensitivity", *SMALL, "--out", tmp_path)
    assert run(*search).exit_code == 0
    other = run(*search, "--text", tmp_path / "book.txt")
    assert other.exit_code == 1
    assert "differs in loss; delete it" in other.stderr


def test_texts_are_spread_over_the_file(tmp_path):
    tokenizer = passkey_tokenizer()
    ids = tokenizer(" ".join(map(str, range(10, 40)))).input_ids  # a token per digit
    (tmp_path / "book.txt").write_text(" ".join(map(str, range(10, 40))), "utf-8")
    found = layers._stretches(tokenizer, tmp_path / "book.txt", 20, 3)
    assert found == [ids[:20], ids[20:40], ids[40:]]
    assert layers._stretches(tokenizer, tmp_path / "book.txt", 59, 2) == [ids[:59], ids[1:]]
    with pytest.raises(ConfigError, match="too few for 2 stretches of 60"):  # they would be the same
        layers._stretches(tokenizer, tmp_path / "book.txt", 60, 2)


@pytest.mark.parametrize(("given", "tokens"), [("3000", 3000), ("1k", 1024), ("16K", 16384)])
def test_lengths_are_tokens_or_thousands_of_them(given, tokens):
    assert token_counts.read("--length", given) == tokens


def test_without_matplotlib_all_but_the_picture_is_written(small_llama, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run(small_llama, *SMALL, "--out", tmp_path)
    assert done.exit_code == 0
    assert "no picture: LayerChoice.draw needs matplotlib" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layers.json", "swaa.json"]


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (("--method", "lasy"), "did you mean 'lazy'"),
        (("--texts", 0), "--texts 0: expected at least 1"),
        (("--length", "2m"), "--length 2m: expected a number of tokens"),
        (("--length", 8), "--length 8: expected more than the 8 tokens that --window 6 and --sinks 2 show"),
        (("--budget", 4), "budget=4: expected a number of full layers from 1 to 3"),
        (("--length", 513), "--length 513: 513 tokens are read, and the model goes no further than 512"),
        (("--window", 0), "sliding_window=0"),
        (("--text", "short.txt"), "short.txt has 2 tokens, too few for"),
        (("--out", "short.txt"), "--out short.txt: it is a file; expected a folder"),
        (("--text", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(changed, problem, small_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("green grass", "utf-8")
    done = run(small_llama, *SMALL, *changed)
    assert done.exit_code == 1
    assert problem in done.stderr
    assert len(done.stderr.splitlines()) == 1
