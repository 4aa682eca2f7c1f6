"""The attention function registered with transformers as "swaa_flex"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ..attention import attention
from ..errors import UnsupportedModelError
from .mask import ForwardMask
from .receipt import Receipt

_CHOOSING = ("indices", "block_indices", "sinks")
"""What changes attention in some models (DeepSeek V3.2, MiniMax-M3, Inkling), and other models do not hand on."""


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: ForwardMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    prompt_lengths: int | list[int] | Tensor | None = None,
    decode_rows: Tensor | None = None,
    position_ids: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = None,
    swaa_receipt: Receipt | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer; arguments and result as transformers' other attention functions.

    Args:
        module: the attention module, which says which layer it is.
        query: `[batch, heads, q_len, head_dim]`.
        key: `[batch, kv_heads, kv_len, head_dim]`, from the cache.
        value: `[batch, kv_heads, kv_len, head_dim]`.
        attention_mask: what the mask function returned.
        dropout: must be 0.
        scaling: factor of the scores.
        softcap: bound of the scores (Gemma 2).
        s_aux: learned sink logits `[heads]` (gpt-oss).
        prompt_lengths: tokens of each prompt without pads, see `swaa_flex.prompt`.
        decode_rows: bool `[batch, q_len]`, see `swaa_flex.prompt`.
        position_ids: `[batch, q_len]`, tells packed documents apart.
        position_bias: must be None.
        output_attentions: must be false.
        swaa_receipt: of an adapted model's forward, to sign.
        kwargs: keywords by which models choose keys or cut rows into documents must be None; others are not used.

    Returns:
        The output `[batch, q_len, heads, head_dim]`, and None for the weights, which never exist as a whole.

    Raises:
        UnsupportedModelError: if the model asks for what cannot be honoured; says what and the way out.
    """
    if not isinstance(attention_mask, ForwardMask) and not getattr(module, "is_causal", True):
        # An encoder inside a composite model, such as a vision tower, gets the implementation's name as well.
        encoder: tuple[Tensor, None] = AttentionInterface()["sdpa"](
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return encoder
    refuse_other_attention(dropout, output_attentions=output_attentions, position_bias=position_bias, **kwargs)
    if not isinstance(attention_mask, ForwardMask):
        raise UnsupportedModelError(
            "swaa_flex makes its masks itself: pass attention_mask as [batch, len] (or not at all) instead of "
            f"{'a mask per pair' if attention_mask is not None else 'calling attention without a mask'}"
        )
    if kwargs.get("cu_seq_lens_q") is not None and not attention_mask.forward.native.is_packed:
        raise UnsupportedModelError(
            "cu_seq_lens_q= cuts rows into documents that the mask does not know of: pass position_ids that begin "
            "again at each of them, without a padding mask and a cache"
        )
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise UnsupportedModelError(f"{type(module).__name__} does not say which layer it is (layer_idx)")
    mask = attention_mask.to(query.device)
    if swaa_receipt is not None:
        swaa_receipt.is_signed = True
    source = mask.stored(layer, key)
    info = mask.prompt_info(prompt_lengths, decode_rows)
    tensors = (query, key, value) if s_aux is None else (query, key, value, s_aux)
    ready = mask.plan_for(
        layer,
        query,
        key,
        value,
        info=info,
        source=source,
        position_ids=position_ids,
        needs_grad=torch.is_grad_enabled() and any(t.requires_grad for t in tensors),
        module=module,
    )
    out = attention(query, key, value, ready, scale=scaling, softcap=softcap, sink_logits=s_aux)
    assert isinstance(out, Tensor)
    if source is not None:
        mask.after_attention(source, info)
    attention_mask.forget_after(layer)
    return out.transpose(1, 2).contiguous(), None


def refuse_other_attention(dropout: float, **given: Any) -> None:
    """Refuses what a model asks for beside attention under a mask.

    Args:
        dropout: must be 0.
        given: the other keywords of the attention function.

    Raises:
        UnsupportedModelError: says what it is and the way out.
    """
    if dropout > 0:
        raise UnsupportedModelError(
            f"attention dropout {dropout}: FlexAttention has none; set config.attention_dropout = 0, or model.eval()"
        )
    if given.get("output_attentions"):
        raise UnsupportedModelError(
            "output_attentions=True: fused attention never has the weights; use attn_implementation='eager' for them"
        )
    if given.get("position_bias") is not None:
        raise UnsupportedModelError("the model adds a position bias to its scores, which swaa_flex does not support")
    for name in _CHOOSING:
        if given.get(name) is not None:
            raise UnsupportedModelError(
                f"the model chooses keys or adds sinks by {name}=, which swaa_flex does not support"
            )
