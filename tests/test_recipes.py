"""The recipes: their table, their dependence on the model type, and reading what a user writes."""

from __future__ import annotations

import pytest

from swaa_flex import recipes
from swaa_flex.config import SWAAConfig
from swaa_flex.errors import ConfigError

# name: (sliding_window, sink_tokens, full_attention_layers, full_attention_decode, dense_tail)
TABLE = {
    "full": (None, 0, (), False, 0),
    "naive": (2048, 0, (), False, 0),
    "paper": (2000, 100, "1::2", True, 0),
    "throughput": (2048, 128, (), False, 64),
    "decode_only": (2048, 128, (), True, 64),
    "fast": (2048, 128, "1::4", True, 64),
    "balanced": (4096, 128, "1::2", True, 64),
    "quality": (8192, 128, "1::2", True, 128),
}
HALF_FULL = ("paper", "balanced", "quality")


def test_names_are_in_the_order_of_the_table():
    assert recipes.names() == tuple(TABLE)


@pytest.mark.parametrize("model_type", [None, "qwen3", "qwen2", "mistral", "a-type-nobody-knows"])
@pytest.mark.parametrize("name", TABLE)
def test_recipe_has_the_values_of_the_table(name, model_type):
    assert recipes.get(name, model_type) == SWAAConfig(*TABLE[name], backend="auto")


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("name", TABLE)
def test_half_of_the_layers_means_the_even_ones_where_the_paper_found_them_better(name, model_type):
    window, sinks, layers, decode, tail = TABLE[name]
    expected = SWAAConfig(window, sinks, "0::2" if name in HALF_FULL else layers, decode, tail)
    assert recipes.get(name, model_type) == expected


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("num_hidden_layers", [2, 30, 36])
def test_every_recipe_fits_every_model(name, num_hidden_layers):
    assert len(recipes.get(name).resolve(num_hidden_layers)) == num_hidden_layers


def test_default_recipe_is_the_default_config():
    assert recipes.get(recipes.DEFAULT) == recipes.get("balanced") == SWAAConfig()


@pytest.mark.parametrize("name", TABLE)
def test_description_is_one_line_of_its_own(name):
    description = recipes.describe(name)
    assert description
    assert "\n" not in description
    assert sum(description == recipes.describe(other) for other in TABLE) == 1


@pytest.mark.parametrize("function", [recipes.get, recipes.describe, recipes.coerce])
@pytest.mark.parametrize(("name", "nearest"), [("qualty", "quality"), ("Balanced", "balanced")])
def test_unknown_recipe_suggests_the_nearest_and_lists_all(function, name, nearest):
    with pytest.raises(ConfigError) as caught:
        function(name)
    assert str(caught.value) == (
        f"unknown recipe {name!r}: expected one of full, naive, paper, throughput, decode_only, fast, "
        f"balanced, quality; did you mean {nearest!r}?"
    )


def test_unknown_recipe_without_a_near_one_lists_all():
    with pytest.raises(ConfigError) as caught:
        recipes.get("zzz")
    assert str(caught.value).endswith("decode_only, fast, balanced, quality")


def test_nothing_means_the_default_recipe_of_the_model_type():
    assert recipes.coerce(None) == recipes.get("balanced")
    assert recipes.coerce(None, "llama") == recipes.get("balanced", "llama")


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("model_type", [None, "llama"])
def test_string_means_the_recipe_of_that_name(name, model_type):
    assert recipes.coerce(name, model_type) == recipes.get(name, model_type)


def test_config_is_taken_as_it_is_whatever_the_model_type():
    config = SWAAConfig(full_attention_layers="1::2", sink_tokens=3)
    assert recipes.coerce(config, "llama") is config


def test_dict_means_the_config_of_these_fields_whatever_the_model_type():
    config = SWAAConfig(sliding_window=16, full_attention_layers=[1])
    assert recipes.coerce(config.to_dict(), "llama") == config
    assert recipes.coerce({"sliding_window": 16}, "llama") == SWAAConfig(sliding_window=16)


def test_dict_with_an_unknown_key_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'sink_tokens'"):
        recipes.coerce({"sink_token": 4})


@pytest.mark.parametrize("value", [True, 2048, 1.5, ["quality"], object])
def test_value_of_another_type_is_refused(value):
    with pytest.raises(ConfigError) as caught:
        recipes.coerce(value)
    assert str(caught.value).startswith("expected a recipe name (full, naive, ")
    assert str(caught.value).endswith(f"got {value!r}")
