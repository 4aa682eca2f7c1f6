"""`SWAACache` against full caches and dense masks that know the true boundary between prompt and answer."""

import copy
import dataclasses

import pytest
import torch
from reference import Truth, under_reference
from tiny_models import FAMILIES, SIZE, batch, tiny
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import swaa_flex
from swaa_flex import ConfigError, SWAACache, SWAAConfig, UnsupportedModelError
from swaa_flex.hf.cache import CACHE
from swaa_flex.hf.cache_layers import Pads, SinksAndWindowLayer, StaticSinksAndWindowLayer

WINDOW, SINKS = 8, 3
LENGTH = 29  # 4 chunks of 7 and one token
RECIPES = [
    SWAAConfig(
        sliding_window=WINDOW,
        sink_tokens=SINKS,
        full_attention_layers=full,
        full_attention_decode=decode,
        dense_tail=tail,
    )
    for full in ((), (1, 3))
    for decode in (False, True)
    for tail in (0, 5)
]
RECIPES.append(SWAAConfig(WINDOW, 0, [0], False, 5))
GREEDY = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
MODELS = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
}
CACHES = {"dynamic": None, "static": 64}
NEW = 12  # tokens, so that a ring comes round


@pytest.fixture(params=MODELS)
def model(request):
    return tiny(request.param, **MODELS[request.param])


def caches(model, **kwargs):
    """A growing cache and one of fixed size."""
    for max_length in CACHES.values():
        yield SWAACache(model.config, max_length=max_length, **kwargs)


def each_recipe(model):
    for config in (RECIPES[at] for at in (0, 3, 5, 6, 8)):  # each pair of two fields' values
        model.config.swaa = config
        yield config


def prompt(length=LENGTH):
    return {"input_ids": torch.randint(3, 99, (1, length)), "attention_mask": torch.ones(1, length, dtype=torch.long)}


def compare(ours, theirs):
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), atol=1e-5, rtol=1e-5)


def truth(model, config, sequence, attention_mask, answers, dense_tail=None):
    """Logits of one dense forward over everything that was said; `answers`: [start, stop) columns of each answer."""
    Truth.set(config, sequence, attention_mask, answers)
    model.set_attn_implementation("swaa_truth")
    try:
        with torch.no_grad():
            return model(sequence, attention_mask=attention_mask).logits
    finally:
        model.set_attn_implementation("swaa_flex")


# --- generate, cell by cell -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pads", [0, 13, LENGTH - 2])
def test_plain_and_left_padded(model, pads):
    inputs = batch(LENGTH, pads) if pads else prompt()
    kwargs = {**inputs, **GREEDY, "max_new_tokens": NEW}
    for config in each_recipe(model):
        expected = under_reference(model, config, lambda: model.generate(**kwargs))
        for cache in caches(model):
            compare(model.generate(**kwargs, past_key_values=cache), expected)


def test_beams(model):
    kwargs = {**batch(LENGTH, 13), "max_new_tokens": NEW, "num_beams": 3, "do_sample": False}
    for config in each_recipe(model):
        expected = under_reference(model, config, lambda: model.generate(**kwargs))
        for cache in caches(model):
            assert torch.equal(model.generate(**kwargs, past_key_values=cache), expected)


@pytest.mark.parametrize(
    ("chunk", "who_knows", "pads"),
    [(10, "cache", 13), (7, "prompt", 0)]
    + [pytest.param(*more, marks=pytest.mark.slow) for more in [(10, "cache", 0), (7, "prompt", 13)]],
)
def test_chunked_prefill(model, chunk, who_knows, pads):
    inputs = batch(LENGTH, pads) if pads else prompt()
    lengths = [LENGTH - pads, LENGTH] if pads else [LENGTH]
    kwargs = {**inputs, **GREEDY, "max_new_tokens": NEW}
    for config in each_recipe(model):
        expected = under_reference(model, config, lambda: model.generate(**kwargs), lengths)
        for cache in caches(model, prompt_lengths=lengths if who_knows == "cache" else None):
            with swaa_flex.prompt(lengths if who_knows == "prompt" else None):
                ours = model.generate(**kwargs, prefill_chunk_size=chunk, past_key_values=cache)
            compare(ours, expected)


def test_assisted_decoding(model):
    assistant = tiny("llama", num_hidden_layers=1)
    assistant.set_attn_implementation("sdpa")
    inputs = prompt()
    kwargs = {**inputs, "max_new_tokens": NEW, "do_sample": False}
    for config in each_recipe(model):
        expected = under_reference(model, config, lambda: model.generate(**kwargs), [LENGTH])
        with swaa_flex.prompt(LENGTH):
            ours = model.generate(**kwargs, past_key_values=SWAACache(model.config), assistant_model=assistant)
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("pads", [0, 13])
def test_continued(model, pads):
    inputs = batch(LENGTH, pads) if pads else prompt()
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
    for config in each_recipe(model):
        whole = under_reference(model, config, lambda: model.generate(**inputs, **GREEDY, max_new_tokens=NEW))
        for cache in caches(model):
            begun = model.generate(**inputs, **GREEDY, max_new_tokens=5, past_key_values=cache)
            rest = {"input_ids": begun.sequences, "attention_mask": mask, "max_new_tokens": NEW - 5}
            rest = model.generate(**rest, **GREEDY, past_key_values=cache)
            rest.logits = begun.logits + rest.logits
            compare(rest, whole)


@pytest.mark.parametrize(
    ("user", "pads"),
    [(4, 0), (20, 13)] + [pytest.param(*more, marks=pytest.mark.slow) for more in [(4, 13), (20, 0)]],
)
def test_a_second_turn(model, pads, user):
    inputs = batch(LENGTH, pads) if pads else prompt()
    mask = inputs["attention_mask"]
    said = torch.randint(3, 99, (mask.shape[0], user))
    # The last token of the first answer is not run before the second turn, so it counts with the user's tokens.
    end = LENGTH + 6 + user
    answers = [(LENGTH, LENGTH + 5), (end, end + 8)]
    for config in each_recipe(model):
        for cache in caches(model, prompt_lengths=mask.sum(-1)):
            first = model.generate(**inputs, **GREEDY, max_new_tokens=6, past_key_values=cache)
            sequence = torch.cat([first.sequences, said], 1)
            longer = torch.nn.functional.pad(mask, (0, 6 + user), value=1)
            cache.prompt_lengths = longer.sum(-1)
            second = model.generate(sequence, attention_mask=longer, **GREEDY, max_new_tokens=8, past_key_values=cache)
            whole = torch.nn.functional.pad(longer, (0, 8), value=1)
            expected = truth(model, config, second.sequences, whole, answers)
            for ours, columns in ((first, range(LENGTH - 1, LENGTH + 5)), (second, range(end - 1, end + 7))):
                torch.testing.assert_close(torch.stack(ours.logits, 1), expected[:, columns], atol=1e-5, rtol=1e-5)


# --- the verbs of a cache ---------------------------------------------------------------------------------------

RELEASING = SWAAConfig(
    sliding_window=WINDOW, sink_tokens=SINKS, full_attention_layers=(), full_attention_decode=False, dense_tail=0
)


@pytest.fixture
def llama():
    model = tiny("llama")
    model.config.swaa = RELEASING
    return model


@torch.no_grad()
def forward(model, ids, cache, **kwargs):
    return model(ids, past_key_values=cache, **kwargs).logits


def test_released_layers_hold_sinks_and_window_and_say_so(llama):
    cache, ids = SWAACache(llama.config), torch.randint(3, 99, (2, 50))
    forward(llama, ids, cache)
    token = 2 * 2 * 2 * 8 * 4  # keys and values, batch, kv heads, head_dim, bytes
    assert cache.get_seq_length() == 50
    assert cache.memory() == {"full": 0, "window": 4 * 10 * token, "native": 0, "total": 4 * 10 * token}
    llama.config.swaa = SWAAConfig(WINDOW, SINKS, [1, 3], False, 0)
    half = SWAACache(llama.config)
    forward(llama, ids, half)
    assert half.memory() == {"full": 2 * 50 * token, "window": 2 * 10 * token, "native": 0, "total": 120 * token}
    fixed = SWAACache(llama.config, max_length=64)
    forward(llama, ids, fixed)
    assert fixed.memory()["window"] == 2 * 11 * token
    assert fixed.memory()["full"] == 2 * 64 * token


def test_a_dense_tail_holds_the_prompt_until_decoding_begins(llama):
    llama.config.swaa = SWAAConfig(WINDOW, SINKS, (), False, 5)
    for cache in caches(llama):
        forward(llama, torch.randint(3, 99, (1, 50)), cache)
        held = cache.memory()["window"]
        forward(llama, torch.randint(3, 99, (1, 1)), cache)
        assert cache.memory()["window"] < held / 3


@pytest.mark.parametrize("slack", [0, 6])
def test_crop_takes_back_as_many_tokens_as_the_slack(llama, slack):
    ids, other = torch.randint(3, 99, (1, 60)), torch.randint(3, 99, (1, 9))
    cache, expected = SWAACache(llama.config, slack=slack), SWAACache(llama.config)
    forward(llama, ids[:, :30], cache)
    forward(llama, ids[:, 30:], cache)
    if slack == 0:
        with pytest.raises(ConfigError, match=r"crop\(-6\).*released.*slack=6"):
            cache.crop(-6)
        return
    cache.crop(-6)
    forward(llama, ids[:, :54], expected)
    assert cache.get_seq_length() == 54
    ours, theirs = (forward(llama, other, c) for c in (cache, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"crop\(-9\).*released.*slack=9"):
        cache.crop(-9)


def test_a_fixed_cache_cannot_be_cropped(llama):
    with pytest.raises(ConfigError, match="without max_length"):
        SWAACache(llama.config, max_length=40).crop(-1)


@pytest.mark.parametrize("pads", [0, 13])
def test_sequences_are_repeated_selected_and_reordered(llama, pads):
    inputs = batch(40, pads)
    cache = SWAACache(llama.config)
    forward(llama, inputs["input_ids"], cache, attention_mask=inputs["attention_mask"])
    order = torch.tensor([3, 0, 2])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(order)
    cache.reorder_cache(torch.tensor([2, 1, 0]))
    rows = torch.tensor([1, 0, 1])  # of the two sequences
    expected = SWAACache(llama.config)
    mask = inputs["attention_mask"][rows]
    forward(llama, inputs["input_ids"][rows], expected, attention_mask=mask)
    more, longer = torch.randint(3, 99, (3, 12)), torch.nn.functional.pad(mask, (0, 12), value=1)
    ours, theirs = (forward(llama, more, c, attention_mask=longer) for c in (cache, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_cache_is_as_new_after_reset(llama):
    ids = torch.randint(3, 99, (1, 40))
    for config in each_recipe(llama):
        for cache in caches(llama):
            once = llama.generate(ids, max_new_tokens=12, do_sample=False, past_key_values=cache)
            cache.reset()
            assert cache.get_seq_length() == 0, config
            assert torch.equal(llama.generate(ids, max_new_tokens=12, do_sample=False, past_key_values=cache), once)


def test_a_prefix_is_reused_by_copying_its_cache(llama):
    prefix, rest = torch.randint(3, 99, (1, 40)), [torch.randint(3, 99, (1, n)) for n in (1, 5, 20)]
    for config in each_recipe(llama):
        for cache in caches(llama, prompt_lengths=100):
            forward(llama, prefix, cache)
            # Rows of the prefix stay as they were computed, so the dense tail has to lie in the remainder.
            for remainder in (r for r in rest if r.shape[1] >= config.dense_tail):
                whole = torch.cat([prefix, remainder], 1)
                length = whole.shape[1]
                used = copy.deepcopy(cache)
                used.prompt_lengths = length
                ours = forward(llama, remainder, used)[:, -1]
                theirs = truth(llama, config, whole, torch.ones_like(whole), [(length, length)])[:, -1]
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dense_tail", [0, 5])
def test_pads_may_be_told_to_the_cache_instead_of_every_forward(llama, dense_tail):
    llama.config.swaa = SWAAConfig(WINDOW, SINKS, (), False, dense_tail)
    inputs = batch(40, 13)
    position_ids = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    more = torch.randint(3, 99, (2, 6))
    known = {"prompt_lengths": [33, 46]}
    for max_length in CACHES.values():
        told = SWAACache(llama.config, max_length=max_length, attention_mask=inputs["attention_mask"])
        each = SWAACache(llama.config, max_length=max_length)
        forward(llama, inputs["input_ids"], told, position_ids=position_ids, **known)
        forward(
            llama,
            inputs["input_ids"],
            each,
            attention_mask=inputs["attention_mask"],
            position_ids=position_ids,
            **known,
        )
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 6), value=1)
        later = position_ids[:, -1:] + 1 + torch.arange(6)
        ours = forward(llama, more, told, position_ids=later, **known)
        theirs = forward(llama, more, each, attention_mask=mask, position_ids=later, **known)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# --- what goes wrong --------------------------------------------------------------------------------------------


LATENT = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16, "q_lora_rank": 16}
WIDENED = {  # by what comes between the cache and attention
    "deepseek_v3": LATENT | {"num_key_value_heads": 4, "first_k_dense_replace": 4, "n_group": 1, "topk_group": 1},
    "jetmoe": {"kv_channels": 8, "num_local_experts": 4},
}


@pytest.mark.parametrize("dense_tail", [0, 4])
@pytest.mark.parametrize("family", WIDENED)
def test_keys_that_are_widened_for_attention_are_kept_and_released(family, dense_tail, monkeypatch):
    monkeypatch.setitem(FAMILIES, family, WIDENED[family])
    model = tiny(family)
    model.config.swaa = dataclasses.replace(RELEASING, dense_tail=dense_tail)
    inputs = batch()

    def answer(cache):
        kwargs = {"max_new_tokens": 20, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        return torch.stack(model.generate(**inputs, past_key_values=cache, **kwargs).logits)

    expected = answer(DynamicCache(config=model.config))
    for cache in (SWAACache(model.config), SWAACache(model.config, max_length=100)):
        torch.testing.assert_close(answer(cache), expected, atol=1e-5, rtol=1e-5)
        held = [getattr(layer, "ring", None) or (layer.keys,) for layer in cache.layers]
        assert all(keys[0].shape[2] <= WINDOW + SINKS + 1 for keys in held), "all but sinks and window is released"


def test_layers_that_use_the_keys_of_others_are_refused(llama):
    config = copy.deepcopy(llama.config)
    config.num_kv_shared_layers = 2
    with pytest.raises(UnsupportedModelError, match=r"last 2 layers use the keys of others.*DynamicCache"):
        SWAACache(config)


@pytest.mark.parametrize("kwargs", [{}, {"max_length": 110}])
def test_a_first_chunk_of_pads_alone_does_not_end_the_prompt(llama, kwargs):
    llama.config.swaa = dataclasses.replace(RELEASING, dense_tail=5)
    ids = torch.randint(3, 99, (1, 43))
    expected = forward(llama, ids, None, prompt_lengths=40, use_cache=False)
    padded, real = torch.cat([torch.zeros(1, 60, dtype=torch.long), ids], 1), torch.ones(1, 103, dtype=torch.long)
    real[:, :60] = 0
    cache, found = SWAACache(llama.config, **kwargs), []
    for begin, end in ((0, 50), (50, 75), (75, 100), (100, 101), (101, 103)):
        chunk, mask = padded[:, begin:end], real[:, :end]
        found.append(forward(llama, chunk, cache, attention_mask=mask, prompt_lengths=40))
    torch.testing.assert_close(torch.cat(found, 1)[:, 60:], expected, atol=1e-5, rtol=1e-5)


def test_a_cache_of_another_recipe_or_model_is_refused_by_name(llama):
    ids, cache = torch.randint(3, 99, (1, 20)), SWAACache(llama.config)
    swaa_flex.adapt(llama, "naive")
    with pytest.raises(
        ConfigError, match=r"made for SWAAConfig\(sliding_window=8.*runs SWAAConfig\(sliding_window=2048"
    ):
        forward(llama, ids, cache)
    shallow = tiny("llama", num_hidden_layers=2)
    shallow.config.swaa = RELEASING
    with pytest.raises(ConfigError, match="made for a llama model with num_hidden_layers=2"):
        forward(llama, ids, SWAACache(shallow.config))
    with pytest.raises(ConfigError, match="made for a llama model with model_type='llama' and this one is qwen3"):
        forward(tiny("qwen3"), ids, SWAACache(llama.config))


def test_another_batch_is_refused_by_name(llama):
    for cache in caches(llama):
        forward(llama, torch.randint(3, 99, (2, 20)), cache)
        with pytest.raises(ConfigError, match=r"batch, kv_heads, head_dim\] = \[2, 2, 8\] and is given \[3, 2, 8\]"):
            forward(llama, torch.randint(3, 99, (3, 4)), cache)


@pytest.mark.parametrize("arguments", [{"max_length": 0}, {"max_length": True}, {"slack": -1}, {"max_length": 2.5}])
def test_sizes_that_make_no_sense_are_refused(llama, arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ConfigError, match=f"{name}={value}: expected"):
        SWAACache(llama.config, **arguments)


def test_model_and_cache_are_usable_after_an_interrupt(llama):
    ids = torch.randint(3, 99, (1, 40))
    expected = llama.generate(ids, max_new_tokens=12, do_sample=False)
    calls = []

    def interrupt(module, arguments):
        calls.append(module)
        if len(calls) == 5:
            raise KeyboardInterrupt

    for cache in caches(llama):
        calls.clear()
        hook = llama.model.layers[2].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt), swaa_flex.prompt(40):
            llama.generate(ids, max_new_tokens=12, do_sample=False, past_key_values=cache)
        hook.remove()
        # Some layers have one token more than others: not to be continued, which the cache says, but to be reset.
        with pytest.raises(ConfigError, match=r"interrupted.*reset\(\)"):
            llama.generate(ids, max_new_tokens=12, do_sample=False, past_key_values=cache)
        cache.reset()
        again = llama.generate(ids, max_new_tokens=12, do_sample=False, past_key_values=cache)
        assert torch.equal(again, expected)
        assert torch.equal(llama.generate(ids, max_new_tokens=12, do_sample=False), expected)


def test_the_first_real_token_of_a_sequence_may_come_alone(llama):
    inputs = batch(LENGTH, LENGTH - 1)  # the last chunk is one token, the only one of the first prompt
    for config in each_recipe(llama):
        lengths = [1, LENGTH]
        kwargs = {**inputs, **GREEDY, "max_new_tokens": NEW}
        expected = under_reference(llama, config, lambda kwargs=kwargs: llama.generate(**kwargs), lengths)
        for cache in caches(llama, prompt_lengths=lengths):
            compare(llama.generate(**kwargs, prefill_chunk_size=7, past_key_values=cache), expected)


def test_a_reset_cache_of_fixed_size_begins_with_any_chunk(llama):
    llama.config.swaa = RECIPES[1]
    ids, used, fresh = torch.randint(3, 99, (1, LENGTH)), *(SWAACache(llama.config, max_length=64) for _ in range(2))
    forward(llama, ids, used)
    used.reset()
    for first, stop in ((0, 1), (1, 15), (15, 29)):
        ours, theirs = (forward(llama, ids[:, first:stop], cache) for cache in (used, fresh))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_prompt_lengths_move_with_their_sequences(llama):
    llama.config.swaa = RECIPES[3]
    ids, more, order = torch.randint(3, 99, (2, 29)), torch.randint(3, 99, (2, 20)), torch.tensor([1, 0])
    cache = SWAACache(llama.config, prompt_lengths=[33, 44])
    forward(llama, ids, cache)
    cache.reorder_cache(order)
    straight = SWAACache(llama.config, prompt_lengths=[44, 33])
    forward(llama, ids[order], straight)
    ours, theirs = (forward(llama, more, c) for c in (cache, straight))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.prompt_lengths.tolist() == [33]
    cache.reset()
    assert cache.prompt_lengths is None


def test_lengths_and_pads_per_prompt_serve_beams(llama):
    inputs = batch(LENGTH, 13)
    kwargs = {"max_new_tokens": NEW, "num_beams": 3, "do_sample": False}
    for config in each_recipe(llama):
        expected = under_reference(
            llama, config, lambda: llama.generate(**inputs, **kwargs), [LENGTH - 13] * 3 + [LENGTH] * 3
        )
        for cache in caches(llama, prompt_lengths=[LENGTH - 13, LENGTH], attention_mask=inputs["attention_mask"]):
            assert torch.equal(llama.generate(**inputs, **kwargs, past_key_values=cache), expected)


def test_a_dense_tail_that_comes_too_late_is_refused(llama):
    ids = torch.randint(3, 99, (1, 29))
    for cache in caches(llama):
        with swaa_flex.prompt(29, dense_tail=5), pytest.raises(ConfigError, match=r"dense_tail=5.*has released keys"):
            llama.generate(ids, max_new_tokens=3, prefill_chunk_size=10, past_key_values=cache)


def test_a_later_prompt_in_chunks_is_refused_by_a_cache_of_fixed_size(llama):
    llama.config.swaa = RECIPES[1]
    cache = SWAACache(llama.config, max_length=64, prompt_lengths=20)
    forward(llama, torch.randint(3, 99, (1, 20)), cache)
    forward(llama, torch.randint(3, 99, (1, 1)), cache)
    cache.prompt_lengths = 40
    forward(llama, torch.randint(3, 99, (1, 9)), cache)
    with pytest.raises(ConfigError, match=r"later prompt arrives in several forwards.*without max_length"):
        forward(llama, torch.randint(3, 99, (1, 9)), cache)


def test_more_tokens_than_there_are_cannot_be_cropped(llama):
    cache = SWAACache(llama.config)
    with pytest.raises(ConfigError, match=r"crop\(-3\).*of 0"):
        cache.crop(-3)
    forward(llama, torch.randint(3, 99, (1, 5)), cache)
    with pytest.raises(ConfigError, match=r"crop\(-9\).*of 5"):
        cache.crop(-9)
    cache.crop(-5)
    assert cache.get_seq_length() == 0


# --- limits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [RECIPES[0], RECIPES[1], RECIPES[4]])
def test_more_tokens_than_a_cache_of_fixed_size_is_for_are_refused(config):
    model = tiny("llama")
    model.config.swaa = config
    for length, tokens in ((40, 3), (20, 30)):  # in the prompt, and while decoding
        with pytest.raises(ConfigError, match=r"max_length=30 tokens per sequence and is given number \d+; make"):
            cache = SWAACache(model.config, max_length=30)
            model.generate(**prompt(length), past_key_values=cache, max_new_tokens=tokens, do_sample=False)


@torch.no_grad()
def test_decode_rows_of_known_prompts_may_come_several_at_a_time():
    model = tiny("llama")
    model.config.swaa = SWAAConfig(WINDOW, SINKS, (1,), False, 5)
    ids = torch.randint(3, 99, (1, 60))
    expected = model(ids, use_cache=False, prompt_lengths=30).logits
    for cache in caches(model, prompt_lengths=30):
        parts = [ids[:, :30], *ids[:, 30:].split(3, dim=1)]
        logits = torch.cat([model(part, **{CACHE: cache}).logits for part in parts], dim=1)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_what_was_held_for_assisted_decoding_is_released():
    model = tiny("llama")
    model.config.swaa = SWAAConfig(WINDOW, SINKS, (), False, 0)
    cache = SWAACache(model.config)
    with swaa_flex.prompt(40):
        model.generate(
            **prompt(40), past_key_values=cache, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=3
        )
    assert max(layer.keys.shape[2] for layer in cache.layers) <= SINKS + WINDOW + 3


def test_the_window_of_the_next_token_is_the_most_that_can_be_taken_back():
    layer = SinksAndWindowLayer(SINKS, WINDOW, Pads(), hold_prompt=False, slack=4)
    keys = torch.arange(50.0).reshape(1, 1, 50, 1)
    layer.update(keys, keys)
    layer.after_attention(decoding=True)
    held = layer.keys[0, 0, SINKS:, 0].tolist()
    assert held == list(map(float, range(50 - (WINDOW - 1) - 4, 50)))
    assert layer.can_crop(4) and not layer.can_crop(5)


@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_a_layer_may_lie_on_another_device_than_the_first(kind):
    pads = Pads()
    pads.set(torch.tensor([3, 0]))
    if kind == "fixed":
        layer = StaticSinksAndWindowLayer(100, SINKS, WINDOW, pads)
    else:
        layer = SinksAndWindowLayer(SINKS, WINDOW, pads, hold_prompt=False)
    keys = torch.empty(2, 1, 30, 4, device="meta")
    layer.update(keys, keys)
    if kind == "growing":
        layer.after_attention(decoding=True)
    keys, _ = layer.update(keys[:, :, :1], keys[:, :, :1])
    assert keys.device.type == "meta"


def test_a_model_is_no_configuration():
    with pytest.raises(ConfigError, match=r"expected that of a model, as in SWAACache\(model.config\), got LlamaFor"):
        SWAACache(tiny("llama"))


@torch.no_grad()
def test_recurrent_layers_are_counted_and_not_compiled():
    shape = {name: SIZE[name] for name in SIZE if name != "head_dim"}
    config = AutoConfig.for_model("lfm2", **shape, layer_types=["conv", "full_attention"] * 2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="swaa_flex").eval()
    model.config.swaa = SWAAConfig(WINDOW, SINKS, (), False, 0)
    ids = torch.randint(3, 99, (1, 40))
    expected = model(ids, use_cache=False).logits
    for cache in caches(model):
        parts = [ids[:, :30], *ids[:, 30:].split(1, dim=1)]
        logits = torch.cat([model(part, **{CACHE: cache}).logits for part in parts], dim=1)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        held = cache.memory()
        assert held["window"] > 0 and held["native"] > 0 and held["full"] == 0
    with pytest.raises(UnsupportedModelError, match="'lfm2': compiled prompts are padded, and its recurrent layers"):
        swaa_flex.compile(model, max_length=256)


def test_lengths_per_prompt_follow_their_beams_when_sequences_move(llama):
    llama.config.swaa = RECIPES[0]
    cache = SWAACache(llama.config, prompt_lengths=[5, 15])
    forward(llama, torch.randint(3, 99, (4, 20)), cache)
    cache.batch_select_indices(torch.tensor([2, 3]))
    assert cache.prompt_lengths.tolist() == [15, 15]


def test_a_shallow_copy_is_refused(llama):
    with pytest.raises(ConfigError, match="deepcopy"):
        copy.copy(SWAACache(llama.config))
