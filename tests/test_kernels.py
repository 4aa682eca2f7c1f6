"""Which backend, kernel, options and block lists are chosen, on machines that are not there."""

import itertools
import sys

import pytest
import torch

import swaa_flex
from swaa_flex import BackendUnavailableError, attention, backends, flex, kernels
from swaa_flex.backends import Capability, Inputs, resolve, why_not
from swaa_flex.kernels import DECODE_OPTIONS, Kernel, Segment, choose
from swaa_flex.masks import causal, from_mask_mod, heads, rows_from, sinks, window

CPU = Capability("cpu")
MPS = Capability("mps")
H200 = Capability("cuda", compute="9.0", has_flash=True)
B200 = H200._replace(compute="10.0")
WITHOUT_FLASH = H200._replace(has_flash=False)
A100 = H200._replace(compute="8.0")
MI300 = Capability("cuda", compute="9.4", hip=True)

NEAR = causal() & (window(500) | sinks(5))
PER_HEAD = heads([True, False] * 4, causal(), NEAR)
TMA = {"fwd_USE_TMA": True, "fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_stages": 3, "fwd_num_warps": 4}


def asked(**known):
    """A prompt of the attention of Qwen3-4B, but for what is said otherwise."""
    prompt = {
        "q_len": 4001,
        "kv_len": 4001,
        "device": torch.device("cpu"),
        "batch": 1,
        "heads": 32,
        "kv_heads": 8,
        "dtype": torch.bfloat16,
        "head_dim": 128,
        "value_dim": 128,
    }
    return Inputs(**prompt | known)


@pytest.mark.parametrize(
    ("machine", "known", "expected"),
    [
        (H200, {}, "flash"),
        (H200, {"needs_grad": True}, "flash"),
        (H200, {"in_graph": True}, "flash"),
        (B200, {"needs_lse": True}, "flash"),
        (A100, {}, "triton"),
        (MI300, {}, "triton"),
        (WITHOUT_FLASH, {}, "triton"),
        # flash does not split the keys
        (H200, {"q_len": 128}, "flash"),
        (H200, {"q_len": 127}, "triton"),
        (H200, {"q_len": 1}, "triton"),
        # it takes half precision, and multiples of 8 from 16 to 128
        (H200, {"dtype": torch.float16}, "flash"),
        (H200, {"dtype": torch.float32}, "triton"),
        (H200, {"head_dim": 64, "value_dim": 64}, "flash"),
        (H200, {"head_dim": 16, "value_dim": 16}, "flash"),
        (H200, {"head_dim": 256, "value_dim": 256}, "triton"),
        (H200, {"head_dim": 192, "value_dim": 128}, "triton"),
        (H200, {"head_dim": 128, "value_dim": 256}, "triton"),
        (H200, {"head_dim": 100, "value_dim": 100}, "triton"),
        (H200, {"head_dim": 64, "value_dim": 100}, "triton"),
        # and is not promised to what is not known to suit it
        (H200, {"dtype": None}, "triton"),
        (H200, {"head_dim": None, "value_dim": None}, "triton"),
        (H200, {"value_dim": None}, "flash"),
        # triton takes no float64, and 16 numbers per head and more
        (H200, {"dtype": torch.float64}, "chunked"),
        (H200, {"head_dim": 8, "value_dim": 8}, "chunked"),
        (H200, {"head_dim": 64, "value_dim": 8}, "chunked"),
        (CPU, {}, "chunked"),
        (CPU, {"q_len": 1}, "chunked"),
        (CPU, {"in_graph": True}, "cpp"),
        (MPS, {}, "chunked"),
    ],
    ids=str,
)
def test_what_auto_takes(machine, known, expected):
    assert resolve("auto", asked(**known), machine) == expected


@pytest.mark.parametrize(
    ("backend", "machine", "known", "message"),
    [
        (
            "triton",
            H200,
            {"head_dim": 8},
            r"'triton' cannot .*head_dim=8: it takes at least 16; use backend='chunked'",
        ),
        ("triton", H200, {"value_dim": 8}, "head_dim=8: it takes at least 16"),
        ("triton", H200, {"dtype": torch.float64}, "not float64; use backend='chunked'"),
        ("triton", H200, {"dtype": torch.float64, "in_graph": True}, "not float64; call it outside of torch.compile"),
        ("triton", CPU, {}, "needs a CUDA device and the tensors are on cpu"),
        ("flash", WITHOUT_FLASH, {}, "flash-attn-4 is not installed; pip install"),
        ("flash", A100, {}, "this GPU has 8.0; use backend='triton'"),
        ("flash", H200, {"head_dim": 256}, "head_dim=256: it takes multiples of 8 up to 128"),
        ("flash", H200, {"value_dim": 256}, "head_dim=256: it takes multiples of 8 up to 128"),
        ("flash", H200, {"dtype": torch.float32}, "not float32; use backend='triton'"),
        ("cpp", H200, {}, "it is FlexAttention's CPU kernel"),
        (
            "cpp",
            CPU,
            {"needs_grad": True},
            r"no backward pass on CPU; run it under torch.no_grad\(\), or use backend=",
        ),
        ("cpp", CPU, {"needs_lse": True}, "no log-sum-exp; use backend='chunked'"),
        ("cpp", CPU, {"dtype": torch.float64}, "not float64; use backend='chunked'"),
        ("chunked", CPU, {"in_graph": True}, "breaks a torch.compile graph; use backend='auto', or call it outside"),
        ("auto", MPS, {"in_graph": True}, "^attention cannot .* breaks a torch.compile graph; call it outside"),
        ("auto", H200, {"dtype": torch.float64, "in_graph": True}, "^attention cannot .* outside of torch.compile"),
    ],
    ids=str,
)
def test_what_cannot_run_is_refused_with_the_way_out(backend, machine, known, message):
    with pytest.raises(BackendUnavailableError, match=message):
        resolve(backend, asked(**known), machine)


@pytest.mark.parametrize(
    ("known", "reason"), [({"needs_grad": True}, r"torch.no_grad\(\)"), ({"needs_lse": True}, "no log-sum-exp")]
)
def test_a_graph_on_a_cpu_names_no_backend_that_nobody_asked_for(known, reason):
    with pytest.raises(BackendUnavailableError, match=reason) as refusal:
        resolve("auto", asked(in_graph=True, **known), CPU)
    assert "inside torch.compile" in str(refusal.value) and "backend=" not in str(refusal.value)
    assert "use backend=" not in why_not("cpp", asked(in_graph=True, **known), CPU)


def segment(mask, rows, keys, backend="triton", is_slice=False, needs_grad=False):
    """A segment for the last rows of a query, with the lists that a plan has."""
    full = kernels.lists_full_blocks(backend, rows, needs_grad)
    shifted = swaa_flex.masks.offset(mask, q=keys - rows)
    bounds = swaa_flex.block_mask.row_block_bounds(shifted, rows, keys, 128, "cpu")
    lists = swaa_flex.block_mask.layout(shifted, bounds, rows, keys, device="cpu", separate_full=full)
    return Segment(0, rows, backend, shifted, lists, is_slice=is_slice, is_causal_end=mask == causal())


DECODE = {"BACKEND": "TRITON_DECODE"}


@pytest.mark.parametrize(
    ("known", "of", "name", "options"),
    [
        # one row of a long cache, and a few
        ({"q_len": 1}, {}, "decode", DECODE | DECODE_OPTIONS),
        ({"q_len": 16}, {}, "decode", DECODE | DECODE_OPTIONS),
        ({"q_len": 17}, {}, "triton", {"BACKEND": "TRITON"}),
        ({"q_len": 1, "dtype": torch.float32}, {}, "decode", DECODE),
        ({"q_len": 1, "head_dim": 256, "value_dim": 256}, {}, "decode", DECODE),
        ({"q_len": 1, "in_graph": True}, {}, "decode", {"BACKEND": "AUTO"} | DECODE_OPTIONS),
        # its results are wrong for a slice of a query, and it has no backward pass
        ({"q_len": 1}, {"is_slice": True}, "triton", {"BACKEND": "TRITON"}),
        ({"q_len": 16}, {"is_slice": True}, "triton", {"BACKEND": "TRITON"}),
        ({"q_len": 1, "in_graph": True}, {"is_slice": True}, "triton", {"BACKEND": "TRITON"}),
        ({"q_len": 1, "needs_grad": True}, {"needs_grad": True}, "triton", {"BACKEND": "TRITON"}),
        # it wants a power of 2 for a group, and one mask for all heads
        ({"q_len": 1, "heads": 24}, {}, "decode", DECODE | DECODE_OPTIONS),
        ({"q_len": 16, "heads": 24}, {}, "decode", DECODE | DECODE_OPTIONS),
        ({"q_len": 17, "heads": 24}, {}, "triton", {"BACKEND": "TRITON"}),
        ({"q_len": 1, "heads": 8}, {"mask": PER_HEAD}, "triton", {"BACKEND": "TRITON"}),
        ({"q_len": 1, "heads": 24}, {"mask": from_mask_mod(lambda *b: b[2] >= b[3])}, "triton", {"BACKEND": "TRITON"}),
        # full causal rows in half precision are PyTorch's: a few last rows ...
        ({"q_len": 60}, {"mask": causal()}, "sdpa", None),
        ({"q_len": 60}, {"mask": causal(), "is_slice": True}, "sdpa", None),
        ({"q_len": 200}, {"mask": causal(), "backend": "flash", "is_slice": True}, "sdpa", None),
        ({"q_len": 257}, {"mask": causal(), "backend": "flash", "is_slice": True}, "flash", {"BACKEND": "FLASH"}),
        ({"q_len": 1}, {"mask": causal()}, "decode", DECODE | DECODE_OPTIONS),
        ({"q_len": 1}, {"mask": causal(), "is_slice": True}, "sdpa", None),
        ({"q_len": 60, "dtype": torch.float32}, {"mask": causal()}, "triton", {"BACKEND": "TRITON"}),
        ({"q_len": 60, "value_dim": 64}, {"mask": causal()}, "triton", {"BACKEND": "TRITON"}),
        ({"q_len": 60, "needs_lse": True}, {"mask": causal()}, "triton", {"BACKEND": "TRITON"}),
        ({"q_len": 60, "in_graph": True}, {"mask": causal()}, "triton", {"BACKEND": "TRITON"}),
        # ... and whole prompts that FLASH cannot take
        ({}, {"mask": causal()}, "sdpa", None),
        ({"head_dim": 512, "value_dim": 512}, {"mask": causal()}, "triton", {"BACKEND": "TRITON"}),
        ({}, {"mask": causal(), "backend": "flash"}, "flash", {"BACKEND": "FLASH"}),
        ({}, {"backend": "flash"}, "flash", {"BACKEND": "FLASH"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("machine", [H200, A100], ids=["H200", "A100"])
def test_kernels(known, of, name, options, machine):
    inputs = asked(**known)
    chosen = choose(segment(**{"mask": NEAR, "rows": inputs.q_len, "keys": inputs.kv_len} | of), inputs, machine)
    assert chosen.name == name
    if name == "triton" and machine is H200 and inputs.dtype.itemsize == 2 and 64 < inputs.head_dim <= 128:
        options = options if inputs.in_graph else options | TMA
    assert chosen.options == options
    assert chosen.group == (4 if name == "decode" else inputs.heads // inputs.kv_heads)


@pytest.mark.parametrize("rows", [1, 60, 4001])
@pytest.mark.parametrize("mask", [NEAR, causal()], ids=repr)
def test_the_cpu_has_one_kernel(rows, mask):
    assert choose(segment(mask, rows, 4001, "cpp"), asked(q_len=rows), CPU) == Kernel("cpp", 4)


def test_a_softcap_is_no_work_for_sdpa():
    assert choose(segment(causal(), 60, 4001), asked(q_len=60), A100, softcap=True).name == "triton"


@pytest.mark.parametrize(
    ("machine", "known", "options"),
    [
        (H200, {}, TMA),
        (H200, {"q_len": 4096}, TMA),
        (H200, {"q_len": 4096, "kv_len": 8192}, TMA | {"IS_DIVISIBLE": True}),
        (H200, {"head_dim": 64}, {}),
        (H200, {"head_dim": 65}, TMA),
        (H200, {"head_dim": 129}, {}),
        (H200, {"dtype": torch.float32}, {}),
        (H200, {"in_graph": True, "q_len": 4096, "kv_len": 4096}, {}),
        (A100, {}, {}),
        (A100, {"q_len": 4096, "kv_len": 4096}, {"IS_DIVISIBLE": True}),
        (B200, {}, {}),
        (MI300, {}, {}),
    ],
    ids=str,
)
def test_options_of_prompts(machine, known, options):
    inputs = asked(**known)
    chosen = choose(segment(NEAR, inputs.q_len, inputs.kv_len), inputs, machine)
    assert chosen == Kernel("triton", 4, {"BACKEND": "TRITON"} | options)


@pytest.mark.parametrize(
    ("backend", "machine", "known", "rows"),
    [
        ("flash", H200, {"head_dim": 64}, 192),
        ("flash", H200, {"head_dim": 65}, 128),
        ("flash", H200, {"head_dim": None}, 128),
        ("flash", H200, {"head_dim": 64, "needs_grad": True}, 128),
        ("flash", B200, {"head_dim": 64}, 128),
        ("triton", H200, {"head_dim": 64}, 128),
        ("cpp", CPU, {"head_dim": 64}, 128),
    ],
    ids=str,
)
def test_rows_per_block(backend, machine, known, rows):
    assert kernels.rows_per_block(backend, asked(**known), machine) == rows


@pytest.mark.parametrize(
    ("backend", "rows", "needs_grad", "apart"),
    [
        ("triton", 1, False, False),
        ("triton", 127, False, False),
        ("triton", 128, False, True),
        ("triton", 1, True, True),
        ("flash", 200, False, True),
        ("cpp", 1, False, True),
    ],
)
def test_full_blocks_have_lists_of_their_own_but_for_decoding(backend, rows, needs_grad, apart):
    assert kernels.lists_full_blocks(backend, rows, needs_grad) == apart


# --- whole plans and calls --------------------------------------------------------------------------------------


@pytest.fixture
def on(monkeypatch):
    """A machine that is not there: what is chosen is that of it, on tensors of the CPU."""

    def pretend(machine):
        monkeypatch.setattr(sys.modules["swaa_flex.plan"], "capability_of", lambda device: machine)

    return pretend


def plan(mask, q_len, kv_len, **known):
    known = {"batch": 2, "heads": 8, "dtype": torch.bfloat16, "head_dim": 128} | known
    return swaa_flex.plan(mask, q_len, kv_len, **known)


def stretches(ready):
    return [(s.first, s.stop, s.backend, s.is_slice, s.is_causal_end) for s in ready.segments]


def test_few_rows_of_a_flash_plan_run_on_triton(on):
    on(H200)
    tail = NEAR | (causal() & rows_from(3937))
    assert stretches(plan(causal() & (window(500) | rows_from(3937)), 4001, 4001)) == [
        (0, 4001, "flash", False, False),
        (3937, 4001, "triton", True, True),
    ]
    assert stretches(plan(causal() & (window(500) | rows_from(3873)), 4001, 4001)) == [
        (0, 4001, "flash", False, False),
        (3873, 4001, "flash", True, True),
    ]
    assert stretches(plan(tail, 4001, 4001, dtype=torch.float32))[0][2] == "triton"
    assert stretches(plan(tail, 4001, 4001, head_dim=256))[0][2] == "triton"
    assert stretches(plan(NEAR, 1, 4001, q_offset=4000)) == [(0, 1, "triton", False, False)]
    assert plan(NEAR, 4001, 4001).backend == "flash"
    assert swaa_flex.plan(NEAR, 4001, 4001).backend == "triton"  # which dtype, nobody said


def test_masks_with_single_numbers_run_on_triton_unless_the_batch_is_known(on):
    on(H200)
    mask = causal() & (window(500) | rows_from(torch.tensor(3900)))
    assert stretches(plan(mask, 4001, 4001, batch=None))[0][2] == "triton"
    assert stretches(plan(mask, 4001, 4001))[0][2] == "flash"


def test_row_blocks_of_flash_fit_its_kernel(on):
    for machine, head_dim, rows in ((H200, 64, 192), (H200, 128, 128), (B200, 64, 128)):
        on(machine)
        first, last = plan(causal() & (window(500) | rows_from(3937)), 4001, 4001, head_dim=head_dim).segments
        assert tuple(first.block_mask.BLOCK_SIZE) == (rows, 128)
        assert tuple(last.block_mask.BLOCK_SIZE) == (128, 128), "triton's, whatever the rest has"


class Called:
    """Stands in for compiled kernels, and keeps what they are asked for."""

    def __init__(self, monkeypatch):
        self.kinds, self.options, self.shapes = [], [], []
        monkeypatch.setattr(flex, "_compiled", self.compiled)

    def compiled(self, kind):
        self.kinds.append(kind)
        return self.call

    def call(self, query, key, value, block_mask, scale, softcap, needs_lse, options):
        self.options.append((options or {}).get("BACKEND"))
        self.shapes.append(tuple(query.shape[1:3]))
        return query.new_zeros(*query.shape[:3], value.shape[3]), query.new_zeros(query.shape[:3])


@pytest.fixture
def called(monkeypatch):
    return Called(monkeypatch)


def tensors(q_len, kv_len, batch=2, query_heads=8, dtype=torch.bfloat16):
    query = torch.randn(batch, query_heads, q_len, 128, dtype=dtype)
    return query, *torch.randn(2, batch, 2, kv_len, 128, dtype=dtype).unbind(0)


@pytest.mark.parametrize(
    ("machine", "backends_"),
    [(H200, ["FLASH", "TRITON"]), (A100, ["TRITON", "TRITON"]), (MI300, ["TRITON", "TRITON"])],
)
def test_attention_asks_for_what_is_chosen(on, called, machine, backends_):
    on(machine)
    tail = causal() & (window(500) | (window(900) & rows_from(3937)))
    attention(*tensors(4001, 4001), tail)
    assert (called.options, called.shapes) == (backends_, [(8, 4001), (8, 64)])
    called.options.clear()
    attention(*tensors(1, 4001), causal() & window(500) & ~sinks(0))
    attention(*tensors(1, 4001, query_heads=6), causal())
    assert called.options == ["TRITON_DECODE"] * 2
    assert called.shapes[-2:] == [(8, 1), (8, 1)], "a group of 3 is padded to 4"


@pytest.mark.parametrize("return_lse", [False, True])
def test_second_derivatives_of_compiled_kernels_are_refused(return_lse, on, called, monkeypatch):
    """Whatever the loss: torch 2.11 drops them where it is linear in the output."""
    on(A100)
    monkeypatch.setattr(called, "call", lambda query, *rest: (query * 2, query.sum(-1)), raising=False)
    query, key, value = tensors(300, 300, dtype=torch.float32)
    results = attention(query.requires_grad_(), key, value, causal() & window(64), return_lse=return_lse)
    for result in results if return_lse else (results,):
        (grad,) = torch.autograd.grad(result.sum(), query, retain_graph=True)
        assert grad.isfinite().all()
        with pytest.raises(BackendUnavailableError, match=r"no second derivatives.*backend='chunked' has"):
            torch.autograd.grad(result.sum(), query, create_graph=True)


def test_few_rows_cut_out_of_a_query_are_no_work_for_the_decode_kernel(on, called):
    on(H200)
    attention(*tensors(4001, 4001), causal() & (window(500) | (window(900) & rows_from(3993))))
    assert called.options == ["FLASH", "TRITON"]
    assert called.shapes == [(8, 4001), (8, 8)]


@pytest.mark.parametrize(
    ("machine", "q_len", "backends_"),
    [(H200, 700, ["FLASH", "TRITON"]), (A100, 700, ["TRITON", "TRITON"]), (H200, 1, ["AUTO"])],
)
def test_choices_are_traced_into_one_graph(on, called, monkeypatch, machine, q_len, backends_):
    on(machine)
    monkeypatch.setattr(flex, "_flex_call", called.call)
    near = causal() & window(70)
    mask = near if q_len == 1 else near | (causal() & rows_from(680))
    compiled = torch.compile(lambda *qkv: attention(*qkv, mask), fullgraph=True, backend="eager")
    assert compiled(*tensors(q_len, 700)).shape == (2, 8, q_len, 128)
    assert called.options == backends_


def test_padded_heads_are_dropped_from_output_and_log_sum_exp(on, called):
    on(H200)
    out, lse = attention(*tensors(3, 4001, query_heads=6), causal(), return_lse=True)
    assert (out.shape, lse.shape, called.shapes) == ((2, 6, 3, 128), (2, 6, 3), [(8, 3)])


def test_the_log_sum_exp_of_flash_is_scaled_back_where_torch_scales_it(on, called, monkeypatch):
    ones = lambda query, *rest: (query, query.new_ones(query.shape[:3], dtype=torch.float32))  # noqa: E731
    monkeypatch.setattr(called, "call", ones)
    for scaled, backend in itertools.product((True, False), ("flash", "triton")):
        on(H200._replace(flash_lse_is_scaled=scaled))
        _, lse = attention(*tensors(200, 200), NEAR, backend=backend, return_lse=True)
        expected = 1 / 0.6931471805599453 if scaled and backend == "flash" else 1.0
        torch.testing.assert_close(lse, torch.full_like(lse, expected))


@pytest.mark.parametrize(("q_len", "different"), [(1, 3), (40, 1)])
def test_kernels_are_for_one_batch_where_they_decode_and_for_all_where_not(on, called, q_len, different):
    """Inductor's decode kernel refuses a batch that is symbolic."""
    on(A100)
    for batch in (2, 3, 5):
        inputs = tensors(q_len, 300, batch)
        attention(*inputs, swaa_flex.plan(causal() & window(70), q_len, 300, batch=batch, q_offset=300 - q_len))
    assert len(set(called.kinds)) == different


def test_a_plan_is_refused_by_tensors_that_its_backend_does_not_take(on):
    on(H200)
    ready = swaa_flex.plan(NEAR, 300, 300, backend="flash")
    with pytest.raises(
        BackendUnavailableError, match=r"plan is for backend='flash'.* not float32; use backend='triton'"
    ):
        attention(*tensors(300, 300, dtype=torch.float32), ready)
    with pytest.raises(swaa_flex.MaskError, match="plan is for meta and the tensors are on cpu"):
        attention(*tensors(300, 300), swaa_flex.plan(NEAR, 300, 300, backend="flash", device="meta"))
    ready = swaa_flex.plan(NEAR, 300, 300, backend="flash", batch=1, head_dim=64)
    with pytest.raises(swaa_flex.MaskError, match=r"is for batch and head_dim \(1, 64\) and the query has \(2, 128\)"):
        attention(*tensors(300, 300), ready)


def test_what_a_cuda_device_can_do_is_asked_of_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (10, 3))
    found = backends.capability_of(torch.device("cuda"))
    assert (found.device_type, found.compute, found.major, found.is_hopper) == ("cuda", "10.3", 10, False)
    assert backends.capability_of(torch.device("cpu")) == CPU
