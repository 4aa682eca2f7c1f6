"""A model with a cache of fixed size goes through torch.export and AOTInductor."""

import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "export_aot.py"


@pytest.fixture(scope="module")
def example():
    spec = spec_from_file_location("export_aot", EXAMPLE)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_exported_decode_step_gives_the_logits_of_eager_mode(example):
    model = example.tiny_model()
    decode = example.export(model, 1).module()
    step = example.Step(model)
    states = step.empty_state(), step.empty_state()
    prompt = torch.randint(model.config.vocab_size, (1, example.CHUNK))
    with torch.no_grad():
        for state in states:
            state["first"].fill_(30)
            logits = step(prompt, state)
        for _ in range(4):
            token = logits.argmax(-1, keepdim=True)
            logits = step(token, states[0])
            torch.testing.assert_close(decode(token, states[1]), logits)
    for eager, exported in zip(states[0]["layers"], states[1]["layers"], strict=True):
        assert int(exported["cumulative_length"]) == example.CHUNK + 4
        torch.testing.assert_close(exported, eager)


@pytest.mark.slow
def test_the_example_runs_in_a_process_without_swaa_flex(tmp_path):
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "40 tokens as from generate" in done.stdout
