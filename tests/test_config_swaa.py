"""`config.swaa`: edits reach the model or are refused, and a recipe is enough to choose swaa_flex."""

import copy
import json
import pickle
import warnings

import pytest
import torch
import transformers
from conftest import dense_attention
from tiny_models import SIZE, composite
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

import swaa_flex
from swaa_flex import ConfigError, SWAAConfig, UnsupportedModelError
from swaa_flex.evaluation.runner import _as_measured
from swaa_flex.hf.adapt import full_attention
from swaa_flex.hf.config import RECIPE_VARIABLE, swaa_of

RECIPE = SWAAConfig(sliding_window=8, sink_tokens=2, full_attention_layers=[1], dense_tail=4)
IDS = torch.arange(3, 43)[None]
IDLE = "recipe is idle: swaa="


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A checkpoint without a recipe."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain")
    LlamaForCausalLM(LlamaConfig(**SIZE)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def merged(plain, tmp_path_factory):
    """The same checkpoint, with a recipe in its config.json."""
    folder = tmp_path_factory.mktemp("merged")
    LlamaForCausalLM.from_pretrained(plain).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"swaa": RECIPE.to_dict()}))
    return folder


@pytest.fixture(scope="module")
def expected(plain):
    """Logits of the recipe, from unmodified transformers whose attention is a dense softmax under an explicit mask."""
    model = LlamaForCausalLM.from_pretrained(plain, attn_implementation="sdpa").eval()

    def dense(module: nn.Module, query, key, value, mask, **kwargs):
        q, kv = torch.arange(IDS.shape[1])[:, None], torch.arange(IDS.shape[1])
        near = (q - kv < 8) | (kv < 2) | (q >= IDS.shape[1] - 4) | (module.layer_idx == 1)
        out, _ = dense_attention(query, key, value, (kv <= q) & near, scale=kwargs["scaling"])
        return out.float().transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("dense_for_a_test", dense)
    model.set_attn_implementation("dense_for_a_test")
    return logits(model)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def implementations(model):
    return [config._attn_implementation for config in (model.config, model.config.get_text_config())]


# --- a recipe is enough --------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, LlamaForCausalLM.from_pretrained])
def test_a_recipe_alone_runs_the_recipe(load, plain, merged, expected):
    for model in (load(plain, swaa=RECIPE), load(plain, swaa=RECIPE.to_dict()), load(merged)):
        assert model.config._attn_implementation == "swaa_flex"
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(load(plain)), expected, atol=1e-3)


def test_a_config_with_a_recipe_makes_a_model_that_runs_it(merged):
    config = AutoConfig.from_pretrained(merged)
    made = (
        AutoModelForCausalLM.from_config(config),
        LlamaForCausalLM(LlamaConfig(**SIZE, swaa=RECIPE)),
        LlamaForCausalLM(copy.deepcopy(config)),
        LlamaForCausalLM(pickle.loads(pickle.dumps(config))),
        AutoModelForCausalLM.from_pretrained(merged, config=config),
    )
    for model in made:
        assert model.config._attn_implementation == "swaa_flex" and swaa_of(model.config) == RECIPE
        swaa_flex.restore(model)
        assert model.config._attn_implementation == "sdpa" and model.config.swaa is None


def test_a_model_of_a_recipe_alone_saves_it_and_loads_again(plain, tmp_path):
    AutoModelForCausalLM.from_pretrained(plain, swaa=RECIPE).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["swaa"] == RECIPE.to_dict()
    assert "swaa_flex" not in json.dumps(written)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "swaa_flex"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_another_implementation_wins_and_a_warning_says_that_the_recipe_does_nothing(implementation, plain, merged):
    full = logits(AutoModelForCausalLM.from_pretrained(plain))
    for folder, options in ((plain, {"swaa": RECIPE}), (merged, {})):
        with pytest.warns(UserWarning, match=f"attn_implementation='{implementation}' .* {IDLE}.*Leave out"):
            model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation, **options)
        assert model.config._attn_implementation == implementation
        torch.testing.assert_close(logits(model), full, atol=1e-5, rtol=1e-5)
        # Whatever borrows the model puts it back as it was, without a second warning (which would be an error).
        before = model.config.swaa
        with _as_measured(model, [0]):
            assert model.config._attn_implementation == "swaa_flex"
        assert model.config._attn_implementation == implementation and model.config.swaa == before == RECIPE.to_dict()
        swaa_flex.restore(swaa_flex.adapt(model, "fast"))
        assert model.config._attn_implementation == implementation and model.config.swaa is None


def test_without_a_recipe_nothing_is_chosen(plain, merged):
    assert AutoModelForCausalLM.from_pretrained(plain).config._attn_implementation == "sdpa"
    without = AutoModelForCausalLM.from_pretrained(merged, swaa=None)
    assert without.config._attn_implementation == "sdpa" and without.config.swaa is None
    config = LlamaConfig(**SIZE)
    config.swaa = "naive"
    config.swaa = "paper"
    config.swaa = None
    assert AutoModelForCausalLM.from_config(config).config._attn_implementation == "sdpa"
    asked_for = LlamaConfig(**SIZE, swaa="naive", attn_implementation="swaa_flex")
    asked_for.swaa = None
    assert asked_for._attn_implementation == "swaa_flex"


def test_a_model_keeps_its_attention_when_its_recipe_goes(merged):
    model = AutoModelForCausalLM.from_pretrained(merged)
    with full_attention(model.config):
        assert implementations(model) == ["swaa_flex"] * 2
    assert swaa_of(model.config) == RECIPE
    model.config.swaa = None  # without an implementation, transformers would run it without a causal mask
    assert implementations(model) == ["swaa_flex"] * 2


def test_in_a_composite_model_the_text_model_runs_the_recipe(tmp_path):
    made = AutoModelForImageTextToText.from_config(composite(swaa=RECIPE))
    made.save_pretrained(tmp_path)
    load = AutoModelForImageTextToText.from_pretrained
    for model in (made, load(tmp_path), load(tmp_path, swaa="naive")):
        assert implementations(model) == ["swaa_flex"] * 2
        assert model.config.vision_config._attn_implementation == "sdpa"
        assert model.config.swaa is model.config.text_config.swaa
    assert model.config.swaa["sliding_window"] == 2048
    for asked_for in ("sdpa", {"text_config": "sdpa"}):
        with pytest.warns(UserWarning, match=IDLE):
            assert implementations(load(tmp_path, attn_implementation=asked_for)) == ["sdpa"] * 2
    vision = load(tmp_path, attn_implementation={"vision_config": "eager"})
    assert implementations(vision) == ["swaa_flex"] * 2
    assert vision.config.vision_config._attn_implementation == "eager"
    assert implementations(swaa_flex.restore(vision)) == ["sdpa"] * 2


def test_a_model_that_cannot_run_a_recipe_refuses_it():
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=99)
    model = transformers.BloomForCausalLM._from_config(config, attn_implementation="swaa_flex")
    with pytest.raises(UnsupportedModelError, match="bloom"):
        model(IDS)


def test_a_recipe_that_was_loaded_before_the_package_counts(plain, expected):
    model = AutoModelForCausalLM.from_pretrained(plain)
    vars(model.config)["swaa"] = RECIPE.to_dict()  # what transformers makes of a key that it does not know
    model.set_attn_implementation("swaa_flex")
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_the_recipe_of_the_environment_does_not_replace_a_models_own_silently(plain, merged, monkeypatch):
    monkeypatch.setenv(RECIPE_VARIABLE, "naive")
    with pytest.warns(
        UserWarning, match=r"SWAA_FLEX_RECIPE='naive' .*--swaa.* has a recipe and runs it: .*config\.json"
    ):
        assert swaa_of(AutoModelForCausalLM.from_pretrained(merged).config) == RECIPE
    monkeypatch.setenv(RECIPE_VARIABLE, RECIPE.to_json())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoModelForCausalLM.from_pretrained(merged)
        swaa_flex.adapt(AutoModelForCausalLM.from_pretrained(plain), "fast")


# --- edits ---------------------------------------------------------------------------------------------------


def ior(swaa, fields):
    swaa |= fields


@pytest.mark.parametrize(
    "edit",
    [
        lambda swaa: swaa.__setitem__("sliding_window", 9),
        lambda swaa: swaa.update(sliding_window=9),
        lambda swaa: ior(swaa, {"sliding_window": 9}),
    ],
    ids=["[]=", "update", "|="],
)
def test_a_field_that_is_set_reaches_the_model(edit):
    config = LlamaConfig(**SIZE, swaa=RECIPE)
    edit(config.swaa)
    assert config.swaa == RECIPE.to_dict() | {"sliding_window": 9}
    assert swaa_of(config) == SWAAConfig.from_dict(RECIPE.to_dict() | {"sliding_window": 9})
    assert json.loads(config.to_json_string())["swaa"] == RECIPE.to_dict() | {"sliding_window": 9}
    config.swaa |= {"sink_tokens": 1}
    assert swaa_of(config).sink_tokens == 1 and swaa_of(config).sliding_window == 9


@pytest.mark.parametrize(
    "edit",
    [
        lambda swaa: swaa.__delitem__("sink_tokens"),
        lambda swaa: swaa.pop("sink_tokens"),
        lambda swaa: swaa.pop("sink_tokens", None),
        lambda swaa: swaa.popitem(),
        lambda swaa: swaa.clear(),
        lambda swaa: swaa.setdefault("slidng_window", 9),
        lambda swaa: ior(swaa, {"slidng_window": 9}),
        lambda swaa: ior(swaa, {"sliding_window": 0}),
        lambda swaa: swaa["full_attention_layers"].append(3),
        lambda swaa: swaa["full_attention_layers"].extend([3]),
        lambda swaa: swaa["full_attention_layers"].insert(0, 0),
        lambda swaa: swaa["full_attention_layers"].remove(1),
        lambda swaa: swaa["full_attention_layers"].pop(),
        lambda swaa: swaa["full_attention_layers"].clear(),
        lambda swaa: swaa["full_attention_layers"].sort(reverse=True),
        lambda swaa: swaa["full_attention_layers"].reverse(),
        lambda swaa: swaa["full_attention_layers"].__setitem__(0, 3),
        lambda swaa: swaa["full_attention_layers"].__delitem__(0),
        lambda swaa: ior(swaa, {}) or swaa["full_attention_layers"].__iadd__([3]),
        lambda swaa: swaa["full_attention_layers"].__imul__(2),
        lambda swaa: swaa["full_attention_decode"].append(3),
    ],
)
def test_an_edit_that_would_not_reach_the_model_is_refused_and_changes_nothing(edit):
    recipe = SWAAConfig(8, 2, [1, 2], [0, 3], 4)
    config = LlamaConfig(**SIZE, swaa=recipe)
    for _ in range(2):
        with pytest.raises(ConfigError):
            edit(config.swaa)
        assert config.swaa == recipe.to_dict() and swaa_of(config) == recipe
        config.swaa.update()  # parses again what the dict says


def test_reading_is_as_of_a_plain_dict():
    config = LlamaConfig(**SIZE, swaa=RECIPE)
    assert isinstance(config.swaa, dict) and isinstance(config.swaa["full_attention_layers"], list)
    assert config.swaa == RECIPE.to_dict() and json.loads(json.dumps(config.swaa)) == RECIPE.to_dict()
    assert config.swaa.setdefault("sink_tokens", 99) == 2 and config.swaa.pop("nothing", 5) == 5
    with pytest.raises(KeyError):
        config.swaa.pop("nothing")
    for copied in (copy.deepcopy(config.swaa), pickle.loads(pickle.dumps(config.swaa)), copy.copy(config.swaa)):
        copied["sink_tokens"] = 1
        assert copied.parsed.sink_tokens == 1 and swaa_of(config) == RECIPE
    layers = copy.copy(config.swaa["full_attention_layers"])
    layers.append(3)  # a plain list
    config.swaa["full_attention_layers"] = layers
    assert swaa_of(config).full_attention_layers == (1, 3)
    config.swaa = config.swaa | {"sink_tokens": 0}
    assert swaa_of(config).sink_tokens == 0


def test_an_edit_reaches_both_configs_of_a_composite_model_and_no_copy():
    config = composite(swaa=RECIPE)
    copied = copy.deepcopy(config)
    config.swaa["sink_tokens"] = 0
    assert swaa_of(config.text_config).sink_tokens == 0
    assert swaa_of(copied) == swaa_of(copied.text_config) == RECIPE
    copied.text_config.swaa["sink_tokens"] = 1
    assert swaa_of(copied).sink_tokens == 1


@pytest.mark.parametrize("family", ["falcon", "xlnet", "mamba"])
def test_a_recipe_for_a_model_that_it_cannot_reach_is_refused_with_the_model_named(family):
    with pytest.raises(UnsupportedModelError, match=f"'{family}' does not call attention by name"):
        AutoConfig.for_model(family, swaa=RECIPE)
    config = AutoConfig.for_model(family)
    with pytest.raises(UnsupportedModelError, match=f"'{family}' does not call attention by name"):
        config.swaa = RECIPE
    assert config.swaa is None


def test_an_edit_that_names_layers_which_the_model_does_not_have_is_refused_at_once():
    config = LlamaConfig(**SIZE, swaa=RECIPE)
    with pytest.raises(ConfigError, match="layer 9 of 4"):
        config.swaa["full_attention_layers"] = [9]
    assert config.swaa["full_attention_layers"] == [1] and config.swaa.parsed == RECIPE
