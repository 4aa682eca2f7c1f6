import copy
from functools import partial

import pytest
import torch
from conftest import counting_backend, visible_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import BATCH, HEADS, compositions
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

import swaa_flex
from swaa_flex import MaskError, build_block_mask
from swaa_flex.algebra import on_device
from swaa_flex.block_mask import SERIAL, _listed, _moved, _ranges, bounded_on, layout, list_width, row_block_bounds
from swaa_flex.masks import (
    causal,
    from_mask_mod,
    heads,
    kv_positions,
    left_padded,
    offset,
    packed,
    rows_from,
    rows_where,
    sinks,
    sinks_and_tail,
    window,
)


def listed(num: torch.Tensor, indices: torch.Tensor, columns: int) -> torch.Tensor:
    """Block lists as a bool tensor `[batch, heads, rows, columns]`; no block may be listed twice."""
    result = torch.zeros(*indices.shape[:-1], columns, dtype=torch.long)
    slots = torch.arange(indices.shape[-1]) < num[..., None]
    result.scatter_add_(-1, indices.long(), slots.long())
    assert result.max() <= 1, "a block is listed twice"
    return result.bool()


def blocks(block_mask: BlockMask) -> tuple[torch.Tensor, torch.Tensor]:
    columns = -(-block_mask.seq_lengths[1] // block_mask.BLOCK_SIZE[1])
    partial = listed(block_mask.kv_num_blocks, block_mask.kv_indices, columns)
    if block_mask.full_kv_num_blocks is None:
        return partial, torch.zeros_like(partial)
    return partial, listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, columns)


def assert_right(block_mask: BlockMask, visible: torch.Tensor) -> None:
    """No visible pair lies in a skipped block, and every pair of a full block is visible."""
    partial, full = blocks(block_mask)
    assert not (partial & full).any(), "a block is both partial and full"

    def per_pair(per_block: torch.Tensor) -> torch.Tensor:
        rows, keys = block_mask.BLOCK_SIZE
        pairs = per_block.repeat_interleave(rows, -2).repeat_interleave(keys, -1)
        return pairs[..., : visible.shape[-2], : visible.shape[-1]].expand(visible.shape)

    assert not (visible & ~per_pair(partial | full)).any(), "a visible pair lies in a skipped block"
    assert not (~visible & per_pair(full)).any(), "a full block holds an invisible pair"


# Short ones too: their blocks end inside of documents, pads and runs of rows.
LENGTHS = st.one_of(st.integers(1, 64), st.integers(1, 600))


@settings(max_examples=600, deadline=None)
@given(st.data(), LENGTHS, LENGTHS, st.sampled_from([4, 8, (16, 4), 16, 32, 128, (48, 32), (16, 64)]))
def test_random_compositions_keep_what_is_visible(data, q_len, kv_len, block_size):
    q_offset = data.draw(st.integers(0, 200))
    mask = data.draw(compositions(max(q_len + q_offset, kv_len)))
    built = build_block_mask(mask, q_len, kv_len, batch=BATCH, heads=HEADS, block_size=block_size, q_offset=q_offset)
    visible = visible_pairs(mask, q_len, kv_len, BATCH, HEADS, q_offset)
    assert_right(built, visible)


@pytest.mark.parametrize("length", [97, 128, 130, 1000, 4096])
@pytest.mark.parametrize(("sliding_window", "sink_tokens"), [(64, 4), (128, 128), (256, 100), (1, 0), (700, 300)])
def test_window_and_sinks_give_the_blocks_of_create_block_mask(length, sliding_window, sink_tokens):
    mask = causal() & (window(sliding_window) | sinks(sink_tokens))
    ours = build_block_mask(mask, length, length)
    stock = create_block_mask(mask, None, None, length, length, device="cpu")
    for mine, theirs in zip(blocks(ours), blocks(stock), strict=True):
        assert torch.equal(mine, theirs)


COMPACT = causal() & (window(256) | sinks(4))


@pytest.mark.parametrize("blocks", [1, 5, 6, 7, 16])
def test_methods_of_compact_lists_are_those_of_stock_ones(blocks):
    length = 128 * blocks - 3
    ours = build_block_mask(COMPACT, length, length)
    stock = create_block_mask(COMPACT, None, None, length, length, device="cpu")
    assert isinstance(ours, BlockMask)
    for mine, theirs in ((ours, stock), (ours[0], stock[0]), (ours[:, :, -1:], stock[:, :, -1:])):
        assert torch.equal(mine.to_dense(), theirs.to_dense())
        assert mine.to_string() == theirs.to_string()
        assert str(mine) == str(theirs)
        assert mine.sparsity() == theirs.sparsity()
    assert torch.equal(copy.deepcopy(ours).to("cpu").to_dense(), stock.to_dense())
    for width in (ours.with_full_lists().kv_indices.shape[-1], stock.kv_indices.shape[-1]):
        assert width == blocks


@pytest.mark.parametrize("blocks", [5, 6, 7, 16])
def test_full_lists_can_be_transposed(blocks):
    length = 128 * blocks
    full = build_block_mask(COMPACT, length, length).with_full_lists()
    lists = full.kv_num_blocks, full.kv_indices, full.full_kv_num_blocks, full.full_kv_indices
    ours = BlockMask.from_kv_blocks(*lists, mask_mod=COMPACT, seq_lengths=(length, length))
    stock = create_block_mask(COMPACT, None, None, length, length, device="cpu")
    for prefix in ("", "full_"):
        mine, theirs = (
            listed(getattr(x, f"{prefix}q_num_blocks"), getattr(x, f"{prefix}q_indices"), blocks)
            for x in (ours, stock)
        )
        assert torch.equal(mine, theirs)


def test_sliced_lists_of_the_backward_pass_are_transposed_again():
    mask = heads([True, False], COMPACT, causal())
    bounds = row_block_bounds(mask, 2048, 2048, 128, "cpu")
    built = layout(mask, bounds, 2048, 2048, device="cpu", needs_grad=True)
    part = built[:, :, 2:5]
    assert torch.equal(part.to_dense(), built.to_dense()[:, :, 2:5])
    dense = listed(part.q_num_blocks, part.q_indices, 3) | listed(part.full_q_num_blocks, part.full_q_indices, 3)
    assert torch.equal(dense, part.to_dense().bool().transpose(-1, -2))


@pytest.mark.parametrize("reach", range(1, 1025, 61))
def test_bare_compact_lists_are_no_block_mask_with_blocks_missing(reach):
    length, mask = 1024, causal() & (window(reach) | sinks(4))
    built = build_block_mask(mask, length, length)
    lists = built.kv_num_blocks, built.kv_indices, built.full_kv_num_blocks, built.full_kv_indices
    make = partial(BlockMask.from_kv_blocks, *lists, mask_mod=mask)
    if is_narrow := built.kv_indices.shape[-1] < 8:
        q, k = torch.zeros(1, 1, length, 16), torch.zeros(1, 1, length, 16)
        with pytest.raises((ValueError, RuntimeError), match="mask was created for a smaller length"):
            flex_attention(q, k, k, block_mask=make(compute_q_blocks=False))
    try:
        made = make(seq_lengths=(length, length)) if is_narrow else make()
    except IndexError:  # up to torch 2.14
        assert is_narrow
    else:
        stock = create_block_mask(mask, None, None, length, length, device="cpu")
        assert is_narrow or torch.equal(made.to_dense(), stock.to_dense())
        for prefix in ("", "full_"):
            ours, theirs = (
                listed(getattr(x, f"{prefix}q_num_blocks"), getattr(x, f"{prefix}q_indices"), 8) for x in (made, stock)
            )
            assert torch.equal(ours, theirs)


def test_what_compact_lists_cannot_do_is_refused_with_a_way_out():
    built = build_block_mask(COMPACT, 2048, 2048)
    with pytest.raises(MaskError, match="with_full_lists"):
        type(built).from_kv_blocks(built.kv_num_blocks, built.kv_indices)
    with pytest.raises(MaskError, match=r"cannot be cut to \(1024, 1024\); build them"):
        built._adjust(1024, 1024)


@pytest.mark.parametrize(
    "mask",
    [
        heads([True, False], causal(), causal() & window(128)),
        packed(causal(), document_ids=torch.arange(1024) // 300),
        kv_positions(causal() & rows_from(torch.tensor([3])), torch.arange(1024)),
        left_padded(sinks_and_tail(causal(), 4, start=torch.tensor(40)), torch.ones(1024)),
        offset(rows_where(torch.arange(1024) % 2 == 0), kv=torch.tensor(3)),
    ],
    ids=repr,
)
def test_what_a_mask_holds_on_the_cpu_goes_where_the_query_is(mask):
    for built in (
        build_block_mask(mask, 1024, 1024, heads=2, device="meta"),
        build_block_mask(mask, 1024, 1024, heads=2).to("meta"),
    ):
        assert built.kv_indices.device.type == "meta"
        index = torch.zeros(1, dtype=torch.long, device="meta")
        assert built.mask_mod(index, index, index, index).device.type == "meta"
    assert on_device(mask, torch.device("cpu")) is mask
    assert on_device(causal() & window(3), torch.device("meta")) == causal() & window(3)


@pytest.mark.parametrize("q_offset", [0, 1, 500, 872])
def test_one_query_row_lists_only_what_it_sees(q_offset):
    mask = causal() & (window(128) | sinks(4))
    as_int = build_block_mask(mask, 1, 1000, q_offset=q_offset)
    as_tensor = build_block_mask(mask, 1, 1000, q_offset=torch.tensor(q_offset))
    visible = visible_pairs(mask, 1, 1000, q_offset=q_offset)
    needed = {i // 128 for i in visible[0, 0, 0].nonzero().flatten().tolist()}
    for built in (as_int, as_tensor):
        partial, full = blocks(built)
        assert set((partial | full)[0, 0, 0].nonzero().flatten().tolist()) == needed
        assert built.kv_indices.shape[-1] <= 4


def test_lists_are_compact_equally_wide_and_small_at_a_million_tokens():
    mask = causal() & (window(2048) | sinks(128))
    built = build_block_mask(mask, 1 << 20, 1 << 20)
    tensors = [built.kv_num_blocks, built.kv_indices, built.full_kv_num_blocks, built.full_kv_indices]
    assert sum(t.numel() * t.element_size() for t in tensors) <= 4 << 20
    assert built.kv_indices.shape == built.full_kv_indices.shape
    assert built.kv_indices.is_contiguous()


def test_a_function_anded_with_a_window_is_block_sparse():
    mask = causal() & window(256) & from_mask_mod(lambda b, h, q, kv: (q + kv) % 3 == 0)
    built = build_block_mask(mask, 8192, 8192)
    assert built.kv_indices.shape[-1] <= 4
    assert built.full_kv_num_blocks.sum() == 0


def test_packed_windows_keep_compact_lists():
    ids = torch.arange(8192) // 700
    built = build_block_mask(packed(causal() & (window(256) | sinks(4)), document_ids=ids), 8192, 8192)
    assert built.kv_indices.shape[-1] <= 16


def test_geometry_survives_an_offset_tensor():
    window_only = offset(causal() & window(256), q=torch.tensor(300), kv=torch.tensor(-7))
    assert build_block_mask(window_only, 4096, 8192).kv_indices.shape[-1] <= 4
    with_sinks = offset(causal() & (window(256) | sinks(4)), q=torch.tensor(300))
    assert build_block_mask(with_sinks, 4096, 8192).kv_indices.shape[-1] <= 5


def test_per_head_masks_have_lists_per_head():
    mask = heads([True, False], causal(), causal() & window(128))
    built = build_block_mask(mask, 1024, 1024, heads=2)
    partial, full = blocks(built)
    assert (partial | full)[0, 0].sum() == 36
    assert (partial | full)[0, 1].sum() == 15


@pytest.mark.parametrize("needs_full", [True, False])
def test_query_side_lists_are_the_transpose(needs_full):
    mask = causal() & (window(300) | sinks(130) | rows_from(torch.tensor([900, 100])))
    bounds = row_block_bounds(mask, 1000, 1100, 128, "cpu")
    built = layout(mask, bounds, 1000, 1100, device="cpu", needs_grad=True, separate_full=needs_full)
    partial, full = blocks(built)
    rows = partial.shape[2]
    assert torch.equal(listed(built.q_num_blocks, built.q_indices, rows), partial.transpose(-1, -2))
    if needs_full:
        assert torch.equal(listed(built.full_q_num_blocks, built.full_q_indices, rows), full.transpose(-1, -2))


def test_dense_rows_known_as_an_int_do_not_widen_the_other_lists():
    length = 65536
    plan = swaa_flex.plan(
        causal() & (window(2048) | sinks(128) | rows_from(length - 64)), length, length, backend="cpp"
    )
    assert [(s.first, s.stop) for s in plan.segments] == [(0, length), (length - 64, length)]
    widths = [s.block_mask.kv_num_blocks + s.block_mask.full_kv_num_blocks for s in plan.segments]
    assert widths[0].max() <= 20


def test_rows_that_would_not_shorten_a_list_do_not_split_the_plan():
    plan = swaa_flex.plan(causal() & (window(2048) | rows_from(400)), 500, 500, backend="cpp")
    assert len(plan.segments) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q_len": 0, "kv_len": 4}, "q_len=0, kv_len=4: expected at least one"),
        ({"q_len": 4, "kv_len": 4, "batch": 3}, "holds tensors for batch=2, but it is used with batch=3"),
        ({"q_len": 4, "kv_len": 4}, "batch=2, but it is used with batch=None"),
    ],
)
def test_sizes_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(MaskError, match=message):
        build_block_mask(rows_from(torch.tensor([1, 2])), **arguments)


def test_wrong_number_of_heads_is_named():
    with pytest.raises(MaskError, match="heads=2, but it is used with heads=4"):
        build_block_mask(heads([True, False], causal(), causal()), 4, 4, heads=4)


@pytest.mark.filterwarnings("ignore:.*torch.compile.*")
def test_building_traces_into_one_graph_for_all_lengths():
    graphs = []

    @torch.compile(fullgraph=True, backend=counting_backend(graphs))
    def counts(x, q_offset):
        mask = causal() & (window(256) | sinks(4))
        built = build_block_mask(mask, x.shape[0], x.shape[0] + 100, q_offset=q_offset)
        return built.kv_num_blocks + built.full_kv_num_blocks

    for length in (640, 700, 801, 1000, 1300):
        got = counts(torch.zeros(length), torch.tensor(100))
        want = build_block_mask(causal() & (window(256) | sinks(4)), length, length + 100, q_offset=100)
        assert torch.equal(got, want.kv_num_blocks + want.full_kv_num_blocks)
    assert len(graphs) <= 2


def test_masks_without_tensors_are_bounded_on_the_cpu():
    cuda, near = torch.device("cuda"), causal() & (window(5) | sinks(2))
    assert bounded_on(near, cuda).type == "cpu"
    assert bounded_on(near & from_mask_mod(lambda b, h, q, kv: q > kv), cuda).type == "cpu"
    assert bounded_on(near, cuda, needs_grad=True) == cuda  # whose lists take all pairs of blocks
    assert bounded_on(offset(near, q=torch.tensor(3)), cuda) == cuda
    assert bounded_on(packed(near, document_ids=torch.zeros(9, dtype=torch.long)), cuda) == cuda
    assert bounded_on(near, torch.device("cpu")).type == "cpu"


@pytest.mark.parametrize("size", [5, SERIAL // 2, SERIAL + 1])
def test_what_is_moved_together_arrives_in_order(size):
    numbers = [torch.arange(size) + i for i in range(3)]
    moved = _moved(numbers, torch.device("cpu"))
    assert all(torch.equal(x, number) for x, number in zip(moved, numbers, strict=True))


@settings(deadline=None)
@given(compositions(300), st.integers(1, 300), st.integers(1, 300))
def test_lists_that_are_written_elsewhere_are_the_same(mask, q_len, kv_len):
    bounds = row_block_bounds(mask, q_len, kv_len, 16, "cpu")
    for ranges in _ranges(bounds, q_len, kv_len, 16, 16, "cpu", True):
        like = torch.zeros(BATCH, HEADS, -(-q_len // 16), dtype=torch.int32)
        here, moved = (_listed(ranges, list_width(bounds, kv_len, 16), like, to) for to in (None, torch.device("cpu")))
        assert all(torch.equal(a, b) for a, b in zip(here, moved, strict=True))
        assert not moved[0]._is_view()


class LargestOnTheCPU(TorchDispatchMode):
    """Notes the size of the largest tensor that is computed there."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type == "cpu":
            self.numbers = max(self.numbers, out.numel())
        return out


def test_no_list_is_written_on_the_cpu_for_another_device():
    mask, length = causal() & (window(2048) | sinks(128)), 1 << 20
    with LargestOnTheCPU() as largest:
        bounds = row_block_bounds(mask, length, length, 128, "cpu")
        built = layout(mask, bounds, length, length, device="meta", bounds_device="cpu")
    assert built.kv_indices.device.type == "meta"
    assert built.kv_indices.numel() > 1 << 17
    assert largest.numbers <= SERIAL
    with pytest.raises(MaskError, match="bounds on cpu, lists on meta: expected both there"):
        layout(mask, bounds, length, length, device="meta", bounds_device="cpu", needs_grad=True)
