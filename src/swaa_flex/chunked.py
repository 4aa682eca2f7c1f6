"""The plain-PyTorch backend: rows in chunks, each against the keys its rows may see.

It runs everywhere, in every dtype, with gradients, and is linear in memory for windows. For each chunk it reads
on the host which kv intervals the mask keeps, so it cannot be traced into a full graph.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .algebra import Mask
from .block_mask import Range, merged_ranges, row_block_bounds
from .errors import BackendUnavailableError

CHUNK_ROWS = 256


@dataclass(frozen=True)
class Chunk:
    """Query rows `[first, stop)` and the kv intervals that hold everything they see."""

    first: int
    stop: int
    kept: tuple[tuple[int, int], ...]
    all_visible: bool  # every row sees every kept key, so no mask is needed


Part = tuple[int, Mask, tuple[Chunk, ...]]
"""A stretch of rows: its first row, its mask (at row indices counted from there), its chunks."""


def chunks(mask: Mask, q_len: int, kv_len: int, device: torch.device) -> tuple[Chunk, ...]:
    """Cuts the query rows into chunks and reads on the host what each of them may see.

    Raises:
        BackendUnavailableError: if the device holds no numbers that could be read.
    """
    if device.type == "meta":
        raise BackendUnavailableError(
            "backend='chunked' cannot run here: it reads on the host what rows see, and meta tensors hold no numbers; "
            "use tensors on a device, or build_block_mask for the shapes of block lists"
        )
    bounds = row_block_bounds(mask, q_len, kv_len, CHUNK_ROWS, device)
    count = -(-q_len // CHUNK_ROWS)
    superset = [_hull(r) for r in merged_ranges(bounds.superset, count, device)]
    covered = torch.ones(count, dtype=torch.bool, device=device)
    subset = merged_ranges(bounds.subset, count, device)
    for start, stop in superset:
        inside = torch.zeros((), dtype=torch.bool, device=device)
        for sub_start, sub_stop in subset:
            inside = inside | ((sub_start <= start) & (stop <= sub_stop))
        fits = (stop <= start) | inside
        covered = covered & fits.expand(torch.broadcast_shapes(fits.shape, (1, count))).flatten(0, -2).all(0)
    rows = torch.stack([*(end for r in superset for end in r), covered.int()], dim=-1).tolist()
    return tuple(
        Chunk(i * CHUNK_ROWS, min(q_len, (i + 1) * CHUNK_ROWS), _joined(row[:-1]), bool(row[-1]))
        for i, row in enumerate(rows)
    )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parts: tuple[Part, ...],
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention over chunks.

    Args:
        query: `[batch, heads, q_len, head_dim]`.
        key: `[batch, kv_heads, kv_len, head_dim]`, heads a multiple of kv_heads.
        value: `[batch, kv_heads, kv_len, value_dim]`.
        parts: the stretches of rows of a plan.
        scale: factor of the scores.
        softcap: bounds the scores to (-softcap, softcap) through a tanh.
        sink_logits: `[heads]`, logits of one more key without value per head.
        return_lse: whether to return the log-sum-exp of the scores (sink logit included).

    Returns:
        The output `[batch, heads, q_len, value_dim]`, zero for rows that see nothing, and the log-sum-exp
        `[batch, heads, q_len]` (natural logarithm; float32, or float64 for float64 inputs) or None.
    """
    tensors = (query, key, value) if sink_logits is None else (query, key, value, sink_logits)
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise BackendUnavailableError(
            "backend='chunked' has no forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad); use "
            "reverse mode: torch.func.vjp, torch.func.grad or backward()"
        )
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not (needs_grad or softcap is not None or sink_logits is not None or return_lse):
        return _fused(query, key, value, parts, scale), None
    out, lse = _ChunkedAttention.apply(query, key, value, sink_logits, parts, scale, softcap)  # type: ignore[no-untyped-call]
    return out, lse if return_lse else None


def _fused(query: Tensor, key: Tensor, value: Tensor, parts: tuple[Part, ...], scale: float) -> Tensor:
    """Without what `scaled_dot_product_attention` lacks: softcap, sink logits, log-sum-exp, unseen keys of NaN."""
    out = None
    for rows, visible, chunk in _each(parts, query):
        k, v = _kept(key, chunk), _kept(value, chunk)
        if not chunk.kept or (visible is not None and not _known_finite(k, v)):
            result, _ = _explicit(_rows(query, rows), k, v, visible, scale)
        else:
            q = _grouped(_rows(query, rows), key)
            if visible is None:
                result = F.scaled_dot_product_attention(q, k, v, scale=scale)
            else:
                visible = _per_group(visible, query.shape[1], key.shape[1])
                result = F.scaled_dot_product_attention(q, k, v, visible, scale=scale)
                result = result.masked_fill(~visible.any(-1, keepdim=True), 0)
            result = _ungrouped(result, query.shape[1])
        out = _put(out, rows, result.to(query.dtype), query)
    assert out is not None
    return out


def _explicit(
    query: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output `[batch, heads, rows, value_dim]` and log-sum-exp of rows and their kept keys, in float32 or wider."""
    compute = torch.promote_types(query.dtype, torch.float32)
    k, v = k.to(compute), v.to(compute)
    scores, _ = _scores(query, k, visible, scale, softcap)
    lse = scores.logsumexp(-1) if k.shape[2] else scores.sum(-1) - math.inf
    if sink_logits is not None:
        lse = torch.logaddexp(lse, sink_logits.to(compute).view(1, -1, 1))
    weights = _grouped((scores - lse.clamp(min=torch.finfo(compute).min)[..., None]).exp(), k)
    if visible is None or _known_finite(v):
        return _ungrouped(weights @ v, query.shape[1]), lse
    # What a row does not see has weight 0, and 0 * NaN would be NaN: infinities and NaN are counted, not multiplied.
    special = torch.cat([v == math.inf, v == -math.inf, v.isnan()], dim=-1).to(compute)
    up, down, nan = (weights @ special > 0).chunk(3, dim=-1)
    out = weights @ _finite_or_zero(v)
    for seen, number in ((up, math.inf), (down, -math.inf), (nan, math.nan)):
        out = out + torch.where(seen, number, 0.0).to(compute)
    return _ungrouped(out, query.shape[1]), lse


def _without_autocast(method: Callable[..., Any]) -> Any:
    """Autocast would take products of float32 for ones of bfloat16."""

    @functools.wraps(method)
    def exact(*args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        with torch.autocast(device.type, enabled=False):
            return method(*args)

    return exact


class _ChunkedAttention(torch.autograd.Function):
    """Explicit softmax per chunk; the backward pass computes it again instead of keeping it.

    The backward pass consists of differentiable operations on what was saved, so it has derivatives itself.
    """

    generate_vmap_rule = True

    @staticmethod
    @_without_autocast
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink_logits: Tensor | None,
        parts: tuple[Part, ...],
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        out = lse = None
        for rows, visible, chunk in _each(parts, query):
            k, v = _kept(key, chunk), _kept(value, chunk)
            result, total = _explicit(_rows(query, rows), k, v, visible, scale, softcap, sink_logits)
            out = _put(out, rows, result.to(query.dtype), query)
            lse = _put(lse, rows, total, query)
        assert out is not None
        assert lse is not None
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.parts, ctx.scale, ctx.softcap = inputs
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    @_without_autocast
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sink_logits, out, lse = ctx.saved_tensors
        compute, heads = lse.dtype, query.shape[1]
        grad_query = grad_key = grad_value = None
        # d(loss)/d(score) = weight * (d(loss)/d(weight) - shared), shared per row.
        shared = (grad_out.to(compute) * out.to(compute)).sum(-1) - grad_lse
        for rows, visible, chunk in _each(ctx.parts, query):
            k, v = _kept(key, chunk).to(compute), _kept(value, chunk).to(compute)
            scores, slope = _scores(_rows(query, rows), k, visible, ctx.scale, ctx.softcap)
            weights = (scores - _rows(lse, rows).clamp(min=torch.finfo(compute).min)[..., None]).exp()
            unseen = None
            if visible is not None and not _known_finite(k, v, _rows(shared, rows)):
                # A product of 0 and NaN is to be 0 where the key is not seen.
                unseen, k, v = ~visible, _finite_or_zero(k), _finite_or_zero(v)
                weights = weights.masked_fill(unseen, 0)
            grad_rows = _grouped(_rows(grad_out, rows).to(compute), key)
            grad_weights = _ungrouped(grad_rows @ v.transpose(-1, -2), heads)
            grad_scores = weights * (grad_weights - _rows(shared, rows)[..., None]) * ctx.scale
            grad_scores = grad_scores if slope is None else grad_scores * slope
            grad_scores = _grouped(grad_scores if unseen is None else grad_scores.masked_fill(unseen, 0), key)
            grad_query = _put(grad_query, rows, _ungrouped(grad_scores @ k, heads).to(query.dtype), query)
            q = _grouped(_rows(query, rows).to(compute), key)
            grad_key = _add_kept(grad_key, chunk, grad_scores.transpose(-1, -2) @ q, key)
            grad_value = _add_kept(grad_value, chunk, _grouped(weights, key).transpose(-1, -2) @ grad_rows, value)
        assert grad_key is not None
        assert grad_value is not None
        grad_sinks = None
        if sink_logits is not None:
            sink_weights = (sink_logits.to(compute).view(1, -1, 1) - lse).exp()
            grad_sinks = -(sink_weights * shared).sum((0, 2)).to(sink_logits.dtype)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_sinks, None, None, None


def _each(parts: Iterable[Part], query: Tensor) -> Iterator[tuple[slice, Tensor | None, Chunk]]:
    """Rows, visible pairs `[batch | 1, heads | 1, rows, kept]` (None: all) and chunk, chunk by chunk."""
    batch, heads = query.shape[:2]
    b = torch.arange(batch, device=query.device)[:, None, None, None]
    h = torch.arange(heads, device=query.device)[:, None, None]
    for first, mask, own in parts:
        for chunk in own:
            visible = None
            if not chunk.all_visible:
                rows = torch.arange(chunk.first, chunk.stop, device=query.device)
                kept = [torch.arange(start, stop, device=query.device) for start, stop in chunk.kept]
                keys = torch.cat(kept) if kept else rows[:0]
                visible = mask(b, h, rows[None, None, :, None], keys[None, None, None, :])
                batch_and_heads = (*[1] * (4 - visible.dim()), *visible.shape)[:2]  # it may look at few of the indices
                visible = visible.expand(*batch_and_heads, len(rows), len(keys))
            yield slice(first + chunk.first, first + chunk.stop), visible, chunk


def _scores(
    query: Tensor, k: Tensor, visible: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Masked scores `[batch, heads, rows, kept]` and, with a softcap, its derivative."""
    scores = _ungrouped(_grouped(query.to(k.dtype), k) @ k.transpose(-1, -2), query.shape[1]) * scale
    slope = None
    if softcap is not None:
        bounded = torch.tanh(scores / softcap)
        scores, slope = softcap * bounded, 1 - bounded.square()
    return scores if visible is None else scores.masked_fill(~visible, -math.inf), slope


def _grouped(x: Tensor, key: Tensor) -> Tensor:
    """`[batch, heads, rows, d]` -> `[batch, kv_heads, group * rows, d]`: query heads of a group as rows."""
    return _with_heads(x, key.shape[1])


def _ungrouped(x: Tensor, heads: int) -> Tensor:
    """The inverse of `_grouped`."""
    return _with_heads(x, heads)


def _with_heads(x: Tensor, heads: int) -> Tensor:
    return x.reshape(x.shape[0], heads, x.shape[1] * x.shape[2] // heads, x.shape[-1])


def _per_group(visible: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Visible pairs in the layout of `_grouped` queries."""
    group = heads // kv_heads
    if group == 1:
        return visible
    batch, mask_heads, rows, kept = visible.shape
    if mask_heads == 1:
        return visible.repeat(1, 1, group, 1)
    return visible.reshape(batch, kv_heads, group * rows, kept)


def _kept(x: Tensor, chunk: Chunk) -> Tensor:
    kept = [_rows(x, slice(start, stop)) for start, stop in chunk.kept]
    return kept[0] if len(kept) == 1 else torch.cat(kept, dim=2) if kept else _rows(x, slice(0, 0))


def _rows(x: Tensor, rows: slice) -> Tensor:
    """`x[:, :, rows]` in a form that works with `is_grads_batched=True`, which cannot index all rows (torch 2.13)."""
    return x.narrow(2, rows.start, rows.stop - rows.start)


def _put(total: Tensor | None, rows: slice, part: Tensor, query: Tensor) -> Tensor:
    """Rows of `total`, which the first part makes: under torch.vmap it then has the batch dimension of the parts."""
    if total is None:
        total = part.new_empty(*part.shape[:2], query.shape[2], *part.shape[3:])
    _rows(total, rows).copy_(part)
    return total


def _add_kept(total: Tensor | None, chunk: Chunk, part: Tensor, like: Tensor) -> Tensor:
    """Adds the gradients of the kept keys to those of all; see `_put`."""
    if total is None:
        total = part.new_zeros(like.shape)
    at = 0
    for start, stop in chunk.kept:
        _rows(total, slice(start, stop)).add_(_rows(part, slice(at, at + stop - start)))
        at += stop - start
    return total


def _known_finite(*tensors: Tensor) -> bool:
    """Whether all numbers are finite, for all that the host can tell."""
    total = sum(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)) for x in tensors)
    assert isinstance(total, Tensor)
    try:
        return bool(total.isfinite())
    except RuntimeError:  # within torch.vmap the host can tell nothing
        return False


def _finite_or_zero(x: Tensor) -> Tensor:
    return x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _hull(ends: Range) -> Range:
    """The hull of a range over sequences and heads, `[row_blocks]`; empty ranges do not count."""
    start, stop = (end.flatten(0, -2) for end in ends)
    if start.shape[0] == 0:  # a batch of no sequence
        return start.new_zeros(start.shape[1:]), stop.new_zeros(stop.shape[1:])
    empty = stop <= start
    low = torch.where(empty, 1 << 30, start).amin(0)
    high = torch.where(empty, 0, stop).amax(0)
    return torch.minimum(low, high), high


def _joined(ends: list[int]) -> tuple[tuple[int, int], ...]:
    """Ascending disjoint intervals from a flat list of starts and stops."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(zip(ends[::2], ends[1::2], strict=True)):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        elif start < stop:
            joined.append((start, stop))
    return tuple(joined)
