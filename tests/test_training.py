"""Masks in training: losses and gradients against one sample at a time in a dense float64 model."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from labelled import ARRANGED, gradients, loss_of, packed, padded, sample
from reference import Reference
from tiny_models import SIZE, tiny
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForSequenceClassification

import swaa_flex
from swaa_flex import MaskError, SWAAConfig
from swaa_flex.hf.labels import decode_rows_of

# A conversation is a list of parts: tokens of the user, tokens of the answer, ...
CONVERSATIONS = [(30, 9), (17, 5, 12, 8), (50, 3), (2, 20, 3, 4)]
RECIPES = [
    SWAAConfig(sliding_window=8, sink_tokens=2, full_attention_layers=[1], dense_tail=4),
    SWAAConfig(8, 2, (), False, 4),
    SWAAConfig(8, 2, (), True, 0),
]


class OneSample(Reference):
    """Dense attention over one sample without pads, from the definition, pair by pair."""

    answers: list[bool]

    @classmethod
    def visible(cls, module, native, q_len, kv_len):
        kind = cls.config.resolve(module.config.num_hidden_layers)[module.layer_idx]
        allowed = torch.zeros(1, 1, q_len, kv_len, dtype=torch.bool)
        for row in range(q_len):
            until = next((i for i in range(row, q_len) if cls.answers[i]), q_len)  # where the next answer begins
            tail = not cls.answers[row] and until - row <= cls.config.dense_tail
            dense = kind.full or tail or (cls.answers[row] and kind.full_attention_decode)
            for key in range(row + 1):
                allowed[..., row, key] = dense or row - key < cls.config.sliding_window or key < cls.config.sink_tokens
        return allowed


AttentionInterface.register("swaa_one_sample", OneSample.attention)
AttentionMaskInterface.register("swaa_one_sample", OneSample.mask)


def expected(model, samples, config):
    """Loss and gradients of samples one by one, float64."""
    exact = copy.deepcopy(swaa_flex.restore(copy.deepcopy(model))).double()
    exact.set_attn_implementation("swaa_one_sample")
    total = 0
    OneSample.config = config
    for ids, labels in samples:
        OneSample.answers = (labels != -100).tolist()
        total = total + loss_of(exact, {"input_ids": ids[None], "labels": labels[None]})[0]
    return total, gradients(exact, total)


@pytest.fixture
def model():
    return swaa_flex.adapt(tiny("llama"), RECIPES[0]).train()


@pytest.mark.parametrize("config", RECIPES, ids=repr)
@pytest.mark.parametrize("arranged", ARRANGED)
@pytest.mark.parametrize("told", ["labels", "decode_rows"])
def test_losses_and_gradients_are_those_of_single_samples(model, config, arranged, told):
    swaa_flex.adapt(model, config)
    samples = [sample(parts) for parts in CONVERSATIONS]
    batch = ARRANGED[arranged](samples)
    loss, _ = loss_of(model, batch, **({} if told == "labels" else {"decode_rows": batch["labels"] != -100}))
    exact, exact_gradients = expected(model, samples, config)
    torch.testing.assert_close(loss.double(), exact, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(gradient.double(), exact_gradients[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arranged", ["right padded", "left padded"])
def test_prompt_lengths_say_the_same_as_labels(model, arranged):
    samples = [sample((30, 9)), sample((50, 3)), sample((5, 30))]
    batch = ARRANGED[arranged](samples)
    told, _ = loss_of(model, batch, prompt_lengths=[30, 50, 5])
    torch.testing.assert_close(told, loss_of(model, batch)[0])


def test_a_packed_row_of_five_documents_has_the_loss_of_five_rows(model):
    samples = [sample(parts) for parts in [*CONVERSATIONS, (11, 2)]]
    count = sum(int((labels != -100).sum()) for _, labels in samples)
    row = model(**packed(samples)).loss * count
    rows = [model(ids[None], labels=labels[None]).loss * (labels != -100).sum() for ids, labels in samples]
    torch.testing.assert_close(row, sum(rows))


def test_checkpointed_gradients_are_the_same(model):
    batch = padded([sample(parts) for parts in CONVERSATIONS])
    plain = gradients(model, loss_of(model, batch)[0])
    # The name until transformers 5.17 and the one since.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    for reentrant in (False, True):
        enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        for name, gradient in gradients(model, loss_of(model, batch)[0]).items():
            torch.testing.assert_close(gradient, plain[name], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_tail_of_a_prompt_ends_with_its_document_and_before_pads():
    model = tiny("llama")
    model.config.swaa = SWAAConfig(8, 2, (), True, 4)
    ids = torch.randint(3, 99, (1, 60))
    answer = torch.zeros(1, 60, dtype=torch.bool)
    answer[:, 10:14] = True  # a prompt, its answer, another prompt; in the second document a prompt only
    alone = model(ids[:, :40], decode_rows=answer[:, :40], use_cache=False).logits
    positions = torch.cat([torch.arange(40), torch.arange(20)])[None]
    packed = model(ids, position_ids=positions, decode_rows=answer, use_cache=False).logits
    torch.testing.assert_close(packed[:, :40], alone, atol=1e-5, rtol=1e-5)
    padded, real = torch.cat([ids[:, :40], torch.zeros(1, 9, dtype=torch.long)], 1), (torch.arange(49) < 40).long()
    told = {"attention_mask": real[None], "decode_rows": answer[:, :49]}
    torch.testing.assert_close(model(padded, **told, use_cache=False).logits[:, :40], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_model_with_adapters_is_adapted_and_restored(model):
    peft = pytest.importorskip("peft")
    ids, labels = (x[None] for x in sample((30, 9)))
    aware = model(ids, labels=labels).loss
    plain = swaa_flex.restore(model)
    wrapped = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert swaa_flex.adapt(wrapped, RECIPES[0]) is wrapped
    torch.testing.assert_close(wrapped(input_ids=ids, labels=labels).loss, aware)
    assert swaa_flex.restore(wrapped) is wrapped
    assert plain.config._attn_implementation == "sdpa" and "forward" not in vars(plain)


def test_text_without_a_prompt_slides_everywhere(model):
    ids = torch.randint(3, 99, (1, 60))
    flattened = ids.clone()
    flattened[:, 0] = -100  # as transformers' collator for packed rows has it
    with swaa_flex.prompt(dense_tail=0):
        prompt_only = model(ids, decode_rows=torch.zeros(1, 60, dtype=torch.bool)).logits
        for labels in (ids, flattened):
            torch.testing.assert_close(model(ids, labels=labels).logits, prompt_only)
    assert not decode_rows_of(ids).any()


def test_what_is_told_counts_more_than_labels(model):
    ids, labels = (x[None] for x in sample((30, 9)))
    told = model(ids, labels=labels, prompt_lengths=20).logits
    with swaa_flex.prompt(lengths=20):
        torch.testing.assert_close(model(ids, labels=labels).logits, told)
    assert (model(ids, labels=labels).logits - told).abs().max() > 1e-3


def test_labels_are_read_through_peft_and_not_after_restore(model):
    peft = pytest.importorskip("peft")
    ids, labels = (x[None] for x in sample((30, 9)))
    aware = model(ids, labels=labels).loss
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    torch.testing.assert_close(wrapped(input_ids=ids, labels=labels).loss, aware)
    swaa_flex.restore(model)
    assert "forward" not in vars(model)


def test_labels_are_read_beside_hooks_of_accelerate_and_from_a_pickled_model(model):
    ids, labels = (x[None] for x in sample((30, 9)))
    aware, plain = model(ids, labels=labels).loss, swaa_flex.restore(copy.deepcopy(model))
    add_hook_to_module(plain, ModelHook())
    torch.testing.assert_close(swaa_flex.adapt(plain, RECIPES[0])(ids, labels=labels).loss, aware)
    add_hook_to_module(model, ModelHook())
    torch.testing.assert_close(model(ids, labels=labels).loss, aware)
    for hooked in (plain, model):
        full = swaa_flex.restore(hooked)(ids, labels=labels).loss
        assert abs(full - aware) > 1e-4 and hooked._hf_hook
    again = pickle.loads(pickle.dumps(swaa_flex.adapt(tiny("llama"), RECIPES[0]).train()))
    torch.testing.assert_close(swaa_flex.adapt(again, RECIPES[0])(ids, labels=labels).loss, aware)


def test_arguments_by_position_are_read_too(model):
    batch = padded([sample((30, 9)), sample((50, 3))], "left")
    expected = model(**batch).loss
    torch.testing.assert_close(
        model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss, expected
    )
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    given = [batch.get(name) for name in names[: names.index("labels") + 1]]
    torch.testing.assert_close(model(*given).loss, expected)


def test_labels_of_other_tasks_are_left_alone():
    config = LlamaConfig(**SIZE | {"num_labels": 2})
    model = swaa_flex.adapt(LlamaForSequenceClassification(config), RECIPES[2]).eval()
    assert model(torch.randint(3, 99, (2, 20)), labels=torch.tensor([0, 1])).loss > 0


def test_a_copy_of_an_adapted_model_is_its_own(model):
    ids, labels = (x[None] for x in sample((30, 9)))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        assert other(ids, labels=labels).logits.abs().max() == 0


def test_training_blindly_warns(model):
    ids, _ = sample((30, 9))
    with pytest.warns(UserWarning, match="without knowing where prompts end.*prompt_lengths.*swaa_flex.adapt"):
        model(ids[None])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids[None], prompt_lengths=30)
        with torch.no_grad():
            model(ids[None])


def test_a_prompt_longer_than_its_sample_is_refused(model):
    ids, labels = (x[None] for x in sample((30, 9)))
    with pytest.raises(MaskError, match=r"prompt_lengths\[0\]=40: the sample has 39 tokens"):
        model(ids, labels=labels, prompt_lengths=[40])


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gpt_oss"])
def test_other_families_train_like_single_samples(family):
    model = swaa_flex.adapt(tiny(family), RECIPES[0]).train()
    batch = padded([sample(parts) for parts in CONVERSATIONS])
    rows = loss_of(model, batch)[0]
    singles = 0
    for ids, mask, labels in zip(*batch.values(), strict=True):
        one = {"input_ids": ids[mask.bool()][None], "labels": labels[mask.bool()][None]}
        singles = singles + loss_of(model, one)[0]
    torch.testing.assert_close(rows, singles, atol=1e-4, rtol=1e-5)


@pytest.mark.slow
def test_an_adapted_model_compiles_with_labels(model):
    ids, labels = (x[None] for x in sample((200, 9)))
    with torch.no_grad():
        eager = model(ids, labels=labels).loss
        compiled = torch.compile(model, fullgraph=True)(ids, labels=labels).loss
    torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)


def test_training_under_autocast_has_the_gradients_of_plain_training():
    model = swaa_flex.adapt(tiny("llama"), SWAAConfig(8, 2, [1], True, 4)).train()
    ids = torch.randint(3, 99, (2, 60))
    labels = torch.where(torch.arange(60) < 40, -100, ids)
    plain = gradients(model, model(ids, labels=labels).loss)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids, labels=labels).loss
    for name, gradient in gradients(model, rounded).items():
        assert (gradient - plain[name]).norm() < 0.1 * plain[name].norm(), name


@pytest.mark.parametrize("length", [-1, 10.5])
def test_prompt_lengths_that_are_no_numbers_of_tokens_are_refused(length):
    model, ids = swaa_flex.adapt(tiny("llama"), SWAAConfig(8, 2, [1], True, 4)), torch.randint(3, 99, (1, 60))
    with pytest.raises(MaskError, match=rf"prompt_lengths\[0\]={length}: expected a number of tokens"):
        model(ids, labels=ids, prompt_lengths=[length])
