"""The backend in vLLM's own classes, with the stand-in for FlashAttention of tests/vllm_stand_ins.py."""

import logging
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from vllm_stand_ins import HEAD_DIM, HEADS, KV_HEADS, PAGE, Server, merge, speculative, varlen, vllm_config

from swaa_flex import BackendUnavailableError, ConfigError, UnsupportedModelError
from swaa_flex.vllm import register
from swaa_flex.vllm.rows import Rule

pytest.importorskip("vllm", reason="needs the package vllm: nox -s tests_vllm")
flash_attn = pytest.importorskip("vllm.v1.attention.backends.flash_attn")

import vllm  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata  # noqa: E402
from vllm.v1.attention.backends import fa_utils  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm.v1.engine.core import EngineCore  # noqa: E402
from vllm.v1.sample.logits_processor import build_logitsprocs  # noqa: E402
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality  # noqa: E402


def noted(*args, **kwargs):
    SCALES.append((kwargs["softmax_scale"], kwargs["softcap"]))
    return varlen(*args, **kwargs)


SCALES = []


@pytest.fixture
def backend(monkeypatch):
    SCALES.clear()
    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", noted, raising=False)
    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", noted, raising=False)
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda **_: 3)
    monkeypatch.setattr(flash_attn, "get_scheduler_metadata", lambda **_: None, raising=False)
    monkeypatch.setattr(flash_attn, "flash_attn_supports_quant_query_input", lambda: False)
    monkeypatch.setattr(flash_attn, "get_current_vllm_config_or_none", lambda: None)
    from swaa_flex.vllm import backend

    monkeypatch.setattr(backend, "flash_attn_varlen_func", noted)
    monkeypatch.setattr(backend, "merge_attn_states", merge)
    return backend


def configured(recipe, requests=4, **changed):
    config = vllm_config(recipe, **changed)
    config.model_config.get_num_attention_heads = lambda _: HEADS
    config.model_config.get_num_kv_heads = lambda _: KV_HEADS
    config.model_config.get_head_size = lambda: HEAD_DIM
    config.model_config.dtype = torch.float32
    config.parallel_config.cp_kv_cache_interleave_size = 1
    config.scheduler_config = SimpleNamespace(max_num_seqs=requests, max_num_batched_tokens=64)
    config.num_speculative_tokens = 0
    config.cache_config.cache_dtype = "auto"
    config.compilation_config = SimpleNamespace(
        cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: False),
        max_cudagraph_capture_size=8,
        static_forward_context={},
    )
    config.attention_config.flash_attn_max_num_splits_for_cuda_graph = 4
    return config


def common(server, computed, lengths):
    """What vLLM tells about a step."""
    computed, lengths = (torch.tensor(x, dtype=torch.int32) for x in (computed, lengths))
    start = torch.cat([torch.zeros(1, dtype=torch.int32), (lengths - computed).cumsum(0).int()])
    rows = int(start[-1])
    return CommonAttentionMetadata(
        query_start_loc=start,
        query_start_loc_cpu=start,
        seq_lens=lengths,
        num_reqs=len(lengths),
        num_actual_tokens=rows,
        max_query_len=int((lengths - computed).max()),
        max_seq_len=int(lengths.max()),
        block_table_tensor=server.block_table,
        slot_mapping=torch.zeros(rows, dtype=torch.long),
        is_prefilling=computed < server.prompts,
        seq_lens_cpu_upper_bound=lengths,
    )


RECIPE = {"sliding_window": 24, "sink_tokens": 5, "full_attention_layers": [1], "full_attention_decode": [2]}
RULES = {0: Rule(24, 5, 7, False), 1: Rule(1000, 0, 0, True), 2: Rule(24, 5, 7, True)}


@pytest.mark.parametrize("told", [True, False])
def test_every_layer_of_a_step_sees_what_the_recipe_says(backend, monkeypatch, told):
    tail = 7 if told else 0  # with speculative decoding nobody tells where prompts end
    config = configured(RECIPE | {"dense_tail": tail}, speculative=None if told else speculative())
    lengths = backend.PromptLengths(config, torch.device("cpu"), False) if told else None
    monkeypatch.setattr(backend, "get_current_vllm_config", lambda: config)
    names = [f"model.layers.{i}.self_attn.attn" for i in range(3)]
    spec = SimpleNamespace(dtype=torch.float32, block_size=PAGE)
    builder = backend.MetadataBuilder(spec, names, config, torch.device("cpu"))
    implementation = backend.Attention(HEADS, HEAD_DIM, 1.0, KV_HEADS, None, None, "auto", 0.5)
    scales = {f"_{name}_scale": torch.ones(1) for name in "qkv"}
    draw = random.Random(0)
    for seed in range(12):
        prompts = [draw.randrange(1, 90) for _ in range(4)]
        server = Server(prompts, 110, seed)
        if told:
            added = [(row, None, [0] * prompt, []) for row, prompt in enumerate(prompts)]
            lengths.update_state(BatchUpdate(4, [], added, []))
        if seed % 3 == 1:
            computed = [draw.randrange(prompt, 109) for prompt in prompts]  # decode rows only
            ends = [c + 1 for c in computed]
        elif seed % 3 == 2:
            # Prompts that come row by row, near their ends.
            computed = [max(0, prompt - draw.choice((1, 2, 9))) for prompt in prompts]
            ends = [c + 1 for c in computed]
        else:
            computed = [draw.choice((0, prompt // 2, prompt)) for prompt in prompts]
            # Without being told, a prompt and its answer are never in one step.
            most = [110 if c >= prompt or told else prompt for c, prompt in zip(computed, prompts, strict=True)]
            ends = [draw.randrange(c + 1, m + 1) for c, m in zip(computed, most, strict=True)]
        metadata = builder.build(0, common(server, computed, ends))
        query = torch.cat([q[c:n] for q, c, n in zip(server.query, computed, ends, strict=True)])
        pages = torch.stack(list(server.cache), 1)
        for number, name in enumerate(names):
            layer = SimpleNamespace(layer_name=name, **scales)
            out = torch.empty_like(query)
            implementation.forward(layer, query, query, query, pages, metadata, out)
            rule = RULES[number]
            rule = Rule(rule.window, rule.sinks, min(tail, rule.dense_tail), rule.dense_decode)
            expected = [server.expected(rule, i, c, n) for i, (c, n) in enumerate(zip(computed, ends, strict=True))]
            torch.testing.assert_close(out, torch.cat(expected), atol=1e-5, rtol=1e-5)
    assert set(SCALES) == {(1.0, 0.5)}, "soft caps and scales are those of the layer, in whole steps and in parts"


@pytest.mark.parametrize("own", [20, 24])
def test_a_window_of_the_models_own_stays_where_it_is_no_wider(backend, monkeypatch, own):
    config = configured(RECIPE | {"dense_tail": 7})
    monkeypatch.setattr(backend, "get_current_vllm_config", lambda: config)
    layer = SimpleNamespace(layer_name="model.layers.0.self_attn.attn")
    assert backend.Attention(HEADS, HEAD_DIM, 1.0, KV_HEADS, None, own, "auto").rule_of(layer) is None
    wider = backend.Attention(HEADS, HEAD_DIM, 1.0, KV_HEADS, None, 25, "auto")
    builder, _ = builder_for(backend, config)
    server = Server([30] * 4, 110)
    metadata = builder.build(0, common(server, [0] * 4, [30] * 4))
    query = torch.randn(120, HEADS, HEAD_DIM)
    with pytest.raises(UnsupportedModelError, match="own sliding window is 25 and that of the recipe 24"):
        wider.forward(layer, query, query, query, torch.stack(list(server.cache), 1), metadata, query)


def test_steps_share_no_prefix_and_no_block_table(backend):
    builder, _ = builder_for(backend, configured(RECIPE))
    server = Server([60] * 4, 110)
    metadata = builder.build(32, common(server, [60] * 4, [61] * 4))
    assert not metadata.use_cascade and not builder.supports_update_block_table
    assert not backend.Backend.supports_batch_invariance()


def test_a_prompt_that_could_come_among_answers_in_a_graph_is_refused(backend):
    config = configured(RECIPE)
    config.compilation_config.cudagraph_mode.has_full_cudagraphs = lambda: True
    builder_for(backend, config)
    config.scheduler_config.max_num_batched_tokens = 4
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens=4: .* expected more than 4, or --enforce-eager"):
        builder_for(backend, config)
    sliding = configured(RECIPE | {"full_attention_decode": False})
    sliding.compilation_config, sliding.scheduler_config = config.compilation_config, config.scheduler_config
    builder_for(backend, sliding)


def test_the_log_says_which_layers_slide(backend, caplog):
    config = configured(RECIPE)
    names = [f"model.layers.{i}.self_attn.attn" for i in range(3)]
    layers = config.compilation_config.static_forward_context
    layers |= {name: SimpleNamespace(impl=SimpleNamespace(own_window=None)) for name in names}
    with caplog.at_level("INFO", "vllm"):
        builder_for(backend, config)
        assert "sliding_window=24" in caplog.text and caplog.text.strip().endswith("layers that slide: 0 2")
        for name in (names[0], names[2]):
            layers[name].impl.own_window = 20
        builder_for(backend, config)
    assert "layers 0 2 have a window of their own" in caplog.text


def builder_for(backend, config):
    told = backend.PromptLengths(config, torch.device("cpu"), False)
    names = [f"model.layers.{i}.self_attn.attn" for i in range(3)]
    spec = SimpleNamespace(dtype=torch.float32, block_size=PAGE)
    return backend.MetadataBuilder(spec, names, config, torch.device("cpu")), told


def test_steps_of_decode_rows_keep_their_tensors(backend):
    """A CUDA graph reads them where they were."""
    builder, _ = builder_for(backend, configured(RECIPE | {"dense_tail": 7}))
    server = Server([10] * 4, 110)
    found = [builder.build(0, common(server, [c] * 4, [c + 1] * 4)).stretches for c in (30, 90)]
    assert [list(step) for step in found] == [[RULES[0]]] * 2, "dense decode rows need no cutting"
    first, second = (step[RULES[0]].sinks for step in found)
    assert first.data_ptr() == second.data_ptr() and second.tolist() == [5] * 4


@pytest.mark.parametrize("tail", [0, 7])
def test_a_graph_of_decode_steps_is_right_for_prompts_that_end_with_a_single_row(backend, monkeypatch, tail):
    config = configured(RECIPE | {"dense_tail": tail})
    builder, told = builder_for(backend, config)
    prompts = [60, 61, 90, 20]
    server = Server(prompts, 110)
    told.update_state(BatchUpdate(4, [], [(row, None, [0] * n, []) for row, n in enumerate(prompts)], []))
    step = common(server, [100] * 4, [101] * 4)
    captured = builder.build(0, step)
    computed = [60, 60, 89, 70]  # answer, end of a prompt, end of a prompt, answer
    step.seq_lens.copy_(torch.tensor(computed) + 1)  # where the graph reads them
    step.is_prefilling = torch.tensor(computed) < server.prompts
    builder.build(0, step)
    monkeypatch.setattr(backend, "get_current_vllm_config", lambda: config)
    implementation = backend.Attention(HEADS, HEAD_DIM, 1.0, KV_HEADS, None, None, "auto")
    query = torch.stack([q[c] for q, c in zip(server.query, computed, strict=True)])
    out = torch.empty_like(query)
    layer = SimpleNamespace(layer_name="model.layers.0.self_attn.attn")
    implementation.forward(layer, query, query, query, torch.stack(list(server.cache), 1), captured, out)
    rule = Rule(24, 5, tail, False)
    expected = torch.cat([server.expected(rule, i, c, c + 1) for i, c in enumerate(computed)])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_cuda_graphs_are_for_what_they_can_do(backend):
    def support(**fields):
        return backend.MetadataBuilder.get_cudagraph_support(configured(RECIPE | fields), None)

    assert support(full_attention_decode=True) == AttentionCGSupport.UNIFORM_BATCH
    assert support() == AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


def test_prompt_lengths_follow_their_requests(backend):
    config = configured(RECIPE)
    lengths = backend.PromptLengths(config, torch.device("cpu"), False)
    lengths.update_state(BatchUpdate(3, [], [(i, None, [0] * n, []) for i, n in enumerate((11, 22, 33))], []))
    assert lengths.of_batch(3).tolist() == [11, 22, 33]
    moves = [(0, 2, MoveDirectionality.SWAP), (2, 1, MoveDirectionality.UNIDIRECTIONAL)]
    lengths.update_state(BatchUpdate(2, [1], [], moves))
    assert lengths.of_batch(2).tolist() == [33, 11]
    lengths.update_state(None)
    assert lengths.of_batch(6).tolist()[:2] == [33, 11]
    assert lengths.of_batch(6).shape == (6,)


def test_each_engine_of_a_process_has_its_own_prompt_lengths(backend):
    first, second, third = configured(RECIPE), configured(RECIPE), configured(RECIPE)
    kept = [backend.PromptLengths(config, torch.device("cpu"), False) for config in (first, second)]
    assert [backend.PromptLengths.of(config) for config in (first, second, third)] == [*kept, None]
    del kept[1]
    assert backend.PromptLengths.of(second) is None


def test_without_its_logits_processor_the_backend_does_not_start(backend):
    names, spec = ["model.layers.0.self_attn.attn"], SimpleNamespace(dtype=torch.float32, block_size=PAGE)
    with pytest.raises(BackendUnavailableError, match=r"expected vLLM to load the plugin swaa_flex"):
        backend.MetadataBuilder(spec, names, configured("balanced"), torch.device("cpu"))
    backend.MetadataBuilder(spec, names, configured("full"), torch.device("cpu"))  # needs to know nothing


def test_layers_whose_steps_vllm_changes_are_refused(backend):
    class ChunkedLocalAttentionBuilder(backend.MetadataBuilder):
        """As vLLM derives it for layers that attend within chunks."""

    spec = SimpleNamespace(dtype=torch.float32, block_size=PAGE)
    config = configured(RECIPE)
    told = backend.PromptLengths(config, torch.device("cpu"), False)
    with pytest.raises(UnsupportedModelError, match=r"ChunkedLocalAttentionBuilder: layers such as model.layers.0"):
        ChunkedLocalAttentionBuilder(spec, ["model.layers.0.attn"], config, torch.device("cpu"))
    ChunkedLocalAttentionBuilder(spec, ["model.layers.1.attn"], config, torch.device("cpu"))  # a full layer
    del told


def test_vllm_finds_the_backend(backend):
    register()
    register()
    assert AttentionBackendEnum.CUSTOM.get_class() is backend.Backend


def test_vllm_loads_the_logits_processor(backend, monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    config = configured(RECIPE)
    register()
    loaded = build_logitsprocs(config, torch.device("cpu"), False, is_pooling_model=False)
    assert backend.PromptLengths.of(config) in list(loaded.all)


@pytest.mark.parametrize("recipe, lines", [("balanced", 1), (None, 0)])
def test_an_engine_of_another_version_says_that_a_recipe_is_not_used(monkeypatch, caplog, recipe, lines):
    class Stop(Exception):
        """The engine is configured, and would now start its workers."""

    def executor(_):
        raise Stop

    monkeypatch.setattr(logging.getLogger("vllm.v1.engine.core"), "filters", [])
    monkeypatch.setattr(vllm, "__version__", "0.31.0")
    config = vllm_config(recipe)
    config.parallel_config.data_parallel_rank_local = 0
    register()
    with caplog.at_level("INFO", "vllm"), pytest.raises(Stop):
        EngineCore(config, executor, log_stats=False)
    assert caplog.text.count("Initializing a V1 LLM engine") == 1
    assert caplog.text.count("is not used") == lines


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype not supported"),
        ({"use_mla": True}, "MLA not supported"),
        ({"attn_type": "encoder_only"}, "attention type encoder_only not supported"),
        ({"attn_type": "encoder_decoder"}, "attention type encoder_decoder not supported"),
        ({"has_sink": True}, "attention sinks not supported"),
        ({"use_non_causal": True}, "non-causal attention not supported"),
        ({"dtype": torch.float32}, "dtype not supported"),
    ],
)
def test_vllm_is_told_what_the_backend_cannot_run(backend, changed, reason):
    plain = {"head_size": 64, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": None}
    plain |= dict.fromkeys(("use_mla", "has_sink", "use_sparse", "use_mm_prefix", "use_per_head_quant_scales"), False)
    plain |= {"device_capability": DeviceCapability(9, 0), "attn_type": "decoder"}
    assert backend.Backend.validate_configuration(**plain) == []
    reasons = backend.Backend.validate_configuration(**plain | changed)
    assert reasons == [reason, backend.SERVED]
