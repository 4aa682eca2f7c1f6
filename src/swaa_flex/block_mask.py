"""From a `Mask` to the block lists FlexAttention runs on, without looking at query-key pairs.

Everything here is tensor arithmetic on `[batch, heads, row_blocks]` and on the lists themselves. Shapes follow
from Python integers, so it neither waits for the device nor breaks a `torch.compile` graph. Of masks that hold no
tensors a GPU only writes the lists of the forward pass: which blocks they hold, a hundred operations on a number per
row block, is worked out on the CPU in less time than the launches would take.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .algebra import LARGEST, Mask, checked, has_tensor, is_whole, on_device
from .compact import CompactBlockMask
from .errors import MaskError
from .intervals import Bounds, Interval, Linear, Rows, Union, symbolic
from .masks import offset
from .tracing import is_tracing

BLOCK_SIZE = 128
"""Rows and keys per block, FlexAttention's default sparse block size."""

SERIAL = 1 << 15
"""Numbers up to which the CPU computes an operation in one thread (PyTorch's grain size)."""

BlockSize = int | tuple[int, int]
"""Rows and keys per block, or one number for both."""

Range = tuple[Tensor, Tensor]
"""First and past-the-last block, int32 `[batch | 1, heads | 1, row_blocks]`."""


def build_block_mask(
    mask: Mask,
    q_len: int,
    kv_len: int,
    *,
    batch: int | None = None,
    heads: int | None = None,
    device: torch.device | str = "cpu",
    block_size: BlockSize = BLOCK_SIZE,
    q_offset: int | Tensor = 0,
) -> CompactBlockMask:
    """The `BlockMask` of a mask, from its geometry.

    Its lists are compact: as wide as the longest list can be, not as the number of kv blocks; the batch and
    head dimensions are 1 where the mask does not depend on them. Blocks that need no mask (every pair visible)
    are listed as full; a last block cut off by `q_len` or `kv_len` is always partial, as in `create_block_mask`.

    Args:
        mask: the mask; query row i is evaluated at i + `q_offset`, key j at j.
        q_len: number of query rows.
        kv_len: number of keys.
        batch: number of sequences, or None for one mask for all.
        heads: number of query heads, or None for one mask for all.
        device: where to build, the device of the query. What the mask holds on the CPU is copied there.
        block_size: rows and keys per block, one number or both.
        q_offset: added to query indices, an int or a 0-d integer tensor.

    Returns:
        A `BlockMask` for `torch.nn.attention.flex_attention`, without the query-side lists that only the backward pass
        needs (`swaa_flex.plan(..., needs_grad=True)` adds them). Code that takes the width of its lists for the number
        of kv blocks needs those of its method `with_full_lists`.

    Raises:
        MaskError: if a length or block size is not positive, or the mask holds tensors for another batch, number of
            heads or fewer rows or keys.

    Examples:
        >>> from swaa_flex.masks import causal, sinks, window
        >>> block_mask = build_block_mask(causal() & (window(256) | sinks(4)), 4096, 4096)
        >>> tuple(block_mask.kv_indices.shape)
        (1, 1, 32, 5)
    """
    sides = _sides(block_size)
    if len(sides) != 2 or not all(is_whole(side) and side >= 1 for side in sides):
        raise MaskError(f"block_size={block_size!r}: expected at least 1 row and key per block, one number or both")
    shifted = offset(checked("mask", mask), q=q_offset)
    check_sizes(shifted, q_len, kv_len, batch, heads)
    shifted = on_device(shifted, torch.device(device))
    here = bounded_on(shifted, torch.device(device))
    bounds = row_block_bounds(shifted, q_len, kv_len, sides[0], here)
    return layout(shifted, bounds, q_len, kv_len, device=device, bounds_device=here, block_size=sides)


def bounded_on(mask: Mask, device: torch.device, needs_grad: bool = False) -> torch.device:
    """Where to work out the bounds of a mask for a device: the CPU if that has all it takes.

    Not with the query-side lists of the backward pass, which are worked out at the size of all pairs of blocks.
    """
    if device.type != "cuda" or needs_grad or is_tracing() or has_tensor(mask):
        return device
    return torch.device("cpu")


def layout(
    mask: Mask,
    bounds: Bounds,
    q_len: int,
    kv_len: int,
    *,
    device: torch.device | str,
    bounds_device: torch.device | str | None = None,
    block_size: BlockSize = BLOCK_SIZE,
    full_width: bool = False,
    separate_full: bool = True,
    needs_grad: bool = False,
) -> CompactBlockMask:
    """`build_block_mask` with the choices that differ between kernels.

    Args:
        mask: evaluated at row and key indices as they are.
        bounds: its `row_block_bounds`, for the same number of rows per block.
        q_len: number of query rows.
        kv_len: number of keys.
        device: where the lists are wanted.
        bounds_device: where the bounds are, None if there too.
        block_size: rows and keys per block, one number or both.
        full_width: lists as wide as there are kv blocks.
        separate_full: list full blocks apart; otherwise all blocks are partial and there is no full list.
        needs_grad: add the query-side lists of the backward pass (row blocks x kv blocks of int32, twice).
    """
    q_block, kv_block = _sides(block_size)
    device = torch.device(device)
    here = device if bounds_device is None else torch.device(bounds_device)
    elsewhere = None if here.type == device.type else device
    if elsewhere is not None and needs_grad:
        raise MaskError(f"bounds on {here}, lists on {device}: expected both there for the lists of the backward pass")
    partial, full = _ranges(bounds, q_len, kv_len, q_block, kv_block, here, separate_full)
    row_blocks, kv_blocks = -(-q_len // q_block), -(-kv_len // kv_block)
    width = kv_blocks if full_width else list_width(bounds, kv_len, kv_block)
    shape = _common_shape([end for ends in (*partial, *full) for end in ends], row_blocks)
    like = torch.zeros(shape, dtype=torch.int32, device=here)
    # Both lists must be equally wide: kernels address the full one with the strides of the partial one
    # (torch 2.11 forward and backward, the decode kernel of every version).
    lists: dict[str, Tensor] = {}
    for prefix, ranges in (("", partial), ("full_", full)) if separate_full else (("", partial),):
        lists[f"{prefix}kv_num_blocks"], lists[f"{prefix}kv_indices"] = _listed(ranges, width, like, elsewhere)
        if needs_grad:
            lists[f"{prefix}q_num_blocks"], lists[f"{prefix}q_indices"] = _transposed(ranges, kv_blocks, like)
    return CompactBlockMask(
        seq_lengths=(q_len, kv_len),
        kv_num_blocks=lists["kv_num_blocks"],
        kv_indices=lists["kv_indices"],
        full_kv_num_blocks=lists.get("full_kv_num_blocks"),
        full_kv_indices=lists.get("full_kv_indices"),
        q_num_blocks=lists.get("q_num_blocks"),
        q_indices=lists.get("q_indices"),
        full_q_num_blocks=lists.get("full_q_num_blocks"),
        full_q_indices=lists.get("full_q_indices"),
        BLOCK_SIZE=(q_block, kv_block),
        mask_mod=mask,
    )


def list_width(bounds: Bounds, kv_len: int, kv_block: int = BLOCK_SIZE) -> int:
    """How many kv blocks a row block can list at most, from Python integers alone."""
    kv_blocks = -(-kv_len // kv_block)
    touched = 0
    for interval in bounds.superset:
        blocks = interval.max_blocks(kv_block)
        if blocks is None:
            return kv_blocks
        touched += blocks
    if not is_tracing() and touched == kv_blocks - 1:
        # From lists one block too narrow, BlockMask.from_kv_blocks drops that block without a word (torch
        # 2.13 puts what is no entry into the column behind the last one); narrower ones it cannot index.
        return kv_blocks
    return max(1, min(kv_blocks, touched))


def row_block_bounds(mask: Mask, q_len: int, kv_len: int, q_block: int, device: torch.device | str) -> Bounds:
    """Bounds of each block of `q_block` rows, clipped to the keys there are."""
    blocks = torch.arange(-(-q_len // q_block), dtype=torch.int32, device=device)
    first = blocks[None, None, :] * q_block
    start = symbolic(first)
    bounds = mask.bounds(Rows(start, start.plus(min(q_block, q_len) - 1)))
    return bounds.clip(Interval((Linear(),), (Linear(offset=kv_len),)))


def merged_ranges(intervals: Union, row_blocks: int, device: torch.device | str) -> list[Range]:
    """A union of intervals as ascending, disjoint ranges, int32 `[batch | 1, heads | 1, row_blocks]`."""
    return _merged(_tensors(intervals, row_blocks, device))


def check_sizes(mask: Mask, q_len: int, kv_len: int, batch: int | None, heads: int | None) -> None:
    """Refuses lengths of nothing, and tensors in masks that are for other sizes."""
    if not all(is_whole(length) and length >= 1 for length in (q_len, kv_len)):
        raise MaskError(f"q_len={q_len}, kv_len={kv_len}: expected at least one query row and one key")
    if not is_tracing():  # a graph is for lengths that vary
        if max(q_len, kv_len) > LARGEST:
            raise MaskError(f"q_len={q_len}, kv_len={kv_len}: expected at most {LARGEST} rows and keys")
        mask.check_indices((0, q_len), (0, kv_len))
    check_batch_and_heads(mask, batch, heads)


def check_batch_and_heads(mask: Mask, batch: int | None, heads: int | None) -> None:
    """Refuses tensors in masks that are for another batch or number of heads."""
    for name, given, own in (("batch", batch, mask.batch_size), ("heads", heads, mask.num_heads)):
        if own is not None and given != own:
            raise MaskError(
                f"{mask!r} holds tensors for {name}={own}, but it is used with {name}={given}; build the mask for "
                f"{name}={given}, or use tensors without that dimension for one mask for all"
            )


def _sides(block_size: BlockSize) -> tuple[int, int]:
    return tuple(block_size) if isinstance(block_size, (tuple, list)) else (block_size, block_size)  # type: ignore[return-value]


def _ranges(
    bounds: Bounds,
    q_len: int,
    kv_len: int,
    q_block: int,
    kv_block: int,
    device: torch.device | str,
    separate_full: bool,
) -> tuple[list[Range], list[Range]]:
    """Partial and full kv blocks of each row block, as ascending disjoint ranges of blocks."""
    row_blocks = -(-q_len // q_block)
    keys = _tensors(bounds.superset, row_blocks, device)
    touched = _merged([(start // kv_block, _blocks_until(start, stop, kv_block)) for start, stop in keys])
    full: list[Range] = []
    if separate_full and q_len >= q_block and kv_len >= kv_block and bounds.subset:
        complete = torch.arange(1, row_blocks + 1, device=device) * q_block <= q_len
        for start, stop in merged_ranges(bounds.subset, row_blocks, device):
            first, last = (start + kv_block - 1) // kv_block, stop // kv_block
            full.append((first, torch.where(complete, torch.maximum(first, last), first)))
    return _subtract(touched, full), full


def _blocks_until(start: Tensor, stop: Tensor, kv_block: int) -> Tensor:
    """One past the last block of `[start, stop)`, the block of `start` itself if that is empty."""
    return torch.where(stop > start, (stop + kv_block - 1) // kv_block, start // kv_block)


def _tensors(intervals: Union, row_blocks: int, device: torch.device | str) -> list[Range]:
    """Start and stop of each interval as int32 tensors, start <= stop."""
    result = []
    for interval in intervals:
        ends = []
        for value in interval.values():
            tensor = (
                value if isinstance(value, Tensor) else torch.full((1, 1, 1), value, dtype=torch.int32, device=device)
            )
            ends.append(tensor.to(torch.int32))
        shape = _common_shape(ends, row_blocks)
        start, stop = (end.expand(shape) for end in ends)
        result.append((start, torch.maximum(start, stop)))
    return result


def _common_shape(tensors: list[Tensor], row_blocks: int) -> tuple[int, int, int]:
    """What tensors broadcast to, together with `[1, 1, row_blocks]` (`torch.broadcast_shapes` takes longer)."""
    batch = heads = 1
    for tensor in tensors:
        own_batch, own_heads, _ = (*[1] * (3 - tensor.dim()), *tensor.shape)
        batch = batch if own_batch == 1 else own_batch
        heads = heads if own_heads == 1 else own_heads
    return batch, heads, row_blocks


def _merged(ranges: list[Range]) -> list[Range]:
    """The same union as ascending disjoint ranges (some of them empty)."""
    if len(ranges) < 2:
        return ranges
    starts = torch.stack(torch.broadcast_tensors(*(start for start, _ in ranges)))
    stops = torch.stack(torch.broadcast_tensors(*(stop for _, stop in ranges)))
    starts, order = starts.sort(dim=0)
    stops = stops.gather(0, order)
    result = [(starts[0], stops[0])]
    for start, stop in zip(starts[1:].unbind(), stops[1:].unbind(), strict=True):
        before, reach = result[-1]
        touches = start <= reach
        result[-1] = (before, torch.where(touches, before, reach))  # emptied if it joins the next one
        result.append((torch.where(touches, before, start), torch.where(touches, torch.maximum(reach, stop), stop)))
    return result


def _subtract(ranges: list[Range], holes: list[Range]) -> list[Range]:
    """Ascending `ranges` without ascending `holes`."""
    # An empty hole removes nothing, wherever it lies: at 0 it is before every range.
    real = [(torch.where(stop > start, start, 0), torch.where(stop > start, stop, 0)) for start, stop in holes]
    pieces = []
    for low, stop in ranges:
        for hole_start, hole_stop in real:
            pieces.append((low, torch.maximum(low, torch.minimum(stop, hole_start))))
            low = torch.maximum(low, hole_stop)
        pieces.append((low, torch.maximum(low, stop)))
    return pieces


def _listed(
    ranges: list[Range], width: int, like: Tensor, elsewhere: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Number of blocks `[..., row_blocks]` and their indices `[..., row_blocks, width]`, ascending, int32.

    On the device of the ranges, or written `elsewhere`: a list is longer than SERIAL, and a busy CPU waits long for
    all its threads to come together.
    """
    count = torch.zeros_like(like)
    ends = []
    for start, stop in ranges:
        ends += [count, start - count]  # its first slot, and from a slot to its block
        count = count + (stop - start)
    if elsewhere is not None:
        count, *ends = _moved([count, *ends], elsewhere)
        count = count.clone()  # of a view torch.compile notices what it is a view of, and would compile again
    slot = torch.arange(width, dtype=torch.int32, device=count.device)
    shift = torch.zeros_like(count)[..., None]
    for first, own in zip(ends[::2], ends[1::2], strict=True):
        shift = torch.where(slot >= first[..., None], own[..., None], shift)
    indices = torch.where(slot < count[..., None], slot + shift, 0)
    return _laid_out(count), _laid_out(indices)


def _moved(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of one shape on a device, in as few copies as are small; nothing waits for them."""
    several = max(1, SERIAL // tensors[0].numel())
    moved: list[Tensor] = []
    for at in range(0, len(tensors), several):
        together = torch.stack(tensors[at : at + several])
        together = together.pin_memory() if device.type == "cuda" else together
        moved += together.to(device, non_blocking=True).unbind()
    return moved


def _transposed(ranges: list[Range], kv_blocks: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The q-side lists: per kv block the row blocks that list it. Takes row_blocks x kv_blocks memory."""
    block = torch.arange(kv_blocks, dtype=torch.int32, device=like.device)[:, None]
    listed = torch.zeros((*like.shape[:2], kv_blocks, like.shape[2]), dtype=torch.bool, device=like.device)
    for start, stop in ranges:
        listed = listed | ((block >= start[:, :, None]) & (block < stop[:, :, None]))
    order = listed.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return _laid_out(listed.sum(-1, dtype=torch.int32)), _laid_out(order.to(torch.int32))


def _laid_out(x: Tensor) -> Tensor:
    """`x` contiguous in memory, in a compiled graph too.

    There inductor may still lay out a computed tensor in another order after the template of flex_attention has read
    its strides, and the kernel then reads garbage as block indices (torch 2.11). A view with strides settles them.
    """
    if not is_tracing():
        return x.contiguous()
    strides = [1]
    for size in reversed(x.shape[1:]):
        strides.insert(0, strides[0] * size)
    return x.as_strided(x.shape, strides)
