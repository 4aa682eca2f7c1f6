"""`swaa-flex run`: programs that know nothing of swaa_flex, with its name registered and a recipe."""

import json
import os
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from swaa_flex import ConfigError, SWAAConfig, recipes
from swaa_flex.cli import app
from swaa_flex.cli.run import harness_model
from swaa_flex.hf.config import RECIPE_VARIABLE, default_recipe, swaa_of

# Loads the model it is given as a user's program would, runs it, and writes down what it saw.
PROGRAM = """
import json, os, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM

folder, *others = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="swaa_flex").eval()
with torch.no_grad():
    model(torch.arange(8)[None])
seen = {"name": __name__, "file": Path(sys.argv[0]).name, "others": others, "swaa": model.config.swaa,
        "attention": model.config._attn_implementation}
Path(f"seen-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(seen))
sys.exit(7)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=9)
    LlamaForCausalLM(LlamaConfig(**size)).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder of its own to run in, and nothing that stays behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv(RECIPE_VARIABLE, "balanced")
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, ["run", *map(str, arguments)])


def warned(done):
    """The lines of the warning at the end, behind the progress of loading."""
    return "".join(done.stderr.partition("Warning: ")[1:]).splitlines()


def seen(folder, rank=0):
    return json.loads((folder / f"seen-{rank}.json").read_text())


@pytest.mark.parametrize("how", [("-m", "program"), ("program.py",), ("-m", "package")])
def test_a_program_runs_as_main_with_its_arguments_and_its_exit_code(how, here, model):
    (here / "program.py").write_text(PROGRAM)
    (here / "package").mkdir()
    (here / "package" / "__main__.py").write_text(PROGRAM)
    others = ["--help", "--debug", "-m", "--swaa", "full", "--", ""]
    assert run("--swaa", "naive", *how, model, *others).exit_code == 7
    assert seen(here) == {
        "name": "__main__",
        "file": "__main__.py" if "package" in how else "program.py",
        "others": others,
        "swaa": recipes.get("naive").to_dict(),
        "attention": "swaa_flex",
    }


OWN = SWAAConfig(sliding_window=5, sink_tokens=1, full_attention_layers=[1])


@pytest.mark.parametrize("form", ["name", "file", "json"])
def test_a_recipe_is_a_name_a_file_or_json(form, here, model):
    (here / "program.py").write_text(PROGRAM)
    (here / "own.json").write_text(OWN.to_json())
    run("--swaa", {"name": "quality", "file": "own.json", "json": OWN.to_json()}[form], "program.py", model)
    expected = recipes.get("quality", "llama") if form == "name" else OWN
    assert seen(here)["swaa"] == expected.to_dict()


def test_a_model_keeps_a_recipe_of_its_own(model, monkeypatch):
    monkeypatch.setenv(RECIPE_VARIABLE, "naive")
    with pytest.warns(UserWarning, match="SWAA_FLEX_RECIPE='naive' .* is for models without a recipe of their own"):
        loaded = AutoModelForCausalLM.from_pretrained(model, attn_implementation="swaa_flex", swaa=OWN)
    assert swaa_of(loaded.config) == OWN
    assert swaa_of(AutoModelForCausalLM.from_pretrained(model, attn_implementation="swaa_flex").config) == recipes.get(
        "naive"
    )


@pytest.mark.filterwarnings("ignore:SWAA_FLEX_RECIPE=")
def test_a_checkpoint_with_a_recipe_runs_it_in_a_program_that_does_not_know_of_it(here, model):
    merged = here / "merged"
    AutoModelForCausalLM.from_pretrained(model, swaa=OWN).save_pretrained(merged)
    (here / "program.py").write_text(PROGRAM.replace('attn_implementation="swaa_flex"', ""))
    assert run("--swaa", OWN.to_json(), "program.py", merged).exit_code == 7
    assert seen(here)["swaa"] == OWN.to_dict() and seen(here)["attention"] == "swaa_flex"
    with pytest.warns(UserWarning, match=r"SWAA_FLEX_RECIPE='full' \(swaa-flex run --swaa\) .* runs it"):
        run("--swaa", "full", "program.py", merged)
    assert seen(here)["swaa"] == OWN.to_dict() and seen(here)["attention"] == "swaa_flex"


@pytest.mark.parametrize("how", ["--swaa", "variable"])
@pytest.mark.parametrize("ends_with", ["sys.exit(7)", "raise KeyError('own')", ""])
def test_models_without_the_recipe_are_named_at_the_end(how, ends_with, here, model, monkeypatch):
    plain = PROGRAM.replace(', attn_implementation="swaa_flex"', "").replace("sys.exit(7)", "")
    (here / "program.py").write_text(f"{plain}\n{ends_with}\n")
    monkeypatch.setenv(RECIPE_VARIABLE, "naive")
    done = run(*(("--swaa", "naive") if how == "--swaa" else ()), "program.py", model)
    assert done.exit_code == {"sys.exit(7)": 7, "": 0}.get(ends_with, 1)
    named = {"--swaa": "--swaa naive", "variable": "SWAA_FLEX_RECIPE=naive"}[how]
    assert warned(done) == [
        f"Warning: {named} was not run by these models of the program:",
        f"  LlamaForCausalLM ({model}) has attn_implementation='sdpa'; the program is to load it with "
        'attn_implementation="swaa_flex"',
    ]
    monkeypatch.setenv("RANK", "1")
    assert warned(run("--swaa", "naive", "program.py", model)) == []


@pytest.mark.filterwarnings("ignore:SWAA_FLEX_RECIPE=", "ignore:attn_implementation=")
@pytest.mark.parametrize(
    ("program", "reasons"),
    [
        ("load(attn_implementation='swaa_flex')", []),
        ("swaa_flex.adapt(load(), 'naive')", []),
        ("load(swaa='naive')", []),
        ("load(swaa='fast'); load(swaa='fast')", ["has a recipe of its own, {'sliding_window': 2048"]),
        ("load(swaa='naive', attn_implementation='eager')", ["has attn_implementation='eager'"]),
        ("load(swaa='naive').set_attn_implementation('sdpa')", ["has attn_implementation='sdpa'"]),
        ("swaa_flex.restore(load(swaa='naive'))", ["has attn_implementation='sdpa'"]),
        ("load(); load(swaa='full')", ["has attn_implementation='sdpa'", "has a recipe of its own, {"]),
    ],
)
def test_each_model_is_named_with_the_reason_once_and_its_parts_are_not(program, reasons, here, model):
    (here / "program.py").write_text(
        "import functools\nfrom transformers import AutoModelForCausalLM\nimport swaa_flex\n"
        f"load = functools.partial(AutoModelForCausalLM.from_pretrained, {str(model)!r})\n{program}\n"
    )
    before = PreTrainedModel.post_init
    done = run("--swaa", "naive", "program.py")
    assert done.exit_code == 0 and PreTrainedModel.post_init is before
    lines = warned(done)[1:]
    assert len(lines) == len(reasons), done.stderr
    for line, reason in zip(lines, reasons, strict=True):
        assert line.startswith(f"  LlamaForCausalLM ({model}) {reason}")


def test_the_vision_tower_of_a_model_is_a_part_of_it(here):
    (here / "program.py").write_text(
        "from tiny_models import composite\n"
        "from transformers import AutoModelForImageTextToText\n"
        "model = AutoModelForImageTextToText.from_config(composite(swaa='naive'))\n"
        "assert model.config.vision_config._attn_implementation == 'sdpa'\n"
    )
    done = run("--swaa", "naive", "program.py")
    assert (done.exit_code, done.stderr) == (0, "")


def test_without_a_recipe_it_is_that_of_the_environment_or_the_default(here, model, monkeypatch):
    (here / "program.py").write_text(PROGRAM)
    monkeypatch.setenv(RECIPE_VARIABLE, "fast")
    run("program.py", model)
    assert seen(here)["swaa"] == recipes.get("fast").to_dict()
    monkeypatch.delenv(RECIPE_VARIABLE)
    run("program.py", model)
    assert seen(here)["swaa"] == recipes.get("balanced", "llama").to_dict()


@pytest.mark.parametrize("error", ["ImportError('no such thing')", "OSError('disk')", "ValueError('bad')"])
def test_the_exceptions_of_a_program_are_passed_on(error, here):
    (here / "program.py").write_text(f"raise {error}")
    done = run("-m", "program")
    assert repr(done.exception) == error
    assert "Error" not in done.output


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("-m", "nowhere"), "-m nowhere: expected a module"),
        (("-m", "nowhere.deeper"), "-m nowhere.deeper: cannot be run (No module named 'nowhere')"),
        (("-m", "json"), "-m json: expected a module, or a package with __main__.py"),
        (("program",), "program: expected a Python script; a module takes -m: swaa-flex run -m program"),
        (("--swaa", "qality", "program.py"), "did you mean 'quality'"),
        (("--swaa", '{"window": 5}', "program.py"), "unknown key 'window'"),
        (("--swaa", "nowhere.json", "program.py"), "nowhere.json"),
    ],
)
def test_what_cannot_run_is_one_line_and_nothing_runs(arguments, problem, here):
    (here / "program.py").write_text("from pathlib import Path; Path('ran').touch()")
    done = run(*arguments)
    assert done.exit_code == 1
    assert problem in done.output and done.output.count("\n") == 1
    assert not (here / "ran").exists()


def test_a_recipe_that_cannot_be_read_is_named(here):
    (here / "bytes.json").write_bytes(b"\xff\xfe")
    for given, problem in (
        ("nope", "--swaa nope: "),
        ("bytes.json", "--swaa bytes.json: "),
        ("no.json", "No such file"),
    ):
        done = CliRunner().invoke(app, ["run", "--swaa", given, "script.py"])
        assert done.exit_code == 1 and problem in done.output and "SWAA_FLEX_RECIPE" not in done.output


def test_a_wrong_variable_is_named(monkeypatch):
    monkeypatch.setenv(RECIPE_VARIABLE, "fst")
    with pytest.raises(ConfigError, match=r"SWAA_FLEX_RECIPE: unknown recipe 'fst'.*did you mean 'fast'"):
        default_recipe()


def test_every_process_of_a_launcher_has_the_recipe(here, model):
    (here / "program.py").write_text(PROGRAM.replace("sys.exit(7)", ""))
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    program = ("swaa_flex", "run", "--swaa", "naive", "-m", "program", str(model), "--nproc-per-node=9")
    subprocess.run([sys.executable, "-m", *launcher, *program], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for rank in (0, 1):
        assert seen(here, rank)["others"] == ["--nproc-per-node=9"]
        assert seen(here, rank)["swaa"] == recipes.get("naive").to_dict()


UNDER_SWAA_FLEX = ("--model_args", "pretrained=m,attn_implementation=swaa_flex")


@pytest.mark.parametrize(
    ("arguments", "model"),
    [
        (("--model", "hf", *UNDER_SWAA_FLEX), "hf"),
        ((*UNDER_SWAA_FLEX, "--model=huggingface"), "huggingface"),
        (("run", "-M", "hf-auto", *UNDER_SWAA_FLEX), "hf-auto"),
        (("-a", '{"pretrained": "m", "attn_implementation": "swaa_flex"}'), "hf"),  # lm_eval's default
        (("--model", "hf", "--model_args", "pretrained=m,attn_implementation=sdpa"), None),
        (("--model", "hf", "--model_args", "pretrained=m"), None),
        (("--model", "vllm", *UNDER_SWAA_FLEX), None),
        (("--model", "swaa_flex", *UNDER_SWAA_FLEX), None),
        ((), None),
    ],
)
def test_lm_evals_own_model_is_recognised_where_it_would_run_under_swaa_flex(arguments, model):
    assert harness_model(arguments) == model


@pytest.mark.parametrize(
    ("model_args", "recognised"),
    [
        ("pretrained=plain", False),
        ("pretrained=nowhere", False),
        ("pretrained=merged,dtype=float32", True),
        ('{"dtype": "float32", "pretrained": "merged"}', True),
        ("pretrained=plain,swaa=fast", True),
        ('{"pretrained": "plain", "swaa": {"sliding_window": 8}}', True),
        ("pretrained=merged,attn_implementation=sdpa", False),
    ],
)
def test_lm_evals_own_model_is_recognised_by_its_recipe(model_args, recognised, here, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, more in (("plain", {}), ("merged", {"swaa": OWN.to_dict()})):
        (here / name).mkdir()
        (here / name / "config.json").write_text(json.dumps({"model_type": "llama"} | more))
    assert harness_model(("--model_args", model_args)) == ("hf" if recognised else None)
