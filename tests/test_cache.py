"""`SWAACache` against full caches and dense masks that know the true boundary between prompt and answer."""

import copy

import pytest
import torch
from reference import Truth
from test_models import batch, tiny, under_reference

import swaa_flex
from swaa_flex import ConfigError, SWAACache, SWAAConfig

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
RECIPES.append(SWAAConfig(sliding_window=WINDOW, sink_tokens=0, full_attention_layers=[0], full_attention_decode=False))
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
    for config in RECIPES:
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


@pytest.mark.parametrize(("chunk", "who_knows"), [(10, "cache"), (7, "prompt")])
@pytest.mark.parametrize("pads", [0, 13])
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
    for config in each_recipe(model):
        kwargs = {**inputs, "max_new_tokens": NEW, "do_sample": False}
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


@pytest.mark.parametrize("pads", [0, 13])
@pytest.mark.parametrize("user", [4, 20])
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
