import pytest
import torch
from conftest import dense_attention, visible_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import BATCH, compositions

import swaa_flex
from swaa_flex import BackendUnavailableError, ConfigError, MaskError, attention, chunked, flex, plan
from swaa_flex.attention import _joined
from swaa_flex.masks import (
    causal,
    documents,
    from_mask_mod,
    heads,
    left_padded,
    packed,
    rows_from,
    rows_where,
    sinks,
    window,
)

MASKS = {
    "causal": causal(),
    "window and sinks": causal() & (window(70) | sinks(5)),
    "dense tail": causal() & (window(70) | sinks(5) | rows_from(280)),
    "rows per sequence": causal() & (window(70) | sinks(5) | rows_from(torch.tensor([280, 30]))),
    "per head": heads([True, False, False, True], causal(), causal() & window(64)),
    "documents": causal() & documents(torch.arange(300) // 110),
    "packed": packed(causal() & (window(30) | sinks(2)), document_ids=torch.arange(300) // 110),
    "left padded": left_padded(
        causal() & (window(30) | sinks(2)), (torch.arange(300) >= torch.tensor([[0], [133]])).long()
    ),
    "own function": causal() & window(100) & from_mask_mod(lambda b, h, q, kv: (q + kv) % 3 == 0),
    "rows that see nothing": window(20) & ~causal() & rows_from(100),
    "complement": ~(causal() & window(10)),
}


def tensors(q_len=300, kv_len=300, dtype=torch.float32, heads=4, kv_heads=2, head_dim=16, value_dim=None):
    query = torch.randn(2, heads, q_len, head_dim, dtype=dtype)
    key = torch.randn(2, kv_heads, kv_len, head_dim, dtype=dtype)
    value = torch.randn(2, kv_heads, kv_len, value_dim or head_dim, dtype=dtype)
    return query, key, value


def oracle(query, key, value, mask, **kwargs):
    visible = visible_pairs(mask, query.shape[2], key.shape[2], query.shape[0], query.shape[1])
    return dense_attention(query, key, value, visible, **kwargs)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(
    "extra", [{}, {"softcap": 2.0}, {"sink_logits": torch.tensor([0.5, -1.0, 2.0, 0.0])}, {"scale": 0.7}], ids=str
)
def test_chunked_equals_the_dense_softmax(name, extra, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_ROWS", 64)
    query, key, value = tensors()
    expected, expected_lse = oracle(query, key, value, MASKS[name], **extra)
    out = attention(query, key, value, MASKS[name], backend="chunked", **extra)
    torch.testing.assert_close(out, expected.float(), atol=2e-6, rtol=1e-5)
    out, lse = attention(query, key, value, MASKS[name], backend="chunked", return_lse=True, **extra)
    torch.testing.assert_close(out, expected.float(), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse.float(), atol=2e-6, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 400), st.integers(1, 400))
def test_chunked_is_right_for_random_masks(data, q_len, kv_len):
    mask = data.draw(compositions(max(q_len, kv_len)))
    query, key, value = tensors(q_len, kv_len, heads=2, kv_heads=1)
    expected, _ = oracle(query, key, value, mask)
    assert query.shape[0] == BATCH
    torch.testing.assert_close(attention(query, key, value, mask), expected.float(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_chunked_takes_every_dtype_and_another_value_dim(dtype, tolerance, softcap):
    query, key, value = tensors(dtype=dtype, value_dim=24)
    mask = MASKS["window and sinks"]
    out = attention(query, key, value, mask, backend="chunked", softcap=softcap)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double(), oracle(query, key, value, mask, softcap=softcap)[0], atol=tolerance, rtol=0
    )


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_chunked_gradients_equal_those_of_the_dense_softmax(name, softcap, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_ROWS", 64)
    inputs = [*tensors(dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    leaves = [x.requires_grad_() for x in inputs]
    weights, lse_weights = torch.randn(2, 4, 300, 16, dtype=torch.float64), torch.randn(2, 4, 300, dtype=torch.float64)

    def loss(out, lse):
        return (out * weights).sum() + (lse * lse_weights).sum()

    expected = torch.autograd.grad(
        loss(*oracle(*leaves[:3], MASKS[name], softcap=softcap, sink_logits=leaves[3])), leaves
    )
    ours = attention(*leaves[:3], MASKS[name], softcap=softcap, sink_logits=leaves[3], return_lse=True)
    for mine, theirs in zip(torch.autograd.grad(loss(*ours), leaves), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-8)


def test_chunked_keeps_memory_linear_for_windows():
    mask, chunk_rows = causal() & (window(128) | sinks(4)), chunked.CHUNK_ROWS
    plan = swaa_flex.plan(mask, 1 << 17, 1 << 17, backend="chunked")
    longest = max(sum(stop - start for start, stop in c.kept) for s in plan.segments for c in s.chunks)
    assert longest <= 128 + chunk_rows + 4


def test_a_plan_is_made_once_and_run_many_times():
    query, key, value = tensors()
    plan = swaa_flex.plan(MASKS["dense tail"], 300, 300, batch=2, heads=4)
    for _ in range(2):
        out = attention(query, key, value, plan)
        torch.testing.assert_close(
            out, oracle(query, key, value, MASKS["dense tail"])[0].float(), atol=2e-6, rtol=1e-5
        )


def test_a_few_other_rows_are_written_over_those_of_a_call_for_all_rows():
    ready = plan(causal() & (window(64) | rows_from(980)), 1000, 1000, backend="cpp")
    assert [(s.first, s.stop, s.is_causal_end) for s in ready.segments] == [(0, 1000, False), (980, 1000, True)]
    ready = plan(causal() & (window(64) | rows_from(500)), 1000, 1000, backend="cpp")
    assert [(s.first, s.stop) for s in ready.segments] == [(0, 500), (500, 1000)]


@pytest.mark.parametrize("needs_grad", [False, True])
def test_segments_are_joined_with_and_without_gradients(needs_grad):
    ready = plan(causal() & (window(64) | rows_from(980)), 1000, 1000, backend="cpp")
    rows = torch.randn(1, 2, 1000, 8, requires_grad=needs_grad), torch.randn(1, 2, 20, 8, requires_grad=needs_grad)
    expected = torch.cat([rows[0][:, :, :980], rows[1]], dim=2)
    whole = rows[0] * 1
    joined = _joined([whole, rows[1]], ready)
    assert torch.equal(joined, expected)
    if needs_grad:
        assert torch.equal(whole, rows[0]), "the backward pass needs what the kernel returned"
        weights = torch.randn_like(expected)
        ours = torch.autograd.grad((joined * weights).sum(), rows)
        assert torch.equal(ours[0], torch.cat([weights[:, :, :980], torch.zeros(1, 2, 20, 8)], dim=2))
        assert torch.equal(ours[1], weights[:, :, 980:])


@pytest.mark.parametrize("q_len", [300, 20])
def test_full_causal_rows_by_pytorchs_own_kernels(q_len):
    query, key, value = tensors(q_len=q_len)
    visible = visible_pairs(causal(), q_len, 300, q_offset=300 - q_len)
    ours = flex.sdpa(query, key, value, 0.3)
    torch.testing.assert_close(
        ours.double(), dense_attention(query, key, value, visible, scale=0.3)[0], atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("q_offset", [0, 17, 299])
def test_a_query_that_continues_a_cache(q_offset):
    query, key, value = tensors(q_len=1)
    mask = MASKS["window and sinks"]
    visible = visible_pairs(mask, 1, 300, 2, 4, q_offset)
    expected = dense_attention(query, key, value, visible)[0].float()
    for offset in (q_offset, torch.tensor(q_offset)):
        plan = swaa_flex.plan(mask, 1, 300, q_offset=offset)
        torch.testing.assert_close(attention(query, key, value, plan), expected, atol=2e-6, rtol=1e-5)


COMPILED = ["window and sinks", "dense tail", "rows per sequence"]


@pytest.mark.parametrize(
    "name", [*COMPILED, *(pytest.param(n, marks=pytest.mark.slow) for n in MASKS if n not in COMPILED)]
)
def test_the_compiled_kernel_agrees_on_the_block_lists(name):
    """The compiled kernel visits listed blocks only, so a wrong list shows."""
    mask = MASKS[name]
    query, key, value = tensors()
    with torch.no_grad():
        out = attention(query, key, value, mask, backend="cpp")
    torch.testing.assert_close(out, oracle(query, key, value, mask)[0].float(), atol=2e-6, rtol=1e-5)


def test_lengths_and_window_sizes_do_not_pile_up_compilations():
    from torch._dynamo.utils import counters

    def run(length, sliding_window):
        query, key, value = tensors(length, length)
        mask = causal() & (window(sliding_window) | sinks(5))
        with torch.no_grad():
            out = attention(query, key, value, mask, backend="cpp")
        torch.testing.assert_close(out, oracle(query, key, value, mask)[0].float(), atol=2e-6, rtol=1e-5)

    run(300, 70)
    run(410, 90)
    run(523, 91)
    compiled = counters["stats"]["unique_graphs"]
    for length, sliding_window in ((260, 31), (600, 70), (777, 200), (1000, 7), (1001, 300)):
        run(length, sliding_window)
    assert counters["stats"]["unique_graphs"] == compiled


def test_attention_inside_a_compiled_function_is_one_graph():
    query, key, value = tensors()
    mask = MASKS["window and sinks"]
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, mask), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(query, key, value), attention(query, key, value, mask))


GRAPHS = {
    "attention": lambda q, k, v: attention(q, k, v, MASKS["window and sinks"]) * 2,
    "plan": lambda q, k, v: attention(q, k, v, plan(MASKS["window and sinks"], 300, 300, needs_grad=True)) * 2,
    "log-sum-exp": lambda q, k, v: attention(q, k, v, MASKS["window and sinks"], return_lse=True)[0] * 2,
}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch.compile does, where it traces what is left
@pytest.mark.parametrize("name", GRAPHS)
def test_gradients_on_a_cpu_leave_the_graph_or_are_refused_with_the_way_out(name):
    """FlexAttention has no backward pass there, and what has one reads on the host."""
    leaves = [x.requires_grad_() for x in tensors(dtype=torch.float64)]
    whole = torch.compile(GRAPHS[name], fullgraph=True, backend="eager")
    message = (
        r"attention cannot run here: gradients are asked for inside torch\.compile.*run it under torch\.no_grad\(\)"
    )
    with pytest.raises(Exception, match=message):
        whole(*leaves)
    torch._dynamo.reset()
    out = torch.compile(GRAPHS[name], backend="eager")(*leaves)
    expected = oracle(*leaves, MASKS["window and sinks"])[0] * 2
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    weights = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), leaves) for x in (out, expected))
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-10, rtol=1e-8)


def run(backend="auto", **kwargs):
    return lambda q, k, v: attention(q, k, v, causal(), backend=backend, **kwargs)


def of_a_plan(backend):
    def call(query, key, value):
        ready = swaa_flex.plan(causal(), query.shape[2], key.shape[2])
        assert attention(query, key, value, ready, backend="chunked").shape == query.shape
        return attention(query, key, value, ready, backend=backend)

    return call


UNAVAILABLE = BackendUnavailableError


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (run("flahs"), ConfigError, r"'flahs'.*did you mean 'flash'"),
        (run("flash"), UNAVAILABLE, "needs a CUDA device"),
        (run("triton"), UNAVAILABLE, "needs a CUDA device"),
        (lambda *qkv: run("cpp")(*(x.double() for x in qkv)), UNAVAILABLE, "float64; use backend='chunked'"),
        (lambda q, k, v: run("cpp")(q.requires_grad_(), k, v), UNAVAILABLE, "no backward pass on CPU"),
        (run("cpp", return_lse=True), UNAVAILABLE, "no log-sum-exp"),
        (lambda q, k, v: attention(q, k, v, lambda b, h, q, kv: q >= kv), MaskError, "from_mask_mod"),
        (lambda q, k, v: attention(q, k, v, rows_from(torch.tensor([1, 2, 3]))), MaskError, r"batch=3.*batch=2"),
        (lambda q, k, v: run()(q[:, :3], k, v), MaskError, "heads must be a multiple of kv_heads"),
        (lambda q, k, v: run()(q[0], k, v), MaskError, r"must be \[batch, heads, len, head_dim\]"),
        (run(sink_logits=torch.zeros(3)), MaskError, r"expected one per query head, \[4\]"),
        (lambda q, k, v: attention(q, k, v, swaa_flex.plan(causal(), 9, 9)), MaskError, "plan is for q_len=9"),
        (of_a_plan("triton"), ConfigError, "'triton': the plan is for 'chunked'"),
        (run(softcap=0.0), MaskError, "softcap=0.0: expected a positive bound, or None for none"),
        (run(softcap=-5), MaskError, "softcap=-5"),
        (run(sink_logits=[0.0]), MaskError, r"sink_logits: expected a tensor \[heads\], got \[0.0\]"),
        (lambda q, k, v: run()(q, k, v.to("meta")), MaskError, "expected one device, got cpu, cpu and meta"),
        (lambda q, k, v: run()(q[:, :0], k, v), MaskError, "expected at least one head, row and number"),
        (lambda q, k, v: attention(q, k, v, rows_where(torch.ones(3, dtype=torch.bool))), MaskError, "3 query rows"),
        (lambda q, k, v: attention(q, k, v, window), MaskError, r"mask: expected a Mask, not function; call what"),
    ],
)
def test_what_cannot_run_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call(*tensors())


def test_no_sequence_is_no_error():
    query, key, value = (x[:0] for x in tensors())
    assert attention(query, key, value, causal()).shape == query.shape


def test_chunked_is_refused_inside_a_full_graph():
    query, key, value = tensors()
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, causal(), backend="chunked"), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match="BackendUnavailableError"):
        compiled(query, key, value)
