"""`attention`: one call for every backend.

FlexAttention runs compiled, always: uncompiled it materialises every score. Each combination of mask structure
and tensor kind has a compiled function of its own, so that many masks do not run into the recompilation limit of
one function, after which torch.compile silently stops compiling; lengths and integers in the mask become
symbolic after their first change, so new lengths reuse what is there.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
import types
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from . import backends, chunked
from .algebra import Mask, checked
from .block_mask import BLOCK_SIZE, check_batch_and_heads
from .errors import BackendUnavailableError, ConfigError, MaskError
from .plan import FEW_ROWS, AttentionPlan, Segment, plan

FOR_CUDNN = 8192  # tokens; see `_sdpa`
DECODE_OPTIONS = {"BLOCK_N": 64, "num_stages": 3, "num_warps": 4}  # of the decode kernel, where tiles are small enough
NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | AttentionPlan,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    backend: str = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | AttentionPlan,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    backend: str = "auto",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | AttentionPlan,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention under a mask: softmax(query @ key.T * scale, masked) @ value, grouped-query aware.

    Args:
        query: `[batch, heads, q_len, head_dim]`.
        key: `[batch, kv_heads, kv_len, head_dim]`, heads a multiple of kv_heads.
        value: `[batch, kv_heads, kv_len, value_dim]`.
        mask: a `Mask` (query row i is row i), or an `AttentionPlan` made for these lengths.
        scale: factor of the scores, 1 / sqrt(head_dim) if None.
        softcap: bounds scores to (-softcap, softcap) through a tanh (Gemma 2).
        sink_logits: `[heads]`, one learned logit per head that joins the softmax without a value (gpt-oss).
        backend: "auto", or the one to use or be refused: "flash", "triton", "cpp", "chunked". A plan has its own, and
            refuses another.
        return_lse: whether to return the log-sum-exp too.

    Returns:
        The output `[batch, heads, q_len, value_dim]`, zero in rows that see nothing; with `return_lse` also the
        log-sum-exp of the scores, sink logit included, `[batch, heads, q_len]` (natural logarithm, float32 or wider).

    Raises:
        MaskError: if the shapes do not fit each other or the mask, or `softcap` is not positive.
        ConfigError: if `backend` is no backend, or not that of the plan.
        BackendUnavailableError: if the backend cannot run what is asked; the message says the way out.

    Examples:
        >>> from swaa_flex.masks import causal, sinks, window
        >>> query, key, value = torch.randn(3, 1, 2, 300, 16).unbind(0)
        >>> attention(query, key, value, causal() & (window(64) | sinks(4))).shape
        torch.Size([1, 2, 300, 16])
    """
    _check_shapes(query, key, value, sink_logits)
    if softcap is not None and not softcap > 0:
        raise MaskError(f"softcap={softcap}: expected a positive bound, or None for none")
    needs_grad = torch.is_grad_enabled() and any(
        t.requires_grad for t in (query, key, value, sink_logits) if t is not None
    )
    if isinstance(mask, AttentionPlan):
        ready = _checked_plan(mask, query, key, needs_grad)
        if backend not in ("auto", ready.backend):
            raise ConfigError(f"backend={backend!r}: the plan is for {ready.backend!r}; make one for the other")
    else:
        checked("mask", mask)
        chosen = backends.resolve(
            backend,
            query.device,
            q_len=query.shape[2],
            needs_grad=needs_grad,
            dtype=query.dtype,
            head_dim=max(query.shape[-1], value.shape[-1]),
        )
        ready = plan(
            mask,
            query.shape[2],
            key.shape[2],
            batch=query.shape[0],
            heads=query.shape[1],
            device=query.device,
            backend=chosen,
            needs_grad=needs_grad,
            head_dim=query.shape[-1],
        )
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if ready.backend == "chunked":
        parts = tuple((s.first, s.mask, s.chunks) for s in ready.segments)
        out, lse = chunked.attention(
            query,
            key,
            value,
            parts,
            scale=scale,
            softcap=softcap,
            sink_logits=sink_logits,
            return_lse=return_lse,
        )
    else:
        out, lse = _flex(query, key, value, ready, scale, softcap, sink_logits, return_lse)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ready: AttentionPlan,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    needs_lse = return_lse or sink_logits is not None
    if needs_lse and ready.backend == "cpp":
        raise BackendUnavailableError(
            "backend='cpp' cannot run here: FlexAttention on CPU returns no log-sum-exp, which learned sink logits "
            "and return_lse need; run without torch.compile, where backend='chunked' has both"
        )
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for segment in ready.segments:
        is_slice = (segment.first, segment.stop) != (0, ready.q_len)
        rows = query[:, :, segment.first : segment.stop] if is_slice else query
        part, part_lse = _call(rows, key, value, segment, is_slice, scale, softcap, needs_lse)
        outs.append(part)
        if part_lse is not None:
            lses.append(part_lse / math.log(2) if segment.backend == "flash" and _flash_lse_is_scaled() else part_lse)
    out = _joined(outs, ready)
    if not needs_lse:
        return out, None
    lse = _joined(lses, ready)
    if sink_logits is not None:
        sinks = sink_logits.to(lse.dtype).view(1, -1, 1)
        out = (out * torch.sigmoid(lse - sinks)[..., None]).to(out.dtype)
        lse = torch.logaddexp(lse, sinks)
    return out, lse


def _joined(parts: list[Tensor], ready: AttentionPlan) -> Tensor:
    """What the segments computed, `[batch, heads, rows, ...]`, as one tensor."""
    whole = parts[0]
    if len(parts) == 1:
        return whole
    if whole.shape[2] != ready.q_len:
        return torch.cat(parts, dim=2)
    for segment, part in zip(ready.segments[1:], parts[1:], strict=True):
        if whole.requires_grad:  # the backward pass of the first needs it unchanged
            whole = torch.slice_scatter(whole, part, 2, segment.first, segment.stop)
        else:
            whole[:, :, segment.first : segment.stop] = part
    return whole


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment: Segment,
    is_slice: bool,
    scale: float,
    softcap: float | None,
    needs_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    query = _padded_groups(query, key, segment, is_slice)
    if query.shape[1] != heads:
        out, lse = _call(query, key, value, segment, is_slice, scale, softcap, needs_lse)
        return _unpadded_groups(out, key, group), None if lse is None else _unpadded_groups(lse, key, group)
    plain = segment.is_causal_end and not needs_lse and softcap is None
    if plain and _sdpa_is_faster(query, key, value, segment, is_slice):
        return _sdpa(query, key, value, scale), None
    backend = segment.backend
    options = _kernel_options(query, key, segment, is_slice)
    block_mask = segment.block_mask
    assert block_mask is not None
    if torch.compiler.is_compiling():
        return _flex_call(query, key, value, block_mask, scale, softcap, needs_lse, options)
    kind = (
        segment.compiled_for,
        backend,
        query.device,
        query.dtype,
        # The decode kernel wants a batch that does not vary: each size is compiled on its own.
        (query.shape[0] if _decodes(options) else query.shape[0] == 1, query.shape[2] == 1),
        (query.shape[1], query.shape[3], key.shape[1], value.shape[3]),
        (scale, softcap, needs_lse, tuple((options or {}).items())),
        torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
    )
    return _compiled(kind)(query, key, value, block_mask, scale, softcap, needs_lse, options)


def _sdpa_is_faster(query: Tensor, key: Tensor, value: Tensor, segment: Segment, is_slice: bool) -> bool:
    """Whether PyTorch's own kernels win at full causal rows (benchmarks/kernel_options.py).

    Whole prompts: cuDNN is ahead of the Triton kernel, not of FLASH. A few last rows (64 were measured):
    FlashAttention-2 splits the keys among the processors, as the decode kernel does for even fewer. Not in a compiled
    graph: torch.compile cannot trace the bias that aligns the last rows with the last keys (torch 2.13).
    """
    if torch.compiler.is_compiling():
        return False
    if not query.is_cuda or query.dtype.itemsize != 2 or query.shape[3] != value.shape[3] or query.shape[3] > 256:
        return False
    if query.shape[2] == key.shape[2]:
        return segment.backend == "triton"
    return query.shape[2] <= FEW_ROWS and not _can_decode(query, key, segment, is_slice)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Full causal rows, the last of which sees all keys."""
    whole = query.shape[2] == key.shape[2]
    bias = None if whole else causal_lower_right(query.shape[2], key.shape[2])
    # cuDNN prepares for each new length, for tens of milliseconds: more than it saves in a model with a short prompt.
    with sdpa_kernel(NOT_CUDNN) if whole and query.shape[2] < FOR_CUDNN else contextlib.nullcontext():
        out: Tensor = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, is_causal=whole, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    return out


def _flex_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    scale: float,
    softcap: float | None,
    needs_lse: bool,
    options: Any,
) -> tuple[Tensor, Tensor | None]:
    def capped(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)  # type: ignore[operator]

    out, aux = flex_attention(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=options,
        return_aux=AuxRequest(lse=needs_lse),
    )
    return out, aux.lse


@functools.cache
def _compiled(kind: tuple[Any, ...]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A compiled `_flex_call` for one kind of call.

    The function gets a code object and a name of its own. torch.compile counts recompilations per code object and
    raises (with fullgraph) or runs uncompiled once there are more than `torch._dynamo.config.recompile_limit`; and
    it remembers by name which sizes and integers have varied.
    """
    name = f"flex_attention_{next(_numbers)}"
    own = types.FunctionType(_flex_call.__code__.replace(co_name=name), globals(), name)
    return torch.compile(own, fullgraph=True)


_numbers = itertools.count()


def _kernel_options(query: Tensor, key: Tensor, segment: Segment, is_slice: bool) -> dict[str, Any] | None:
    if segment.backend == "cpp":
        return None
    if segment.backend == "flash":
        return {"BACKEND": "FLASH"}
    if not _can_decode(query, key, segment, is_slice):
        return _prefill_options(query, key)
    # In a compiled graph the batch may vary; FlexAttention then takes its other kernel, or refuses if told not to.
    options: dict[str, Any] = {"BACKEND": "AUTO" if torch.compiler.is_compiling() else "TRITON_DECODE"}
    if query.dtype.itemsize == 2 and query.shape[-1] <= 128:
        # The defaults of torch 2.11 to 2.13 keep one tile in flight, which leaves a sixth of the bandwidth unused
        # or more (benchmarks/decode_kernel.py).
        options |= DECODE_OPTIONS
    return options


def _decodes(options: dict[str, Any] | None) -> bool:
    return options is not None and options["BACKEND"] == "TRITON_DECODE"


def _prefill_options(query: Tensor, key: Tensor) -> dict[str, Any]:
    """What is fastest by measurement (benchmarks/kernel_options.py; sm90), the defaults of FlexAttention elsewhere.

    In a compiled graph they are the defaults too: there inductor sees whether lengths are whole blocks, and lays out
    queries as views that TMA cannot read ("misaligned address", a model of the shape of Qwen3, torch 2.11). Without
    TMA only tiles of 128 x 128 are faster than the defaults, for lengths of whole blocks, and slower for others.
    """
    options: dict[str, Any] = {"BACKEND": "TRITON"}
    if torch.compiler.is_compiling():
        return options
    if query.dtype.itemsize == 2 and 64 < query.shape[3] <= 128 and backends.is_hopper(query.device.index):
        # Two programs per processor hide each other's softmax; loads by TMA leave registers for that, and reach
        # beyond 2^31 elements, where plain ones overflow.
        options |= {"fwd_USE_TMA": True, "fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64}
        options |= {"fwd_num_stages": 3, "fwd_num_warps": 4}
    if query.shape[2] % BLOCK_SIZE == 0 and key.shape[2] % BLOCK_SIZE == 0:  # one kernel is for all lengths
        options["IS_DIVISIBLE"] = True
    return options


def _padded_groups(query: Tensor, key: Tensor, segment: Segment, is_slice: bool) -> Tensor:
    """`query` with zero heads added to each group, if the decode kernel, which wants powers of 2, can then run it."""
    group = query.shape[1] // key.shape[1]
    if segment.backend != "triton" or group & (group - 1) == 0 or segment.mask.looks_at_heads:
        return query
    wanted = 1 << group.bit_length()
    grouped = query.unflatten(1, (key.shape[1], group))
    padded: Tensor = F.pad(grouped, (0, 0, 0, 0, 0, wanted - group)).flatten(1, 2)
    return padded if _can_decode(padded, key, segment, is_slice) else query


def _unpadded_groups(x: Tensor, key: Tensor, group: int) -> Tensor:
    """Drops the heads that `_padded_groups` added, from `[batch, heads, ...]`."""
    grouped: Tensor = x.unflatten(1, (key.shape[1], -1))[:, :, :group]
    return grouped.flatten(1, 2)


def _can_decode(query: Tensor, key: Tensor, segment: Segment, is_slice: bool) -> bool:
    """Whether the decode kernel, which splits the keys among the processors, can run a few rows.

    It holds all rows of a kv head's group in one tile, which must divide the sparse block, and gives wrong results for
    a few rows cut out of a longer query (seen with torch 2.11 on an H200).
    """
    group = query.shape[1] // key.shape[1]
    block_mask = segment.block_mask
    assert block_mask is not None
    fits = query.shape[2] * group <= 64 and group & (group - 1) == 0
    return fits and not is_slice and block_mask.full_kv_num_blocks is None and block_mask.kv_indices.shape[1] == 1


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _flash_lse_is_scaled() -> bool:
    """Whether flex_attention takes FLASH's log-sum-exp for base 2 and scales it once too often (torch 2.11).

    Later versions tell the two apart by a variable of this name (torch 2.13).
    """
    return "stats_are_log2" not in inspect.getsource(flex_attention)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, sink_logits: Tensor | None) -> None:
    if not (query.dim() == key.dim() == value.dim() == 4):
        raise MaskError(
            "query, key and value must be [batch, heads, len, head_dim]; got "
            f"{list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )
    if 0 in (*query.shape[1:], *key.shape[1:], *value.shape[1:]):
        raise MaskError(
            "query, key and value: expected at least one head, row and number, got "
            f"{list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )
    if not query.device == key.device == value.device:
        raise MaskError(
            f"query, key and value: expected one device, got {query.device}, {key.device} and {value.device}"
        )
    same = query.shape[0] == key.shape[0] == value.shape[0] and query.shape[3] == key.shape[3]
    if not same or key.shape[1:3] != value.shape[1:3] or query.shape[1] % key.shape[1]:
        raise MaskError(
            "query [batch, heads, q_len, head_dim], key [batch, kv_heads, kv_len, head_dim] and value [batch, "
            f"kv_heads, kv_len, value_dim] do not fit: {list(query.shape)}, {list(key.shape)}, {list(value.shape)}; "
            "heads must be a multiple of kv_heads"
        )
    if sink_logits is not None and not isinstance(sink_logits, Tensor):
        raise MaskError(f"sink_logits: expected a tensor [heads], got {sink_logits!r}")
    if sink_logits is not None and sink_logits.shape != query.shape[1:2]:
        raise MaskError(f"sink_logits: expected one per query head, [{query.shape[1]}], got {list(sink_logits.shape)}")


def _checked_plan(ready: AttentionPlan, query: Tensor, key: Tensor, needs_grad: bool) -> AttentionPlan:
    lengths = (query.shape[2], key.shape[2])
    if (ready.q_len, ready.kv_len) != lengths:
        raise MaskError(
            f"the plan is for q_len={ready.q_len}, kv_len={ready.kv_len} and the tensors have {lengths[0]} and "
            f"{lengths[1]}; make a plan for these lengths"
        )
    given = (query.shape[0], query.shape[3])
    if ready.backend == "flash" and any(
        own not in (None, new) for own, new in zip(ready.made_for, given, strict=True)
    ):
        raise MaskError(
            f"the plan is for batch and head_dim {ready.made_for} and the query has {given}; make a plan for these"
        )
    if needs_grad and not ready.needs_grad and ready.backend != "chunked":
        raise MaskError("the plan was made without gradients; make it with plan(..., needs_grad=True)")
    check_batch_and_heads(ready.mask, query.shape[0], query.shape[1])
    return ready
