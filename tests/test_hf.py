import copy
import dataclasses
import json
import traceback
import warnings

import pytest
import torch
import transformers
from conftest import counting_backend
from reference import Reference, under_reference
from tiny_models import SIZE, batch, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask

import swaa_flex
from swaa_flex import ConfigError, MaskError, SWAACache, SWAAConfig, UnsupportedModelError
from swaa_flex.hf.adapt import full_attention
from swaa_flex.hf.attention import attention_forward
from swaa_flex.hf.cache import CACHE
from swaa_flex.hf.mask import ForwardMask
from swaa_flex.hf.surroundings import PromptInfo, surroundings

CONFIG = SWAAConfig(sliding_window=16, sink_tokens=2, full_attention_layers=[1], dense_tail=4)
TIGHT = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def model():
    model = tiny("llama")
    model.config.swaa = CONFIG
    return model


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


def reference_logits(model, ids, config=CONFIG, prompt_lengths=None, **kwargs):
    return under_reference(model, config, lambda: logits(model, ids, **kwargs), prompt_lengths)


# --- the configuration travels with the model ---------------------------------------------------------------


def test_from_pretrained_takes_the_name_and_the_configuration(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SIZE)).save_pretrained(tmp_path)
    for given, expected in (
        (CONFIG, CONFIG),
        (CONFIG.to_dict(), CONFIG),
        ("quality", swaa_flex.recipes.get("quality", "llama")),
    ):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="swaa_flex", swaa=given)
        assert model.config._attn_implementation == "swaa_flex"
        assert model.config.swaa == expected.to_dict()


def test_a_field_that_is_set_in_the_configuration_of_a_model_counts(model, tmp_path):
    ids = torch.randint(3, 99, (1, 60))
    model.config.swaa["sliding_window"] = 24
    model.config.swaa.update(sink_tokens=0, full_attention_layers=())
    changed = SWAAConfig(sliding_window=24, sink_tokens=0, full_attention_layers=(), dense_tail=4)
    torch.testing.assert_close(logits(model, ids), reference_logits(model, ids, changed), **TIGHT)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).swaa == model.config.swaa == changed.to_dict()
    with pytest.raises(ConfigError, match="sliding_windw"):
        model.config.swaa["sliding_windw"] = 24
    with pytest.raises(ConfigError, match="sliding_window"):
        model.config.swaa["sliding_window"] = 0
    assert model.config.swaa == changed.to_dict()


def test_a_recipe_that_narrows_no_layer_of_the_model_warns():
    model = tiny("gemma2", layer_types=["sliding_attention", "full_attention"] * 2)
    with pytest.warns(UserWarning, match=r"changes nothing: full_attention_layers='1::2' .*\(1, 3\).*=\[3\]"):
        swaa_flex.adapt(model, "balanced")
    with full_attention(model.config):  # a warning would be an error
        pass
    for useful in (SWAAConfig(full_attention_layers=[3]), SWAAConfig(sliding_window=16), "full"):
        swaa_flex.adapt(model, useful)
    chunked = AutoConfig.for_model("llama4_text", num_hidden_layers=4, layer_types=model.config.layer_types)
    chunked.layer_types = ["chunked_attention", "full_attention"] * 2
    chunked.swaa = "balanced"  # narrows chunks of 8192


def test_omitting_the_configuration_takes_the_default_recipe(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SIZE)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="swaa_flex")
    ids = torch.randint(3, 99, (1, 20))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(model, ids), logits(plain, ids), **TIGHT)
    assert model.config.swaa == swaa_flex.recipes.get("balanced", "llama").to_dict()


def test_the_configuration_survives_save_and_load(tmp_path, model):
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["swaa"]
    assert written == CONFIG.to_dict()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="swaa_flex")
    assert loaded.config.swaa == CONFIG.to_dict()
    ids = torch.randint(3, 99, (1, 60))
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), **TIGHT)


def test_config_swaa_reads_as_a_plain_dict_or_none():
    config = LlamaConfig(**SIZE)
    assert config.swaa is None
    config.swaa = "paper"
    assert isinstance(config.swaa, dict)
    assert config.swaa["sliding_window"] == 2000
    assert json.loads(json.dumps(config.swaa)) == config.swaa
    config.swaa = None
    assert config.swaa is None


def test_restore_works_on_a_copy_and_where_there_is_no_sdpa(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**SIZE))
    model.set_attn_implementation("eager")
    swaa_flex.adapt(model, CONFIG)
    torch.save(model, tmp_path / "model.pt")
    for changed in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False), model):
        assert swaa_flex.restore(changed).config._attn_implementation == "eager"
        assert changed.config.swaa is None
    swaa_flex.adapt(model, CONFIG)
    model.config = copy.deepcopy(model.config)  # another number of configs than before
    assert swaa_flex.restore(model).config._attn_implementation == "eager" and model.config.swaa is None
    compiled = torch.compile(swaa_flex.adapt(model, CONFIG))
    assert swaa_flex.adapt(compiled, "full") is compiled and model.config.swaa["sliding_window"] is None
    assert swaa_flex.restore(compiled) is compiled and model.config._attn_implementation == "eager"
    loaded = tiny("gpt_oss")  # under swaa_flex from the start
    assert swaa_flex.restore(loaded).config._attn_implementation == "eager"
    before = swaa_flex.restore(swaa_flex.adapt(loaded, CONFIG))
    assert before.config._attn_implementation == "eager" and before.config.swaa is None


@pytest.mark.parametrize("call", [swaa_flex.adapt, swaa_flex.restore])
@pytest.mark.parametrize("wrong", ["Qwen/Qwen3-4B", None, LlamaConfig(**SIZE)])
def test_what_is_no_model_is_refused(call, wrong):
    with pytest.raises(UnsupportedModelError, match=f"expected a model of transformers, got {type(wrong).__name__}"):
        call(wrong)


def test_adapt_replaces_and_restore_puts_back_the_former_implementation():
    config = AutoConfig.for_model("llama", **SIZE)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = torch.randint(3, 99, (1, 60))
    before = logits(model, ids)
    assert swaa_flex.adapt(model, CONFIG) is model
    adapted = logits(model, ids)
    assert (adapted - before).abs().max() > 1e-4
    torch.testing.assert_close(adapted, reference_logits(model, ids), **TIGHT)
    wider = SWAAConfig(**CONFIG.to_dict() | {"sliding_window": 30})
    swaa_flex.adapt(model, wider)
    torch.testing.assert_close(logits(model, ids), reference_logits(model, ids, wider), **TIGHT)
    assert swaa_flex.restore(model) is model
    assert model.config._attn_implementation == "eager"
    assert model.config.swaa is None
    assert torch.equal(logits(model, ids), before)


def test_set_attn_implementation_switches_a_loaded_model():
    model = tiny("llama")
    model.set_attn_implementation("sdpa")
    ids = torch.randint(3, 99, (1, 60))
    full = logits(model, ids)
    with pytest.warns(UserWarning, match="recipe is idle"):
        model.config.swaa = CONFIG
    model.set_attn_implementation("swaa_flex")
    assert (logits(model, ids) - full).abs().max() > 1e-3


def test_a_recipe_that_a_forward_does_not_run_is_said_once():
    model, ids = tiny("llama"), torch.randint(3, 99, (1, 60))
    full = logits(model, ids)
    swaa_flex.adapt(model, CONFIG)
    slides = logits(model, ids)
    model.set_attn_implementation("sdpa")
    with pytest.warns(
        UserWarning, match=r"attn_implementation='sdpa' was set after the recipe, which is idle now: swaa="
    ):
        assert torch.equal(logits(model, ids), full)
    assert torch.equal(logits(model, ids), full)  # warnings are errors here
    model.set_attn_implementation("swaa_flex")
    assert torch.equal(logits(model, ids), slides)
    assert torch.equal(logits(swaa_flex.restore(model), ids), full)


# --- prompt and decode rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("full_attention_decode", [True, False])
@pytest.mark.parametrize("how", ["keyword list", "keyword tensor", "context", "rows"])
def test_known_prompt_lengths_make_the_later_rows_decode_rows(model, how, full_attention_decode):
    config = SWAAConfig(**CONFIG.to_dict() | {"full_attention_decode": full_attention_decode})
    model.config.swaa = config
    inputs, lengths = batch(), [40, 55]  # the first of the two has 13 pads on the left
    expected = reference_logits(model, inputs["input_ids"], config, lengths, attention_mask=inputs["attention_mask"])
    if how == "context":
        with swaa_flex.prompt(lengths):
            ours = logits(model, **{"ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]})
    else:
        given = {"prompt_lengths": torch.tensor(lengths) if how == "keyword tensor" else lengths}
        if how == "rows":
            position = inputs["attention_mask"].cumsum(-1) - 1
            given = {"decode_rows": position >= torch.tensor(lengths)[:, None]}
        ours = logits(model, inputs["input_ids"], attention_mask=inputs["attention_mask"], **given)
    real = inputs["attention_mask"].bool()
    if how == "rows":  # without lengths the end of the sequence is the end of a prompt too
        real = real & (torch.arange(real.shape[1]) < real.shape[1] - config.dense_tail)
    torch.testing.assert_close(ours[real], expected[real], **TIGHT)


def test_one_known_length_splits_the_plan_instead_of_widening_all_lists(model):
    ids = torch.randint(3, 99, (2, 700))
    expected = reference_logits(model, ids, prompt_lengths=[650, 650])
    torch.testing.assert_close(logits(model, ids, prompt_lengths=650), expected, **TIGHT)


@pytest.mark.parametrize("chunk", [7, 20, 59])
@pytest.mark.parametrize("pads", [0, 13])
def test_chunked_prefill_with_known_lengths_equals_one_forward(model, chunk, pads):
    inputs = batch(60, pads) if pads else {"input_ids": torch.randint(3, 99, (2, 60))}
    lengths = [60 - pads, 60]
    kwargs = {
        **inputs,
        "max_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with swaa_flex.prompt(lengths):
        chunked = model.generate(**kwargs, prefill_chunk_size=chunk)
        whole = model.generate(**kwargs)
    unknown = model.generate(**kwargs)
    assert torch.equal(chunked.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(chunked.logits), torch.stack(whole.logits), **TIGHT)
    torch.testing.assert_close(torch.stack(unknown.logits), torch.stack(whole.logits), **TIGHT)


def test_chunked_prefill_without_lengths_warns_once(model):
    ids = torch.randint(3, 99, (1, 60))
    with pytest.warns(UserWarning, match="depend on the chunk size.*swaa_flex.prompt") as caught:
        model.generate(ids, max_new_tokens=3, do_sample=False, prefill_chunk_size=20)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(ids, max_new_tokens=3, do_sample=False)
        with swaa_flex.prompt(60):
            model.generate(ids, max_new_tokens=3, do_sample=False, prefill_chunk_size=20)


def test_a_second_turn_continues_the_cache(model):
    first, second = torch.randint(3, 99, (1, 50)), torch.randint(3, 99, (1, 30))
    cache = transformers.DynamicCache(config=model.config)
    logits(model, first, past_key_values=cache, prompt_lengths=50)
    ours = logits(model, second, past_key_values=cache, prompt_lengths=80)
    flags = torch.zeros(1, 80, dtype=torch.bool)
    # The same in one forward: both parts are prompts, each with a dense tail.
    flags[:, 46:50] = flags[:, 76:] = True
    with swaa_flex.prompt(dense_tail=0):
        rows = logits(model, torch.cat([first, second], 1), decode_rows=flags)
    torch.testing.assert_close(ours[:, -4:], rows[:, -4:], **TIGHT)


def test_assisted_decoding_verifies_with_decode_rows(model):
    ids = torch.randint(3, 99, (1, 60))
    assistant = tiny("llama", num_hidden_layers=1)
    assistant.set_attn_implementation("sdpa")
    with swaa_flex.prompt(60):
        plain = model.generate(ids, max_new_tokens=16, do_sample=False)
    with swaa_flex.prompt(60):
        assisted = model.generate(ids, max_new_tokens=16, do_sample=False, assistant_model=assistant)
    assert torch.equal(plain, assisted)


def test_beams_and_sampling_run_over_the_reference(model):
    inputs = batch(50, 9)

    def beams():
        return model.generate(**inputs, max_new_tokens=8, num_beams=3, do_sample=False)

    assert torch.equal(beams(), under_reference(model, CONFIG, beams))


def test_a_static_cache_gives_the_same_tokens(model):
    inputs = batch(50, 9)
    kwargs = {"max_new_tokens": 8, "do_sample": False}
    dynamic = model.generate(**inputs, **kwargs)
    assert torch.equal(dynamic, model.generate(**inputs, **kwargs, cache_implementation="static"))


def test_dense_tail_follows_the_real_end_of_right_padded_sequences(model):
    ids = torch.randint(3, 99, (2, 60))
    mask = torch.ones_like(ids)
    mask[0, 37:] = 0
    padded = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(padded[:1, :37], logits(model, ids[:1, :37]), **TIGHT)
    torch.testing.assert_close(padded[1:], logits(model, ids[1:]), **TIGHT)


def test_packed_documents_equal_separate_forwards(model):
    documents = [torch.randint(3, 99, (1, n)) for n in (40, 25, 60)]
    position_ids = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    flags = torch.cat([torch.arange(d.shape[1]) >= d.shape[1] - 5 for d in documents])[None]
    with swaa_flex.prompt(dense_tail=0):
        packed = logits(model, torch.cat(documents, 1), position_ids=position_ids, use_cache=False)
        with_rows = logits(
            model, torch.cat(documents, 1), position_ids=position_ids, use_cache=False, decode_rows=flags
        )
        at = 0
        for document in documents:
            length = document.shape[1]
            torch.testing.assert_close(packed[:, at : at + length], logits(model, document), **TIGHT)
            separate = logits(model, document, prompt_lengths=length - 5)
            torch.testing.assert_close(with_rows[:, at : at + length], separate, **TIGHT)
            at += length


def test_gradients_flow_through_an_adapted_model(model):
    model.train()
    ids = torch.randint(3, 99, (2, 60))
    loss = model(ids, labels=ids, prompt_lengths=[30, 45]).loss
    loss.backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    under_reference(model, CONFIG, lambda: model(ids, labels=ids).loss.backward(), [30, 45])
    for mine, theirs in zip(ours, [p.grad for p in model.parameters()], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_plans_are_shared_by_layers_of_a_kind(model, monkeypatch):
    made = []
    original = swaa_flex.hf.mask.plan
    monkeypatch.setattr(swaa_flex.hf.mask, "plan", lambda *a, **k: made.append(a[0]) or original(*a, **k))
    logits(model, torch.randint(3, 99, (1, 60)))
    assert [repr(mask) for mask in made] == ["causal & (window(16) | sinks(2) | rows_from(56))", "causal"]


def test_inputs_within_the_window_are_exact():
    model = tiny("llama")
    model.config.swaa = SWAAConfig(sliding_window=64, sink_tokens=0, full_attention_layers=(), dense_tail=0)
    ids = torch.randint(3, 99, (1, 64))
    ours = logits(model, ids)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(ours, logits(model, ids), **TIGHT)


# --- torch.compile ------------------------------------------------------------------------------------------


def test_fullgraph_compiles_once_for_all_long_prompts():
    graphs, model = [], tiny("llama", num_hidden_layers=2)
    model.config.swaa = SWAAConfig(sliding_window=128, sink_tokens=8, full_attention_layers=[1], dense_tail=16)
    compiled = torch.compile(model, fullgraph=True, backend=counting_backend(graphs))

    def compare(length):
        ids = torch.randint(3, 99, (1, length))
        ours = compiled(ids, use_cache=False).logits
        torch.testing.assert_close(ours, logits(model, ids, use_cache=False), **TIGHT)

    with torch.no_grad():
        for length in (260, 300, 333, 401, 512):
            compare(length)
        assert len(graphs) <= 3
        after = len(graphs)
        for length in (280, 345, 390, 450, 505):
            compare(length)
        assert len(graphs) == after


def test_fullgraph_with_a_padding_mask(model):
    inputs = batch(60, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        ours = compiled(**inputs, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[real], logits(model, **{"ids": inputs.pop("input_ids")}, **inputs)[real], **TIGHT)


@pytest.mark.slow
def test_inductor_runs_the_compiled_model(model):
    torch._dynamo.reset()  # earlier tests have varied lengths, which would be symbolic here
    ids = torch.randint(3, 99, (1, 300))
    with torch.no_grad():
        ours = torch.compile(model, fullgraph=True)(ids, use_cache=False).logits
    torch.testing.assert_close(ours, logits(model, ids), atol=1e-4, rtol=1e-4)


# --- what cannot be honoured is refused ---------------------------------------------------------------------


def test_a_layer_the_model_does_not_have_is_refused_when_the_configuration_is_set(model):
    with pytest.raises(ConfigError, match=r"full_attention_layers.*40"):
        swaa_flex.adapt(model, SWAAConfig(full_attention_layers=[40]))
    with pytest.raises(ConfigError, match="did you mean 'balanced'"):
        swaa_flex.adapt(model, "ballanced")


@pytest.mark.parametrize("family", ["bloom", "mpt", "falcon"])
def test_a_model_that_never_calls_the_interface_is_refused(family):
    size = {"vocab_size": 99, "hidden_size": 32, "n_embd": 32, "rotary_dim": 4, "pad_token_id": 0}
    size |= {"n_layer": 2, "n_head": 4} if family != "falcon" else {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(family, **size)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with pytest.raises(UnsupportedModelError, match="AttentionInterface"):
        swaa_flex.adapt(model, CONFIG)
    model.config._attn_implementation = "swaa_flex"
    with pytest.raises(UnsupportedModelError, match="AttentionInterface"):
        model(torch.randint(3, 9, (1, 5)))


def test_bidirectional_models_are_refused():
    config = AutoConfig.for_model("bert", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    model = transformers.AutoModel.from_config(config, attn_implementation="swaa_flex")
    with pytest.raises(UnsupportedModelError, match="bidirectional"):
        model(torch.randint(3, 9, (1, 5)))


def test_dropout_in_training_is_refused():
    model = tiny("llama", attention_dropout=0.1)
    model.config.swaa = CONFIG
    ids = torch.randint(3, 99, (1, 20))
    logits(model, ids)
    model.train()
    with pytest.raises(UnsupportedModelError, match=r"attention dropout 0\.1"):
        model(ids)


@pytest.mark.parametrize("where", ["call", "config"])
def test_attention_weights_are_refused(model, where):
    ids = torch.randint(3, 99, (1, 20))
    with pytest.raises((UnsupportedModelError, ValueError), match="output_attentions"):
        if where == "config":
            model.config.output_attentions = True
        model(ids, **({"output_attentions": True} if where == "call" else {}))


@pytest.mark.parametrize("name", ["indices", "block_indices", "sinks"])
def test_keys_that_a_model_chooses_itself_are_refused(name):
    query = torch.zeros(1, 2, 4, 8)
    with pytest.raises(UnsupportedModelError, match=f"chooses keys or adds sinks by {name}="):
        attention_forward(torch.nn.Module(), query, query, query, None, **{name: torch.zeros(1)})


def test_the_last_rows_of_a_forward_have_a_mask_of_their_own(model):
    """As transformers 5.24 asks for, before layers whose other rows nobody reads."""
    mask = create_causal_mask(
        config=model.config,
        inputs_embeds=torch.zeros(1, 50, 32),
        attention_mask=None,
        past_key_values=None,
        position_ids=None,
    )
    query = torch.randn(1, 4, 50, 8)
    whole, _ = attention_forward(model.model.layers[0].self_attn, query, query, query, mask, prompt_lengths=45)
    last = mask[:, :, slice(-7, None), :]
    part, _ = attention_forward(
        model.model.layers[0].self_attn, query[:, :, -7:], query, query, last, prompt_lengths=45
    )
    assert last.shape[2] == 7
    torch.testing.assert_close(part, whole[:, -7:], **TIGHT)
    with pytest.raises(UnsupportedModelError, match="takes a part of its attention mask"):
        mask[:, 0]


def test_a_mask_per_pair_is_refused(model):
    with pytest.raises(UnsupportedModelError, match="attention_mask as"):
        logits(model, torch.randint(3, 99, (1, 6)), attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, ids: logits(m, ids, prompt_lengths=[1, 2, 3]), "got 3 for a batch of 1"),
        (lambda m, ids: logits(m, ids, prompt_lengths=torch.tensor([0.5])), "expected ints"),
        (lambda m, ids: logits(m, ids, prompt_lengths=[3.7]), "expected numbers of tokens, got 3.7"),
        (lambda m, ids: logits(m, ids, prompt_lengths=3.7), "got 3.7"),
        (lambda m, ids: logits(m, ids, prompt_lengths="33"), "got '33'"),
        (lambda m, ids: logits(m, ids, prompt_lengths=True), "got True"),
        (lambda m, ids: swaa_flex.prompt(-5).__enter__(), "got -5"),
        (lambda m, ids: logits(m, ids, decode_rows=torch.zeros(1, 3, dtype=torch.bool)), r"expected \[1, 20\]"),
        (lambda m, ids: logits(m, ids, decode_rows=torch.zeros(1, 20)), "expected bool"),
        (lambda m, ids: logits(m, ids, prompt_lengths=3, decode_rows=torch.ones(1, 20).bool()), "either"),
        (lambda m, ids: swaa_flex.prompt(dense_tail=-1).__enter__(), "dense_tail=-1"),
    ],
)
def test_wrong_prompt_boundaries_are_named(model, call, message):
    with pytest.raises(MaskError, match=message):
        call(model, torch.randint(3, 99, (1, 20)))


def test_the_reference_itself_knows_full_attention(model):
    """The oracle is worth something only if it equals stock attention where everything fits in the window."""
    ids = torch.randint(3, 99, (1, 40))
    wide = SWAAConfig(sliding_window=1000)
    ours = reference_logits(model, ids, wide)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(ours, logits(model, ids), **TIGHT)
    assert Reference.config is wide


# --- what one forward leaves does not reach another ------------------------------------------------------------


def test_pads_of_a_request_without_cache_do_not_reach_the_cache_of_another(model):
    model.config.swaa = dataclasses.replace(CONFIG, dense_tail=0)
    ids, later = torch.randint(3, 99, (1, 40)), torch.randint(3, 99, (1, 5))
    padded = torch.tensor([[0] * 20 + [1] * 20])

    def continued(disturbed):
        cache = SWAACache(model.config)
        logits(model, ids, **{CACHE: cache})
        if disturbed:
            logits(model, ids.flip(1), attention_mask=padded, use_cache=False)
        assert cache.first is None
        return logits(model, later, **{CACHE: cache})

    assert torch.equal(continued(True), continued(False))


def test_a_cache_that_was_asked_outside_of_a_forward_is_not_told_of_the_next_one(model):
    cache = SWAACache(model.config)
    cache.get_mask_sizes(7, 0)
    logits(model, torch.randint(3, 99, (1, 40)), attention_mask=torch.tensor([[0] * 20 + [1] * 20]), use_cache=False)
    assert cache.first is None


def test_a_refused_forward_leaves_nothing_behind(model):
    ids, padded = torch.randint(3, 99, (1, 40)), torch.tensor([[0] * 20 + [1] * 20])
    expected = logits(model, ids, use_cache=False)
    cache = SWAACache(model.config, prompt_lengths=3, attention_mask=padded)
    with pytest.raises(UnsupportedModelError, match="output_attentions"):
        logits(model, ids.flip(1), output_attentions=True, **{CACHE: cache})
    assert torch.equal(logits(model, ids, use_cache=False), expected)


def test_prompts_that_are_not_left_in_turn_are_refused_and_forgotten(model):
    first, second = swaa_flex.prompt(30), swaa_flex.prompt(70)
    first.__enter__()
    second.__enter__()
    for each in (first, second):
        with pytest.raises(MaskError, match="do not await inside prompt"):
            each.__exit__(None, None, None)
    assert surroundings.prompt == PromptInfo()


@pytest.mark.parametrize("max_length", [None, 64])
def test_a_decode_step_reads_no_tensor_on_the_host(max_length, model, monkeypatch):
    model.config.swaa = dataclasses.replace(CONFIG, full_attention_decode=False)
    monkeypatch.setattr(ForwardMask, "_may_read", lambda self: self.forward.q_len > 1)  # as on a GPU
    with swaa_flex.prompt(30):
        cache = SWAACache(model.config, max_length=max_length)
        for tokens in (30, 1, 1):
            logits(model, torch.randint(3, 99, (1, tokens)), **{CACHE: cache})
        with Reads() as reads:
            logits(model, torch.randint(3, 99, (1, 1)), **{CACHE: cache})
    # On a CPU the cache looks at its own counters, masks at their offsets, and the backend at what it computes with.
    there = ("hf/cache", "algebra.py", "chunked.py")
    assert [line for line in reads.from_us if not any(name in line for name in there)] == []


class Reads(TorchDispatchMode):
    """Which lines of swaa_flex read a tensor's value."""

    def __init__(self):
        super().__init__()
        self.from_us = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "local_scalar_dense" in str(function):
            ours = [f"{f.filename}:{f.lineno}" for f in traceback.extract_stack() if "swaa_flex/" in f.filename]
            self.from_us += ours[-1:]
        return function(*args, **kwargs or {})
