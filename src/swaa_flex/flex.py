"""Runs a segment of a plan: FlexAttention, compiled once per kind of call, or PyTorch's own kernels.

FlexAttention runs compiled, always: uncompiled it materialises every score. Each combination of mask structure
and tensor kind has a compiled function of its own, so that many masks do not run into the recompilation limit of
one function, after which torch.compile silently stops compiling; lengths and integers in the mask become
symbolic after their first change, so new lengths reuse what is there.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from .backends import Capability, Inputs
from .kernels import Kernel, Segment, choose

FOR_CUDNN = 8192  # tokens; see `sdpa`
NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment: Segment,
    inputs: Inputs,
    capability: Capability,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of the rows of a segment.

    Args:
        query: `[batch, heads, rows, head_dim]`.
        key: `[batch, kv_heads, kv_len, head_dim]`.
        value: `[batch, kv_heads, kv_len, value_dim]`.
        segment: not of the chunked backend.
        inputs: of these tensors.
        capability: of their device.
        scale: factor of the scores.
        softcap: bounds the scores to (-softcap, softcap) through a tanh.

    Returns:
        The output `[batch, heads, rows, value_dim]`, and the log-sum-exp `[batch, heads, rows]` (natural logarithm) or
        None unless `inputs.needs_lse`.
    """
    kernel = choose(segment, inputs, capability, softcap=softcap is not None)
    if kernel.name == "sdpa":
        return sdpa(query, key, value, scale), None
    block_mask = segment.block_mask
    assert block_mask is not None
    call = _flex_call if inputs.in_graph else _compiled(_kind(segment, inputs, kernel, scale, softcap))
    query = _with_group(query, key, kernel.group)
    out, lse = call(query, key, value, block_mask, scale, softcap, inputs.needs_lse, kernel.options)
    if lse is not None:
        lse = _without_padding(lse, key, inputs)
        if kernel.name == "flash" and capability.flash_lse_is_scaled:
            lse = lse / math.log(2)
    return _without_padding(out, key, inputs), lse


def sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Full causal rows, the last of which sees all keys, by PyTorch's own kernels."""
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


def _kind(segment: Segment, inputs: Inputs, kernel: Kernel, scale: float, softcap: float | None) -> tuple[Any, ...]:
    """What a compiled call is made for."""
    assert inputs.kv_heads is not None
    return (
        segment.compiled_for,
        segment.backend,
        inputs.device,
        inputs.dtype,
        # The decode kernel wants a batch that does not vary: each size is compiled on its own.
        (inputs.batch if kernel.name == "decode" else inputs.batch == 1, inputs.q_len == 1),
        (kernel.group * inputs.kv_heads, inputs.head_dim, inputs.kv_heads, inputs.value_dim),
        (scale, softcap, inputs.needs_lse, tuple((kernel.options or {}).items())),
        inputs.needs_grad,
    )


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


def _with_group(query: Tensor, key: Tensor, group: int) -> Tensor:
    """`query` with zero heads added to each group until it has `group` of them."""
    own = query.shape[1] // key.shape[1]
    if own == group:
        return query
    grouped = query.unflatten(1, (key.shape[1], own))
    padded: Tensor = F.pad(grouped, (0, 0, 0, 0, 0, group - own)).flatten(1, 2)
    return padded


def _without_padding(x: Tensor, key: Tensor, inputs: Inputs) -> Tensor:
    """Drops the heads that `_with_group` added, from `[batch, heads, ...]`."""
    if x.shape[1] == inputs.heads:
        return x
    grouped: Tensor = x.unflatten(1, (key.shape[1], -1))[:, :, : inputs.group]
    return grouped.flatten(1, 2)
