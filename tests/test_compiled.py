"""`swaa_flex.compile`: the same tokens as an eager model, and no compilation after the warm-up."""

import gc
import re
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import counting_backend
from reference import under_reference
from tiny_models import batch, tiny
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig

import swaa_flex
from swaa_flex import ConfigError, DoesNotFitError, SWAACache, SWAAConfig, UnsupportedModelError
from swaa_flex.hf.graphs import Graphs

RECIPES = [
    SWAAConfig(16, 3, (), full_attention_decode=False, dense_tail=5),
    SWAAConfig(16, 3, (1, 3), full_attention_decode=True, dense_tail=5),
    SWAAConfig(16, 3, (1, 3), full_attention_decode=False, dense_tail=0),
]
LAYER_TYPES = {"gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2}}


def make(family, config, **overrides):
    model = tiny(family, **LAYER_TYPES.get(family, {}) | overrides)
    model.config.swaa = config
    return model


def greedy(model, config, inputs, new):
    return under_reference(model, config, lambda: model.generate(**inputs, max_new_tokens=new, do_sample=False))


@pytest.fixture
def nothing_compiled():
    """Forwards of all models are one code object, and torch.compile counts what it has compiled of each."""
    torch._dynamo.reset()


@pytest.fixture
def compiled():
    return swaa_flex.compile(make("llama", RECIPES[1]), max_length=300, batch_size=3, prefill_chunk=128)


@pytest.mark.parametrize("config", RECIPES, ids=repr)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_every_length_gives_the_tokens_of_the_dense_reference(family, config):
    model = make(family, config)
    compiled = swaa_flex.compile(model, max_length=600, batch_size=2, prefill_chunk=256)
    for length in (5, 127, 128, 129, 300):
        inputs = batch(length, min(13, length - 2))
        answer = compiled.generate(**inputs, max_new_tokens=20)
        assert torch.equal(answer, greedy(model, config, inputs, 20)), length


@pytest.mark.parametrize(("family", "config"), [("gemma3_text", RECIPES[1]), ("qwen3", RECIPES[2])], ids=repr)
def test_a_compiled_prompt_sees_what_one_that_is_not_compiled_sees(family, config, nothing_compiled, capsys):
    """Layer by layer, over one chunk and several, with pads; one graph serves all layers of a kind."""
    model, graphs = make(family, config), []
    compiled = swaa_flex.compile(
        model, max_length=600, batch_size=2, prefill_chunk=256, backend=counting_backend(graphs)
    )
    compiled._decode = lambda server: torch.zeros(2, 99)  # decode steps take long to trace
    compiled.warmup(all=True)
    said = capsys.readouterr().err
    assert compiled.chunks == (128, 256) and len(graphs) == 2
    assert re.search(r"ready after \d+\.\d s \(decode step .*, chunks of 128 .*, chunks of 256 .*\)", said)
    for length in (5, 300):
        inputs = batch(length, min(13, length - 2))
        logits = under_reference(model, config, lambda inputs=inputs: model(**inputs).logits[:, -1])
        torch.testing.assert_close(compiled.prefill(**inputs), logits, atol=1e-5, rtol=1e-5)
    assert len(graphs) == 2


def test_what_a_graph_returns_is_taken_before_the_next_one_runs(monkeypatch):
    """CUDA graphs share memory, so each may write over what the one before has returned."""
    returned = []

    def capture(graphs, run):
        def replay():
            for tensor in returned:
                tensor.fill_(torch.nan)
            result = run()
            returned[:] = [] if result is None else [result]
            return result

        run()
        return replay

    monkeypatch.setattr(Graphs, "capture", capture)
    model, inputs = make("llama", RECIPES[0]), batch(300, 13)
    server = swaa_flex.compile(model, max_length=400, batch_size=2, prefill_chunk=256)
    assert torch.equal(server.generate(**inputs, max_new_tokens=9), greedy(model, RECIPES[0], inputs, 9))


@pytest.mark.parametrize("config", [RECIPES[1], RECIPES[2], SWAAConfig(16, 3, (), False, 0)], ids=repr)
@pytest.mark.parametrize("rows", [1, 2])
def test_further_turns_compute_what_is_new(config, rows, monkeypatch):
    """The rows of answers before stay decode rows, as in a cache of transformers' own generate."""
    model = make("llama", config)
    server = swaa_flex.compile(model, max_length=700, batch_size=rows, prefill_chunk=256).warmup(all=True)
    sizes, run = [], server._prompt_model

    def note(ids, *rest):
        sizes.append(ids.shape[1])
        return run(ids, *rest)

    monkeypatch.setattr(server, "_prompt_model", note)
    cache = SWAACache(model.config)
    talk, expected_sizes = torch.randint(3, 99, (rows, 300)), [[128, 256], [128], [128], [256], [128]]
    pads = 13 if rows == 2 else 0
    mask = (torch.arange(300) >= torch.tensor([pads, 0])[:rows, None]).long()
    for said, expected in zip((0, 9, 1, 200, 4), expected_sizes, strict=True):
        talk = torch.cat([talk, torch.randint(3, 99, (rows, said))], 1)
        mask = F.pad(mask, (0, talk.shape[1] - mask.shape[1]), value=1)
        given = {"attention_mask": mask, "max_new_tokens": 7, "do_sample": False}
        cache.prompt_lengths = mask.sum(-1)
        plain = model.generate(talk, **given, past_key_values=cache)
        sizes.clear()
        assert torch.equal(server.generate(talk, **given), plain)
        assert sizes == expected
        talk = plain
    other = torch.randint(3, 99, (rows, 40))
    assert torch.equal(server.generate(other, max_new_tokens=7), greedy(model, config, {"input_ids": other}, 7))


def test_further_turns_that_need_released_keys_are_computed_anew(monkeypatch):
    model, ids = make("llama", RECIPES[0]), torch.randint(3, 99, (1, 300))
    server = swaa_flex.compile(model, max_length=700, prefill_chunk=256)
    talk = torch.cat([server.generate(ids, max_new_tokens=7), torch.randint(3, 99, (1, 9))], 1)
    with pytest.warns(UserWarning, match="computed anew.*last 5 rows"):
        answer = server.generate(talk, max_new_tokens=7)
    assert torch.equal(answer, greedy(model, RECIPES[0], {"input_ids": talk}, 7))


def test_a_turn_after_other_tokens_or_under_another_tail_is_a_new_request():
    model, ids = make("llama", RECIPES[1]), torch.randint(3, 99, (1, 300))
    server = swaa_flex.compile(model, max_length=700, prefill_chunk=256)
    said = server.generate(ids, max_new_tokens=7)
    for edited in (said[:, :-3], torch.cat([said[:, :150], said[:, 151:], said[:, :9]], 1)):
        assert torch.equal(
            server.generate(edited, max_new_tokens=7), greedy(model, RECIPES[1], {"input_ids": edited}, 7)
        )
    talk = torch.cat([server.generate(ids, max_new_tokens=7), said[:, :9]], 1)
    with swaa_flex.prompt(dense_tail=0):
        expected = model(talk, prompt_lengths=talk.shape[1]).logits[:, -1]
        torch.testing.assert_close(server.prefill(talk), expected, atol=1e-5, rtol=1e-5)


def test_nothing_is_traced_after_the_warm_up(nothing_compiled):
    graphs = []
    model = make("llama", RECIPES[0], num_hidden_layers=2)
    compiled = swaa_flex.compile(model, max_length=420, prefill_chunk=128, backend=counting_backend(graphs)).warmup()
    assert len(graphs) == 2  # one size of chunk, and the decode step
    for length in range(3, 403, 20):
        compiled.generate(torch.randint(3, 99, (1, length)), max_new_tokens=10)
    assert len(graphs) == 2
    inputs = {"input_ids": torch.randint(3, 99, (1, 200)), "attention_mask": torch.ones(1, 200, dtype=torch.long)}
    assert torch.equal(compiled.generate(**inputs, max_new_tokens=200), greedy(model, RECIPES[0], inputs, 200))
    assert len(graphs) == 2


def test_compiling_again_leaves_the_first_compiled_model_as_it_was(nothing_compiled):
    graphs = []
    model = make("llama", RECIPES[0], num_hidden_layers=1)
    ids = torch.randint(3, 99, (1, 60))
    first = swaa_flex.compile(model, max_length=300, prefill_chunk=128, backend=counting_backend(graphs))
    expected = first.generate(ids, max_new_tokens=8)
    held = [parameter.data_ptr() for parameter in model.parameters()]
    assert torch.equal(
        swaa_flex.compile(model, max_length=200, prefill_chunk=128, backend="eager").generate(ids, max_new_tokens=8),
        expected,
    )
    assert [parameter.data_ptr() for parameter in model.parameters()] == held
    assert torch.equal(first.generate(ids, max_new_tokens=8), expected)
    assert len(graphs) == 2


def test_weights_that_were_replaced_are_noticed(nothing_compiled):
    model = make("llama", RECIPES[0], num_hidden_layers=1)
    ids = torch.randint(3, 99, (1, 60))
    old = swaa_flex.compile(model, max_length=300, prefill_chunk=128, backend="eager")
    old.prefill(ids)
    replaced = {name: value + 0.1 for name, value in model.state_dict().items()}
    model.load_state_dict(replaced, assign=True)
    for call in (old.prefill, partial(old.generate, max_new_tokens=8)):
        with pytest.raises(ConfigError, match=r"weights were replaced.*swaa_flex.compile again"):
            call(ids)
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *args: None)
    again = swaa_flex.compile(model, max_length=300, prefill_chunk=128, backend="eager")
    torch.testing.assert_close(again.prefill(ids), model(ids).logits[:, -1], atol=1e-5, rtol=1e-5)


def test_a_compiled_model_follows_weights_that_are_trained(nothing_compiled):
    model = make("qwen3", RECIPES[0], num_hidden_layers=1)
    plain = swaa_flex.adapt(make("qwen3", RECIPES[0], num_hidden_layers=1), RECIPES[0])
    plain.load_state_dict(model.state_dict())
    fused = swaa_flex.compile(model, max_length=300, prefill_chunk=128, backend="eager")
    ids = torch.randint(3, 99, (1, 40))
    for each in (model, plain):
        each(ids, labels=ids).loss.backward()
        with torch.no_grad():
            for parameter in each.parameters():
                parameter -= parameter.grad
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight.grad, plain.model.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(fused.prefill(ids), plain(ids).logits[:, -1], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_inductor_compiles_it_on_a_cpu(nothing_compiled):
    model = make("llama", RECIPES[0], num_hidden_layers=2)
    compiled = swaa_flex.compile(model, max_length=300, batch_size=2, prefill_chunk=128, backend="inductor")
    inputs = batch(100, 13)
    assert torch.equal(compiled.generate(**inputs, max_new_tokens=12), greedy(model, RECIPES[0], inputs, 12))


def test_prefill_and_decode_steps_are_what_generate_does(compiled):
    ids = torch.randint(3, 99, (2, 70))
    tokens = compiled.prefill(ids).argmax(-1)
    chosen = [tokens]
    for _ in range(8):
        chosen.append(compiled.decode_step(chosen[-1]).argmax(-1))
    assert torch.equal(torch.stack(chosen, 1), compiled.generate(ids, max_new_tokens=9)[:, 70:])


@pytest.mark.parametrize("where", ["prefill", "decode_step"])
def test_an_interrupted_request_is_not_gone_on_with(compiled, where, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    ids = torch.randint(3, 99, (1, 50))
    tokens = compiled.prefill(ids).argmax(-1)
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "_prompt_model" if where == "prefill" else "_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compiled.prefill(ids) if where == "prefill" else compiled.decode_step(tokens)
    with pytest.raises(ConfigError, match="1 tokens for 0 sequences; prefill comes first"):
        compiled.decode_step(tokens)
    compiled.prefill(ids)


def test_prompts_are_released_before_decoding():
    compiled = swaa_flex.compile(make("llama", RECIPES[0]), max_length=300, prefill_chunk=128)
    logits = compiled.prefill(torch.randint(3, 99, (1, 250)))
    per_key = 2 * 2 * 8 * 4  # keys and values, heads, head_dim, bytes
    assert compiled.cache.memory()["window"] < 4 * per_key * (16 + 3 + 128)
    compiled.decode_step(logits.argmax(-1))


def test_what_surrounds_a_request_says_nothing_of_its_prompts(nothing_compiled):
    graphs = []
    ids = torch.randint(3, 99, (1, 87))
    backends = (None, counting_backend(graphs))
    for backend in backends:
        model = make("llama", SWAAConfig(16, 3, (), False, 5), num_hidden_layers=2)
        chosen = []
        for lengths in (1000, None, 40):
            if lengths in (1000, None):  # a warm-up inside, then a new one outside
                compiled = swaa_flex.compile(model, max_length=300, prefill_chunk=128, backend=backend)
            with swaa_flex.prompt(lengths):
                chosen.append([compiled.prefill(ids).clone()])
                for token in (5, 6, 7):
                    chosen[-1].append(compiled.decode_step(torch.tensor([token])).clone())
        for other in chosen[1:]:
            torch.testing.assert_close(other, chosen[0], atol=1e-5, rtol=0)
    assert len(graphs) == 4


def test_inference_mode_does_not_reach_into_a_request(nothing_compiled):
    graphs = []
    model = make("llama", RECIPES[0], num_hidden_layers=1)
    ids = torch.randint(3, 99, (1, 60))
    compiled = swaa_flex.compile(model, max_length=300, prefill_chunk=128, backend=counting_backend(graphs))
    with torch.inference_mode():
        inside = compiled.generate(ids, max_new_tokens=5)
    assert torch.equal(compiled.generate(ids, max_new_tokens=5), inside)
    assert len(graphs) == 2


@pytest.mark.parametrize("change", [swaa_flex.restore, lambda model: swaa_flex.adapt(model, "naive")])
def test_a_model_that_runs_something_else_by_now_is_refused(compiled, change):
    compiled.prefill([[5, 6, 7]])
    change(compiled.model)
    before = compiled.model.config.swaa
    with pytest.raises(ConfigError, match=r"was compiled for SWAAConfig.*by now; call swaa_flex.adapt"):
        compiled.prefill([[5, 6, 7]])
    assert compiled.model.config.swaa == before


def test_weights_beside_the_fused_ones_are_noticed_too(compiled):
    compiled.prefill([[5, 6, 7]])
    compiled.model.lm_head = torch.nn.Linear(32, 99, bias=False)
    with pytest.raises(ConfigError, match="weights were replaced"):
        compiled.prefill([[5, 6, 7]])


def test_a_hook_on_a_fused_layer_is_noticed(nothing_compiled):
    model = make("llama", RECIPES[0], num_hidden_layers=1)
    fused = swaa_flex.compile(model, max_length=300, prefill_chunk=128, backend="eager")
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *args: None)
    with pytest.raises(ConfigError, match=r"a layer replaced or hooked.*swaa_flex.compile again"):
        fused.prefill([[5, 6, 7]])


def test_a_compiled_model_that_is_dropped_leaves_no_cache_behind(compiled):
    cache = weakref.ref(swaa_flex.compile(make("llama", RECIPES[0]), max_length=300, prefill_chunk=128).warmup().cache)
    gc.collect()
    assert cache() is None


@pytest.mark.parametrize("family", ["stablelm", "llama"])
def test_models_that_drop_keywords_know_where_prompts_end(family):
    model = swaa_flex.adapt(make(family, RECIPES[0]), SWAAConfig(7, 1, (), True, 16))
    ids = torch.randint(3, 99, (1, 200))
    with torch.no_grad(), swaa_flex.prompt(200):
        expected = model(ids).logits[:, -1]
    ours = swaa_flex.compile(model, max_length=300, prefill_chunk=128).prefill(ids)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    told = [{"prompt_lengths": 150}, {"decode_rows": torch.ones(1, 200, dtype=torch.bool)}, {"labels": ids}]
    for keywords in told:
        if family == "llama":
            model(ids, **keywords)
            continue
        with pytest.raises(UnsupportedModelError, match=r"'stablelm' does not hand keywords on.*swaa_flex.prompt"):
            model(ids, **keywords)


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_rotations_that_change_with_the_length_are_refused(rope_type):
    factors = {"longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}, "dynamic": {"factor": 4.0}}[
        rope_type
    ]
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "original_max_position_embeddings": 128} | factors
    family = {"longrope": "phi3", "dynamic": "llama"}[rope_type]
    native = {"sliding_window": None, "original_max_position_embeddings": 128} if family == "phi3" else {}
    model = make(family, RECIPES[0], rope_parameters=rope, **native)
    with pytest.raises(ConfigError, match=rf"max_length=129.*beyond 128 tokens \(rope_type='{rope_type}'\)"):
        swaa_flex.compile(model, max_length=129)
    swaa_flex.compile(model, max_length=128).prefill([[5, 6, 7]])


def test_a_family_that_asks_for_a_window_that_it_has_not_is_compiled(nothing_compiled):
    """Qwen2-MoE with its default config."""
    model = make("qwen2_moe", SWAAConfig(7, 1, (), True, 0), num_hidden_layers=1)
    ids = torch.randint(3, 99, (1, 60))
    compiled = torch.compile(lambda x: model(x, use_cache=False).logits, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.prefill(torch.tensor([5, 6])), r"input_ids of shape \[2\]: expected \[sequences, len\]"),
        (lambda m: m.prefill([5, 6]), r"sequence 0 has the shape \[\]"),
        (lambda m: m.prefill([[5.5]]), "sequence 0: expected integers, token ids, got torch.float32"),
        (lambda m: m.prefill(torch.tensor([[True]])), "expected integers, token ids, got torch.bool"),
        (lambda m: m.prefill(["hello"]), "sequence 0: expected token ids, got 'hello'"),
        (lambda m: m.prefill({"input_ids": torch.ones(1, 2)}), r"generate\(\*\*inputs\)"),
        (
            lambda m: m.prefill(torch.ones(1, 5).long(), torch.ones(1, 4)),
            r"shape of input_ids, \[1, 5\], got \[1, 4\]",
        ),
        (lambda m: m.prefill([[5, -100]]), "token ids from -100 to 5; the model has 99"),
        (lambda m: m.prefill([[5, 99]]), "token ids from 5 to 99; the model has 99"),
        (lambda m: m.decode_step([5]), "decode_step: expected a tensor of token ids.*got list"),
    ],
)
def test_what_is_no_request_is_refused_by_name(compiled, call, message):
    with pytest.raises(ConfigError, match=message):
        call(compiled)


def test_requests_that_do_not_fit_are_refused_by_name(compiled):
    ids = torch.randint(3, 99, (1, 290))
    assert compiled.generate(ids, max_new_tokens=10).shape == (1, 300)
    with pytest.raises(ConfigError, match="290 tokens and 11 new ones: compiled for max_length=300"):
        compiled.generate(ids, max_new_tokens=11)
    with pytest.raises(ConfigError, match="4 sequences: compiled for batch_size=3"):
        compiled.prefill(torch.randint(3, 99, (4, 10)))
    with pytest.raises(ConfigError, match="lists have no pads"):
        compiled.prefill([[1, 2]], torch.ones(1, 2))
    with pytest.raises(ConfigError, match="without tokens"):
        compiled.prefill([[]])
    logits = compiled.prefill(torch.randint(3, 99, (1, 299)))
    compiled.decode_step(logits.argmax(-1))
    with pytest.raises(ConfigError, match="reached max_length=300"):
        compiled.decode_step(logits.argmax(-1))
    with pytest.raises(ConfigError, match="2 tokens for 1 sequences"):
        compiled.decode_step(torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 0}, "max_length=0: expected a positive"),
        ({"max_length": 9, "batch_size": -1}, "batch_size=-1"),
        ({"max_length": 9, "prefill_chunk": 100}, "prefill_chunk=100: expected a multiple of 128"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        swaa_flex.compile(make("llama", RECIPES[0]), **arguments)


def test_a_model_with_another_attention_is_refused():
    model = make("llama", RECIPES[0])
    model.set_attn_implementation("sdpa")
    with pytest.raises(ConfigError, match=r"'sdpa'.*swaa_flex.adapt"):
        swaa_flex.compile(model, max_length=100)


def test_a_model_on_several_devices_is_refused():
    model = make("llama", RECIPES[0])
    model.lm_head.to("meta")
    with pytest.raises(UnsupportedModelError, match="layers on cpu, meta; use generate"):
        swaa_flex.compile(model, max_length=100)


def test_a_model_that_makes_its_own_attention_mask_is_refused():
    config = AutoConfig.for_model("biogpt", vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2)
    config.num_attention_heads, config.attention_probs_dropout_prob = 4, 0.0
    model = AutoModelForCausalLM.from_config(config, attn_implementation="swaa_flex").eval()
    with pytest.raises(UnsupportedModelError, match="'biogpt': compiled prompts are padded, and it takes pads"):
        swaa_flex.compile(model, max_length=100)


def test_too_little_memory_says_what_would_fit(monkeypatch):
    model = make("llama", RECIPES[1])
    compiled = swaa_flex.compile(model, max_length=100_000, prefill_chunk=128)
    per_token = 4 * 2 * 2 * 8 * 4
    monkeypatch.setattr("swaa_flex.hf.compiled._free_memory", lambda device: per_token * 10_000)

    def fail(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(compiled), "_make_steps", fail)
    with pytest.raises(DoesNotFitError, match=r"max_length=100000 with batch_size=1 needs.*max_length=7680 would fit"):
        compiled.warmup()
    # No length helps where keys and values take no room that grows, or fit.
    config = SWAAConfig(16, 3, (), False, 0)
    rings = swaa_flex.compile(make("llama", config), max_length=300, prefill_chunk=128)
    with pytest.raises(DoesNotFitError, match="a smaller prefill_chunk than 128, a smaller batch_size"):
        rings.warmup()
    monkeypatch.setattr("swaa_flex.hf.compiled._free_memory", lambda device: 80 << 30)
    with pytest.raises(DoesNotFitError, match=r"80\.0 GiB were free; take a smaller prefill_chunk"):
        compiled.warmup()


# --- without swaa_flex.compile --------------------------------------------------------------------------------

TWO_LAYERS = [
    SWAAConfig(16, 3, (1,) if r.full_attention_layers else (), r.full_attention_decode, r.dense_tail) for r in RECIPES
]


@pytest.mark.parametrize("config", TWO_LAYERS, ids=repr)
def test_generate_compiles_a_static_cache_once(config, nothing_compiled):
    model, inputs = make("llama", config, num_hidden_layers=2), batch(40, 13)
    graphs = []
    compile_config = CompileConfig(backend=counting_backend(graphs), mode=None, fullgraph=True)
    compile_config._compile_all_devices = True  # transformers compiles by itself only on accelerators
    kwargs = {**inputs, "max_new_tokens": 20, "do_sample": False, "compile_config": compile_config}
    expected = greedy(model, config, inputs, 20)
    for cache in ({"past_key_values": SWAACache(model.config, max_length=64)}, {"cache_implementation": "static"}):
        graphs.clear()
        assert torch.equal(model.generate(**kwargs, **cache), expected)
        assert len(graphs) == 1


@pytest.mark.parametrize("config", TWO_LAYERS, ids=repr)
def test_a_forward_that_the_user_compiles_decodes(config, nothing_compiled):
    model = make("llama", config, num_hidden_layers=2)
    graphs = []
    inputs = {"input_ids": torch.randint(3, 99, (2, 40)), "attention_mask": torch.ones(2, 40, dtype=torch.long)}
    step = torch.compile(model.forward, fullgraph=True, backend=counting_backend(graphs))
    cache = SWAACache(model.config, max_length=64)
    with torch.no_grad():
        tokens = model(**inputs, past_key_values=cache).logits[:, -1:].argmax(-1)
        cache.begin_decoding()
        chosen = [tokens]
        for position in range(40, 59):
            at = torch.full((2, 1), position)
            tokens = step(tokens, position_ids=at, past_key_values=cache).logits[:, -1:].argmax(-1)
            chosen.append(tokens)
    assert torch.equal(torch.cat(chosen, 1), greedy(model, config, inputs, 20)[:, 40:])
    assert len(graphs) == 1


def test_graphs_of_one_recipe_may_be_tried_on_the_cache_of_another(nothing_compiled, monkeypatch):
    """To say why it compiles again, torch reads every tensor of a graph from the cache that has come instead."""
    guards, read = torch._dynamo.guards.CheckFunctionManager, []
    build = guards.__init__

    def build_and_note(self, *args, **kwargs):
        build(self, *args, **kwargs)
        sources = self.guard_manager.no_tensor_aliasing_sources
        read.extend(source if isinstance(source, str) else source.name for source in sources)  # objects in torch 2.15

    monkeypatch.setattr(guards, "__init__", build_and_note)
    for full, tail in (((), 5), ((1,), 0)):
        model = make("llama", SWAAConfig(16, 3, full, False, tail), num_hidden_layers=2)
        cache = SWAACache(model.config, max_length=64)
        step = torch.compile(model.forward, fullgraph=True, backend="eager")
        with torch.no_grad():
            model(torch.randint(3, 99, (2, 40)), past_key_values=cache)
            step(torch.randint(3, 99, (2, 1)), position_ids=torch.full((2, 1), 40), past_key_values=cache)
    ways = {source.partition("['past_key_values']")[2] for source in read} - {""}
    assert {".layers[0].keys", ".layers[1].cumulative_length", "._pads.first"} <= ways
    other = SWAACache(make("llama", SWAAConfig(16, 3, (0, 1), False, 0), num_hidden_layers=2).config, max_length=64)
    for way in ways:
        eval("cache" + way, {"cache": other})


def test_a_prompt_with_pads_may_be_compiled_by_the_user_too(nothing_compiled):
    config = SWAAConfig(16, 3, (1,), False, 0)
    model, inputs = make("llama", config, num_hidden_layers=2), batch(40, 13)
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    cache = SWAACache(model.config, max_length=64)
    with torch.no_grad():
        model(inputs["input_ids"], past_key_values=cache)  # lets the cache learn the shapes
        cache.reset()
        position_ids = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        chosen = [step(**inputs, position_ids=position_ids, past_key_values=cache).logits[:, -1].argmax(-1)]
        mask = inputs["attention_mask"]
        for _ in range(12):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            at = mask.sum(-1, keepdim=True) - 1
            out = model(chosen[-1][:, None], attention_mask=mask, position_ids=at, past_key_values=cache)
            chosen.append(out.logits[:, -1].argmax(-1))
    assert torch.equal(torch.stack(chosen, 1), greedy(model, config, inputs, 13)[:, 40:])


def test_a_compile_cache_is_saved_loaded_and_checked(tmp_path, nothing_compiled):
    torch.compile(lambda x: (x + 1).sin())(torch.ones(3))
    path = tmp_path / "cache"
    swaa_flex.save_compile_cache(path)
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]
    swaa_flex.load_compile_cache(path)
    data = path.read_bytes()
    path.write_bytes(data.replace(torch.__version__.encode(), b"1.13.0", 1))
    with pytest.raises(ConfigError, match=rf"torch: 1.13.0 there, {torch.__version__.split('+')[0]}.*here"):
        swaa_flex.load_compile_cache(path)
    for damaged in (data[:60], data[:-200]):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match="damaged"):
            swaa_flex.load_compile_cache(path)
    path.write_bytes(b"something else")
    with pytest.raises(ConfigError, match="save_compile_cache wrote"):
        swaa_flex.load_compile_cache(path)


# --- the copy of the modules that computes prompts ------------------------------------------------------------------


def serve(model, **options):
    return swaa_flex.compile(model, max_length=700, prefill_chunk=256, **options)


@pytest.mark.parametrize("replace", ["model", "layer"])
def test_a_forward_that_was_replaced_by_a_function_is_refused(replace):
    model = make("llama", RECIPES[2])
    module = model if replace == "model" else model.model.layers[1]
    plain = module.forward
    module.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    with pytest.raises(UnsupportedModelError, match="replaced by a function"):
        serve(model).warmup()


def test_a_turn_after_weights_that_changed_in_place_is_computed_anew():
    model, ids = make("llama", RECIPES[2]), torch.randint(3, 99, (1, 60))
    server, weight = serve(model), model.model.layers[0].mlp.up_proj.weight
    talk = server.generate(ids, max_new_tokens=7)
    with torch.no_grad():
        weight.mul_(3)
    torch.testing.assert_close(server.prefill(talk), model(talk).logits[:, -1], atol=1e-5, rtol=1e-5)
    talk = server.generate(talk, max_new_tokens=7)
    weight.data.mul_(3)
    server.forget()
    torch.testing.assert_close(server.prefill(talk), model(talk).logits[:, -1], atol=1e-5, rtol=1e-5)


def test_a_turn_is_told_from_a_buffer_that_its_caller_has_written_to():
    model, buffer = make("llama", RECIPES[2]), torch.randint(3, 99, (60,))
    server = serve(model)
    server.prefill([buffer])
    buffer[10:20] = torch.randint(3, 99, (10,))
    talk = torch.cat([buffer, torch.randint(3, 99, (9,))])
    torch.testing.assert_close(server.prefill([talk]), model(talk[None]).logits[:, -1], atol=1e-5, rtol=1e-5)


def test_turns_of_rows_that_grow_unequally_or_reach_the_end_are_right():
    model, rows = make("llama", RECIPES[2]), [torch.randint(3, 99, (n,)) for n in (60, 40)]
    server = swaa_flex.compile(model, max_length=300, batch_size=2, prefill_chunk=256)
    server.prefill(rows)
    for grown in ((9, 5), (200, 200), (31, 31)):  # the last one reaches max_length
        rows = [torch.cat([row, torch.randint(3, 99, (n,))]) for row, n in zip(rows, grown, strict=True)]
        expected = torch.cat([model(row[None]).logits[:, -1] for row in rows])
        torch.testing.assert_close(server.prefill(rows), expected, atol=1e-5, rtol=1e-5)


def test_pads_of_a_turn_do_not_change_the_rotation_of_the_others():
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": 512}
    rope = factors | {"rope_type": "longrope", "rope_theta": 1e4}
    model = make("phi3", RECIPES[2], max_position_embeddings=1024, rope_parameters=rope)
    server, ids = swaa_flex.compile(model, max_length=512, prefill_chunk=256), torch.randint(3, 99, (1, 470))
    server.prefill(ids)
    talk = torch.cat([ids, torch.randint(3, 99, (1, 15))], 1)
    torch.testing.assert_close(server.prefill(talk), model(talk).logits[:, -1], atol=1e-5, rtol=1e-5)


def test_what_changes_after_compiling_is_refused():
    model, ids = make("llama", RECIPES[2]), torch.randint(3, 99, (1, 60))
    server = serve(model)
    server.prefill(ids)
    model.train()
    with pytest.raises(ConfigError, match="training mode"):
        server.prefill(ids)
    model.eval()
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 2
    with pytest.raises(ConfigError, match="weights were replaced"):
        server.prefill(ids)
