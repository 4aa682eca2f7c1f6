"""`attention`: one call for every backend."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from . import chunked, flex
from .algebra import Mask, checked
from .backends import Inputs, why_not
from .block_mask import check_batch_and_heads
from .errors import BackendUnavailableError, ConfigError, MaskError
from .plan import AttentionPlan, plan_for
from .tracing import is_tracing


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
        MaskError: if shapes or dtypes do not fit each other or the mask, a plan is for what a tensor in its mask no
            longer holds, or `softcap` or `scale` is no such number.
        ConfigError: if `backend` is no backend, or not that of the plan.
        BackendUnavailableError: if the backend cannot run what is asked; the message says the way out.

    Examples:
        >>> from swaa_flex.masks import causal, sinks, window
        >>> query, key, value = torch.randn(3, 1, 2, 300, 16).unbind(0)
        >>> attention(query, key, value, causal() & (window(64) | sinks(4))).shape
        torch.Size([1, 2, 300, 16])
    """
    _check_shapes(query, key, value, sink_logits)
    if softcap is not None and not 0 < softcap < math.inf:
        raise MaskError(f"softcap={softcap}: expected a positive finite bound, or None for none")
    if scale is not None and not -math.inf < scale < math.inf:
        raise MaskError(f"scale={scale}: expected a finite factor, or None for 1 / sqrt(head_dim)")
    tensors = (query, key, value) if sink_logits is None else (query, key, value, sink_logits)
    inputs = Inputs.of(
        query,
        value,
        needs_grad=torch.is_grad_enabled() and any(t.requires_grad for t in tensors),
        needs_lse=return_lse or sink_logits is not None,
        # Asked here, and nowhere below: where torch.compile gives up on this function, it may still compile what this
        # one calls, and the two must not be told different things.
        in_graph=is_tracing(),
    )
    if isinstance(mask, AttentionPlan):
        ready = _checked_plan(mask, inputs)
        if backend not in ("auto", ready.backend):
            raise ConfigError(f"backend={backend!r}: the plan is for {ready.backend!r}; make one for the other")
    else:
        ready = plan_for(checked("mask", mask), inputs, backend)
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
        out, lse = _over_segments(query, key, value, ready, inputs, scale, softcap)
        if sink_logits is not None:
            assert lse is not None
            out, lse = _with_sinks(out, lse, sink_logits)
        if not inputs.in_graph:
            for result in (out, lse):
                if result is not None and result.requires_grad:
                    result.register_hook(_refuse_second_derivatives)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _over_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ready: AttentionPlan,
    inputs: Inputs,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Output and log-sum-exp of a plan for FlexAttention, segment by segment."""
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for segment in ready.segments:
        rows, own = query, inputs
        if segment.is_slice:
            rows = query[:, :, segment.first : segment.stop]
            own = inputs._replace(q_len=segment.stop - segment.first)
        out, lse = flex.run(rows, key, value, segment, own, ready.capability, scale=scale, softcap=softcap)
        outs.append(out)
        if lse is not None:
            lses.append(lse)
    return _joined(outs, ready), _joined(lses, ready) if lses else None


def _with_sinks(out: Tensor, lse: Tensor, sink_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a softmax that one more logit per head has joined, which has no value."""
    sinks = sink_logits.to(lse.dtype).view(1, -1, 1)
    return (out * torch.sigmoid(lse - sinks)[..., None]).to(out.dtype), torch.logaddexp(lse, sinks)


def _refuse_second_derivatives(grad: Tensor) -> None:
    """A hook for the backward pass. Where that is compiled, torch 2.11 drops second derivatives without a word."""
    if torch.is_grad_enabled():
        raise BackendUnavailableError(
            "FlexAttention has no second derivatives (create_graph=True, torch.func.hessian); backend='chunked' has"
        )


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


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, sink_logits: Tensor | None) -> None:
    if query.is_nested or key.is_nested or value.is_nested:
        raise MaskError(
            "query, key and value are nested tensors; pad them (masks.left_padded) or put the sequences one after "
            "another in one row (masks.packed)"
        )
    q, k, v = query.shape, key.shape, value.shape
    if not (len(q) == len(k) == len(v) == 4):
        raise MaskError(
            f"query, key and value must be [batch, heads, len, head_dim]; got {list(q)}, {list(k)}, {list(v)}"
        )
    if 0 in q[1:] or 0 in k[1:] or 0 in v[1:]:
        raise MaskError(
            f"query, key and value: expected at least one head, row and number, got {list(q)}, {list(k)}, {list(v)}"
        )
    if not query.device == key.device == value.device:
        raise MaskError(
            f"query, key and value: expected one device, got {query.device}, {key.device} and {value.device}"
        )
    dtypes = query.dtype, key.dtype, value.dtype
    # Autocast takes care of several of them.
    if not query.is_floating_point() or (len(set(dtypes)) > 1 and not torch.is_autocast_enabled(query.device.type)):
        raise MaskError(
            f"query, key and value: expected one floating-point dtype, got {', '.join(map(str, dtypes))}; cast them"
        )
    if not (q[0] == k[0] == v[0] and q[3] == k[3] and k[1:3] == v[1:3]) or q[1] % k[1]:
        raise MaskError(
            "query [batch, heads, q_len, head_dim], key [batch, kv_heads, kv_len, head_dim] and value [batch, "
            f"kv_heads, kv_len, value_dim] do not fit: {list(q)}, {list(k)}, {list(v)}; heads must be a multiple of "
            "kv_heads"
        )
    if sink_logits is not None and not isinstance(sink_logits, Tensor):
        raise MaskError(f"sink_logits: expected a tensor [heads], got {sink_logits!r}")
    if sink_logits is not None and sink_logits.shape != q[1:2]:
        raise MaskError(f"sink_logits: expected one per query head, [{q[1]}], got {list(sink_logits.shape)}")


def _checked_plan(ready: AttentionPlan, inputs: Inputs) -> AttentionPlan:
    """A plan, if it is one for these inputs."""
    made_for = ready.made_for
    if (made_for.q_len, made_for.kv_len) != (inputs.q_len, inputs.kv_len):
        raise MaskError(
            f"the plan is for q_len={made_for.q_len}, kv_len={made_for.kv_len} and the tensors have {inputs.q_len} "
            f"and {inputs.kv_len}; make a plan for these lengths"
        )
    if made_for.in_graph and not inputs.in_graph:
        raise MaskError("the plan was made inside of a compiled graph and is used outside of it; make one there")
    if ready.is_outdated:
        raise MaskError(
            f"a tensor in {ready.mask!r} has changed in place since the plan was made, and the plan is for what it "
            "held then; make a new one"
        )
    own, given = (made_for.batch, made_for.head_dim), (inputs.batch, inputs.head_dim)
    if ready.backend == "flash" and any(a not in (None, b) for a, b in zip(own, given, strict=True)):
        raise MaskError(f"the plan is for batch and head_dim {own} and the query has {given}; make a plan for these")
    if ready.backend != "chunked":
        if inputs.needs_grad and not made_for.needs_grad:
            raise MaskError("the plan was made without gradients; make it with plan(..., needs_grad=True)")
        if made_for.device not in (inputs.device, torch.device(inputs.device.type)):
            raise MaskError(
                f"the plan is for {made_for.device} and the tensors are on {inputs.device}; make one for this device"
            )
        reason = why_not(ready.backend, inputs, ready.capability)
        if reason:
            raise BackendUnavailableError(
                f"the plan is for backend={ready.backend!r}, which cannot run here: {reason}"
            )
    if (made_for.batch, made_for.heads) != (inputs.batch, inputs.heads):
        check_batch_and_heads(ready.mask, inputs.batch, inputs.heads)
    return ready
