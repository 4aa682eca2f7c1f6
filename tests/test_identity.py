"""Fingerprints of models and tokenizers: whatever changes a result changes them, and nothing else does."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from tiny_models import words_model
from tiny_tokenizers import words_tokenizer
from torch.utils._python_dispatch import return_and_correct_aliasing
from transformers import MixtralConfig, MixtralForCausalLM

from swaa_flex.tuning import identity as module
from swaa_flex.tuning.identity import identity, tokenizer_identity


def weights(model):
    return identity(model)["weights"]


def swap(table, first, second):
    table[[first, second]] = table[[second, first]]


EDITS = {
    "an element": lambda model: model.lm_head.weight[7, 3].add_(1e-3),
    "the sign of zero": lambda model: model.lm_head.weight[7, 3].copy_(torch.tensor(-0.0)),
    "the signs of a row": lambda model: model.model.embed_tokens.weight[5].neg_(),
    "all signs": lambda model: model.model.layers[1].self_attn.o_proj.weight.neg_(),
    "two rows swapped": lambda model: swap(model.model.embed_tokens.weight, 4, 9),
    "a pruned head": lambda model: model.model.layers[0].self_attn.o_proj.weight[:, 8:].zero_(),
    "a pruned neuron": lambda model: model.model.layers[0].mlp.down_proj.weight[:, 11].zero_(),
    "a norm": lambda model: model.model.norm.weight[15].add_(1),
    "layers swapped": lambda model: model.model.layers.__init__(list(model.model.layers)[::-1]),
    "another dtype": lambda model: model.to(torch.bfloat16),
    "a buffer of a checkpoint": lambda model: model.model.extra.add_(1),
}


@pytest.mark.parametrize("chunk", [module.CHUNK, 4])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_every_change_of_weights_is_seen(edit, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    model = words_model()
    with torch.no_grad():
        model.lm_head.weight[7, 3] = 0.0
    model.model.register_buffer("extra", torch.zeros(3))
    before = identity(model)
    assert identity(copy.deepcopy(model)) == before
    with torch.no_grad():
        edit(model)
    assert weights(model) != before["weights"]


def test_each_expert_and_each_row_is_seen():
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=40, num_key_value_heads=2, num_local_experts=16, **size))
    found = {weights(model)}
    experts = [weight for name, weight in model.named_parameters() if "experts" in name]
    rows = [(weight, row) for weight in (*experts, model.lm_head.weight) for row in range(len(weight))]
    for weight, row in rows:
        with torch.no_grad():
            weight[row].neg_()
        found.add(weights(model))
    assert len(found) == 1 + len(rows)


def test_what_a_model_computes_anew_and_how_its_weights_lie_do_not_count():
    model = words_model()
    before = identity(model)
    model.model.register_buffer("scratch", torch.rand(3), persistent=False)
    head = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(head.detach().t().contiguous().t())
    assert not model.lm_head.weight.is_contiguous()
    assert identity(model) == before


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_weights_that_accelerate_keeps_elsewhere_are_read(where, tmp_path):
    expected = weights(words_model())

    def offloaded(model, name):
        if where == "memory":
            return cpu_offload(model, execution_device=torch.device("cpu"))
        return disk_offload(model, tmp_path / name, execution_device=torch.device("cpu"))

    model = offloaded(words_model(), "a")
    assert model.lm_head.weight.device.type == "meta"
    assert weights(model) == expected
    assert model.lm_head.weight.device.type == "meta"
    other = words_model()
    with torch.no_grad():
        other.lm_head.weight[3].neg_()
    assert weights(offloaded(other, "b")) != expected


class Halves(torch.Tensor):
    """A tensor in two parts, as quantized ones have codes and scales."""

    @staticmethod
    def __new__(cls, high, low):
        return torch.Tensor._make_wrapper_subclass(cls, high.shape, dtype=high.dtype)

    def __init__(self, high, low):
        self.high, self.low = high, low

    def __tensor_flatten__(self):
        return ["high", "low"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return return_and_correct_aliasing(function, args, kwargs or {}, Halves(args[0].high, args[0].low))
        raise NotImplementedError(function)


def test_tensors_that_are_made_of_others_are_read():
    def model(low):
        made = words_model()
        made.lm_head.weight = torch.nn.Parameter(Halves(torch.ones(12, 16), low), requires_grad=False)
        return made

    assert weights(model(torch.zeros(12, 16))) == weights(model(torch.zeros(12, 16)))
    assert weights(model(torch.zeros(12, 16))) != weights(model(torch.eye(12, 16)))


def test_tokenizers_are_told_apart_by_all_that_they_do():
    tokenizer = words_tokenizer()
    before = tokenizer_identity(tokenizer)
    tokenizer(["red", "red green"], padding=True, truncation=True, max_length=5)  # which the tokenizer remembers
    assert tokenizer_identity(tokenizer) == before == tokenizer_identity(words_tokenizer())
    tokenizer.add_tokens(["seven"])
    assert tokenizer_identity(tokenizer) != before
    templated = words_tokenizer()
    templated.chat_template += " "
    assert tokenizer_identity(templated) != before
