"""What the commands check before they load a model, and what they say when they are interrupted."""

import json

import pytest
from conftest import invoke

from swaa_flex import ConfigError
from swaa_flex.cli import checkpoint, paths
from swaa_flex.files import held
from swaa_flex.tuning import adapters


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to run in: data, a file, a folder that is not empty, an adapter; and peft is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adapters, "peft", lambda: None)
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    for name in ("file", "folder/inside", "adapter/adapter_config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.fixture
def no_loading(monkeypatch):
    monkeypatch.setattr(checkpoint, "load", lambda name: pytest.fail("loaded"))


WRONG = {
    "eval MODEL --text nowhere": "--text nowhere: expected a file that can be read (No such file or directory)",
    "eval MODEL --text folder": "--text folder: expected a file that can be read (Is a directory)",
    "eval MODEL --settings nowhere": "--settings nowhere: expected a file that can be read",
    "eval MODEL --recipes nowhere.json": "--recipes nowhere.json: ",
    "eval MODEL --tasks qa:nowhere": "--tasks nowhere: expected a file that can be read",
    "eval MODEL --tasks choice:nowhere": "--tasks nowhere: expected a file that can be read",
    "eval MODEL --adapter nowhere": "--adapter nowhere: expected the folder of an adapter",
    "eval MODEL --out file/out": "--out file/out: expected a folder that can be written to (Not a directory)",
    "layers MODEL --text nowhere": "--text nowhere: expected a file that can be read",
    "layers MODEL --out file": "--out file: it is a file; expected a folder",
    "layers MODEL --out file/out": "--out file/out: expected a folder that can be written to",
    "recommend MODEL --text nowhere": "--text nowhere: expected a file that can be read",
    "recommend MODEL --out file/out": "--out file/out: expected a folder that can be written to",
    "distill MODEL nowhere out.jsonl": "DATA nowhere: expected a file that can be read",
    "distill MODEL data.jsonl file/out": "OUT file/out: its folder file: it is a file",
    "distill MODEL data.jsonl folder": "OUT folder: it is a folder; expected a file",
    "distill MODEL data.jsonl file": "file exists; name another file, or have it replaced with --overwrite",
    "finetune MODEL nowhere out": "DATA nowhere: expected a file that can be read",
    "finetune MODEL file out --held-out nowhere": "--held-out nowhere: expected a file that can be read",
    "finetune MODEL file file": "OUT file: it is a file; expected a folder",
    "merge MODEL nowhere out": "ADAPTER nowhere: expected the folder of an adapter",
    "merge MODEL adapter folder": "OUT folder: it is not empty; expected a new folder",
    "merge MODEL adapter file": "OUT file: it is a file; expected a folder",
    "merge MODEL adapter out --recipe nowhere.json": "--recipe nowhere.json: expected a JSON file",
    "run --swaa nowhere.json program.py": "--swaa nowhere.json: expected a file that can be read",
    "show causal --png file/mask.png": "--png file/mask.png: its folder file: it is a file; expected a folder",
    "show causal --png file/a/mask.png": "--png file/a/mask.png: its folder file/a: expected a folder that can be",
    "show causal --png folder.png": "--png folder.png: it is a folder; expected a file, existing or new",
}


@pytest.mark.parametrize(("line", "problem"), WRONG.items())
def test_a_wrong_path_is_one_line_with_its_option_before_a_model_is_loaded(line, problem, here, no_loading):
    (here / "folder.png").mkdir()
    before = sorted(here.rglob("*"))
    result = invoke(line)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1), result.output
    assert result.stderr.startswith(f"Error: {problem}")
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    "line", ["merge MODEL adapter out", "eval MODEL --adapter adapter", "finetune MODEL data.jsonl out"]
)
def test_peft_that_is_missing_is_said_before_a_model_is_loaded(line, here, no_loading, monkeypatch):
    def missing():
        raise ImportError("fine-tuning takes the package peft: pip install 'swaa-flex[tune]'")

    monkeypatch.setattr(adapters, "peft", missing)
    result = invoke(line)
    assert result.exit_code == 1
    assert result.stderr == "Error: fine-tuning takes the package peft: pip install 'swaa-flex[tune]'\n"


def test_folders_are_made_when_they_are_written_to_and_not_before(here):
    assert invoke(f"show causal --len 64 --png {here / 'new' / 'mask.png'}").exit_code == 0
    assert (here / "new" / "mask.png").is_file()
    paths.write_folder("--out", here / "a" / "b")
    assert not (here / "a").exists()


def test_what_the_system_refuses_to_write_is_found(here, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(paths.tempfile, "TemporaryFile", full)
    with pytest.raises(ConfigError, match=r"--out .*: expected a folder .* \(No space left on device\)"):
        paths.write_folder("--out", here / "out")
    assert not (here / "out").exists()
    monkeypatch.setenv("RANK", "1")
    paths.write_folder("--out", here / "out")  # the first process is the one that writes


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("eval MODEL --out out", "out/summary.json"),
        ("eval --settings settings.json --out out", "out/2-b/summary.json"),
        ("recommend MODEL --out out", "out/summary.json"),
        ("layers MODEL --out out", "out/losses.json"),
        ("layers MODEL --out out --method greedy", "out/losses.json"),
        ("distill MODEL data.jsonl out.jsonl", "out.jsonl"),
        ("distill MODEL data.jsonl out.jsonl --overwrite", "out.jsonl"),
        ("finetune MODEL data.jsonl out", "out/run.json"),
        ("merge MODEL adapter out", "out/config.json"),
    ],
)
def test_a_second_run_is_refused_before_it_loads_a_model(line, path, here, no_loading):
    reference = {"sliding_window_size": 64, "keep_first": 0, "force_fa_decode": False, "non_sliding_layers": []}
    (here / "settings.json").write_text(json.dumps([{"swaa_config": reference, "model_list": ["a", "b"]}]))
    with held(here / path):
        result = invoke(line)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1), result.output
    assert result.stderr == f"Error: {path}: another run is writing it; wait until it has ended, or choose another\n"


GOES_ON = "Interrupted. The same command goes on where this one was."


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("eval MODEL", GOES_ON),
        ("recommend MODEL", GOES_ON),
        ("distill MODEL data.jsonl out.jsonl --judge none", GOES_ON),
        (
            "finetune MODEL data.jsonl out",
            "Interrupted. The same command goes on from the last checkpoint (--save-steps).",
        ),
        (
            "layers MODEL",
            "Interrupted. With --out, the same command goes on with the losses that are measured; --method lazy "
            "starts over.",
        ),
        ("demo --model MODEL", "Interrupted. The same command starts over."),
        ("merge MODEL adapter out", "Interrupted. Nothing is written; the same command starts over."),
    ],
)
def test_an_interrupted_command_says_whether_it_goes_on_and_exits_with_130(line, said, here, monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "load", interrupted)
    before = sorted(here.rglob("*"))
    result = invoke(line)
    assert sorted(here.rglob("*")) == before
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (130, said)
    monkeypatch.setenv("RANK", "1")
    assert "Interrupted" not in invoke(line).stderr


def test_the_interruption_of_a_program_is_the_programs(here):
    (here / "program.py").write_text("raise KeyboardInterrupt")
    result = invoke("run program.py")
    assert result.exit_code == 130 and "Interrupted" not in result.stderr
