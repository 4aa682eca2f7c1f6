"""From a `Mask` to what a backend runs: the layout choices that make its kernels fast and correct."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from . import backends, chunked
from .algebra import (
    Mask,
    checked,
    has_single_number,
    inlined,
    only_integers,
    per_sequence,
    with_tensors,
    with_tensors_in_memory,
)
from .block_mask import BLOCK_SIZE, bounded_on, check_sizes, layout, list_width, row_block_bounds
from .intervals import Bounds
from .masks import causal, offset

FEW_ROWS = 256
"""Up to so many rows that differ from the rest are computed twice, rather than left out of the rest's kernel call. As
many take a kernel that splits the keys (kernels.py)."""


@dataclass(frozen=True, eq=False)
class Segment:
    """A stretch of query rows `[first, stop)` that is one kernel call."""

    first: int
    stop: int
    backend: str
    mask: Mask  # evaluated at row indices counted from `first`
    block_mask: BlockMask | None  # None for the chunked backend, which has
    chunks: tuple[chunked.Chunk, ...]
    is_causal_end: bool = False  # full causal rows, the last of which sees all keys: kernels without masks do as well

    @functools.cached_property
    def compiled_for(self) -> Any:
        """What of its mask a compiled kernel is made for."""
        return inlined(self.mask) if self.backend == "flash" else self.mask.structure


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """A mask made ready for a backend: run it with `attention(query, key, value, plan)`.

    Made by `plan`; all layers with the same mask and lengths share one. Where segments overlap, later ones are right.
    """

    mask: Mask  # at the rows of the query, offset included
    backend: str
    q_len: int
    kv_len: int
    segments: tuple[Segment, ...]
    needs_grad: bool
    made_for: tuple[int | None, int | None] = (None, None)  # batch and head_dim, which count for flash

    def __repr__(self) -> str:
        rows = ", ".join(f"rows {s.first}-{s.stop - 1}: {s.mask!r}" for s in self.segments)
        return f"AttentionPlan({self.backend}, {self.q_len} x {self.kv_len}, {rows})"


def plan(
    mask: Mask,
    q_len: int,
    kv_len: int,
    *,
    batch: int | None = None,
    heads: int | None = None,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    q_offset: int | Tensor = 0,
    needs_grad: bool = False,
    head_dim: int | None = None,
    twin: Mask | None = None,
) -> AttentionPlan:
    """Turns a mask into what a backend runs.

    Where a few rows see much more than the others and are known from Python integers (`rows_from(int)`), those rows
    are kernel calls of their own, so that they do not widen the lists of all rows. In a plan for flash, stretches of
    fewer than 128 rows run on triton, and so do masks with single numbers in tensors if `batch` is not given, and
    masks with any tensors in a compiled graph.

    Args:
        mask: the mask; query row i is evaluated at i + `q_offset`, key j at j.
        q_len: number of query rows.
        kv_len: number of keys.
        batch: number of sequences, or None for one mask for all.
        heads: number of query heads, or None for one mask for all.
        device: the device of the query.
        backend: "auto", "flash", "triton", "cpp" or "chunked".
        q_offset: added to query indices, an int or a 0-d integer tensor.
        needs_grad: whether the backward pass will run.
        head_dim: of the query, if known: flash has blocks of another shape for small ones.
        twin: a mask that sees the same as `mask` at `q_offset`, with its tensors on the CPU: which blocks its rows
            see, the host works out sooner than a GPU can be told to.

    Returns:
        The plan.

    Raises:
        MaskError: if a length is not positive, or the mask holds tensors for another batch, number of heads or fewer
            rows or keys.
        ConfigError: if `backend` is no backend.
        BackendUnavailableError: if the backend cannot run here; the message says what is missing.

    Examples:
        >>> from swaa_flex.masks import causal, rows_from, window
        >>> plan(causal() & (window(256) | rows_from(4000)), 4096, 4096)
        AttentionPlan(chunked, 4096 x 4096, rows 0-3999: causal & window(256), rows 4000-4095: offset(causal, q=4000))
    """
    local = offset(checked("mask", mask), q=q_offset)
    check_sizes(local, q_len, kv_len, batch, heads)
    device = torch.device(device)
    backend = backends.resolve(backend, device, q_len=q_len, needs_grad=needs_grad)
    # The compiled CPU kernel is wrong on a slice of a query that is computed in the same graph (torch 2.13).
    whole = backend == "cpp" and torch.compiler.is_compiling()
    parts = [(0, q_len, mask)] if whole or twin is not None else _split(mask, q_len, q_offset)
    if backend == "chunked":
        segments = tuple(_chunked_segment(*part, q_offset, kv_len, device) for part in parts)
        return AttentionPlan(local, backend, q_len, kv_len, segments, needs_grad)
    # Where no list would become shorter, one call is better; but a compiled graph keeps the stretches, whose masks
    # hold no symbolic row numbers: capturing those fails in torch 2.11's lowering of flex_attention.
    if len(parts) > 1 and not torch.compiler.is_compiling():
        here = bounded_on(local, device)
        widths = {list_width(_bounds(*part, q_offset, kv_len, BLOCK_SIZE, here), kv_len) for part in parts}
        if len(widths) == 1:
            parts = [(0, q_len, mask)]
    segments = tuple(
        _flex_segment(*part, q_offset, kv_len, batch, device, backend, needs_grad, head_dim, twin)
        for part in _covered(parts, q_len)
    )
    return AttentionPlan(local, backend, q_len, kv_len, segments, needs_grad, (batch, head_dim))


Part = tuple[int, int, Mask]
"""A stretch of query rows: first, stop, and the mask that holds there."""


def _split(mask: Mask, q_len: int, q_offset: int | Tensor) -> list[Part]:
    """The query rows, cut where the mask is known to change."""
    if isinstance(q_offset, Tensor):
        return [(0, q_len, mask)]
    edges = [0, q_len]
    for row in mask.row_breaks():  # insertion by comparisons: torch.compile cannot sort symbolic integers
        row = row - q_offset
        if 0 < row < q_len:
            at = sum(1 for edge in edges if edge < row)
            if edges[at] != row:
                edges.insert(at, row)
    return [(a, b, mask.for_rows(a + q_offset, b - 1 + q_offset)) for a, b in itertools.pairwise(edges)]


def _covered(parts: list[Part], q_len: int) -> list[Part]:
    """The longest part stretched over all rows and the others after it, if those are few: nothing has to be joined."""
    at = 0
    for i, (first, stop, _) in enumerate(parts):
        if stop - first > parts[at][1] - parts[at][0]:
            at = i
    first, stop, mask = parts[at]
    if len(parts) == 1 or q_len - (stop - first) > FEW_ROWS:
        return parts
    return [(0, q_len, mask), *parts[:at], *parts[at + 1 :]]


def _bounds(
    first: int, stop: int, mask: Mask, q_offset: int | Tensor, kv_len: int, q_block: int, device: torch.device
) -> Bounds:
    return row_block_bounds(offset(mask, q=q_offset + first), stop - first, kv_len, q_block, device)


def _chunked_segment(
    first: int, stop: int, mask: Mask, q_offset: int | Tensor, kv_len: int, device: torch.device
) -> Segment:
    local = offset(mask, q=q_offset + first)
    return Segment(first, stop, "chunked", local, None, chunked.chunks(local, stop - first, kv_len, device))


def _flex_segment(
    first: int,
    stop: int,
    mask: Mask,
    q_offset: int | Tensor,
    kv_len: int,
    batch: int | None,
    device: torch.device,
    backend: str,
    needs_grad: bool,
    head_dim: int | None,
    twin: Mask | None,
) -> Segment:
    q_len, shift = stop - first, q_offset + first
    is_causal_end = False
    if not isinstance(shift, Tensor) and not torch.compiler.is_compiling():
        is_causal_end = mask == causal() and shift + q_len == kv_len
    local = offset(mask, q=shift)
    here = bounded_on(local, device, needs_grad) if twin is None else torch.device("cpu")
    if backend == "flash":
        # FLASH has no split over keys, which few rows need.
        readable = None if q_len < BLOCK_SIZE else _for_flash(local, shift, batch, device)
        backend, local = ("triton", local) if readable is None else ("flash", readable)
    if torch.compiler.is_compiling() and backend == "triton" and not isinstance(shift, Tensor) and shift != 0:
        local = offset(mask, q=_row_tensor(shift, device))  # may be symbolic: see `plan`
    if backend == "cpp" and torch.compiler.is_compiling():
        local = with_tensors_in_memory(local)
    # FLASH has a faster kernel for small heads, with tiles of 192 rows (sm90; benchmarks/kernel_options.py).
    small = backend == "flash" and head_dim is not None and head_dim <= 64 and not needs_grad
    q_block = 192 if small and backends.is_hopper(device.index) else BLOCK_SIZE
    bounds = (
        _bounds(first, stop, mask, q_offset, kv_len, q_block, here)
        if twin is None
        else row_block_bounds(twin, q_len, kv_len, q_block, here)
    )
    block_mask = layout(
        local,
        bounds,
        q_len,
        kv_len,
        device=device,
        bounds_device=here,
        block_size=(q_block, BLOCK_SIZE),
        # The compiled CPU kernel insists on kv_len <= list width * block (torch 2.11 to 2.13, flex_cpu.py).
        full_width=backend == "cpp",
        # The decode kernel sizes its splits by kv_len instead of by the list once there are full blocks.
        separate_full=backend != "triton" or q_len >= BLOCK_SIZE or needs_grad,
        needs_grad=needs_grad,
    )
    if backend == "cpp" and not torch.compiler.is_compiling():
        # Symbolic integers in a mask_mod can break the compiled CPU kernel: inductor substitutes its own names in the
        # C++ text, and "ks2" also matches in "ks27" (torch 2.11 to 2.13, codegen/cpp_flex_attention_template.py).
        local = block_mask.mask_mod = with_tensors(local, device)
    return Segment(first, stop, backend, local, block_mask, (), is_causal_end)


def _for_flash(mask: Mask, shift: int | Tensor, batch: int | None, device: torch.device) -> Mask | None:
    """The mask in a form that FLASH can read, or None.

    In a compiled graph inductor may free tensors before this kernel has read them, and cannot inline symbolic integers
    (torch 2.11; later versions can do both and are not tested).
    """
    if torch.compiler.is_compiling():
        return mask if not isinstance(shift, Tensor) and shift == 0 and only_integers(mask) else None
    readable = mask if batch is None else per_sequence(mask, batch, device)
    return None if has_single_number(readable) else readable


def _row_tensor(row: int, device: torch.device) -> Tensor:
    return torch.full((), row, dtype=torch.int32, device=device)
