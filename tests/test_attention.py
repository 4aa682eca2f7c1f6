import math

import pytest
import torch
from conftest import counting_backend, dense_attention, visible_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import BATCH, compositions
from torch.nn.attention.flex_attention import noop_mask

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
from swaa_flex.plan import Segment

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


def small(name, dtype=torch.float64):
    """Rows of several chunks, in which some keys are not seen; `CHUNK_ROWS` is 4."""
    tensor = {"query": (1, 2, 10, 3), "key": (1, 1, 10, 3), "value": (1, 1, 10, 2), "sinks": (2,)}[name]
    return torch.randn(tensor, dtype=dtype, requires_grad=True)


SMALL = {
    "window and sinks": causal() & (window(3) | sinks(1)),
    "rows that see nothing": causal() & window(2) & ~rows_from(8),
    "all": causal() | ~causal(),
}


@pytest.mark.parametrize("mask", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_chunked_has_second_derivatives(mask, softcap, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_ROWS", 4)
    query, key, value = leaves = [small(name) for name in ("query", "key", "value")]
    weights = torch.randn(1, 2, 10, 2, dtype=torch.float64)

    def penalty(function):
        """The norm of a gradient, whose own gradient is the second derivative; the loss is linear in the output."""
        out = function(*leaves, mask, softcap=softcap)
        out = out if isinstance(out, torch.Tensor) else out[0]
        grads = torch.autograd.grad((out * weights).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    for mine, theirs in zip(penalty(attention), penalty(oracle), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-8)
    sink_logits = small("sinks")
    assert torch.autograd.gradgradcheck(
        lambda q, k, v, s: attention(q, k, v, mask, softcap=softcap, sink_logits=s, return_lse=True)[0],
        (query, key, value, sink_logits),
    )


def row_by_row(query, key, value, visible, **extra):
    """The dense softmax of each row over no other keys than those that it sees."""
    rows = [
        dense_attention(query[:, :, row : row + 1], key[:, :, seen], value[:, :, seen], seen[seen], **extra)[0]
        for row, seen in enumerate(visible)
    ]
    return torch.cat(rows, dim=2)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("chunk_rows", [4, 256])
@pytest.mark.parametrize("extra", [{}, {"softcap": 2.0}, {"sink_logits": torch.ones(2).double()}], ids=[*"abc"])
def test_what_is_not_finite_reaches_the_rows_that_see_it_and_no_others(where, number, chunk_rows, extra, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_ROWS", chunk_rows)
    mask = causal() & (window(3) | sinks(1))
    visible = visible_pairs(mask, 10, 10)[0, 0]
    clean = ~visible[:, 5]
    assert clean.sum() == 7
    given = {name: small(name).detach() for name in ("query", "key", "value")}
    given[where][..., 5, 1] = number
    leaves = [x.requires_grad_() for x in given.values()]
    expected = row_by_row(*leaves, visible, **extra)
    assert expected[:, :, clean].isfinite().all()
    assert math.isinf(number) or expected[:, :, ~clean].isnan().any()
    with torch.no_grad():
        torch.testing.assert_close(attention(*leaves, mask, **extra), expected, equal_nan=True)
    out = attention(*leaves, mask, **extra)
    torch.testing.assert_close(out, expected, equal_nan=True)
    mine, theirs = (torch.autograd.grad(x[:, :, clean].square().sum(), leaves) for x in (out, expected))
    torch.testing.assert_close(mine[0][:, :, clean], theirs[0][:, :, clean])
    by_clean_rows_alone = ~visible[~clean].any(0)
    for grad, right in zip(mine[1:], theirs[1:], strict=True):
        torch.testing.assert_close(grad[:, :, by_clean_rows_alone], right[:, :, by_clean_rows_alone])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")  # of PyTorch's forward mode
def test_functions_of_functions_are_right_or_refused(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_ROWS", 4)
    mask = SMALL["window and sinks"]
    query, key, value = (small(name).detach() for name in ("query", "key", "value"))

    def loss(q, k=key, v=value):
        return attention(q, k, v, mask).square().sum()

    (expected,) = torch.autograd.grad(loss(leaf := query.clone().requires_grad_()), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(query), expected)
    for at, name in enumerate(("query", "key", "value")):
        many = torch.randn(3, *(query, key, value)[at].shape, dtype=torch.float64)

        def call(x, at=at, **extra):
            return attention(*(x if i == at else given for i, given in enumerate((query, key, value))), mask, **extra)

        for extra in ({}, {"softcap": 3.0}):
            one_by_one = torch.stack([call(x, **extra) for x in many])
            torch.testing.assert_close(torch.vmap(lambda x, e=extra, f=call: f(x, **e))(many), one_by_one, msg=name)
    out, vectors = attention(leaf, key, value, mask), torch.randn(2, 1, 2, 10, 2, dtype=torch.float64)
    (batched,) = torch.autograd.grad(out, leaf, vectors, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(
        batched, torch.stack([torch.autograd.grad(out, leaf, v, retain_graph=True)[0] for v in vectors])
    )
    with pytest.raises(BackendUnavailableError, match=r"forward-mode derivatives .* use reverse mode"):
        torch.func.jvp(loss, (query,), (query,))


CHOSEN = torch.tensor([True, False, True, False])
FEW_INDICES = {
    "heads of a table": lambda b, h, q, k: CHOSEN[h],
    "even heads": lambda b, h, q, k: h % 2 == 0,
    "first sequence": lambda b, h, q, k: b == 0,
    "rows": lambda b, h, q, k: q > 3,
    "keys": lambda b, h, q, k: k > 3,
    "nothing at all": noop_mask,
}


@pytest.mark.parametrize("name", FEW_INDICES)
@pytest.mark.parametrize(
    "spell", [lambda m: m, lambda m: ~m, lambda m: m & window(9)], ids=["alone", "negated", "and"]
)
def test_a_function_may_look_at_few_of_the_indices(name, spell):
    query, key, value = tensors(q_len=30, kv_len=40)
    mask = spell(from_mask_mod(FEW_INDICES[name]))
    out, lse = attention(query, key, value, mask, return_lse=True)
    expected, expected_lse = oracle(query, key, value, mask)
    torch.testing.assert_close(attention(query, key, value, mask), expected.float(), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(out, expected.float(), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse.float(), atol=2e-6, rtol=1e-5)


def test_a_plan_for_what_a_tensor_no_longer_holds_is_refused():
    query, key, value = tensors(q_len=1)
    position, ids = torch.tensor(70), torch.arange(300) // 110
    moving = plan(MASKS["window and sinks"], 1, 300, q_offset=position)
    copied = plan(causal() & documents(ids), 1, 300)
    before = attention(query, key, value, copied)
    attention(query, key, value, moving)
    position += 1
    ids.zero_()
    with pytest.raises(MaskError, match=r"has changed in place since the plan was made.*make a new one"):
        attention(query, key, value, moving)
    assert torch.equal(attention(query, key, value, copied), before)
    again = plan(MASKS["window and sinks"], 1, 300, q_offset=position)
    expected = dense_attention(query, key, value, visible_pairs(MASKS["window and sinks"], 1, 300, 2, 4, 71))[0]
    torch.testing.assert_close(attention(query, key, value, again), expected.float(), atol=2e-6, rtol=1e-5)


def test_functions_with_other_numbers_are_compiled_apart_on_the_cpu():
    """A number in a closure that varies is symbolic, which the C++ kernel cannot have (torch 2.13)."""

    def kind(mask, backend="cpp"):
        return Segment(0, 9, backend, mask, None, ()).compiled_for

    def every(n, by=2, inner=None):
        return from_mask_mod(lambda b, h, q, k, *, by=by: (q + by) % n == 0 if inner is None else inner(b, h, q, k))

    assert kind(every(3)) == kind(every(3))
    assert kind(every(3)) != kind(every(4))
    assert kind(every(3)) != kind(every(3, by=3))
    assert kind(every(3, inner=every(4).mask_mod)) != kind(every(3, inner=every(5).mask_mod))
    assert kind(causal() & window(3)) == kind(causal() & window(4))
    assert kind(every(3), "triton") == kind(every(4), "triton")


@pytest.mark.slow
def test_a_function_whose_closure_changes_runs_on_the_cpu():
    query, key, value = (x[:1, :1] for x in tensors(q_len=150, kv_len=150, heads=1, kv_heads=1))
    for every, rest in ((3, 0), (4, 0), (5, 2)):
        mask = causal() & from_mask_mod(lambda b, h, q, k, e=every, r=rest: (q + k) % e == r)
        with torch.no_grad():
            out = attention(query, key, value, mask, backend="cpp")
        torch.testing.assert_close(out, oracle(query, key, value, mask)[0].float(), atol=2e-6, rtol=1e-5)


def test_bounds_in_a_graph_are_not_clamped():
    """Inductor on the CPU cannot divide what was clamped (torch 2.13)."""
    graphs = []
    torch.compile(
        lambda q, k, v: attention(q, k, v, causal() & (window(64) | sinks(4))),
        fullgraph=True,
        backend=counting_backend(graphs),
    )(*(x.detach() for x in tensors()))
    clamps = [n for n in graphs[0].graph.nodes if n.target == "clamp" and n.kwargs.get("min") is not None]
    assert not clamps


@pytest.mark.slow
@pytest.mark.parametrize("length", [129, 1024])
def test_a_window_of_several_blocks_compiles_with_the_default_backend(length):
    query, key, value = tensors(length, length)
    mask = causal() & (window(64) | sinks(4))
    with torch.no_grad():
        out = torch.compile(lambda q, k, v: attention(q, k, v, mask), fullgraph=True)(query, key, value)
    torch.testing.assert_close(out, oracle(query, key, value, mask)[0].float(), atol=2e-6, rtol=1e-5)


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


def jagged():
    rows = [torch.randn(10, 2, 16), torch.randn(7, 2, 16)]
    return torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2)


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
        (run(softcap=0.0), MaskError, "softcap=0.0: expected a positive finite bound, or None for none"),
        (run(softcap=-5), MaskError, "softcap=-5"),
        (run(softcap=math.inf), MaskError, "softcap=inf: expected a positive finite bound"),
        (run(softcap=math.nan), MaskError, "softcap=nan"),
        (run(scale=math.nan), MaskError, "scale=nan: expected a finite factor"),
        (run(scale=-math.inf), MaskError, "scale=-inf: expected a finite factor"),
        (lambda q, k, v: run()(q, k, v.bfloat16()), MaskError, "one floating-point dtype, got .*bfloat16; cast them"),
        (lambda q, k, v: run()(q.requires_grad_(), k, v.double()), MaskError, "one floating-point dtype"),
        (lambda *qkv: run()(*(x.int() for x in qkv)), MaskError, "floating-point dtype, got torch.int32"),
        (lambda *qkv: run()(*(x.to("meta") for x in qkv)), UNAVAILABLE, "meta tensors hold no numbers; use tensors"),
        (lambda q, k, v: run()(*[jagged()] * 3), MaskError, "are nested tensors; pad them"),
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
    for mask in (causal(), left_padded(causal(), torch.ones(0, 300)), causal() & rows_where(torch.ones(0, 300) > 0)):
        assert attention(query, key, value, mask).shape == query.shape


def test_chunked_is_refused_inside_a_full_graph():
    query, key, value = tensors()
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, causal(), backend="chunked"), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match="BackendUnavailableError"):
        compiled(query, key, value)
