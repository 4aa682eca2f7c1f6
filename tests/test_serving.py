"""`generate` of a compiled model takes and returns what `generate` of the model does, its random numbers included."""

import string
import threading

import pytest
import torch
from tiny_models import batch, tiny
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

import swaa_flex
from swaa_flex import ConfigError, SWAACache, SWAAConfig
from swaa_flex.hf.cache import CACHE

LENGTH, NEW = 60, 9
RECIPES = [
    SWAAConfig(16, 3, (), full_attention_decode=False, dense_tail=5),
    SWAAConfig(16, 3, (1, 3), full_attention_decode=True, dense_tail=5),
]


def adapted(recipe):
    return swaa_flex.adapt(tiny("llama"), recipe)


@pytest.fixture(params=RECIPES, ids=repr)
def server(request):
    return swaa_flex.compile(adapted(request.param), max_length=300, batch_size=4, prefill_chunk=128)


def plain(server, *inputs, **options):
    torch.manual_seed(5)
    return server.model.generate(*inputs, **options, **{CACHE: SWAACache(server.model.config)})


def ours(server, *inputs, **options):
    torch.manual_seed(5)
    return server.generate(*inputs, **options)


def hooked(server, *inputs, **options):
    torch.manual_seed(5)
    return server.model.generate(*inputs, **options, custom_generate=server)


def assert_same(found, expected):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
        return
    assert type(found) is type(expected)
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)


class Forbid(LogitsProcessor):
    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, self.tokens, -torch.inf)


def after_four(input_ids, scores, **kwargs):
    return torch.full((len(input_ids),), input_ids.shape[1] == LENGTH + 4, device=input_ids.device)


SAMPLING = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 30, "repetition_penalty": 1.3}
RECORDS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


@pytest.mark.parametrize("way", [ours, hooked])
@pytest.mark.parametrize(
    "options",
    [
        {},
        SAMPLING,
        RECORDS,
        RECORDS | SAMPLING | {"num_return_sequences": 2},
        {"generation_config": GenerationConfig(max_new_tokens=NEW, no_repeat_ngram_size=2, **SAMPLING)},
        {"logits_processor": LogitsProcessorList([Forbid(torch.arange(3, 60))])},
        {"stopping_criteria": [after_four]},
        {"prefix_allowed_tokens_fn": lambda row, ids: [5 + row, 7 + row, 9 + row]},
        {"min_new_tokens": 4, "eos_token_id": list(range(3, 80)), "pad_token_id": 0},
        {"max_length": LENGTH + 3, "max_new_tokens": None},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
def test_it_is_generate_of_the_model(server, way, options):
    options = options if "generation_config" in options else {"max_new_tokens": NEW, **options}
    inputs = batch(LENGTH, 13)
    assert_same(way(server, **inputs, **options), plain(server, **inputs, **options))


def test_other_options_give_other_tokens(server):
    inputs = batch(LENGTH, 13)
    chosen = [
        ours(server, **inputs, max_new_tokens=NEW, **options) for options in ({}, SAMPLING, {"eos_token_id": None})
    ]
    assert torch.equal(chosen[0], chosen[2])
    assert not torch.equal(chosen[0], chosen[1])


@pytest.mark.parametrize("way", [ours, hooked])
def test_an_answer_ends_before_the_other(server, way):
    inputs = batch(LENGTH, 13)
    free = plain(server, **inputs, max_new_tokens=NEW)[:, LENGTH:]
    options = {"max_new_tokens": NEW, "eos_token_id": int(free[0, 2]), "pad_token_id": 0}
    expected = plain(server, **inputs, **options)
    assert (expected[:, LENGTH:] == 0).any(-1).sum() == 1, "one answer must end before the other"
    assert torch.equal(way(server, **inputs, **options), expected)


def test_answers_end_at_a_string(server):
    characters = Tokenizer(models.BPE({character: number for number, character in enumerate(string.printable)}, []))
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters)
    inputs = {"input_ids": torch.randint(3, 99, (1, LENGTH))}
    free = plain(server, **inputs, max_new_tokens=NEW)[0, LENGTH:].tolist()
    options = {
        "max_new_tokens": NEW,
        "stop_strings": [tokenizer.convert_ids_to_tokens(free[3])],
        "tokenizer": tokenizer,
        "pad_token_id": 0,
    }
    expected = plain(server, **inputs, **options)
    assert expected.shape[1] < LENGTH + NEW
    assert torch.equal(ours(server, **inputs, **options), expected)


class Streamer:
    def __init__(self):
        self.seen, self.ended = [], False

    def put(self, tokens):
        self.seen.append(tokens.tolist())

    def end(self):
        self.ended = True


def test_tokens_are_streamed(server):
    ids = torch.randint(3, 99, (1, LENGTH))
    streamers = [Streamer(), Streamer()]
    for way, streamer in zip((ours, plain), streamers, strict=True):
        way(server, ids, max_new_tokens=NEW, streamer=streamer, **SAMPLING)
    assert streamers[0].seen == streamers[1].seen
    assert len(streamers[0].seen) == 1 + NEW
    assert streamers[0].ended


def test_pads_are_recognised_as_transformers_does(server):
    ids = torch.randint(3, 99, (2, LENGTH))
    ids[0, :13] = 0
    assert_same(ours(server, ids, max_new_tokens=NEW), plain(server, ids, max_new_tokens=NEW))


def test_prompts_may_be_lists_and_fewer_than_the_batch(server):
    prompts = [torch.randint(3, 99, (n,)).tolist() for n in (40, 150)]
    together = server.generate(prompts, max_new_tokens=NEW)
    assert together.shape == (2, 150 + NEW)
    assert together[0, :150].tolist() == [0] * 110 + prompts[0]
    for prompt, answer in zip(prompts, together, strict=True):
        alone = server.generate(input_ids=[prompt], max_new_tokens=NEW)
        assert torch.equal(alone[0], answer[-len(prompt) - NEW :])


def test_pads_on_the_right_are_pads_too(server):
    inputs = batch(LENGTH, 13)
    left = server.generate(**inputs, max_new_tokens=NEW)
    right = {name: torch.stack([rows[0].roll(-13), rows[1]]) for name, rows in inputs.items()}
    found = server.generate(**right, max_new_tokens=NEW)
    assert torch.equal(found[:, :LENGTH], right["input_ids"])
    assert torch.equal(found[:, LENGTH:], left[:, LENGTH:])


def test_a_dense_tail_that_surrounds_it_counts():
    model = adapted(RECIPES[0])
    server = swaa_flex.compile(model, max_length=300, prefill_chunk=128)
    ids, found = torch.randint(3, 99, (1, LENGTH)), []
    for tail in (None, 30):
        with swaa_flex.prompt(dense_tail=tail):
            found.append([way(server, ids, max_new_tokens=NEW, **RECORDS) for way in (ours, plain)])
            assert_same(*found[-1])
    assert not torch.allclose(found[0][0].logits[0], found[1][0].logits[0], atol=1e-3)


def test_threads_wait_for_each_other(server):
    prompts = torch.randint(3, 99, (4, 1, LENGTH))
    expected = [server.generate(ids, max_new_tokens=NEW) for ids in prompts]
    found = [None] * 4

    def answer(number):
        found[number] = server.generate(prompts[number], max_new_tokens=NEW)

    threads = [threading.Thread(target=answer, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, found, expected))


def test_an_interrupted_request_does_not_spoil_the_next(server):
    ids = torch.randint(3, 99, (1, LENGTH))
    expected = server.generate(ids, max_new_tokens=NEW)

    def interrupt(input_ids, scores, **kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        server.generate(ids, max_new_tokens=NEW, stopping_criteria=[interrupt])
    assert torch.equal(server.generate(ids, max_new_tokens=NEW), expected)


@pytest.mark.parametrize(
    "replace",
    [
        lambda server, ids: server.prefill(ids + 1),
        lambda server, ids: server.decode_step(ids[:, -1]),
        lambda server, ids: server.generate(ids + 1, max_new_tokens=2),
    ],
)
def test_a_request_within_a_request_is_noticed(server, replace):
    ids = torch.randint(3, 90, (1, LENGTH))

    def criterion(input_ids, scores, **kwargs):
        replace(server, ids)
        return torch.zeros(1, dtype=torch.bool)

    with pytest.raises(ConfigError, match="stopping criterion has begun a request of its own"):
        server.generate(ids, max_new_tokens=NEW, stopping_criteria=[criterion])


@pytest.mark.parametrize("way", [ours, hooked])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "cannot honour beam_search: it decodes greedily or samples"),
        ({"num_beams": 2, "do_sample": True}, "beam_sample"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
        ({"use_cache": False}, "use_cache=False.*generate of the model itself"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"prefill_chunk_size": 16}, "prefill_chunk_size"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"output_attentions": True}, "output_attentions"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"position_ids": torch.arange(7, 7 + LENGTH)[None]}, "position_ids"),
        ({"inputs_embeds": torch.zeros(2, LENGTH, 32)}, "inputs_embeds"),
        ({"prompt_lengths": 50}, "prompt_lengths|not used by the model"),
        ({"num_return_sequences": 3, "do_sample": True}, "a request of 6 sequences: compiled for batch_size=4"),
        ({"max_new_tokens": 241}, "a prompt of 60 tokens and 241 new ones: compiled for max_length=300"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_it_cannot_honour_is_refused(server, way, options, message):
    inputs = batch(LENGTH, 13)
    with pytest.raises(ValueError, match=message):
        way(server, **inputs, **{"max_new_tokens": NEW} | options)


@pytest.mark.parametrize("way", [ours, hooked])
def test_a_cache_that_is_handed_in_is_refused(server, way):
    with pytest.raises(ConfigError, match=f"cannot honour {CACHE}"):
        way(server, **batch(LENGTH), max_new_tokens=NEW, **{CACHE: SWAACache(server.model.config)})


@pytest.mark.parametrize("name", ["assistant_model", "custom_generate"])
def test_other_models_and_ways_are_refused(server, name):
    with pytest.raises(ConfigError, match=f"cannot honour {name}"):
        server.generate(**batch(LENGTH), max_new_tokens=NEW, **{name: adapted(RECIPES[0])})


def test_the_model_must_be_the_one_that_was_compiled(server):
    with pytest.raises(ConfigError, match="another model was compiled"):
        adapted(RECIPES[0]).generate(**batch(LENGTH), max_new_tokens=NEW, custom_generate=server)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.tensor([5, 6]), r"input_ids of shape \[2\]"),
        ([[5.5]], "expected integers"),
        ([[5, 99]], "the model has 99"),
        ({"input_ids": torch.ones(1, 2)}, r"generate\(\*\*inputs\)"),
    ],
)
def test_what_is_no_prompt_is_refused(server, inputs, message):
    with pytest.raises(ConfigError, match=message):
        server.generate(inputs, max_new_tokens=NEW)
