"""What configurations cost, and which one is recommended."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import jsonl
from conftest import visible_pairs as pairs_of
from tiny_models import tiny
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM
from typer.testing import CliRunner

import swaa_flex
from swaa_flex import ConfigError, SWAAConfig
from swaa_flex.analysis.cost import Cost, Rates, estimate, measure, visible_pairs
from swaa_flex.analysis.recommend import FULL, Option, Quality, able, candidates, choose, qualities, shrunk
from swaa_flex.cli import app
from swaa_flex.cli import recommend as cli_recommend
from swaa_flex.evaluation import questions
from swaa_flex.evaluation.statistics import Interval
from swaa_flex.evaluation.summary import Cell, Summary

NEAR = SWAAConfig(9, 3, (), True, dense_tail=4)
FASTEST_MEMORY = Rates("none", matmul=1.0, attention=float("inf"), bandwidth=float("inf"))
FREE_PRODUCTS = Rates("none", matmul=float("inf"), attention=1.0, bandwidth=float("inf"))


@pytest.mark.parametrize(
    "config", [NEAR, replace(NEAR, dense_tail=0), FULL, replace(NEAR, sliding_window=60)], ids=repr
)
@pytest.mark.parametrize("length", [1, 8, 9, 12, 13, 50])
@pytest.mark.parametrize("layer", [0, 1])
def test_visible_pairs_are_those_of_the_mask(config, length, layer):
    config = replace(config, full_attention_layers=[1])
    mask = config.mask_for(layer, 2, prompt_length=length)
    assert visible_pairs(config, config.resolve(2)[layer], length) == pairs_of(mask, length, length).sum()


@pytest.mark.parametrize(
    "config",
    [FULL, NEAR, replace(NEAR, full_attention_decode=False), replace(NEAR, full_attention_layers="1::2")],
    ids=["full", "FA decode", "no FA decode", "half"],
)
def test_a_model_holds_what_is_estimated(config):
    model = tiny("llama").to(torch.bfloat16)
    swaa_flex.adapt(model, "balanced")
    before = model.config.swaa
    assert measure(model, config, 50, tokens=2).cache_bytes == estimate(model, config, 52).cache_bytes
    assert model.config.swaa == before


def test_models_without_grouped_queries_are_estimated():
    config = GPTNeoXConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    cost = estimate(GPTNeoXForCausalLM(config), FULL, 50)
    assert cost.cache_bytes == 2 * 2 * 4 * 8 * 2 * 50  # layers, keys and values, heads, head_dim, bytes, tokens


def test_the_estimate_counts_operations_and_bytes():
    model = tiny("llama", num_hidden_layers=2)
    text = model.config
    linear = sum(
        m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n
    )
    assert estimate(model, FULL, 50, FASTEST_MEMORY).first_token_s == 2 * linear * 50
    pairs = 50 * 51 // 2 * text.num_hidden_layers
    head_dim = text.hidden_size // text.num_attention_heads
    assert estimate(model, FULL, 50, FREE_PRODUCTS).first_token_s == 4 * text.num_attention_heads * head_dim * pairs
    slow = Rates("none", matmul=1.0, attention=1.0, bandwidth=1.0)
    head = model.lm_head.weight.numel()
    assert estimate(model, FULL, 50, slow).token_s == 2 * (linear + head) + estimate(model, FULL, 50).cache_bytes


def test_windows_shrink_with_the_prompt_and_sinks_only_so_far():
    config = SWAAConfig(2048, 128)
    assert shrunk(config, 131072, 16384) == replace(config, sliding_window=256, sink_tokens=16)
    assert shrunk(config, 131072, 1024) == replace(config, sliding_window=16, sink_tokens=4)
    assert shrunk(replace(config, sink_tokens=2), 131072, 1024).sink_tokens == 2
    assert shrunk(config, 4096, 4096) == config
    assert shrunk(FULL, 131072, 1024) == FULL


def test_candidates_vary_window_layers_and_decoding():
    found = candidates(NEAR, [2048, 5000], {"odd layers": "1::2"})
    assert list(found) == ["full attention"] + [
        f"window {w}{rest}" for w in ("2k", "5000") for rest in (", no FA decode", "", ", odd layers full")
    ]
    assert found["window 2k, odd layers full"] == replace(NEAR, sliding_window=2048, full_attention_layers="1::2")
    assert not found["window 5000, no FA decode"].full_attention_decode


def test_names_say_which_windows_run():
    found = candidates(NEAR, [2048, 50], {}, context=4096, length=1024)
    assert list(found)[1:] == [
        f"window {w}{rest}" for w in ("2k (run as 512)", "50 (run as 12)") for rest in (", no FA decode", "")
    ]
    assert [config.sliding_window for config in found.values()] == [None, 2048, 2048, 50, 50]
    assert list(candidates(NEAR, [50], {}, context=4096, length=4096))[1:] == ["window 50, no FA decode", "window 50"]


def test_quality_is_measured_on_prompts_that_leave_room_for_the_answers(small_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(cli_recommend, "ON_CPU", 1 << 20)  # as on a GPU: prompts of the context
    given = ("--samples", 1, "--tasks", "niah_single", "--windows", 16, "--out", tmp_path, "--json")
    done = run(small_llama, *given)
    # The model answers nothing right, which is found out after it has answered.
    assert done.exit_code == 1 and "full attention has no answer right" in done.stderr
    (facts,) = {json.loads(path.read_text())["length"] for path in tmp_path.glob("samples/*.json")}
    assert facts == 512 - 32
    assert run(small_llama, *given, "--length", 512).stderr.count("expected lengths of at most 480") == 1


def cell(config, task, value, low, high, metric="score"):
    return Cell(config, task, 1024, metric, 10, value, Interval(low, high), None)


SUMMARY = Summary(
    "tiny",
    0,
    {"full attention": {}, "mine": {}},
    "full attention",
    (
        cell("full attention", "niah", 0.8, 0.7, 0.9),
        cell("full attention", "vt", 0.0, 0.0, 0.1),
        cell("full attention", "ppl", 10.0, 9.0, 11.0, "perplexity"),
        cell("mine", "niah", 0.4, 0.2, 0.6),
        cell("mine", "vt", 0.1, 0.0, 0.2),
        cell("mine", "ppl", 20.0, 16.0, 40.0, "perplexity"),
    ),
)


def test_quality_is_relative_to_full_attention_where_that_can_do_the_task():
    full = able(SUMMARY, "full attention")
    found = qualities(SUMMARY, full)
    assert found["full attention"].ratio == 1
    assert found["mine"].by_task == {"niah": 0.5, "ppl": 0.5}
    assert found["mine"].ratio == 0.5
    assert found["mine"].low == pytest.approx((0.2 / 0.8 + 10 / 40) / 2)


def test_what_one_task_gains_does_not_pay_for_what_another_loses():
    cells = (
        cell("full attention", "one", 0.05, 0.0, 0.2),
        cell("full attention", "two", 1.0, 0.8, 1.0),
        cell("mine", "one", 0.1, 0.01, 0.3),
        cell("mine", "two", 0.1, 0.0, 0.2),
    )
    summary = replace(SUMMARY, cells=cells)
    found = qualities(summary, able(summary, "full attention"))["mine"]
    assert found.by_task == {"one": 2.0, "two": 0.1}
    assert found.ratio == pytest.approx(0.55) and found.low == pytest.approx(0.1)


def test_a_single_sample_tells_nothing():
    summary = replace(SUMMARY, cells=tuple(replace(cell, samples=1) for cell in SUMMARY.cells))
    assert qualities(summary, able(summary, "full attention"))["mine"].low == 0


def test_tasks_that_full_attention_fails_say_nothing():
    failing = replace(SUMMARY, cells=SUMMARY.cells[1:2])
    with pytest.raises(ConfigError, match="no answer right in vt; take shorter prompts"):
        able(failing, "full attention")


def option(name, ratio, seconds):
    return Option(name, NEAR, False, Quality(ratio, ratio, {}), Cost(seconds, 0.0, 0), seconds)


def test_the_fastest_that_keeps_enough_is_chosen():
    options = [option("full", 1.0, 10), option("half", 0.96, 6), option("worse", 0.9, 7), option("naive", 0.1, 2)]
    found = choose(options, 0.95, context=1, length=1, timed="")
    assert found.chosen.name == "half"
    assert [o.name for o in found.options] == ["naive", "half", "worse", "full"]
    assert [o.name for o in found.front] == ["naive", "half", "full"]
    assert choose(options, 0.97, context=1, length=1, timed="").chosen.name == "full"
    assert choose(options, 0.05, context=1, length=1, timed="").chosen.name == "naive"


def run(*arguments):
    runner = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1"})
    return runner.invoke(app, ["recommend", *map(str, arguments)])


def test_the_command_writes_a_configuration_table_and_picture(small_llama, tmp_path):
    pytest.importorskip("matplotlib")
    given = (small_llama, "--tasks", "ppl", "--samples", 2, "--context", 512, "--length", 384, "--out", tmp_path)
    done = run(*given, "--budget", 0.5, "--json")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed == json.loads((tmp_path / "recommend.json").read_text())
    assert SWAAConfig.from_json((tmp_path / "swaa.json").read_text()).to_dict() == printed["chosen"]["config"]
    assert (tmp_path / "recommend.png").read_bytes().startswith(b"\x89PNG")
    assert printed["timed"] == "estimated for NVIDIA H200"
    assert {o["config"]["sliding_window"] for o in printed["options"]} == {None, 8, 32}
    # What was measured is what the names say: 384 tokens in place of 512.
    measured = {o["name"].partition(",")[0]: o["measured"] for o in printed["options"]}
    windows = {name: config["sliding_window"] for name, config in measured.items()}
    assert windows == {"full attention": None, "window 8 (run as 6)": 6, "window 32 (run as 24)": 24}
    summary = json.loads((tmp_path / "summary.json").read_text())
    ran = {name.partition(",")[0]: config["sliding_window"] for name, config in summary["configs"].items()}
    assert ran == windows
    assert {config["dense_tail"] for config in measured.values() if config["sliding_window"]} == {64}
    assert [o["total_s"] for o in printed["options"]] == sorted(o["total_s"] for o in printed["options"])
    table = run(*given, "--budget", 1, "--time", "measured")
    assert table.exit_code == 0, table.output
    said = " ".join(table.stdout.split())
    assert "measured on this CPU" in said
    assert "in proportion to 512 (run as), 96 sinks and a dense tail of 64 rows" in said
    *lines, _, _, _ = table.stdout.splitlines()  # the last ones are to be copied, and do not wrap
    assert max(map(len, lines)) <= 100


def test_tasks_and_windows_are_lists_as_in_eval(small_llama, tmp_path):
    rows = [{"prompt": "red blue", "choices": ["green", "one"], "answer": 0}] * 3
    jsonl(tmp_path / "rows.jsonl", *rows)
    tasks = f"choice:{tmp_path / 'rows.jsonl'}, ppl"
    given = ("--samples", 2, "--context", 512, "--length", 384, "--windows", "16, 32", "--out", tmp_path / "out")
    done = run(small_llama, "--tasks", tasks, *given)
    assert done.exit_code == 0, done.output


def test_a_model_that_always_thinks_is_measured_thinking(small_llama, tmp_path, monkeypatch):
    monkeypatch.setitem(questions.NEW_TOKENS, "cot", 16)  # a thousand would take minutes
    thinks = AutoTokenizer.from_pretrained(small_llama)
    thinks.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}<think>"
    thinks.save_pretrained(tmp_path / "model")
    tiny("llama").save_pretrained(tmp_path / "model")
    rows = [{"prompt": "red blue", "question": "green", "answer": "one"}] * 2
    jsonl(tmp_path / "rows.jsonl", *rows)
    given = ("--samples", 2, "--context", 512, "--length", 384, "--out", tmp_path / "out", "--json")
    done = run(tmp_path / "model", "--tasks", f"ppl,qa:{tmp_path / 'rows.jsonl'}", *given)
    assert done.exit_code == 0, done.output
    assert all(option["thinks"] for option in json.loads(done.stdout)["options"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--budget", 1.5), "--budget 1.5: expected a share"),
        (("--time", "measure"), "did you mean"),
        (("--samples", 0), "--samples 0: expected at least 1"),
        (("--context", "many"), "--context many: expected a number of tokens"),
        (("--context", "128k"), "the model goes no further than"),
        (("--context", 256, "--length", 512), "--length 512: expected at most the 256 tokens"),
        (("--tasks", "nia"), "did you mean 'niah'"),
    ],
)
def test_what_cannot_be_is_refused(arguments, said, small_llama, tmp_path):
    done = run(small_llama, *arguments, "--out", tmp_path)
    assert done.exit_code == 1
    assert said in done.stderr
    assert not list(tmp_path.iterdir())
