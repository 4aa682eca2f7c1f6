import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import invoke, visible_pairs
from typer.testing import CliRunner

import swaa_flex_doctor
from swaa_flex import MaskError, __version__, recipes, viz
from swaa_flex.cli import app, expression, main, show
from swaa_flex.config import SWAAConfig
from swaa_flex.masks import causal, everything, offset, rows_from, sinks, window

# --- expressions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mask"),
    [
        ("causal", causal()),
        ("causal()", causal()),
        ("everything", everything()),
        ("everything()", everything()),
        ("causal & (window(64) | sinks(8))", causal() & (window(64) | sinks(8))),
        ("causal & window(64) | sinks(8)", (causal() & window(64)) | sinks(8)),
        ("~window(2_048)", ~window(2048)),
        ("causal & (window(1) | rows_from(-3))", causal() & (window(1) | rows_from(-3))),
        ("offset(causal & window(4), q=96)", offset(causal() & window(4), q=96)),
        ("offset(causal, q=-1, kv=2)", offset(causal(), q=-1, kv=2)),
        ("  causal\n  & window(3)  ", causal() & window(3)),
    ],
)
def test_an_expression_is_the_mask_it_says(text, mask):
    assert expression.parse(text) == mask


def test_a_comment_ends_with_its_line():
    text = "causal  # all before\n& window(3)  # but near: window(9) # is too far\r\n& ~sinks(2)  # and no & sinks(1)"
    assert repr(expression.parse(text)) == "causal & window(3) & ~sinks(2)"
    with pytest.raises(MaskError, match="the expression is incomplete"):
        expression.parse("# causal")


@pytest.mark.parametrize("mask", [causal() & (window(5) | ~sinks(2)), offset(causal() | rows_from(7), q=3)])
def test_the_repr_of_a_mask_is_an_expression(mask):
    assert expression.parse(repr(mask)) == mask


@pytest.mark.parametrize(
    ("text", "problem", "place"),
    [
        ("causal & windw(64)", "unknown name 'windw'; did you mean 'window'?", "windw"),
        ("causl", "unknown name 'causl'; did you mean 'causal'?", "causl"),
        ("balancd", "unknown name 'balancd'; did you mean 'balanced'?", "balancd"),
        ("zzz(3)", "unknown name 'zzz'", "zzz"),
        ("causal & window", "window takes a number: window(64)", "window"),
        ("window()", "window takes one number: window(64)", "window()"),
        ("sinks(1, 2)", "sinks takes one number: sinks(64)", "sinks(1, 2)"),
        ("rows_from(start=3)", "rows_from takes one number: rows_from(64)", "rows_from(start=3)"),
        ("causal | window(0)", "window(0): expected an integer of at least 1", "0"),
        ("sinks(-1)", "sinks(-1): expected an integer of at least 0", "-1"),
        ("window(6.5)", "expected a whole number such as 64 here", "6.5"),
        ("window(True)", "expected a whole number such as 64 here", "True"),
        ("window('64')", "expected a whole number such as 64 here", "'64'"),
        ("window(2 * 3)", "expected a whole number such as 64 here", "2 * 3"),
        ("window(3000000000)", "expected a number of at most 1_073_741_823", "3000000000"),
        ("causal(3)", "causal takes nothing: causal", "causal(3)"),
        ("offset", "offset takes a mask and how far to move it", "offset"),
        ("offset(causal)", "offset takes a mask and how far to move it", "offset(causal)"),
        ("offset(causal, 3)", "offset takes a mask and how far to move it", "offset(causal, 3)"),
        ("offset(causal, k=3)", "offset takes a mask and how far to move it", "offset(causal, k=3)"),
        ("offset(causal, **x)", "offset takes a mask and how far to move it", "offset(causal, **x)"),
        ("offset(causal, q=causal)", "expected a whole number such as 64 here", "causal"),
        ("offset(3, q=3)", "expected a mask here", "3"),
        ("causal & documents(3)", "documents takes tensors or functions; draw such a mask from Python", "documents"),
        ("causal & balanced", "the recipe balanced stands alone", "balanced"),
        ("causal and window(3)", "masks combine with & instead of and", "causal and window(3)"),
        ("causal or window(3)", "masks combine with | instead of or", "causal or window(3)"),
        ("not causal", "a mask is inverted with ~ instead of not", "not causal"),
        ("causal ^ window(3)", "expected one of the operators & | ~ here", "causal ^ window(3)"),
        ("-causal", "expected one of the operators & | ~ here", "-causal"),
        ("causal < window(3)", "expected one of the operators & | ~ here", "causal < window(3)"),
        ("é & 64", "unknown name 'é'", "é"),
        ("window(3) & 64", "expected a mask here", "64"),
        ("'é' & causal", "expected a mask here", "'é'"),
        ("causal && window(3)", "cannot read the expression: ", "&"),
        ("causal window(3)", "cannot read the expression: ", None),
        ("causal & (window(3)", "cannot read the expression: ", "("),
        ("causal &", "the expression is incomplete", ""),
        ("", "the expression is incomplete", ""),
    ],
)
def test_a_wrong_expression_is_pointed_at_and_told_what_is_allowed(text, problem, place):
    with pytest.raises(MaskError) as caught:
        expression.parse(text)
    what, excerpt, caret, *allowed = str(caught.value).splitlines()
    assert what.startswith(problem)
    assert excerpt == f"  {text}"
    marked = re.fullmatch(r" *(\^+)", caret).span(1)
    if place is not None:
        assert excerpt[slice(*marked)] == place
    assert "\n".join(allowed).startswith("Allowed: causal, everything, window(W)")
    assert max(map(len, allowed)) <= 80


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').mkdir('{path}')",
        "__import__('os')",
        "open('{path}', 'w')",
        "causal & (lambda: open('{path}', 'w'))()",
        "[open('{path}', 'w') for _ in (1,)]",
        "window(__import__('os').mkdir('{path}'))",
        "window(9**9**9)",
        "causal.__class__.__mro__",
        "f'{{open(1)}}'",
        "(x := causal)",
    ],
)
def test_nothing_in_an_expression_is_executed(text, tmp_path):
    path = tmp_path / "made"
    with pytest.raises(MaskError):
        expression.parse(text.format(path=path))
    assert not path.exists()


@pytest.mark.parametrize("text", ["~" * 20_000 + "causal", "(" * 20_000, "causal" + " & causal" * 20_000])
def test_an_absurd_expression_is_refused(text):
    with pytest.raises(MaskError, match="cannot read the expression: "):
        expression.parse(text)


# --- show --------------------------------------------------------------------------------------------------


def test_show_prints_the_picture():
    result = invoke("show 'causal & (window(64) | sinks(8))' --len 256")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "causal & (window(64) | sinks(8))"
    share = visible_pairs(causal() & (window(64) | sinks(8)), 256, 256).double().mean()
    assert lines[1] == f"visible pairs: {share:.1%} of 65,536"
    assert max(map(len, lines)) <= 80
    assert not re.search(r"\x1b\[[\d;]*(3|4)\d", result.stdout)


def test_show_takes_lengths_and_block_size():
    result = invoke("show 'offset(causal, q=96)' --len 32 --kv-len 128 --block-size 32")
    assert "of 4,096\nblocks of 32 × 32\n" in result.stdout
    assert re.search(r"full +3 \(.*\n.*partial +1 \(.*\n.*skipped +0 \(", result.stdout)


def test_length_is_256_unless_given():
    assert "of 65,536" in invoke("show causal").stdout


def test_show_takes_a_recipe():
    result = invoke("show balanced --len 20000")
    assert result.exit_code == 0
    assert result.stdout.startswith("balanced: causal & (window(4096) | sinks(128) | rows_from(19936))\n")
    assert "of 400,000,000" in result.stdout


@pytest.mark.parametrize(("name", "length"), [("full", 256), ("naive", 8192), ("quality", 32_768)])
def test_a_recipe_is_shown_at_four_windows_unless_a_length_is_given(name, length):
    assert f"of {length**2:,}" in invoke(f"show {name}").stdout


@pytest.mark.parametrize("length", [1, 50, 200])
@pytest.mark.parametrize(
    "config",
    [
        SWAAConfig(sliding_window=None),
        SWAAConfig(sliding_window=40, sink_tokens=0, dense_tail=0),
        SWAAConfig(sliding_window=40, sink_tokens=4, dense_tail=0),
        SWAAConfig(sliding_window=40, sink_tokens=0, dense_tail=64),
        SWAAConfig(sliding_window=40, sink_tokens=4, dense_tail=64),
    ],
)
def test_the_mask_of_a_recipe_is_its_definition(config, length):
    q, kv = torch.arange(length)[:, None], torch.arange(length)
    dense = q >= length - config.dense_tail
    near = q - kv < (config.sliding_window or length)
    expected = (kv <= q) & (near | (kv < config.sink_tokens) | dense)
    assert visible_pairs(show.recipe_mask(config, length), length, length)[0, 0].equal(expected)


def test_show_writes_a_png(tmp_path):
    path = tmp_path / "mask.png"
    result = invoke(f"show causal --len 64 --png {path}")
    assert result.exit_code == 0
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert result.stdout.endswith(f"wrote {path}\n")  # unbroken, however long


def test_png_must_end_in_png(tmp_path):
    path = tmp_path / "mask.svg"
    result = invoke(f"show causal --png {path}", COLUMNS="300")
    assert result.exit_code == 2
    assert "expected a file name that ends in .png" in result.stderr
    assert not path.exists()


@pytest.mark.parametrize("options", ["--len 0", "--len x", "--kv-len 0", "--block-size 0", "--nonsense"])
def test_wrong_options_are_a_usage_error(options):
    result = invoke(f"show causal {options}")
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


# --- errors ------------------------------------------------------------------------------------------------


def test_an_error_is_one_line_and_the_place(monkeypatch):
    result = invoke("show 'causal & windw(64)'")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[:3] == [
        "Error: unknown name 'windw'; did you mean 'window'?",
        "  causal & windw(64)",
        "           ^^^^^",
    ]
    assert "Traceback" not in result.stderr


def test_the_error_is_red():
    runner = CliRunner(env={"FORCE_COLOR": "1", "TERM": "xterm-256color", "NO_COLOR": None})
    result = runner.invoke(app, ["show", "nonsense"], color=True)
    assert result.stderr.startswith("\x1b[1;31mError: unknown name 'nonsense'\x1b[0m\n")


@pytest.mark.parametrize("line", ["--debug show nonsense", "show nonsense --debug", "show --debug nonsense"])
def test_debug_raises_the_error_wherever_it_stands(line):
    result = invoke(line)
    assert isinstance(result.exception, MaskError)
    assert result.stderr == ""


def test_a_missing_extra_is_one_line_with_the_install_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = invoke(f"show causal --png {tmp_path / 'mask.png'}")
    assert result.exit_code == 1
    assert result.stderr == "Error: swaa_flex.viz.draw needs matplotlib: pip install 'swaa-flex[plot]'\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(*args, **kwargs):
        raise KeyError("bug")

    monkeypatch.setattr(viz, "terminal", broken)
    assert isinstance(invoke("show causal").exception, KeyError)


def test_a_closed_pipe_is_not_an_error_of_ours(monkeypatch):
    def closed(*args, **kwargs):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(viz, "terminal", closed)
    result = invoke("show causal")
    assert result.exit_code == 1
    assert result.stderr == ""


def test_main_exits_with_the_code(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["swaa-flex", "show", "nonsense"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("Error: unknown name 'nonsense'")


# --- the rest ----------------------------------------------------------------------------------------------


def test_version():
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"swaa-flex {__version__}\n")


def test_recipes_lists_all_with_their_description():
    lines = invoke("recipes").stdout.splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [[name, recipes.describe(name)] for name in recipes.names()]


def test_no_command_shows_the_help():
    result = invoke("")
    assert all(command in result.output for command in ("show", "doctor", "recipes", "--version", "--debug"))


@pytest.mark.parametrize("command", ["", "show", "doctor", "recipes"])
def test_help_is_laid_out_for_80_columns(command):
    result = invoke(f"{command} --help")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_every_example_in_the_help_of_show_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"^ +swaa-flex (show .*)", invoke("show --help").stdout, re.MULTILINE)
    assert len(examples) == 4
    for line in examples:
        assert invoke(line).exit_code == 0, line
    assert (tmp_path / "balanced.png").stat().st_size > 10_000


def test_unknown_command_suggests_the_nearest():
    result = invoke("shwo")
    assert result.exit_code == 2
    assert "show" in result.stderr


# --- doctor ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def h200(monkeypatch):
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=150_754_820_096)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def facts(output):
    """What doctor says, by the words in front of two spaces."""
    return dict(re.split(r"  +", line, maxsplit=1) for line in output.splitlines())


def test_doctor_says_what_there_is(no_gpu):
    result = invoke("doctor")
    said = facts(result.stdout)
    assert result.exit_code == 0
    assert said["swaa_flex"] == __version__
    assert said["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert said["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"transformers", "accelerate", "triton", "flash-attn-4", "platform"} <= set(said)
    assert said["devices"] == "no CUDA GPU"
    assert said["backend chunked"] == said["backend cpp"] == "available"


def test_doctor_gives_each_reason_on_one_unbroken_line(no_gpu):
    said = facts(invoke("doctor", COLUMNS="40").stdout)
    for name in ("flash", "triton"):
        assert said[f"backend {name}"] == "no: it needs a CUDA GPU"


def test_doctor_reports_what_is_not_installed(no_gpu, monkeypatch):
    import importlib.metadata as metadata

    def version(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", version)
    assert facts(invoke("doctor").stdout)["transformers"] == "not installed"
    assert json.loads(invoke("doctor --json").stdout)["versions"]["transformers"] is None


def test_doctor_lists_gpus_and_asks_the_backends_about_them(h200):
    said = facts(invoke("doctor").stdout)
    assert said["cuda:0"] == said["cuda:1"] == "NVIDIA H200, compute capability 9.0, 140.4 GiB"
    assert "devices" not in said
    assert said["backend triton"] == "available"
    assert said["backend cpp"].startswith("no: it is FlexAttention's CPU kernel and the tensors are on cuda")


def test_doctor_survives_a_broken_driver(h200, monkeypatch):
    def broken(index):
        raise RuntimeError("CUDA driver error: unknown error\nsecond line")

    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    result = invoke("doctor")
    assert result.exit_code == 0
    assert facts(result.stdout)["cuda:0"] == "error: CUDA driver error: unknown error"
    assert facts(result.stdout)["backend triton"].startswith("no: ")


def test_doctor_as_json(h200):
    report = json.loads(invoke("doctor --json").stdout)
    assert list(report) == ["versions", "platform", "devices", "backends"]
    assert report["devices"][0] == {
        "name": "cuda:0",
        "model": "NVIDIA H200",
        "capability": "9.0",
        "memory_gib": 140.4,
    }
    assert report["backends"]["chunked"] is None
    assert "CPU kernel" in report["backends"]["cpp"]


def test_doctor_knows_whether_a_compiler_is_there(no_gpu, monkeypatch):
    from torch._inductor import cpp_builder

    assert facts(invoke("doctor").stdout)["backend cpp"] == "available"  # the tests that compile take one
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "no-such-compiler")
    assert facts(invoke("doctor").stdout)["backend cpp"] == (
        "no: it takes a C++ compiler, and there is none (no no-such-compiler); install g++, or name one in CXX"
    )

    def missing():
        raise RuntimeError("No working C++ compiler found\nlong explanation")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    assert "there is none (RuntimeError: No working C++ compiler found); install" in invoke("doctor").stdout


def test_doctor_survives_a_broken_package_that_a_backend_needs(h200, monkeypatch):
    def broken(*asked):
        raise OSError("libcutlass.so: cannot open shared object file")

    monkeypatch.setattr("swaa_flex.backends.why_not", broken)
    said = facts(invoke("doctor").stdout)
    assert said["backend flash"] == "no: it cannot be asked (OSError: libcutlass.so: cannot open shared object file)"


BROKEN = "raise OSError('libcudart.so.12: cannot open shared object file')"


@pytest.mark.parametrize("package", ["torch", "transformers", "accelerate"])
def test_doctor_survives_the_packages_that_it_is_to_diagnose(package, tmp_path):
    (tmp_path / f"{package}.py").write_text(BROKEN)
    source = Path(swaa_flex_doctor.__file__).parent
    command = "import sys, swaa_flex_doctor; sys.argv = ['swaa-flex', *sys.argv[1:]]; swaa_flex_doctor.main()"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{source}"}

    def start(*arguments):
        return subprocess.run(
            [sys.executable, "-c", command, *arguments], env=environment, capture_output=True, text=True
        )

    done = start("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    problem = "cannot be imported (OSError: libcudart.so.12: cannot open shared object file)"
    assert problem in found["versions"][package]
    if package != "accelerate":  # which swaa_flex leaves to others to import
        assert "cannot be imported (" in found["versions"]["swaa_flex"]
        assert found["backends"]["chunked"] == "swaa_flex cannot be imported"
        other = start("recipes")
        assert other.returncode == 1 and "'swaa-flex doctor' says which packages" in other.stderr


def test_doctor_survives_packages_that_are_missing(monkeypatch):
    """As far as this process can pretend that; the packages that are imported already stay."""
    import importlib

    real = importlib.import_module

    def missing(name, *rest):
        if name in ("torch", "swaa_flex"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    said = facts(swaa_flex_doctor.report())
    assert said["torch"].endswith(", cannot be imported (ModuleNotFoundError: No module named 'torch')")
    assert said["devices"] == "no CUDA GPU" and said["backend cpp"] == "no: swaa_flex cannot be imported"


# --- imports -----------------------------------------------------------------------------------------------

LIGHT = """
import sys
import torch, transformers

class Watch:
    asked = set()
    def find_spec(self, name, path=None, target=None):
        if name in HEAVY:
            self.asked.add(name)

def initialised(*args):
    raise AssertionError("CUDA was initialised")

sys.meta_path.insert(0, Watch())
torch.cuda._lazy_init = torch.cuda.init = initialised
import MODULE
print(sorted(Watch.asked))
"""
HEAVY = {"matplotlib", "pyarrow", "lm_eval", "vllm", "gguf"}


def imported(module, heavy):
    check = LIGHT.replace("MODULE", module).replace("HEAVY", repr(heavy))
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("module", "heavy"), [("swaa_flex", HEAVY | {"peft"}), ("swaa_flex.cli", HEAVY)])
def test_imports_stay_light(module, heavy):
    """They ask for nothing that is optional and heavy, installed here or not, and leave CUDA alone.

    Training takes transformers' Trainer, which imports peft where it is installed.
    """
    assert imported(module, heavy) == "[]"


@pytest.mark.parametrize(
    ("code", "noticed"),
    [("import matplotlib", "matplotlib"), ("import torch; torch.cuda.init()", "AssertionError: CUDA was initialised")],
)
def test_an_import_that_is_not_light_would_be_noticed(code, noticed, tmp_path, monkeypatch):
    (tmp_path / "heavy.py").write_text(f"try:\n    {code}\nexcept ImportError:\n    pass\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert noticed in imported("heavy", HEAVY)
