"""`SWAAConfig`: what it accepts, what it refuses and says, and what it means for each layer."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swaa_flex.config import BACKENDS, LayerKind, SWAAConfig
from swaa_flex.errors import ConfigError, SWAAError

FULL = LayerKind(full=True, full_attention_decode=True)
SLIDING = LayerKind(full=False, full_attention_decode=False)
SLIDING_WITH_FULL_DECODE = LayerKind(full=False, full_attention_decode=True)

PAPER_LAYERS = list(range(1, 48, 2))


def full_layers(config: SWAAConfig, num_hidden_layers: int) -> list[int]:
    return [layer for layer, kind in enumerate(config.resolve(num_hidden_layers)) if kind.full]


def full_decode_layers(config: SWAAConfig, num_hidden_layers: int) -> list[int]:
    kinds = config.resolve(num_hidden_layers)
    return [layer for layer, kind in enumerate(kinds) if kind.full_attention_decode]


def test_defaults_are_the_documented_ones():
    assert SWAAConfig().to_dict() == {
        "sliding_window": 4096,
        "sink_tokens": 128,
        "full_attention_layers": "1::2",
        "full_attention_decode": True,
        "dense_tail": 64,
        "backend": "auto",
    }


def test_fields_cannot_be_assigned():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SWAAConfig().sink_tokens = 4  # type: ignore[misc]


def test_config_error_is_a_value_error_of_the_library():
    with pytest.raises(ValueError, match="sink_tokens") as caught:
        SWAAConfig(sink_tokens=-1)
    assert isinstance(caught.value, SWAAError)


@pytest.mark.parametrize("value", [0, -1, True, False, 2048.0, "2048", [2048]])
def test_invalid_window_is_refused_with_the_way_out(value):
    with pytest.raises(ConfigError) as caught:
        SWAAConfig(sliding_window=value)
    assert str(caught.value).startswith(f"sliding_window={value!r}: expected at least 1 token")
    assert "None for full attention" in str(caught.value)


@pytest.mark.parametrize("field", ["sink_tokens", "dense_tail"])
@pytest.mark.parametrize("value", [-1, True, False, 4.0, "4", None])
def test_invalid_token_count_is_refused(field, value):
    with pytest.raises(ConfigError) as caught:
        SWAAConfig(**{field: value})
    assert str(caught.value) == f"{field}={value!r}: expected a number of tokens as an int, 0 for none"


def test_smallest_values_are_accepted():
    config = SWAAConfig(sliding_window=1, sink_tokens=0, full_attention_layers=(), dense_tail=0)
    assert (config.sliding_window, config.sink_tokens, config.dense_tail) == (1, 0, 0)


LAYER_FIELDS = pytest.mark.parametrize("field", ["full_attention_layers", "full_attention_decode"])


@LAYER_FIELDS
@pytest.mark.parametrize(
    "value", ["", "odd", "3", "1,3", "a::2", "1:2:3:4", " 1::2", "1: :2", "--1:", "1.0::2", "1::2\n"]
)
def test_malformed_slice_is_refused_with_an_example(field, value):
    with pytest.raises(ConfigError) as caught:
        SWAAConfig(**{field: value})
    assert str(caught.value).startswith(f"{field}={value!r}: expected ")
    assert '"1::2"' in str(caught.value)


@LAYER_FIELDS
@pytest.mark.parametrize("value", ["1:2:0", "::0", "::-0"])
def test_slice_with_step_zero_is_refused(field, value):
    with pytest.raises(ConfigError) as caught:
        SWAAConfig(**{field: value})
    assert str(caught.value).startswith(f"{field}={value!r}: a slice cannot have step 0")


@LAYER_FIELDS
@pytest.mark.parametrize("value", [None, 1, 1.5, {1, 3}, range(3), {"1": 2}])
def test_layer_set_of_another_type_is_refused(field, value):
    with pytest.raises(ConfigError) as caught:
        SWAAConfig(**{field: value})
    assert str(caught.value).startswith(f"{field}={value!r}: expected a list of layer indices")


@LAYER_FIELDS
@pytest.mark.parametrize("index", [-1, True, 1.0, "1", None, [1]])
def test_invalid_layer_index_is_refused_with_its_place_in_the_list(field, index):
    with pytest.raises(ConfigError) as caught:
        SWAAConfig(**{field: [3, index]})
    assert str(caught.value) == f"{field}[1]={index!r}: expected a layer index as an int, counted from 0"


@LAYER_FIELDS
def test_repeated_layer_index_is_refused(field):
    with pytest.raises(ConfigError) as caught:
        SWAAConfig(**{field: [5, 1, 5, 2, 1]})
    assert str(caught.value) == f"{field}=[5, 1, 5, 2, 1]: expected each layer once, but [1, 5] are repeated"


def test_full_attention_layers_true_is_refused():
    with pytest.raises(ConfigError, match="full_attention_layers=True: expected a list of layer indices"):
        SWAAConfig(full_attention_layers=True)


@LAYER_FIELDS
def test_layer_list_becomes_a_sorted_tuple(field):
    assert getattr(SWAAConfig(**{field: [7, 0, 3]}), field) == (0, 3, 7)


@pytest.mark.parametrize("nothing", [[], ()])
def test_no_decode_layers_is_the_same_as_no_full_attention_decode(nothing):
    assert SWAAConfig(full_attention_decode=nothing) == SWAAConfig(full_attention_decode=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_backend_is_accepted(backend):
    assert SWAAConfig(backend=backend).backend == backend


@pytest.mark.parametrize(("value", "nearest"), [("flsh", "flash"), ("TRITON", "triton"), ("chunk", "chunked")])
def test_unknown_backend_suggests_the_nearest(value, nearest):
    with pytest.raises(ConfigError) as caught:
        SWAAConfig(backend=value)
    assert str(caught.value) == (
        f"backend={value!r}: expected one of auto, flash, triton, cpp, chunked; did you mean {nearest!r}?"
    )


@pytest.mark.parametrize("value", ["cudnn", "", None, 3, [3]])
def test_unknown_backend_without_a_near_one_lists_all(value):
    with pytest.raises(ConfigError) as caught:
        SWAAConfig(backend=value)
    assert str(caught.value) == f"backend={value!r}: expected one of auto, flash, triton, cpp, chunked"


def test_equal_settings_are_equal_and_hash_alike():
    one = SWAAConfig(sliding_window=64, full_attention_layers=[3, 1], full_attention_decode=[0, 2])
    other = SWAAConfig(sliding_window=64, full_attention_layers=(1, 3), full_attention_decode=(2, 0))
    assert one == other
    assert hash(one) == hash(other)


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": None},
        {"sink_tokens": 0},
        {"full_attention_layers": ()},
        {"full_attention_decode": False},
        {"dense_tail": 0},
        {"backend": "chunked"},
    ],
)
def test_configs_that_differ_in_one_field_are_different(change):
    assert SWAAConfig(**change) != SWAAConfig()


indices = st.lists(st.integers(0, 200), unique=True)
slice_bound = st.one_of(st.just(""), st.integers(-200, 200).map(str))
slice_step = st.one_of(st.just(""), st.integers(-9, 9).filter(bool).map(str))
slices = st.one_of(
    st.tuples(slice_bound, slice_bound).map(":".join),
    st.tuples(slice_bound, slice_bound, slice_step).map(":".join),
)
layer_sets = st.one_of(slices, indices, indices.map(tuple))
configs = st.builds(
    SWAAConfig,
    sliding_window=st.none() | st.integers(1, 2**20),
    sink_tokens=st.integers(0, 2**20),
    full_attention_layers=layer_sets,
    full_attention_decode=st.booleans() | layer_sets,
    dense_tail=st.integers(0, 2**20),
    backend=st.sampled_from(BACKENDS),
)


@given(configs)
def test_json_round_trip_gives_an_equal_config(config):
    again = SWAAConfig.from_json(config.to_json())
    assert again == config
    assert hash(again) == hash(config)


@given(configs)
def test_dict_holds_only_what_json_keeps(config):
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert SWAAConfig.from_dict(config.to_dict()) == config


def test_dict_has_lists_where_the_config_has_tuples():
    values = SWAAConfig(full_attention_layers=[3, 1], full_attention_decode=(0,)).to_dict()
    assert values["full_attention_layers"] == [1, 3]
    assert values["full_attention_decode"] == [0]
    assert type(values["full_attention_layers"]) is list


def test_missing_keys_take_the_defaults():
    assert SWAAConfig.from_dict({"sliding_window": 8}) == SWAAConfig(sliding_window=8)
    assert SWAAConfig.from_json("{}") == SWAAConfig()


def test_unknown_key_suggests_the_nearest_field():
    with pytest.raises(ConfigError) as caught:
        SWAAConfig.from_dict({"sliding_windw": 8})
    assert str(caught.value) == (
        "unknown key 'sliding_windw': expected one of sliding_window, sink_tokens, full_attention_layers, "
        "full_attention_decode, dense_tail, backend; did you mean 'sliding_window'?"
    )


@pytest.mark.parametrize("key", ["zzz", 7, None])
def test_unknown_key_without_a_near_one_lists_the_fields(key):
    with pytest.raises(ConfigError) as caught:
        SWAAConfig.from_dict({key: 8})
    assert str(caught.value).startswith(f"unknown key {key!r}: expected one of sliding_window, ")
    assert str(caught.value).endswith("backend")


@pytest.mark.parametrize("values", [None, "quality", 3, [("sliding_window", 8)]])
def test_dict_of_another_type_is_refused(values):
    with pytest.raises(ConfigError) as caught:
        SWAAConfig.from_dict(values)
    assert str(caught.value).startswith("expected a dict with keys among sliding_window, ")
    assert str(caught.value).endswith(f"got {values!r}")


@pytest.mark.parametrize("text", ["", "{", "sliding_window: 8"])
def test_text_that_is_not_json_is_refused(text):
    with pytest.raises(ConfigError) as caught:
        SWAAConfig.from_json(text)
    assert str(caught.value).startswith("expected a JSON object")
    assert str(caught.value).endswith(f"got {text!r}")


def test_json_that_is_not_an_object_is_refused():
    with pytest.raises(ConfigError, match=r"expected a dict .* got \[1, 2\]"):
        SWAAConfig.from_json("[1, 2]")


@pytest.mark.parametrize(
    ("layers", "num_hidden_layers", "expected"),
    [
        ("0::2", 1, [0]),
        (":", 1, [0]),
        ([0], 1, [0]),
        ((), 1, []),
        ("1::2", 2, [1]),
        ("0::2", 2, [0]),
        ("1::4", 2, [1]),
        ([0, 1], 2, [0, 1]),
        ("1::2", 30, [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29]),
        ("1::4", 30, [1, 5, 9, 13, 17, 21, 25, 29]),
        ("-2:", 30, [28, 29]),
        ([29, 0], 30, [0, 29]),
        ("0::2", 36, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34]),
        ("1::4", 36, [1, 5, 9, 13, 17, 21, 25, 29, 33]),
        ("34:99", 36, [34, 35]),
        ("3::-2", 36, [1, 3]),
        (":2", 36, [0, 1]),
        ([35], 36, [35]),
    ],
)
def test_layer_set_selects_the_layers_it_names(layers, num_hidden_layers, expected):
    config = SWAAConfig(full_attention_layers=layers, full_attention_decode=False)
    assert full_layers(config, num_hidden_layers) == expected
    assert full_decode_layers(config, num_hidden_layers) == expected

    config = SWAAConfig(full_attention_layers=(), full_attention_decode=layers)
    assert full_layers(config, num_hidden_layers) == []
    assert full_decode_layers(config, num_hidden_layers) == expected


@given(slices, st.integers(1, 80))
def test_slice_selects_what_it_selects_in_python(text, num_hidden_layers):
    expected = eval(f"range(num_hidden_layers)[{text}]", {"range": range, "num_hidden_layers": num_hidden_layers})
    config = SWAAConfig(full_attention_layers=text)
    if expected:
        assert full_layers(config, num_hidden_layers) == sorted(expected)
    else:
        with pytest.raises(ConfigError, match="selects none"):
            config.resolve(num_hidden_layers)


def test_default_keeps_the_odd_layers_full_and_decodes_the_others_in_full():
    assert SWAAConfig().resolve(4) == (SLIDING_WITH_FULL_DECODE, FULL, SLIDING_WITH_FULL_DECODE, FULL)


def test_decode_layers_do_not_change_full_layers():
    config = SWAAConfig(full_attention_layers=[1], full_attention_decode=[1, 2])
    assert config.resolve(4) == (SLIDING, FULL, SLIDING_WITH_FULL_DECODE, SLIDING)


@pytest.mark.parametrize("num_hidden_layers", [1, 2, 30, 36])
def test_every_layer_is_full_without_a_window(num_hidden_layers):
    config = SWAAConfig(sliding_window=None, full_attention_decode=False)
    assert config.resolve(num_hidden_layers) == (FULL,) * num_hidden_layers


@LAYER_FIELDS
def test_layer_out_of_range_is_refused_by_name(field):
    with pytest.raises(ConfigError) as caught:
        SWAAConfig(**{"full_attention_layers": (), field: [1, 40, 50]}).resolve(36)
    assert str(caught.value).startswith(f"{field}: layer 40 of 36 does not exist; use indices 0 to 35")


@pytest.mark.parametrize("num_hidden_layers", [1, 2, 30, 36])
def test_first_index_past_the_last_layer_is_refused(num_hidden_layers):
    assert full_layers(SWAAConfig(full_attention_layers=[num_hidden_layers - 1]), num_hidden_layers)
    with pytest.raises(ConfigError, match=f"layer {num_hidden_layers} of {num_hidden_layers}"):
        SWAAConfig(full_attention_layers=[num_hidden_layers]).resolve(num_hidden_layers)


@LAYER_FIELDS
@pytest.mark.parametrize(("text", "num_hidden_layers"), [("40::2", 36), ("1::2", 1), ("5:3", 30)])
def test_slice_that_selects_no_layer_is_refused_by_name(field, text, num_hidden_layers):
    config = SWAAConfig(**{"full_attention_layers": (), field: text})
    with pytest.raises(ConfigError) as caught:
        config.resolve(num_hidden_layers)
    assert str(caught.value).startswith(f"{field}={text!r}: the slice selects none of the model's ")
    assert f" {num_hidden_layers} layers" in str(caught.value)
    assert "write ()" in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, True, 36.0, "36", None])
def test_invalid_number_of_layers_is_refused(value):
    with pytest.raises(ConfigError) as caught:
        SWAAConfig(full_attention_layers=()).resolve(value)
    assert str(caught.value) == f"num_hidden_layers={value!r}: expected at least 1 layer as an int"


def test_reference_settings_of_the_paper_fit_a_model_of_36_layers():
    config = SWAAConfig.from_reference(
        {
            "sliding_window_size": 2000,
            "keep_first": 100,
            "force_fa_decode": True,
            "non_sliding_layers": PAPER_LAYERS,
        },
        num_hidden_layers=36,
    )
    assert config == SWAAConfig(
        sliding_window=2000,
        sink_tokens=100,
        full_attention_layers=[1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31, 33, 35],
        full_attention_decode=True,
        dense_tail=0,
        backend="auto",
    )
    assert config.resolve(36) == SWAAConfig(full_attention_layers="1::2").resolve(36)


def test_reference_decode_layers_out_of_range_are_dropped():
    values = {"sliding_window_size": 64, "force_fa_decode": [0, 34, 36, 40]}
    assert SWAAConfig.from_reference(values, num_hidden_layers=36).full_attention_decode == (0, 34)
    assert SWAAConfig.from_reference(values, num_hidden_layers=48).full_attention_decode == (0, 34, 36, 40)


def test_reference_layers_are_kept_and_refused_later_without_the_number_of_layers():
    config = SWAAConfig.from_reference({"sliding_window_size": 2000, "non_sliding_layers": PAPER_LAYERS})
    assert config.full_attention_layers == tuple(PAPER_LAYERS)
    with pytest.raises(ConfigError, match="layer 37 of 36"):
        config.resolve(36)


def test_reference_keys_that_are_missing_are_off():
    assert SWAAConfig.from_reference({"sliding_window_size": 2048}) == SWAAConfig(
        sliding_window=2048,
        sink_tokens=0,
        full_attention_layers=(),
        full_attention_decode=False,
        dense_tail=0,
    )


@pytest.mark.parametrize("values", [{}, {"sliding_window_size": None}, {"sliding_window_size": 0}])
def test_reference_without_a_window_is_full_attention(values):
    assert SWAAConfig.from_reference(values).sliding_window is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sliding_window_size": -1}, "sliding_window_size=-1: expected a number of tokens"),
        ({"sliding_window_size": True}, "sliding_window_size=True: expected a number of tokens"),
        ({"sliding_window_size": 2e3}, "sliding_window_size=2000.0: expected a number of tokens"),
        ({"keep_first": -1}, "keep_first=-1: expected a number of tokens"),
        ({"keep_first": None}, "keep_first=None: expected a number of tokens"),
        ({"force_fa_decode": 1}, "force_fa_decode=1: expected a list of layer indices"),
        ({"non_sliding_layers": "1::2"}, "non_sliding_layers='1::2': expected a list of layer indices"),
        ({"non_sliding_layers": [-1]}, "non_sliding_layers[0]=-1: expected a layer index"),
        ({"keep_frist": 10}, "unknown key 'keep_frist': expected one of sliding_window_size, keep_first, "),
        ({"sliding_window": 10}, "unknown key 'sliding_window': expected one of sliding_window_size, "),
        (None, "expected a dict with keys among sliding_window_size, "),
    ],
)
def test_invalid_reference_settings_are_refused_under_their_own_names(values: Any, message):
    with pytest.raises(ConfigError) as caught:
        SWAAConfig.from_reference(values)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("layer", "decode", "prompt_length", "expected"),
    [
        (1, True, None, "causal"),
        (0, True, None, "causal & (window(8) | sinks(2))"),
        (0, True, 50, "causal & (window(8) | sinks(2) | rows_from(46))"),
        (0, False, 50, "causal & (window(8) | sinks(2) | rows_from(46) & ~rows_from(50))"),
        (2, [0], 50, "causal & (window(8) | sinks(2) | rows_from(46) & ~rows_from(50))"),
    ],
)
def test_mask_for_states_what_a_layer_sees(layer, decode, prompt_length, expected):
    config = SWAAConfig(8, 2, full_attention_layers=[1], full_attention_decode=decode, dense_tail=4)
    assert repr(config.mask_for(layer, 3, prompt_length=prompt_length)) == expected


def test_mask_for_refuses_a_layer_the_model_does_not_have():
    with pytest.raises(ConfigError, match="layer=36: expected 0 to 35"):
        SWAAConfig().mask_for(36, 36)


def test_mask_for_without_a_window_is_causal():
    assert repr(SWAAConfig(sliding_window=None).mask_for(0, 2, prompt_length=9)) == "causal"
