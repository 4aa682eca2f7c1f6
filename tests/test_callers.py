"""Forwards whose caller decides what they can know: checkpoints, generation without a cache, graphs, copies, peft."""

import copy
import gc
import pickle
import threading

import pytest
import torch
import transformers
from tiny_models import SIZE, tiny
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_masks_for_generate

import swaa_flex
from swaa_flex import MaskError, SWAACache, SWAAConfig, UnsupportedModelError
from swaa_flex.hf.adapt import full_attention
from swaa_flex.hf.cache import CACHE
from swaa_flex.hf.mask import ForwardMask
from swaa_flex.tuning import Collator, Example

WINDOW = SWAAConfig(sliding_window=6, sink_tokens=2, full_attention_layers=(1,), dense_tail=3)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def adapted(family="llama", recipe=WINDOW, **overrides):
    model = tiny(family, **{"num_hidden_layers": 2} | overrides)
    model.set_attn_implementation("sdpa")
    return swaa_flex.adapt(model, recipe)


@pytest.fixture
def model():
    return adapted()


def ids(length=24, batch=1):
    return torch.randint(3, 99, (batch, length))


# --- checkpoints -------------------------------------------------------------------------------------------------


def gradient(model, call):
    model.zero_grad()
    call().float().square().sum().backward()
    return model.lm_head.weight.grad.clone(), model.model.layers[0].self_attn.q_proj.weight.grad.clone()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_forward_that_is_told_by_keyword_is_right(model, use_reentrant):
    embedded = model.get_input_embeddings()(ids()).detach().requires_grad_()

    def forward(x):
        return model(inputs_embeds=x, use_cache=False, prompt_lengths=15).logits

    expected = gradient(model, lambda: forward(embedded))
    found = gradient(model, lambda: checkpoint(forward, embedded, use_reentrant=use_reentrant))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("said", [{"lengths": 15}, {"dense_tail": 0}], ids=str)
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("backward_inside", [True, False])
def test_a_checkpointed_forward_inside_prompt_is_refused(model, said, use_reentrant, backward_inside):
    embedded = model.get_input_embeddings()(ids()).detach().requires_grad_()

    def forward(x):
        return model(inputs_embeds=x, use_cache=False).logits

    with pytest.raises(UnsupportedModelError, match=r"pass\s+prompt_lengths= or decode_rows= to the forward"):
        with swaa_flex.prompt(**said):
            out = checkpoint(forward, embedded, use_reentrant=use_reentrant).sum()
            if backward_inside:
                thread_error = []

                def backward():
                    try:
                        out.backward()
                    except UnsupportedModelError as error:
                        thread_error.append(error)

                thread = threading.Thread(target=backward)  # as that of CUDA tensors
                thread.start()
                thread.join()
                raise thread_error[0]
        out.backward()


def test_checkpoints_of_single_layers_and_of_plain_text_go_on_to_work(model):
    tokens = ids()
    with swaa_flex.prompt(15):
        expected = gradient(model, lambda: model(tokens, use_cache=False).logits)
        # transformers 5.24 has renamed it
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.train()
        found = gradient(model, lambda: model(tokens, use_cache=False).logits)
        getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
        model.eval()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    expected = gradient(model, lambda: model(tokens, use_cache=False).logits)
    whole = gradient(
        model, lambda: checkpoint(lambda i: model(i, use_cache=False).logits, tokens, use_reentrant=False)
    )
    for ours, theirs in zip(whole, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# --- generation without a cache ----------------------------------------------------------------------------------


def test_generation_without_a_cache_is_right_or_refused(model):
    prompt = ids(20)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(prompt, **options)
    with swaa_flex.prompt(20):
        assert torch.equal(model.generate(prompt, use_cache=False, **options), expected)
    with pytest.raises(UnsupportedModelError, match=r"generate\(use_cache=False\).*prompt\(lengths\)"):
        model.generate(prompt, use_cache=False, **options)
    model.generation_config.use_cache = False
    with pytest.raises(UnsupportedModelError, match=r"generate\(use_cache=False\)"):
        model.generate(prompt, num_beams=2, **options)


def test_generation_without_a_cache_runs_where_no_row_needs_to_be_known(model):
    prompt = ids(20)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 4, "do_sample": False, "use_cache": False}
    with full_attention(model.config):
        model.generate(prompt, **options)
    model.generate(prompt[:, :2], **options | {"attention_mask": torch.ones(1, 2, dtype=torch.long)})
    with torch.no_grad():
        model(prompt, use_cache=False)  # a forward of one's own is a prompt


# --- graphs and prompt() -----------------------------------------------------------------------------------------


def test_a_graph_that_was_traced_before_the_first_prompt_of_its_thread_looks_for_later_ones(model):
    tokens = ids()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", dynamic=False)
    told = [{}, {"lengths": 15}, {"dense_tail": 0}, {}]
    with torch.no_grad():
        expected = []
        for said in told:
            with swaa_flex.prompt(**said):
                expected.append(model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits)
    found = []

    @torch.no_grad()
    def run():
        for number, said in enumerate(told):
            if number == 0:  # this thread has never entered a prompt()
                found.append(compiled(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits)
                continue
            with swaa_flex.prompt(**said):
                found.append(compiled(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    torch._dynamo.reset()
    assert len(found) == len(told)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_layers_that_are_compiled_one_by_one_are_right_beyond_the_limit_of_recompilations():
    """torch.compile gives up on the ninth layer, which then runs among layers in graphs."""
    model, tokens = adapted(num_hidden_layers=10), ids()
    with torch.no_grad(), swaa_flex.prompt(15):
        expected = model(tokens, use_cache=False).logits
        torch._dynamo.reset()
        for layer in model.model.layers:
            layer.compile(backend="eager")
        torch.testing.assert_close(model(tokens, use_cache=False).logits, expected, **CLOSE)
    torch._dynamo.reset()


def test_compiled_forwards_leave_no_mask_behind():
    """Neither where the last layer does not attend, nor where masks are made outside of the graph."""
    model = adapted("llama")
    torch.manual_seed(0)
    size = SIZE | FAMILIES["lfm2"] | {"layer_types": ["full_attention", "conv"], "num_hidden_layers": 2}
    last_is_conv = AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("lfm2", **size)).eval()
    tokens = ids()
    mask = torch.ones_like(tokens)
    for each in (model, swaa_flex.adapt(last_is_conv, SWAAConfig(6, 2, (), True, 3))):
        with torch.no_grad():
            expected = each(tokens, attention_mask=mask, use_cache=False).logits
            torch._dynamo.reset()
            compiled = torch.compile(each, backend="eager", dynamic=False)
            for made in (mask, create_masks_for_generate(each.config, torch.empty(1, 24, 32), mask, **{CACHE: None})):
                found = compiled(tokens, attention_mask=made, use_cache=False).logits
                torch.testing.assert_close(found, expected, **CLOSE)
        if isinstance(made, ForwardMask):
            assert (made.plans, made.memo) == ({}, {})
        del made
        gc.collect()
        assert [x for x in gc.get_objects() if type(x) is ForwardMask] == []
    torch._dynamo.reset()


# --- copies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m._replicate()]
)
def test_a_copy_of_an_adapted_model_runs_its_own_layers_and_reads_labels(model, duplicate):
    if duplicate.__name__ == "<lambda>" and "_replicate" in duplicate.__code__.co_names:
        twin = model._replicate_for_data_parallel()
        twin._modules = dict(model._modules)
        twin._parameters = {}
    else:
        twin = duplicate(model)
    if twin._modules is model._modules:
        twin._modules = dict(model._modules)
    twin.lm_head = nn.Linear(32, 99, bias=False)
    tokens = ids()
    labels = tokens.clone()
    labels[:, :15] = -100
    with torch.no_grad():
        own = twin.lm_head(twin.model(tokens, use_cache=False, prompt_lengths=15).last_hidden_state)
        torch.testing.assert_close(twin(tokens, labels=labels).logits, own, **CLOSE)
    assert type(twin).__name__ == "LlamaForCausalLM"
    assert isinstance(twin, LlamaForCausalLM)


def test_restore_gives_the_class_back_and_save_names_it(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert LlamaConfig.from_pretrained(tmp_path).architectures == ["LlamaForCausalLM"]
    assert type(swaa_flex.restore(model)) is LlamaForCausalLM


# --- labels and caches, peft -------------------------------------------------------------------------------------


def test_labels_after_a_cached_prompt_are_refused_unless_somebody_says_what_it_is(model):
    tokens = ids(30)
    with torch.no_grad():
        expected = model(tokens, prompt_lengths=20, use_cache=False).logits[:, 20:]

        def answered(**told):
            cache = DynamicCache(config=model.config)
            model(tokens[:, :20], **{CACHE: cache})
            return model(tokens[:, 20:], labels=tokens[:, 20:], **{CACHE: cache}, **told).logits

        for mask in ({}, {"attention_mask": torch.ones_like(tokens)}):
            with pytest.raises(MaskError, match=r"do not say whether those are a prompt.*prompt_lengths="):
                answered(**mask)
            torch.testing.assert_close(answered(prompt_lengths=20, **mask), expected, **CLOSE)
        cache = SWAACache(model.config, prompt_lengths=20)
        model(tokens[:, :20], **{CACHE: cache})
        held = model(tokens[:, 20:], labels=tokens[:, 20:], **{CACHE: cache}).logits
        torch.testing.assert_close(held, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("prompt", [0, 12])
def test_virtual_tokens_of_peft_are_no_prompt(kind, with_mask, prompt):
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(
        tiny("llama", num_hidden_layers=2), getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=5)
    ).eval()
    swaa_flex.adapt(tuned, WINDOW)
    tokens = ids(30, batch=2)
    labels = tokens.clone()
    labels[:, :prompt] = -100
    mask = {"attention_mask": torch.ones_like(tokens)} if with_mask else {}
    flags = (labels != -100) & (prompt > 0)
    if kind == "PromptTuningConfig":
        flags = nn.functional.pad(flags, (5, 0))
    with torch.no_grad():
        found = tuned(input_ids=tokens, labels=labels, **mask).logits
        expected = tuned(input_ids=tokens, decode_rows=flags, **mask).logits
    torch.testing.assert_close(found[:, -30:], expected[:, -30:], **CLOSE)


def test_labels_of_embeddings_that_nobody_explains_are_refused(model):
    tokens = ids()
    labels = tokens.clone()
    labels[:, :5] = -100
    with pytest.raises(MaskError, match="virtual tokens"):
        model(inputs_embeds=model.get_input_embeddings()(tokens), labels=labels)


# --- packed documents --------------------------------------------------------------------------------------------

MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "qwen3": {},
    "mistral": {"sliding_window": 9},
    "gpt_oss": MOE | {"sliding_window": 9},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "biogpt": {},
    "gpt_bigcode": {"n_embd": 32, "n_head": 2, "n_layer": 4, "n_positions": 64},
    "persimmon": {},
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1},
    "qwen3_next": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "conv_L_cache": 3},
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # GPTBigCode of transformers 5.17
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("recipe", "how"), [("full", "adapt"), (WINDOW, "adapt"), (WINDOW, "load")])
def test_packed_examples_have_the_losses_of_single_ones_or_are_refused(family, recipe, how):
    config = transformers.AutoConfig.for_model(family, **SIZE | {"eos_token_id": 2} | FAMILIES[family])
    torch.manual_seed(0)
    if how == "load":
        config.swaa, config.use_cache = recipe, False
    model = AutoModelForCausalLM.from_config(config).eval()
    if how == "adapt":
        swaa_flex.adapt(model, recipe)
    examples = [Example(ids(p + a)[0].tolist(), [False] * p + [True] * a) for p, a in ((20, 8), (30, 10))]

    def loss(chosen, packing):
        with torch.no_grad():
            count = sum(sum(e.decode_rows) for e in chosen)
            return float(model(**Collator(pad_token_id=0, packing=packing)(chosen)).loss) * count

    single = sum(loss([e], False) for e in examples)
    try:
        packed = loss(examples, True)
    except UnsupportedModelError as error:
        assert "a row of its own" in str(error)
        assert family in ("gpt_oss", "opt", "biogpt", "qwen3_next", "lfm2")
        return
    assert family in ("qwen3", "mistral", "llama4_text", "gpt_bigcode", "persimmon")
    assert packed == pytest.approx(single, rel=1e-4)


@pytest.mark.parametrize("make", [DynamicCache, SWAACache], ids=["stock", "ours"])
def test_packed_positions_beside_a_cache_are_refused(model, make):
    positions = torch.cat([torch.arange(14), torch.arange(10)])[None]
    with pytest.raises(UnsupportedModelError, match="use_cache=False"):
        model(ids(), position_ids=positions, **{CACHE: make(config=model.config)})


def test_documents_that_only_other_attentions_know_of_are_refused(model):
    with pytest.raises(UnsupportedModelError, match=r"cu_seq_lens_q.*position_ids"):
        model(ids(), cu_seq_lens_q=torch.tensor([0, 14, 24]), use_cache=False)


def test_what_a_caller_writes_to_its_tensors_afterwards_changes_nothing(model):
    tokens, lengths = ids(30, batch=2), torch.tensor([9, 15])
    with torch.no_grad():
        expected = model(tokens, prompt_lengths=torch.tensor([9, 15]), use_cache=False).logits
        cache = SWAACache(model.config, prompt_lengths=lengths)
        with swaa_flex.prompt(lengths):
            lengths.zero_()
            torch.testing.assert_close(model(tokens, use_cache=False).logits, expected, **CLOSE)
        torch.testing.assert_close(model(tokens, **{CACHE: cache}).logits, expected, **CLOSE)


def test_layers_that_are_computed_again_run_the_recipe_of_their_forward(model):
    tokens = ids()
    model.train()
    expected = gradient(model, lambda: model(tokens, prompt_lengths=15, use_cache=False).logits)
    model.zero_grad()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": True})
    out = model(tokens, prompt_lengths=15, use_cache=False).logits
    model.config.swaa["sliding_window"] = 20
    out.float().square().sum().backward()
    found = model.lm_head.weight.grad, model.model.layers[0].self_attn.q_proj.weight.grad
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# --- layers that are left out, encoders inside ---------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["1::2", (1, 3), (3,)], ids=str)
@pytest.mark.parametrize("decode", [True, (3,)], ids=str)
def test_drafting_with_the_first_layers_changes_nothing(layers, decode):
    recipe = SWAAConfig(6, 2, layers, decode, 3)
    model = adapted(recipe=recipe, num_hidden_layers=4)
    prompt = ids(20)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 5, "do_sample": False}
    with swaa_flex.prompt(20):
        assert torch.equal(
            model.generate(prompt, assistant_early_exit=2, **options), model.generate(prompt, **options)
        )
    assert model.config.num_hidden_layers == 4


def test_a_model_whose_last_layers_are_removed_keeps_what_the_others_do():
    recipe = SWAAConfig(6, 2, (1, 3), True, 3)
    model, smaller = adapted(recipe=recipe, num_hidden_layers=4), adapted(recipe=SWAAConfig(6, 2, (1,), True, 3))
    smaller.load_state_dict({k: v for k, v in model.state_dict().items() if ".2." not in k and ".3." not in k})
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    tokens = ids()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, smaller(tokens).logits, **CLOSE)


def test_an_encoder_with_a_mask_inside_of_a_model_runs_with_sdpa():
    text = {k: v for k, v in SIZE.items() if k != "eos_token_id"} | {"num_hidden_layers": 2, "vocab_size": 101}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Idefics3Config(
        vision_config=vision | {"image_size": 16, "patch_size": 4},
        text_config={"model_type": "llama", **text},
        image_token_id=95,
        scale_factor=2,
    )
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    tokens = torch.randint(3, 90, (1, 40))
    tokens[0, 5:9] = 95
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    inputs["pixel_values"] = torch.randn(1, 1, 3, 16, 16)
    with torch.no_grad():
        expected = model(**inputs).logits
        swaa_flex.adapt(model, "full")
        torch.testing.assert_close(model(**inputs).logits, expected, **CLOSE)
        swaa_flex.adapt(model, WINDOW)
        assert not torch.allclose(model(**inputs).logits, expected, **CLOSE)


def test_a_mask_of_another_shape_is_refused(model):
    with pytest.raises(MaskError, match=r"attention_mask: expected \[batch, len\]"):
        model(ids(8), attention_mask=torch.ones(1, 8, 8).tril())


@pytest.mark.parametrize("family", ["stablelm", "nemotron"])
def test_models_that_drop_keywords_say_so_however_their_recipe_came(family):
    config = transformers.AutoConfig.for_model(family, **SIZE, swaa=WINDOW)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        with swaa_flex.prompt(12):
            told = model(ids()).logits
        for keywords in ({"prompt_lengths": 12}, {"decode_rows": torch.arange(24).expand(1, 24) >= 12}):
            with pytest.raises(UnsupportedModelError, match=f"'{family}' does not hand keywords on"):
                model(ids(), **keywords)
        assert not torch.equal(model(ids()).logits, told)
