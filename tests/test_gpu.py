"""The CUDA backends against the float64 oracle and the chunked backend. Run with `pytest -m gpu`."""

import dataclasses
import warnings
from contextlib import contextmanager

import pytest
import torch
from conftest import dense_attention, visible_pairs
from labelled import ARRANGED, gradients, loss_of, sample
from tiny_models import batch, tiny
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AutoModelForCausalLM
from tune_in_processes import check_two_processes

import swaa_flex
from swaa_flex import SWAACache, SWAAConfig, attention
from swaa_flex.backends import Inputs, capability_of, why_not
from swaa_flex.masks import (
    causal,
    documents,
    from_mask_mod,
    heads,
    kv_positions,
    left_padded,
    packed,
    rows_from,
    rows_where,
    sinks,
    sinks_and_tail,
    window,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:TensorFloat32"),
]

CONFIG = SWAAConfig(sliding_window=16, sink_tokens=2, full_attention_layers=[1], dense_tail=4)
LENGTH = 700
CUDA = torch.device("cuda")
ASKED = Inputs(q_len=LENGTH, kv_len=LENGTH, device=CUDA, dtype=torch.bfloat16, head_dim=64)
NO_FLASH = why_not("flash", ASKED, capability_of(CUDA)) if torch.cuda.is_available() else "-"
flash = pytest.mark.skipif(bool(NO_FLASH), reason=NO_FLASH)
BACKENDS = ["triton", pytest.param("flash", marks=flash)]


def on_cuda(name):
    ids = torch.arange(LENGTH, device="cuda") // 250
    pads = (torch.arange(LENGTH, device="cuda") >= torch.tensor([[0], [333]], device="cuda")).long()
    near = window(200) | sinks(5)
    return {
        "causal": causal(),
        "window and sinks": causal() & near,
        "full sink blocks": causal() & (window(256) | sinks(128)),
        "dense tail": causal() & (near | rows_from(LENGTH - 64)),
        "short dense tail": causal() & (near | rows_from(LENGTH - 4)),
        "rows per sequence": causal() & (near | rows_from(torch.tensor([650, 30], device="cuda"))),
        "per head": heads(torch.tensor([True, False] * 2, device="cuda"), causal(), causal() & window(64)),
        "packed": packed(causal() & near, document_ids=ids),
        "left padded": left_padded(causal() & near, pads),
        "own function": causal() & window(300) & from_mask_mod(lambda b, h, q, kv: (q + kv) % 3 == 0),
    }[name]


NAMES = [
    "causal",
    "window and sinks",
    "full sink blocks",
    "dense tail",
    "short dense tail",
    "rows per sequence",
    "per head",
    "packed",
    "left padded",
    "own function",
]


def tensors(q_len=LENGTH, kv_len=LENGTH, dtype=torch.float32, heads=4, kv_heads=2, head_dim=64, batch=2):
    shapes = (heads, q_len, head_dim), (kv_heads, kv_len, head_dim), (kv_heads, kv_len, head_dim)
    return [torch.randn(batch, *s, device="cuda", dtype=dtype) for s in shapes]


def oracle(query, key, value, mask, q_offset=0, **kwargs):
    # The mask's tensors live on the GPU, so the pairs are evaluated there.
    with torch.device("cuda"):
        visible = visible_pairs(mask, query.shape[2], key.shape[2], query.shape[0], query.shape[1], q_offset)
        return dense_attention(query, key, value, visible, **kwargs)


@contextmanager
def no_synchronisation():
    """Raises where the host waits for the device."""
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)  # the first time
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def close(ours, expected, dtype):
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(ours.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_forward(name, dtype):
    inputs, mask = tensors(dtype=dtype), on_cuda(name)
    with torch.no_grad():
        close(attention(*inputs, mask, backend="triton"), oracle(*inputs, mask)[0], dtype)
        if dtype == torch.float32:
            torch.testing.assert_close(
                attention(*inputs, mask, backend="triton"),
                attention(*inputs, mask, backend="chunked"),
                atol=2e-5,
                rtol=0,
            )


@flash
@pytest.mark.parametrize("name", NAMES)
def test_flash_forward(name):
    inputs, mask = tensors(dtype=torch.bfloat16), on_cuda(name)
    with torch.no_grad():
        close(attention(*inputs, mask, backend="flash"), oracle(*inputs, mask)[0], torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_large_heads(backend, name):
    """Their kernels have tiles of another shape."""
    inputs, mask = tensors(dtype=torch.bfloat16, head_dim=128), on_cuda(name)
    with torch.no_grad():
        close(attention(*inputs, mask, backend=backend), oracle(*inputs, mask)[0], torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_lengths_of_whole_blocks(backend, head_dim):
    near = causal() & (window(200) | sinks(5))
    for length in (768, 640, 700):
        inputs = tensors(length, length, torch.bfloat16, head_dim=head_dim)
        for mask in (near, causal() & (window(200) | sinks(5) | rows_from(length - 64)), causal()):
            with torch.no_grad():
                close(attention(*inputs, mask, backend=backend), oracle(*inputs, mask)[0], torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_million_tokens(backend):
    """Offsets beyond 2^31 elements, in the layout of a transformers model, and lists of linear size."""
    length, near, first = 1 << 20, 2048, 128
    shapes = ((1, length, heads_, 128) for heads_ in (32, 8, 8))
    query, key, value = (torch.randn(s, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for s in shapes)
    mask = causal() & (window(near) | sinks(first) | rows_from(length - 64))
    ready = swaa_flex.plan(mask, length, length, batch=1, heads=32, device="cuda", backend=backend)
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    lists = [getattr(s.block_mask, name) for s in ready.segments for name in names]
    assert sum(t.numel() * t.element_size() for t in lists if t is not None) <= 8 << 20
    with torch.no_grad():
        out = attention(query, key, value, ready)
    rows = torch.tensor([0, 5000, 1 << 19, (1 << 20) - 65, (1 << 20) - 64, (1 << 20) - 1], device="cuda")
    keys = torch.arange(length, device="cuda")
    distance = rows[:, None] - keys
    visible = (distance >= 0) & ((distance < near) | (keys < first) | (rows[:, None] >= length - 64))
    for head in (0, 31):
        few = (query[:, head : head + 1, rows], key[:, head // 4 : head // 4 + 1], value[:, head // 4 : head // 4 + 1])
        expected = dense_attention(*few, visible)[0]
        assert torch.isfinite(out[0, head]).all()
        close(out[:, head : head + 1, rows], expected, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forward_does_not_synchronise(backend):
    model = tiny("qwen3", head_dim=64).to("cuda", torch.bfloat16)
    model.config.swaa = SWAAConfig(64, 5, (1, 3), True, 16, backend=backend)
    ids = torch.randint(3, 99, (1, 700), device="cuda")
    with torch.no_grad():
        model(ids)
        with no_synchronisation():
            model(ids)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["window and sinks", "dense tail", "rows per sequence", "left padded"])
def test_gradients(backend, name):
    dtype = torch.bfloat16 if backend == "flash" else torch.float32
    inputs, mask = [x.requires_grad_() for x in tensors(dtype=dtype)], on_cuda(name)
    weights = torch.randn_like(inputs[0])
    ours = torch.autograd.grad((attention(*inputs, mask, backend=backend) * weights).sum(), inputs)
    expected = torch.autograd.grad((oracle(*inputs, mask)[0] * weights).sum(), inputs)
    for mine, theirs in zip(ours, expected, strict=True):
        error = (mine.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < (2e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("table", ["rows_where", "documents", "packed", "kv_positions"])
def test_tables_of_changing_lengths(backend, table):
    """The second length is compiled for all lengths, which FLASH does not know how to read."""
    make = {
        "rows_where": lambda index: causal() & (window(70) | rows_where(index % 5 == 0)),
        "documents": lambda index: causal() & documents(index // 130),
        "packed": lambda index: packed(causal() & (window(70) | sinks(5)), document_ids=index // 130),
        "kv_positions": lambda index: kv_positions(causal() & window(70), index),
    }[table]
    for length in (300, 420, 700):
        mask = make(torch.arange(length, device="cuda"))
        inputs = [x.requires_grad_() for x in tensors(length, length, dtype=torch.bfloat16)]
        ours = attention(*inputs, mask, backend=backend)
        expected = oracle(*inputs, mask)[0]
        close(ours, expected, torch.bfloat16)
        gradients = zip(*(torch.autograd.grad(out.sum(), inputs) for out in (ours, expected)), strict=True)
        assert all((a.double() - b.double()).norm() < 2e-2 * b.double().norm() for a, b in gradients)


@pytest.mark.parametrize("kv_heads", [1, 2, 3], ids="kv_heads={}".format)
@pytest.mark.parametrize("q_len", [1, 5, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_over_a_long_cache(kv_heads, q_len, dtype):
    heads_ = {1: 8, 2: 8, 3: 9}[kv_heads]  # groups of 8, 4 and 3: the last is no power of two
    inputs = tensors(q_len, 3000, dtype, heads_, kv_heads)
    for mask in (causal(), causal() & (window(500) | sinks(5))):
        for q_offset in (3000 - q_len, 2990 - q_len, torch.tensor(1234, device="cuda")):
            plan = swaa_flex.plan(mask, q_len, 3000, device="cuda", q_offset=q_offset)
            assert plan.backend == "triton"
            with torch.no_grad():
                close(attention(*inputs, plan), oracle(*inputs, mask, int(q_offset))[0], dtype)


@pytest.mark.parametrize("in_graph", [False, True])
def test_decoding_batches_of_changing_sizes(in_graph):
    mask = causal() & (window(500) | sinks(5))

    def run(query, key, value):
        plan = swaa_flex.plan(mask, 1, 3000, batch=query.shape[0], device="cuda", q_offset=2999)
        return attention(query, key, value, plan)

    call = torch.compile(run, fullgraph=True) if in_graph else run
    for query_heads, kv_heads in ((8, 2), (9, 3)):
        for size in (2, 5, 3, 1):
            inputs = tensors(1, 3000, torch.bfloat16, query_heads, kv_heads, batch=size)
            with torch.no_grad():
                close(call(*inputs), oracle(*inputs, mask, 2999)[0], torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_long_query_that_continues_a_cache(backend, as_tensor):
    inputs, mask = tensors(300, 900, torch.bfloat16), on_cuda("window and sinks")
    for q_offset in (256, 511, 600):
        given = torch.tensor(q_offset, device="cuda") if as_tensor else q_offset
        plan = swaa_flex.plan(mask, 300, 900, batch=2, heads=4, device="cuda", q_offset=given, backend=backend)
        assert [segment.backend for segment in plan.segments] == [backend]
        with torch.no_grad():
            close(attention(*inputs, plan), oracle(*inputs, mask, q_offset)[0], torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("extra", ["softcap", "sink_logits", "lse"])
def test_softcap_sink_logits_and_lse(backend, extra):
    dtype = torch.bfloat16 if backend == "flash" else torch.float32
    inputs, mask = tensors(dtype=dtype), on_cuda("window and sinks")
    kwargs = {
        "softcap": {"softcap": 2.0},
        "sink_logits": {"sink_logits": torch.tensor([0.5, -1.0, 2.0, 0.0], device="cuda")},
        "lse": {},
    }[extra]
    with torch.no_grad():
        out, lse = attention(*inputs, mask, backend=backend, return_lse=True, **kwargs)
    expected, expected_lse = oracle(*inputs, mask, **kwargs)
    close(out, expected, dtype)
    close(lse, expected_lse, dtype)


def test_block_lists_equal_create_block_mask():
    mask = causal() & (window(2048) | sinks(128))
    ours = swaa_flex.build_block_mask(mask, 16384, 16384, device="cuda")
    stock = create_block_mask(mask, None, None, 16384, 16384, device="cuda")
    width = ours.kv_indices.shape[-1]
    for prefix in ("", "full_"):
        number = getattr(ours, f"{prefix}kv_num_blocks")
        assert torch.equal(number, getattr(stock, f"{prefix}kv_num_blocks"))
        used = torch.arange(width, device="cuda") < number[..., None]
        mine, theirs = getattr(ours, f"{prefix}kv_indices"), getattr(stock, f"{prefix}kv_indices")[..., :width]
        assert torch.equal(mine * used, theirs * used)


def test_building_and_planning_do_not_synchronise():
    masks = [on_cuda(name) for name in NAMES]
    offset = torch.tensor(100, device="cuda")
    with no_synchronisation():
        for mask in masks:
            swaa_flex.plan(mask, LENGTH, LENGTH, batch=2, heads=4, device="cuda", backend="triton", needs_grad=True)
            swaa_flex.plan(mask, 1, LENGTH, batch=2, heads=4, device="cuda", backend="triton", q_offset=offset)
        swaa_flex.plan(causal() & window(200), LENGTH, LENGTH, device="cuda", backend="triton")


def test_lists_of_a_twin_are_those_of_the_mask():
    lengths = torch.tensor([900, 1100])
    mask, twin = (causal() & (window(200) | sinks(5) | rows_from(x)) for x in (lengths.cuda(), lengths))
    sizes = {"batch": 2, "heads": 4, "device": "cuda", "backend": "triton"}
    with no_synchronisation():
        twins = swaa_flex.plan(mask, 1200, 1200, twin=twin, **sizes).segments
    for ours, its in zip(swaa_flex.plan(mask, 1200, 1200, **sizes).segments, twins, strict=True):
        for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
            assert torch.equal(getattr(ours.block_mask, name), getattr(its.block_mask, name))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_and_offsets_do_not_pile_up_compilations(backend):
    from torch._dynamo.utils import counters

    mask = causal() & (window(200) | sinks(5))

    def run(length, ahead):
        inputs = tensors(length, length + ahead, torch.bfloat16)
        plan = swaa_flex.plan(mask, length, length + ahead, batch=2, device="cuda", q_offset=ahead, backend=backend)
        with torch.no_grad():
            close(attention(*inputs, plan), oracle(*inputs, mask, q_offset=ahead)[0], torch.bfloat16)

    # torch.compile takes lengths that are equal for one number: queries and keys, rows of blocks and width of lists.
    for length, ahead in ((600, 0), (1100, 0), (523, 500), (940, 370), (300, 0)):
        run(length, ahead)
    compiled = counters["stats"]["unique_graphs"]
    for length, ahead in ((260, 0), (641, 7), (777, 900), (1025, 0), (1500, 333)):
        run(length, ahead)
    assert counters["stats"]["unique_graphs"] == compiled


def test_a_plan_with_a_dense_tail_may_be_run_in_a_compiled_function():
    inputs, mask = tensors(dtype=torch.bfloat16), on_cuda("dense tail")
    plan = swaa_flex.plan(mask, LENGTH, LENGTH, batch=2, heads=4, device="cuda", backend="triton")
    compiled = torch.compile(lambda query, key, value: attention(query, key, value, plan), fullgraph=True)
    with torch.no_grad():
        close(compiled(*inputs), oracle(*inputs, mask)[0], torch.bfloat16)


@flash
def test_a_flash_plan_is_for_one_batch_and_head_dim():
    plan = swaa_flex.plan(causal(), 300, 300, batch=1, device="cuda", backend="flash", head_dim=64)
    for inputs in (
        tensors(300, 300, torch.bfloat16),
        [x[:1] for x in tensors(300, 300, torch.bfloat16, head_dim=128)],
    ):
        with pytest.raises(swaa_flex.MaskError, match=r"is for batch and head_dim \(1, 64\)"):
            attention(*inputs, plan)


@flash
def test_flash_runs_masks_of_caches():
    """A cache that has released keys: its offsets are 0-d tensors in a compiled model, integers elsewhere."""
    for start, pads in ((torch.tensor(120, device="cuda"), [0, 60]), (120, [0, 60]), (120, [17])):
        inputs = [x[: len(pads)] for x in tensors(300, 500, torch.bfloat16)]
        first = torch.tensor(pads, device="cuda")
        mask = sinks_and_tail(causal() & (window(200) | sinks(5)), 8, start=start, first=first)
        ahead = torch.tensor(312, device="cuda") if isinstance(start, torch.Tensor) else 312
        plan = swaa_flex.plan(mask, 300, 500, batch=len(pads), device="cuda", q_offset=ahead, backend="flash")
        assert [segment.backend for segment in plan.segments] == ["flash"]
        with torch.no_grad():
            close(attention(*inputs, plan), oracle(*inputs, mask, q_offset=312)[0], torch.bfloat16)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_model_generates_the_same_on_the_gpu(family):
    model = tiny(family, head_dim=16)
    model.config.swaa = CONFIG
    inputs = batch()
    kwargs = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    on_cpu = model.generate(**inputs, **kwargs)
    model.to("cuda")
    on_gpu = model.generate(**{k: v.cuda() for k, v in inputs.items()}, **kwargs)
    torch.testing.assert_close(torch.stack(on_gpu.logits).cpu(), torch.stack(on_cpu.logits), atol=1e-3, rtol=1e-3)
    assert torch.equal(on_gpu.sequences.cpu(), on_cpu.sequences)


def test_half_precision_and_float32_models_choose_a_backend_that_takes_them():
    model = tiny("llama", head_dim=16).cuda()
    model.config.swaa = CONFIG
    ids = torch.randint(3, 99, (1, 300), device="cuda")
    with torch.no_grad():
        exact = model(ids).logits
        half = model.bfloat16()(ids).logits.float()
    assert (exact - half).norm() / exact.norm() < 0.05


@pytest.mark.filterwarnings("ignore:TensorFloat32:UserWarning")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str)
def test_a_compiled_model_equals_the_eager_one(dtype, tolerance):
    model = tiny("llama", head_dim=16).to("cuda", dtype)
    model.config.swaa = CONFIG
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for length in (300, 411, 640):
            ids = torch.randint(3, 99, (1, length), device="cuda")
            ours, eager = (run(ids, use_cache=False).logits.float() for run in (compiled, model))
            assert (ours - eager).norm() / eager.norm() < tolerance
            if dtype == torch.float32:
                torch.testing.assert_close(ours, eager, atol=1e-3, rtol=1e-3)


def test_a_compiled_model_learns_from_labels_what_the_eager_one_learns():
    """Where prompts end is read from the labels in the graph, and the kernels read that."""
    model = swaa_flex.adapt(tiny("llama", head_dim=16).to("cuda"), CONFIG)
    ids = torch.randint(3, 99, (2, 320), device="cuda")
    labels = ids.masked_fill(torch.arange(320, device="cuda") < 200, -100)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        ours, eager = (run(ids, labels=labels).loss for run in (compiled, model))
        unlabelled = model(ids, labels=ids).logits
        assert not torch.allclose(model(ids, labels=labels).logits, unlabelled)
    torch.testing.assert_close(ours, eager, atol=1e-4, rtol=1e-4)


# --- caches and compiled models -------------------------------------------------------------------------------


def recipe(decode, tail, full=(1, 3)):
    return SWAAConfig(
        sliding_window=48,
        sink_tokens=5,
        full_attention_layers=full,
        full_attention_decode=decode,
        dense_tail=tail,
    )


CACHE_RECIPES = [recipe(False, 5, ()), recipe(False, 0), recipe(True, 5)]
LAYER_TYPES = ["sliding_attention", "full_attention"] * 2
DECODING = {"llama": {}, "qwen3": {"num_attention_heads": 6}, "gemma3_text": {"layer_types": LAYER_TYPES}}


def on_gpu(family, config, dtype=torch.float32):
    model = tiny(family, head_dim=32, **DECODING[family]).to("cuda", dtype)
    model.config.swaa = config
    return model


def padded(length, pads):
    return {name: tensor.cuda() for name, tensor in batch(length, pads).items()}


@pytest.mark.parametrize("config", CACHE_RECIPES, ids=repr)
@pytest.mark.parametrize("family", DECODING)
def test_compiled_model_never_compiles_again_and_equals_eager(family, config):
    model = on_gpu(family, config)
    compiled = swaa_flex.compile(model, max_length=640, batch_size=2, prefill_chunk=256).warmup(all=True)
    asked = [padded(length, min(13, length - 2)) for length in range(10, 410, 20)]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    answers = [compiled.generate(**inputs, max_new_tokens=10) for inputs in asked]
    answers.append(compiled.generate(**asked[-1], max_new_tokens=200))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    for inputs, ours in [(asked[0], answers[0]), (asked[7], answers[7]), (asked[-1], answers[-1])]:
        new = ours.shape[1] - inputs["input_ids"].shape[1]
        eager = model.generate(**inputs, max_new_tokens=new, past_key_values=SWAACache(model.config))
        assert torch.equal(ours, eager)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", CACHE_RECIPES, ids=repr)
def test_compiled_prefill_in_half_precision(backend, config, rows):
    """In the kernels of large heads, over several chunks; a sequence alone is not padded."""
    model = tiny("llama", head_dim=128).to("cuda", torch.bfloat16)
    swaa_flex.adapt(model, dataclasses.replace(config, backend=backend))
    compiled = swaa_flex.compile(model, max_length=1300, batch_size=rows, prefill_chunk=512)
    inputs = {name: tensor[-rows:] for name, tensor in padded(1280, 13).items()}
    with torch.no_grad():
        eager = model(**inputs, logits_to_keep=1).logits[:, -1]
        ours = compiled.prefill(**inputs)
        torch.testing.assert_close(ours, eager, atol=2e-2, rtol=2e-2)
        tokens = eager.argmax(-1)
        cache = SWAACache(model.config)
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        model(**inputs, position_ids=positions, past_key_values=cache)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        at = mask.sum(-1, keepdim=True) - 1
        step = model(tokens[:, None], attention_mask=mask, position_ids=at, past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(compiled.decode_step(tokens), step, atol=2e-2, rtol=2e-2)


def test_a_decode_step_does_not_synchronise():
    model = on_gpu("llama", CACHE_RECIPES[2])
    compiled = swaa_flex.compile(model, max_length=640, prefill_chunk=128)
    logits = compiled.prefill(padded(100, 3)["input_ids"][1:])
    with no_synchronisation():
        for _ in range(5):
            logits = compiled.decode_step(logits.argmax(-1))


@pytest.mark.parametrize("config", CACHE_RECIPES, ids=repr)
def test_generate_compiles_itself_with_a_static_cache(config):
    model, inputs = on_gpu("llama", config), padded(100, 13)
    kwargs = {**inputs, "max_new_tokens": 80, "do_sample": False}
    eager = model.generate(**kwargs)
    assert torch.equal(model.generate(**kwargs, cache_implementation="static"), eager)
    for _ in range(2):
        assert torch.equal(model.generate(**kwargs, past_key_values=SWAACache(model.config, max_length=256)), eager)


@pytest.mark.parametrize("config", CACHE_RECIPES, ids=repr)
def test_a_forward_compiled_by_the_user_decodes(config):
    model, inputs = on_gpu("llama", config), padded(100, 0)
    expected = model.generate(**inputs, max_new_tokens=80, do_sample=False)[:, 100:]
    step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    cache = SWAACache(model.config, max_length=256)
    with torch.no_grad():
        tokens = model(**inputs, past_key_values=cache).logits[:, -1:].argmax(-1)
        chosen = [tokens]
        for position in range(100, 179):
            at = torch.full((2, 1), position, device="cuda")
            tokens = step(tokens, position_ids=at, past_key_values=cache).logits[:, -1:].argmax(-1).clone()
            chosen.append(tokens)
    assert torch.equal(torch.cat(chosen, 1), expected)


@pytest.mark.parametrize("config", CACHE_RECIPES, ids=repr)
@pytest.mark.parametrize("max_length", [None, 256])
def test_an_offloaded_cache_gives_the_same_tokens(config, max_length):
    model, inputs = on_gpu("llama", config), padded(100, 13)
    kwargs = {**inputs, "max_new_tokens": 60, "do_sample": False}
    expected = model.generate(**kwargs)
    for layer in model.model.layers:  # a GPU that lags behind shows copies that do not wait for each other
        layer.register_forward_pre_hook(lambda *_: torch.cuda._sleep(1_000_000))
    cache = SWAACache(model.config, max_length=max_length, offloading=True)
    assert torch.equal(model.generate(**kwargs, past_key_values=cache, disable_compile=True), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("config", CACHE_RECIPES, ids=repr)
def test_layers_spread_over_two_gpus_generate_what_one_does(config, tmp_path):
    model, inputs = on_gpu("llama", config), padded(100, 13)
    kwargs = {**inputs, "max_new_tokens": 20, "do_sample": False}
    expected = model.generate(**kwargs)
    model.save_pretrained(tmp_path)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{i}": i // 2 for i in range(4)}
    spread = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="swaa_flex", device_map=places)
    assert {parameter.device.index for parameter in spread.parameters()} == {0, 1}
    assert torch.equal(spread.generate(**kwargs), expected)
    assert torch.equal(spread.generate(**kwargs, past_key_values=SWAACache(spread.config)), expected)


# --- training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arranged", ARRANGED)
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("triton", torch.float32, 1e-3),
        ("triton", torch.bfloat16, 3e-2),
        pytest.param("flash", torch.bfloat16, 3e-2, marks=flash),
    ],
    ids=str,
)
def test_training_on_the_gpu_has_the_losses_and_gradients_of_the_cpu(backend, dtype, tolerance, arranged):
    model = tiny("llama", head_dim=32).train()
    samples = [sample(parts) for parts in [(200, 40), (90, 30, 60, 20), (300, 10), (2, 90, 3, 4)]]
    inputs = ARRANGED[arranged](samples)
    swaa_flex.adapt(model, SWAAConfig(48, 5, [1], True, 4))
    expected_loss, _ = loss_of(model, inputs)
    expected = gradients(model, expected_loss)
    swaa_flex.adapt(model.to("cuda", dtype), SWAAConfig(48, 5, [1], True, 4, backend=backend))
    ours, _ = loss_of(model, {name: tensor.cuda() for name, tensor in inputs.items()})
    assert abs(ours.item() / expected_loss.item() - 1) < tolerance
    for name, gradient in gradients(model, ours).items():
        difference = (gradient.float().cpu() - expected[name]).norm() / expected[name].norm()
        assert difference < 3 * tolerance, (name, float(difference))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("how", ["ddp", *["fsdp"] * 4])  # what goes wrong between streams does so now and then
def test_training_on_two_gpus_has_the_losses_of_one(tmp_path, how):
    pytest.importorskip("peft")
    check_two_processes(tmp_path, how, CUDA_VISIBLE_DEVICES="0,1")
