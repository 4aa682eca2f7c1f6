"""The serving plugin without vLLM's kernels: a kernel of a few lines stands in for them."""

import dataclasses
import json
import logging
import random
import sys
import tomllib
from importlib.metadata import distribution, entry_points, packages_distributions
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from vllm_stand_ins import HEAD_DIM, HEADS, Server, merge, speculative, vllm_config

from swaa_flex import ConfigError, SWAAConfig, UnsupportedModelError
from swaa_flex.hf.config import RECIPE_VARIABLE
from swaa_flex.vllm import register
from swaa_flex.vllm.recipe import check_backend, check_layer, recipe_of, rule_at, rules_of
from swaa_flex.vllm.rows import Rule, attend, cut, cut_decode, have_sliding, in_tail
from swaa_flex.vllm.unsupported import is_supported

WINDOW, SINKS = 24, 5
RULES = [Rule(WINDOW, SINKS, tail, dense) for tail in (0, 7) for dense in (False, True)]
RULES += [Rule(WINDOW, 0, 0, False), Rule(WINDOW, 0, 3, False), Rule(1, 3, 2, True)]


def step(server, rule, computed, lengths, pads=0):
    """The rows of one step as the backend computes them, `[rows, heads, head_dim]`."""
    computed, lengths = torch.tensor(computed), torch.tensor(lengths)
    start = torch.cat([torch.zeros(1, dtype=torch.long), (lengths - computed).cumsum(0)]).int()
    query = torch.cat([q[c:n] for q, c, n in zip(server.query, computed, lengths, strict=True)])
    query = torch.cat([query, torch.randn(pads, HEADS, HEAD_DIM)])
    sizes = {"rows": len(query), "max_rows": int((lengths - computed).max()), "max_keys": int(lengths.max())}
    stretches = cut(rule, start, lengths, server.prompts, server.block_table, **sizes)
    out = torch.empty_like(query)
    attend(rule, stretches, server.kernel(query), merge, out)
    return out


def check(server, rule, out, computed, lengths):
    expected = [server.expected(rule, i, c, n) for i, (c, n) in enumerate(zip(computed, lengths, strict=True))]
    torch.testing.assert_close(out[: sum(map(len, expected))], torch.cat(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_any_step_of_a_continuous_batch_equals_the_masks(rule):
    draw = random.Random(repr(rule))
    for seed in range(5):
        prompts = [draw.randrange(1, 90) for _ in range(4)]
        server = Server(prompts, 110, seed)
        computed = [draw.choice((0, draw.randrange(100), prompt - 1, prompt)) for prompt in prompts]
        lengths = [c + draw.choice((1, 1, draw.randrange(1, 110 - c + 1))) for c in computed]
        check(server, rule, step(server, rule, computed, lengths, pads=3), computed, lengths)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_chunks_of_any_size_give_the_same_rows(rule):
    server = Server([83, 60], 90)
    for chunk in (7, 90):
        for begin in range(0, 90, chunk):
            computed, lengths = [begin] * 2, [min(90, begin + chunk)] * 2
            check(server, rule, step(server, rule, computed, lengths), computed, lengths)


@pytest.mark.parametrize("rule", [rule for rule in RULES if not rule.dense_decode], ids=repr)
@pytest.mark.parametrize("ends", [0, 1, 3, 9])
def test_steps_of_single_tokens_that_slide(rule, ends):
    """Rows of answers and, if a prompt ends only so many tokens later, rows of prompts."""
    server, sinks = Server([1, 20, 40, 80], 110), torch.zeros(4, dtype=torch.int32)
    for lengths in ([3, 22, 41, 110], [WINDOW, WINDOW + 1, WINDOW + SINKS, WINDOW + SINKS + 1], [5, 60, 90, 0]):
        lengths_ = torch.tensor(lengths)
        computed = (lengths_ - 1).clamp(min=0).tolist()
        server.prompts = torch.tensor(computed) + ends
        start = torch.arange(5).int()  # the last request of the third step only pads the batch
        dense = in_tail(rule, lengths_, server.prompts) if ends and rule.dense_tail else None
        stretches = cut_decode(rule, start, lengths_, server.block_table, sinks, max_keys=110, dense=dense)
        query = torch.stack([q[c] for q, c in zip(server.query, computed, strict=True)])
        out = torch.empty_like(query)
        attend(rule, stretches, server.kernel(query), merge, out)
        real = [i for i, n in enumerate(lengths) if n]
        expected = torch.cat([server.expected(rule, i, computed[i], lengths[i]) for i in real])
        torch.testing.assert_close(out[real], expected, atol=1e-5, rtol=1e-5)


def test_a_step_never_says_that_each_stretch_has_one_row():
    """FlashAttention-2 would believe it, and stretches may be empty."""
    start = torch.arange(3).int()
    tokens = {"lengths": torch.tensor([40, 50]), "prompts": torch.tensor([40, 60])}
    table = torch.zeros(2, 4, dtype=torch.int32)
    stretches = cut(RULES[1], start, **tokens, block_table=table, rows=2, max_rows=1, max_keys=50)
    assert len(stretches.full) > 2 and stretches.max_rows > 1


def test_steps_in_which_nothing_slides_are_known_before():
    rule = Rule(WINDOW, SINKS, 7, True)
    for computed, length, prompt, slides in (
        (0, WINDOW + SINKS, 90, False),  # window and sinks leave no gap
        (0, WINDOW + SINKS + 1, 90, True),
        (0, WINDOW + SINKS + 7, WINDOW + SINKS + 7, False),  # then the dense tail begins
        (90, 91, 90, False),
        (88, 90, 90, False),
    ):
        step = [torch.tensor([n]) for n in (computed, length, prompt)]
        assert have_sliding(rule, *step) == slides
        assert have_sliding(
            dataclasses.replace(rule, dense_decode=False), torch.tensor([90]), *step[1:2], step[2]
        ) == (length > 90)


# --- the recipe -----------------------------------------------------------------------------------------------


def test_the_recipe_is_what_the_user_says_else_what_the_checkpoint_holds_else_the_variable(monkeypatch):
    saved = SWAAConfig(sliding_window=77)
    assert recipe_of(vllm_config(saved=saved.to_dict())) == saved
    monkeypatch.setenv(RECIPE_VARIABLE, json.dumps({"sliding_window": 66}))
    assert recipe_of(vllm_config(saved=saved.to_dict())) == saved  # as in transformers
    assert recipe_of(vllm_config()).sliding_window == 66
    assert recipe_of(vllm_config("quality", saved.to_dict())).sliding_window == 8192
    assert recipe_of(vllm_config({"sliding_window": 55}, saved.to_dict())).sliding_window == 55


def test_a_recipe_for_another_attention_backend_is_noticed(caplog):
    saved = SWAAConfig(sliding_window=77).to_dict()
    for name in (None, "FLASH_ATTN"):
        with pytest.raises(ConfigError, match=r"only --attention-backend CUSTOM serves a recipe"):
            check_backend(vllm_config("quality", backend=name))
        check_backend(vllm_config(backend=name))
    assert not caplog.records
    check_backend(vllm_config(saved=saved, backend="FLASH_ATTN"))
    assert "checkpoint is not used: only --attention-backend CUSTOM" in caplog.text
    check_backend(vllm_config("quality", saved))
    assert len(caplog.records) == 1


def test_layers_that_are_not_those_of_the_language_model_are_refused():
    rules = rules_of(vllm_config("quality"))
    assert rule_at(rules, 0, "layers.0") == rules[0]
    with pytest.raises(UnsupportedModelError, match=r"layer audio.layers.4: .* the 4 layers of the language model"):
        rule_at(rules, 4, "audio.layers.4")


def test_layers_have_the_rules_of_the_recipe():
    config = {"sliding_window": 8, "sink_tokens": 2, "full_attention_layers": [1], "full_attention_decode": [2]}
    rules = rules_of(vllm_config(config | {"dense_tail": 3}))
    assert rules == (Rule(8, 2, 3, False), None, Rule(8, 2, 3, True), Rule(8, 2, 3, False))
    assert rules_of(vllm_config("full")) == (None,) * 4


@pytest.mark.parametrize(
    "config, message",
    [
        (vllm_config(), "has no recipe; give one by --additional-config"),
        (vllm_config("balance"), "balanced"),
        (vllm_config(additional={"sliding_window": 5}), 'sliding_window outside of "swaa"'),
        (vllm_config("balanced", fast_prefill=True), "kv_sharing_fast_prefill"),
        (vllm_config({"full_attention_layers": [7]}), "layer 7 of 4 does not exist"),
        (vllm_config("balanced", prefix_caching=True), "start vLLM with --no-enable-prefix-caching"),
        (vllm_config("throughput", prefix_caching=True), "prefix caching"),
        (vllm_config("paper", transfer=object()), "kv_transfer_config"),
        (vllm_config("balanced", speculative=speculative()), "take dense_tail=0"),
        (vllm_config("paper", speculative=speculative("CUSTOM")), "in the speculative_config"),
        (vllm_config("throughput", runner="pooling"), "a model that pools with dense_tail"),
        (vllm_config("balanced", embeds=True), "enable_prompt_embeds"),
        (vllm_config("balanced", halves=True), "enable_dbo"),
        (vllm_config("balanced", context_parallel=2), "decode_context_parallel_size"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(config, message):
    with pytest.raises(ConfigError, match=message) as error:
        rules_of(config)
    assert "\n" not in str(error.value)


def test_naive_windows_and_full_attention_keep_what_shares_pages():
    shared = {"prefix_caching": True, "transfer": object()}
    assert rules_of(vllm_config("naive", **shared))[0] == Rule(2048, 0, 0, False)
    assert rules_of(vllm_config("full", **shared))[0] is None


def test_drafts_need_another_backend_and_pooling_no_tail():
    drafts = {"speculative": speculative("FLASH_ATTN"), "runner": "pooling"}
    assert rules_of(vllm_config("paper", **drafts))[0] == Rule(2000, 100, 0, True)


def test_layers_with_windows_or_biases_of_their_own():
    rule = Rule(100, 4, 0, True)
    check_layer(rule, 100, None)
    with pytest.raises(UnsupportedModelError, match="own sliding window is 101"):
        check_layer(rule, 101, None)
    with pytest.raises(UnsupportedModelError, match="ALiBi"):
        check_layer(rule, None, [0.5])


# --- the plugin -----------------------------------------------------------------------------------------------

REGISTRY = "vllm.v1.attention.backends.registry"
UNSUPPORTED = ["0.22.1", "0.24.0", "0.26.0rc1", "0.31.0", "0.33.0+cu130", "1.23.0", "dev"]


@pytest.fixture
def install(monkeypatch):
    """Stands in for a version of vLLM, and for a process of it whose plugins have been loaded."""
    engine_log = logging.getLogger("vllm.v1.engine.core")
    monkeypatch.setattr(engine_log, "filters", [])
    monkeypatch.setattr(engine_log, "level", logging.INFO)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delenv(RECIPE_VARIABLE, raising=False)

    def install(version):
        registered = []
        for name in ("vllm", *(REGISTRY.rsplit(".", n)[0] for n in (3, 2, 1)), REGISTRY):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["vllm"].__version__ = version
        sys.modules[REGISTRY].AttentionBackendEnum = SimpleNamespace(CUSTOM="CUSTOM")
        sys.modules[REGISTRY].register_backend = lambda *what: registered.append(what)
        register()
        register()
        return registered

    return install


def start_engine(config):
    """What every engine of vLLM 0.23 to 0.33 logs first, unless its log is quieter."""
    logging.getLogger("vllm.v1.engine.core").info(
        "Initializing a V1 LLM engine (v%s) with config: %s", "0.33.0", config
    )


def lines_of_the_plugin(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "vllm.swaa_flex"]


def logits_processors():
    """Those that the plugin adds to what is installed."""
    return [point for point in entry_points(group="vllm.logits_processors") if point.dist.name == "swaa-flex-vllm"]


def test_the_package_itself_brings_no_logits_processor():
    """Of the old interface, vLLM 0.31 does not start with one, and 0.24 to 0.30 run another model runner."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert list(project["entry-points"]) == ["vllm.general_plugins"]
    (pinned,) = project["optional-dependencies"]["vllm"]
    assert pinned.startswith("vllm>=0.23,<0.24;") and is_supported("0.23.0") and is_supported("0.23.1rc1.dev3+gabc")


def test_under_the_supported_version_vllm_finds_backend_and_logits_processor(install):
    assert set(install("0.23.0")) == {("CUSTOM", "swaa_flex.vllm.backend.Backend")}
    (point,) = logits_processors()
    assert point.value == "swaa_flex.vllm.prompts:PromptLengths"
    # Whatever else asks for the metadata of packages goes on finding it.
    assert distribution("pytest").name == "pytest" and "pytest" in packages_distributions()


@pytest.mark.parametrize("version", UNSUPPORTED)
def test_another_version_is_left_alone_in_silence(install, caplog, version):
    caplog.set_level(logging.INFO)
    assert install(version) == [] and logits_processors() == []
    for config in (vllm_config(), vllm_config(additional=SimpleNamespace()), SimpleNamespace(), "a name"):
        start_engine(config)
    assert len(caplog.records) == 4 and lines_of_the_plugin(caplog) == []


@pytest.mark.parametrize("version", UNSUPPORTED)
@pytest.mark.parametrize("backend", ["CUSTOM", "FLASH_ATTN", None])
@pytest.mark.parametrize("way", ["--additional-config", "config.json", RECIPE_VARIABLE])
def test_under_another_version_one_line_says_that_a_recipe_is_not_used(
    install, caplog, monkeypatch, version, backend, way
):
    saved = SWAAConfig(sliding_window=77).to_dict()
    given = {"--additional-config": {"swaa": "quality"}, "config.json": {"saved": saved}, RECIPE_VARIABLE: {}}
    if way == RECIPE_VARIABLE:
        monkeypatch.setenv(RECIPE_VARIABLE, "quality")
    install(version)
    caplog.set_level(logging.INFO)
    start_engine(vllm_config(backend=backend, **given[way]))
    (line,) = lines_of_the_plugin(caplog)
    assert way in line and "is not used" in line and "\n" not in line
    assert "with vLLM 0.23, and" in line and line.endswith(f"this is vLLM {version}")


def test_under_the_supported_version_that_line_never_comes(install, caplog):
    install("0.23.0")
    caplog.set_level(logging.INFO)
    start_engine(vllm_config("quality"))
    assert lines_of_the_plugin(caplog) == []
