"""From a `Mask` to what a backend runs: the layout choices that make its kernels fast and correct."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import chunked
from .algebra import (
    Mask,
    checked,
    has_single_number,
    on_device,
    only_integers,
    per_sequence,
    versions,
    with_tensors,
    with_tensors_in_memory,
)
from .backends import Capability, Inputs, capability_of, resolve
from .block_mask import BLOCK_SIZE, bounded_on, check_sizes, layout, list_width, row_block_bounds
from .intervals import Bounds
from .kernels import FEW_ROWS, Segment, backend_for_rows, lists_full_blocks, rows_per_block
from .masks import causal, offset
from .tracing import is_tracing


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """A mask made ready for a backend: run it with `attention(query, key, value, plan)`.

    Made by `plan`; all layers with the same mask and lengths share one. Where segments overlap, later ones are right.

    Attributes:
        mask: at the rows of the query, offset included.
        backend: the backend that runs it.
        segments: the kernel calls.
        made_for: the inputs, as far as they were known.
        capability: of the device.
        versions: of the tensors in the mask when the plan was made; None if that was in a compiled graph.
    """

    mask: Mask
    backend: str
    segments: tuple[Segment, ...]
    made_for: Inputs
    capability: Capability
    versions: tuple[int, ...] | None

    @property
    def is_outdated(self) -> bool:
        """Whether a tensor in the mask has changed in place since the plan was made."""
        known = self.versions is not None and not is_tracing()
        return known and self.versions != versions(self.mask)

    @property
    def q_len(self) -> int:
        """Number of query rows."""
        return self.made_for.q_len

    @property
    def kv_len(self) -> int:
        """Number of keys."""
        return self.made_for.kv_len

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
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    q_offset: int | Tensor = 0,
    needs_grad: bool = False,
    head_dim: int | None = None,
    value_dim: int | None = None,
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
        dtype: of query, key and value, if known: "auto" takes flash only if it is.
        backend: "auto", "flash", "triton", "cpp" or "chunked".
        q_offset: added to query indices, an int or a 0-d integer tensor.
        needs_grad: whether the backward pass will run.
        head_dim: of query and key, if known: "auto" takes flash only if it is, and flash has blocks of another shape
            for small ones.
        value_dim: of the value, if it differs from `head_dim`.

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
    inputs = Inputs(
        q_len=q_len,
        kv_len=kv_len,
        device=torch.device(device),
        batch=batch,
        heads=heads,
        dtype=dtype,
        head_dim=head_dim,
        value_dim=value_dim,
        needs_grad=needs_grad,
        in_graph=is_tracing(),
    )
    return plan_for(mask, inputs, backend, q_offset)


def plan_for(mask: Mask, inputs: Inputs, backend: str, q_offset: int | Tensor = 0) -> AttentionPlan:
    """`plan` for a call of which `inputs` says what is known."""
    everything = _Stretch.of(on_device(checked("mask", mask), inputs.device), 0, inputs.q_len, q_offset)
    check_sizes(everything.local, inputs.q_len, inputs.kv_len, inputs.batch, inputs.heads)
    capability = capability_of(inputs.device)
    backend = resolve(backend, inputs, capability)
    known = None if inputs.in_graph else versions(everything.local)
    if backend == "chunked":
        segments = [_chunked_segment(stretch, inputs) for stretch in everything.split()]
        return AttentionPlan(everything.local, backend, tuple(segments), inputs, capability, known)
    # The compiled CPU kernel is wrong on a slice of a query that is computed in the same graph (torch 2.13).
    stretches = [everything] if backend == "cpp" and inputs.in_graph else _covered(everything.split(), inputs.q_len)
    bounded = [_bounded(stretch, inputs, backend, capability) for stretch in stretches]
    # Where no list would become shorter, one call is better; but a compiled graph keeps the stretches, whose masks
    # hold no symbolic row numbers: capturing those fails in torch 2.11's lowering of flex_attention.
    if len(bounded) > 1 and not inputs.in_graph and len({list_width(b.bounds, inputs.kv_len) for b in bounded}) == 1:
        bounded = [_bounded(everything, inputs, backend, capability)]
    segments = [_flex_segment(b, inputs) for b in bounded]
    return AttentionPlan(everything.local, backend, tuple(segments), inputs, capability, known)


class _Stretch(NamedTuple):
    """Query rows `[first, stop)` and the mask that holds there."""

    first: int
    stop: int
    mask: Mask  # at row i + shift for row i of the stretch
    shift: int | Tensor
    local: Mask  # at row i

    @classmethod
    def of(cls, mask: Mask, first: int, stop: int, shift: int | Tensor) -> _Stretch:
        return cls(first, stop, mask, shift, offset(mask, q=shift))

    @property
    def rows(self) -> int:
        return self.stop - self.first

    def split(self) -> list[_Stretch]:
        """Its rows, cut where the mask is known to change."""
        if isinstance(self.shift, Tensor):
            return [self]
        edges = [0, self.rows]
        for row in self.mask.row_breaks():  # insertion by comparisons: torch.compile cannot sort symbolic integers
            row = row - self.shift
            if 0 < row < self.rows:
                at = sum(1 for edge in edges if edge < row)
                if edges[at] != row:
                    edges.insert(at, row)
        return [
            _Stretch.of(
                self.mask.for_rows(a + self.shift, b - 1 + self.shift), self.first + a, self.first + b, self.shift + a
            )
            for a, b in itertools.pairwise(edges)
        ]


class _Bounded(NamedTuple):
    """A stretch whose kernel is known, and what its row blocks may see."""

    stretch: _Stretch
    backend: str
    mask: Mask  # as the kernel evaluates it
    bounds: Bounds
    bounds_device: torch.device
    q_block: int


def _covered(stretches: list[_Stretch], q_len: int) -> list[_Stretch]:
    """The longest part stretched over all rows and the others after it, if those are few: nothing has to be joined."""
    at = 0
    for i, stretch in enumerate(stretches):
        if stretch.rows > stretches[at].rows:
            at = i
    longest = stretches[at]
    if len(stretches) == 1 or q_len - longest.rows > FEW_ROWS:
        return stretches
    covering = _Stretch.of(longest.mask, 0, q_len, longest.shift - longest.first)
    return [covering, *stretches[:at], *stretches[at + 1 :]]


def _chunked_segment(stretch: _Stretch, inputs: Inputs) -> Segment:
    chunks = chunked.chunks(stretch.local, stretch.rows, inputs.kv_len, inputs.device)
    return Segment(stretch.first, stretch.stop, "chunked", stretch.local, chunks=chunks)


def _bounded(stretch: _Stretch, inputs: Inputs, backend: str, capability: Capability) -> _Bounded:
    backend = backend_for_rows(backend, stretch.rows)
    mask = stretch.local
    if backend == "flash":
        readable = _for_flash(stretch, inputs)
        backend, mask = ("triton", mask) if readable is None else ("flash", readable)
    if backend == "triton" and inputs.in_graph and not isinstance(stretch.shift, Tensor) and stretch.shift != 0:
        # As a tensor, since it may be symbolic: see `plan_for`.
        mask = offset(stretch.mask, q=torch.full((), stretch.shift, dtype=torch.int32, device=inputs.device))
    q_block = rows_per_block(backend, inputs, capability)
    here = bounded_on(stretch.local, inputs.device, inputs.needs_grad)
    bounds = row_block_bounds(stretch.local, stretch.rows, inputs.kv_len, q_block, here)
    return _Bounded(stretch, backend, mask, bounds, here, q_block)


def _for_flash(stretch: _Stretch, inputs: Inputs) -> Mask | None:
    """The mask of a stretch in a form that FLASH can read, or None.

    In a compiled graph inductor may free tensors before this kernel has read them, and cannot inline symbolic integers
    (torch 2.11; later versions can do both and are not tested).
    """
    mask, shift = stretch.local, stretch.shift
    if inputs.in_graph:
        return mask if not isinstance(shift, Tensor) and shift == 0 and only_integers(mask) else None
    readable = mask if inputs.batch is None else per_sequence(mask, inputs.batch, inputs.device)
    return None if has_single_number(readable) else readable


def _flex_segment(bounded: _Bounded, inputs: Inputs) -> Segment:
    stretch, backend, mask = bounded.stretch, bounded.backend, bounded.mask
    if inputs.in_graph:
        mask = with_tensors_in_memory(mask)
    block_mask = layout(
        mask,
        bounded.bounds,
        stretch.rows,
        inputs.kv_len,
        device=inputs.device,
        bounds_device=bounded.bounds_device,
        block_size=(bounded.q_block, BLOCK_SIZE),
        # The compiled CPU kernel insists on kv_len <= list width * block (torch 2.11 to 2.13, flex_cpu.py).
        full_width=backend == "cpp",
        separate_full=lists_full_blocks(backend, stretch.rows, inputs.needs_grad),
        needs_grad=inputs.needs_grad,
    )
    if backend == "cpp" and not inputs.in_graph:
        # Symbolic integers in a mask_mod can break the compiled CPU kernel: inductor substitutes its own names in the
        # C++ text, and "ks2" also matches in "ks27" (torch 2.11 to 2.13, codegen/cpp_flex_attention_template.py).
        mask = block_mask.mask_mod = with_tensors(mask, inputs.device)
    return Segment(
        stretch.first,
        stretch.stop,
        backend,
        mask,
        block_mask,
        is_slice=stretch.rows != inputs.q_len,
        is_causal_end=_is_causal_end(stretch, inputs),
    )


def _is_causal_end(stretch: _Stretch, inputs: Inputs) -> bool:
    """Whether the rows are full causal ones, the last of which sees all keys."""
    if isinstance(stretch.shift, Tensor) or inputs.in_graph:
        return False
    return stretch.mask == causal() and stretch.shift + stretch.rows == inputs.kv_len
