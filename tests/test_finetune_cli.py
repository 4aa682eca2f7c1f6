"""`swaa-flex finetune` and `merge`, from a file of answers to a plain model."""

import json

import pytest
import torch
from conftest import jsonl
from tiny_models import words_model
from tiny_tokenizers import words_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from swaa_flex import SWAAConfig, recipes
from swaa_flex.cli import app
from swaa_flex.tuning import load_adapter, prompt_ids

pytest.importorskip("peft")

RECIPE = SWAAConfig(4, 1, (1,), True, 2)
QUESTION = "red green blue one two three red"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    words_model().save_pretrained(folder / "model")
    words_tokenizer().save_pretrained(folder / "model")
    (folder / "recipe.json").write_text(json.dumps(RECIPE.to_dict()))
    rows = [{"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "blue"}]}] * 8
    rows += [{"prompt": QUESTION, "question": "which", "answer": "blue"}, {"prompt": ""}]
    jsonl(folder / "train.jsonl", *rows)
    return folder


@pytest.fixture(scope="module")
def tuned(folder):
    done = run(
        *("finetune", folder / "model", folder / "train.jsonl", folder / "run", "--recipe", folder / "recipe.json"),
        *("--epochs", 12, "--batch-size", 3, "--accumulation", 1, "--lr", 0.02, "--held-out", folder / "train.jsonl"),
        *("--save-steps", 30),
    )
    assert done.exit_code == 0, done.output
    return done.output


def test_finetune_writes_an_adapter_that_has_learned_the_answers(folder, tuned):
    assert "1 rows of" in tuned and "row 9" in tuned  # the empty prompt
    assert "held-out loss" in tuned and "tokens/s" in tuned
    assert f"9 samples, wrote {folder / 'run' / 'adapter'}" in tuned
    assert json.loads((folder / "run" / "adapter" / "swaa_config.json").read_text()) == RECIPE.to_dict()
    assert str(folder) not in "".join(path.read_text("latin1") for path in (folder / "run" / "adapter").iterdir())
    model = load_adapter(AutoModelForCausalLM.from_pretrained(folder / "model"), folder / "run" / "adapter").eval()
    assert answer(model, folder) == "blue <end>"


def test_merge_writes_a_plain_model_with_the_recipe(folder, tuned):
    done = run("merge", folder / "model", folder / "run" / "adapter", folder / "merged")
    assert done.exit_code == 0, done.output
    assert f"with the recipe {RECIPE}" in done.output
    model = AutoModelForCausalLM.from_pretrained(folder / "merged", attn_implementation="swaa_flex").eval()
    assert model.config.swaa == RECIPE.to_dict()
    assert answer(model, folder) == "blue <end>"
    assert AutoTokenizer.from_pretrained(folder / "merged").chat_template


def test_merge_says_which_recipe_it_took_instead_of_the_adapters_own(folder, tuned):
    done = run("merge", folder / "model", folder / "run" / "adapter", folder / "other", "--recipe", "naive")
    assert done.exit_code == 0, done.output
    assert f"with the recipe {recipes.get('naive')}" in done.output
    assert AutoConfig.from_pretrained(folder / "other").swaa == recipes.get("naive").to_dict()


def test_a_merge_that_is_interrupted_leaves_nothing_and_starts_over(folder, tuned, tmp_path, monkeypatch):
    def interrupted(*args):
        for name in ("config.json", "model.safetensors"):
            assert (tmp_path / "merged" / name).is_file()
        raise KeyboardInterrupt

    merge = ("merge", folder / "model", folder / "run" / "adapter", tmp_path / "merged")
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", interrupted)
        stopped = run(*merge)
    assert stopped.exit_code == 130 and "Nothing is written; the same command starts over." in stopped.stderr
    assert list(tmp_path.iterdir()) == []
    assert run(*merge).exit_code == 0
    assert "config.json.lock" not in {path.name for path in (tmp_path / "merged").iterdir()}


def answer(model, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = torch.tensor([prompt_ids(tokenizer, [{"role": "user", "content": QUESTION}])])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :])


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (("--recipe", "qality"), "did you mean 'quality'"),
        (("--recipe", "nowhere.json"), "--recipe nowhere.json: expected a JSON file with the fields"),
        (("--targets", "q_proj,w_proj"), "no linear layer 'w_proj'"),
        (("--objective", "dpo"), "objective='dpo': expected one of ce, kl"),
        (("--max-length", "3"), "no row is left"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_wrong_options_are_one_red_line(folder, tmp_path, changed, problem):
    done = run("finetune", folder / "model", folder / "train.jsonl", tmp_path / "run", *changed)
    assert done.exit_code == 1
    assert problem in done.output
    assert not (tmp_path / "run").exists()


def test_rows_that_are_too_long_are_named_by_their_place_in_the_file(folder, tmp_path):
    rows = [
        {"prompt": ""},
        {"prompt": f"{QUESTION} {QUESTION}", "answer": "blue"},
        {"prompt": "red", "answer": "blue"},
    ]
    jsonl(tmp_path / "data.jsonl", *rows)
    recipe = ("--recipe", folder / "recipe.json", "--max-steps", 1)
    done = run("finetune", folder / "model", tmp_path / "data.jsonl", tmp_path / "run", *recipe, "--max-length", 12)
    assert done.exit_code == 0 and "row 0: " in done.output, done.output
    assert "row 1: " in done.output and "more than max_length=12" in done.output
    refused = run("finetune", folder / "model", tmp_path / "data.jsonl", tmp_path / "new", *recipe, "--max-length", 0)
    assert refused.exit_code == 1 and "max_length=0: expected at least 1 token" in refused.output


def test_a_model_is_not_merged_into_itself_or_a_file(folder, tuned, tmp_path):
    before = sorted((path.name, path.read_bytes()) for path in (folder / "model").iterdir())
    (tmp_path / "file").write_text("mine")
    for out, problem in ((folder / "model", "is the base model itself"), (tmp_path / "file", "is a file")):
        done = run("merge", folder / "model", folder / "run" / "adapter", out)
        assert done.exit_code == 1 and problem in " ".join(done.output.split()), done.output
    assert sorted((path.name, path.read_bytes()) for path in (folder / "model").iterdir()) == before
