"""Layers by what they look at: the attention that a window would take away from them.

LightTransfer (arXiv 2410.13846) calls a layer lazy if the last rows of a prompt attend almost only to its first and
latest tokens, and lets lazy layers slide. Its lazy ratio is the attention mass inside sinks and window. Here it is the
mass outside, one minus that, so that a large number means: keep this layer full.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ..algebra import Mask
from ..config import SWAAConfig
from ..errors import ConfigError
from ..hf import NAME
from ..hf.adapt import full_attention
from ..hf.attention import attention_forward
from ..hf.mask import ForwardMask
from ..masks import sinks as sinks_mask
from ..masks import window as window_mask
from .choice import LayerChoice, layers_of
from .evaluated import evaluated

BLOCK = 1024  # keys whose scores exist at a time


def lazy(
    model: Any, prompts: Sequence[Sequence[int]], config: SWAAConfig, budget: int, *, rows: int = 64
) -> LayerChoice:
    """Keeps the layers full that look most at what their window would hide: one forward per prompt.

    Args:
        model: a causal language model of transformers.
        prompts: token ids of prompts, each longer than sinks and window.
        config: what the other layers get; its own full layers do not count.
        budget: how many layers stay full.
        rows: the last rows of each prompt, whose attention is measured.

    Returns:
        The choice; its scores are the mean of `mass_outside` over the prompts.

    Raises:
        ConfigError: if the budget or `rows` is out of range, there is no prompt or no window, or a prompt fits in
            sinks and window.
        UnsupportedModelError: if the model's code does not use transformers' attention interface.
    """
    layers = layers_of(model, config, budget)
    assert config.sliding_window is not None
    if not prompts:
        raise ConfigError("prompts=[]: expected at least one prompt to measure attention on")
    total = [0.0] * layers
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        found = mass_outside(model, ids, window=config.sliding_window, sinks=config.sink_tokens, rows=rows)
        total = [sum(pair) for pair in zip(total, found, strict=True)]
    scores = [mass / len(prompts) for mass in total]
    return LayerChoice.of_largest("lazy", "attention mass outside sinks and window", scores, config, budget)


def mass_outside(model: Any, input_ids: Tensor, *, window: int, sinks: int, rows: int = 64) -> list[float]:
    """The attention mass outside sinks and window in the last rows of a prompt, under full attention.

    Scores are computed for these rows alone, in blocks of keys, with a running log-sum-exp: beside the forward itself
    it takes memory for `[batch, heads, rows, 1024]` scores whatever the length. No other model may run under
    "swaa_flex" meanwhile.

    Args:
        model: a causal language model of transformers. It runs with full attention; afterwards it is as before.
        input_ids: `[batch, len]`, without pads.
        window: keys that a row would see, counting its own.
        sinks: first keys that it would see as well.
        rows: how many rows at the end of the prompt.

    Returns:
        Per layer a share from 0 to 1, the mean over sequences, heads and rows. What the model itself restricts
        (a native sliding window) stays restricted, learned sinks take their share of the mass, and a layer without
        attention has 0.

    Raises:
        ConfigError: if `rows` is not positive, or the prompt fits in sinks and window, so that nothing is outside.
        UnsupportedModelError: if the model's code does not use transformers' attention interface.
    """
    length = input_ids.shape[1]
    if rows < 1:
        raise ConfigError(f"rows={rows}: expected at least one row of the prompt")
    if length <= window + sinks:
        raise ConfigError(
            f"the prompt has {length} tokens, all within {sinks} sinks and a window of {window}; "
            "take a longer prompt or a smaller window"
        )
    near = window_mask(window) | sinks_mask(sinks)
    found: dict[int, Tensor] = {}

    def measuring(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: ForwardMask | Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        result = attention_forward(module, query, key, value, attention_mask, **kwargs)
        if isinstance(attention_mask, ForwardMask):
            [plan] = attention_mask.to(query.device).plans.values()  # all layers are full, so there is one
            layer = module.layer_idx
            assert isinstance(layer, int)
            found[layer] = _mass_outside(query[:, :, -rows:], key, plan.mask, near, **kwargs).mean()
        return result

    with evaluated(model), full_attention(model.config):
        AttentionInterface.register(NAME, measuring)
        try:
            model(input_ids.to(model.device), use_cache=False, logits_to_keep=1)
        finally:
            AttentionInterface.register(NAME, attention_forward)
    layers = range(model.config.get_text_config().num_hidden_layers)
    return [found[layer].item() if layer in found else 0.0 for layer in layers]


def _mass_outside(
    query: Tensor,
    key: Tensor,
    visible: Mask,
    near: Mask,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The mass on visible keys that are not near, for the last rows `[batch, heads, rows, head_dim]` of a forward.

    Other arguments as those of `attention_forward`, whose softmax this is.

    Returns:
        `[batch, heads, rows]`.
    """
    batch, heads, rows, head_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    compute = torch.promote_types(query.dtype, torch.float32)
    scaled = query.to(compute) * (1 / math.sqrt(head_dim) if scaling is None else scaling)
    grouped = scaled.reshape(batch, kv_heads, -1, head_dim)  # the query heads of a key head, one after the other
    b = torch.arange(batch, device=query.device)[:, None, None, None]
    h = torch.arange(heads, device=query.device)[:, None, None]
    q = torch.arange(kv_len - rows, kv_len, device=query.device)[:, None]
    total = outside = scaled.new_full((batch, heads, rows), -math.inf)
    if s_aux is not None:
        total = s_aux.to(compute).view(1, -1, 1).expand(batch, heads, rows)
    for start in range(0, kv_len, BLOCK):
        keys = key[:, :, start : start + BLOCK].to(compute)
        kv = torch.arange(start, start + keys.shape[2], device=query.device)
        scores = (grouped @ keys.transpose(-1, -2)).view(batch, heads, rows, -1)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible(b, h, q, kv), -math.inf)
        total = torch.logaddexp(total, scores.logsumexp(-1))
        outside = torch.logaddexp(outside, scores.masked_fill(near(b, h, q, kv), -math.inf).logsumexp(-1))
    return (outside - total).exp()
