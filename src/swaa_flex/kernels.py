"""Which kernel runs a stretch of query rows, how, and with which block lists: functions of shapes and capability."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch.nn.attention.flex_attention import BlockMask

from .algebra import Mask, inlined, numbers_in_functions
from .backends import FLASH_ROWS, Capability, Inputs
from .block_mask import BLOCK_SIZE
from .chunked import Chunk

FEW_ROWS = 256
"""Up to so many rows that differ from the rest are computed twice, rather than left out of the rest's kernel call. As
many take a kernel that splits the keys."""

DECODE_TILE = 64
"""Rows of a query times heads of a group that the decode kernel takes at most."""

DECODE_OPTIONS = {"BLOCK_N": 64, "num_stages": 3, "num_warps": 4}  # of the decode kernel, where tiles are small enough


@dataclass(frozen=True, eq=False)
class Segment:
    """A stretch of query rows `[first, stop)` that is one kernel call.

    Attributes:
        first: its first row.
        stop: one past its last row.
        backend: the backend that runs it.
        mask: evaluated at row indices counted from `first`.
        block_mask: the block lists of the mask, None for the chunked backend.
        chunks: what the chunked backend has instead.
        is_slice: whether the query has other rows than these.
        is_causal_end: whether these are full causal rows, the last of which sees all keys, as kernels without masks
            compute them.
    """

    first: int
    stop: int
    backend: str
    mask: Mask
    block_mask: BlockMask | None = None
    chunks: tuple[Chunk, ...] = ()
    is_slice: bool = False
    is_causal_end: bool = False

    @functools.cached_property
    def compiled_for(self) -> Any:
        """What of its mask a compiled kernel is made for."""
        if self.backend == "flash":
            return inlined(self.mask)
        # Integers that vary between calls are symbolic, which the CPU kernel cannot have: see plan.py.
        return self.mask.structure, numbers_in_functions(self.mask) if self.backend == "cpp" else None


class Kernel(NamedTuple):
    """A kernel, and what it is asked for.

    Attributes:
        name: "sdpa" is PyTorch's `scaled_dot_product_attention`, "decode" FlexAttention's decode kernel, the others
            are FlexAttention's kernels of these backends.
        options: `kernel_options` of flex_attention, None for its own.
        group: query heads per key-value head that it runs; more than there are if the rest are to be zeros.
    """

    name: Literal["sdpa", "flash", "triton", "decode", "cpp"]
    group: int
    options: dict[str, Any] | None = None


def backend_for_rows(backend: str, rows: int) -> str:
    """The backend of a stretch of rows in a plan for `backend`."""
    return "triton" if backend == "flash" and rows < FLASH_ROWS else backend


def rows_per_block(backend: str, inputs: Inputs, capability: Capability) -> int:
    """Query rows in a block of the lists.

    FLASH has a faster kernel for small heads, with tiles of 192 rows (sm90; benchmarks/kernel_options.py).
    """
    small = inputs.head_dim is not None and inputs.head_dim <= 64
    return 192 if backend == "flash" and small and not inputs.needs_grad and capability.is_hopper else BLOCK_SIZE


def lists_full_blocks(backend: str, rows: int, needs_grad: bool) -> bool:
    """Whether blocks without masked pairs have lists of their own.

    The decode kernel sizes its splits by kv_len instead of by the list once there are full blocks.
    """
    return backend != "triton" or rows >= BLOCK_SIZE or needs_grad


def choose(segment: Segment, inputs: Inputs, capability: Capability, *, softcap: bool = False) -> Kernel:
    """The kernel for a segment of a plan.

    Args:
        segment: not of the chunked backend.
        inputs: of the call; its `q_len` is that of the segment.
        capability: what the device can do.
        softcap: whether scores are bounded.
    """
    group, backend = inputs.group, segment.backend
    decode_group = _decode_group(segment, inputs)
    plain = segment.is_causal_end and not inputs.needs_lse and not softcap
    if plain and _sdpa_is_faster(backend, inputs, capability, can_decode=decode_group is not None):
        return Kernel("sdpa", group)
    if backend == "cpp":
        return Kernel("cpp", group)
    if backend == "flash":
        return Kernel("flash", group, {"BACKEND": "FLASH"})
    if decode_group is None:
        return Kernel("triton", group, _prefill_options(inputs, capability))
    return Kernel("decode", decode_group, _decode_options(inputs))


def _decode_group(segment: Segment, inputs: Inputs) -> int | None:
    """Heads per group with which the decode kernel can run the segment, or None.

    The decode kernel splits the keys among the processors. It wants a power of 2, which zero heads make of any number
    unless the mask tells heads apart. It holds all rows of a group in one tile, which must divide the sparse block,
    and gives wrong results for a few rows cut out of a longer query (seen with torch 2.11 on an H200).
    """
    if segment.backend != "triton" or segment.is_slice:
        return None
    block_mask = segment.block_mask
    assert block_mask is not None
    if block_mask.full_kv_num_blocks is not None or block_mask.kv_indices.shape[1] != 1:
        return None
    group = inputs.group
    if group & (group - 1):
        if segment.mask.looks_at_heads:
            return None
        group = 1 << group.bit_length()
    return group if inputs.q_len * group <= DECODE_TILE else None


def _sdpa_is_faster(backend: str, inputs: Inputs, capability: Capability, can_decode: bool) -> bool:
    """Whether PyTorch's own kernels win at full causal rows (benchmarks/kernel_options.py).

    Whole prompts: cuDNN is ahead of the Triton kernel, not of FLASH. A few last rows (64 were measured):
    FlashAttention-2 splits the keys among the processors, as the decode kernel does for even fewer. Not in a compiled
    graph: torch.compile cannot trace the bias that aligns the last rows with the last keys (torch 2.13).
    """
    if inputs.in_graph or capability.device_type != "cuda" or not _is_half(inputs):
        return False
    assert inputs.head_dim is not None
    if inputs.head_dim != inputs.value_dim or inputs.head_dim > 256:
        return False
    if inputs.q_len == inputs.kv_len:
        return backend == "triton"
    return inputs.q_len <= FEW_ROWS and not can_decode


def _decode_options(inputs: Inputs) -> dict[str, Any]:
    assert inputs.head_dim is not None
    # In a compiled graph the batch may vary; FlexAttention then takes its other kernel, or refuses if told not to.
    options: dict[str, Any] = {"BACKEND": "AUTO" if inputs.in_graph else "TRITON_DECODE"}
    if _is_half(inputs) and inputs.head_dim <= 128:
        # The defaults of torch 2.11 to 2.13 keep one tile in flight, which leaves a sixth of the bandwidth unused
        # or more (benchmarks/decode_kernel.py).
        options |= DECODE_OPTIONS
    return options


def _prefill_options(inputs: Inputs, capability: Capability) -> dict[str, Any]:
    """What is fastest by measurement (benchmarks/kernel_options.py; sm90), the defaults of FlexAttention elsewhere.

    In a compiled graph they are the defaults too: there inductor sees whether lengths are whole blocks, and lays out
    queries as views that TMA cannot read ("misaligned address", a model of the shape of Qwen3, torch 2.11). Without
    TMA only tiles of 128 x 128 are faster than the defaults, for lengths of whole blocks, and slower for others.
    """
    assert inputs.head_dim is not None
    options: dict[str, Any] = {"BACKEND": "TRITON"}
    if inputs.in_graph:
        return options
    if _is_half(inputs) and 64 < inputs.head_dim <= 128 and capability.is_hopper:
        # Two programs per processor hide each other's softmax; loads by TMA leave registers for that, and reach
        # beyond 2^31 elements, where plain ones overflow.
        options |= {"fwd_USE_TMA": True, "fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64}
        options |= {"fwd_num_stages": 3, "fwd_num_warps": 4}
    if inputs.q_len % BLOCK_SIZE == 0 and inputs.kv_len % BLOCK_SIZE == 0:  # one kernel is for all lengths
        options["IS_DIVISIBLE"] = True
    return options


def _is_half(inputs: Inputs) -> bool:
    return inputs.dtype is not None and inputs.dtype.itemsize == 2
