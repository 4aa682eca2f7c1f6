"""Attention of compiled prompts, outside of their graph.

The graph of a prompt calls one opaque operator per layer. When it runs, attention is planned and called as in a
forward that is not compiled: with kernels that a graph cannot hold (FLASH, whose captured tensors inductor frees too
early in torch 2.11; Triton's with loads by TMA), one plan for all layers of a kind, and nothing to compile per layer.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from ..algebra import Mask
from ..attention import attention
from ..masks import offset
from .cache import CACHE, SWAACache
from .mask import ForwardMask
from .surroundings import surroundings


class PromptChunk:
    """What attention has to know while the graph of a chunk of prompts runs; a context manager around the graph.

    Args:
        model: that is compiled.
        cache: of fixed size, before the chunk.
        seen: columns before the chunk.
        size: columns of the chunk, pads included.
        first: column of each sequence's first token, `[batch]`, on the CPU.
        lengths: tokens of each prompt, `[batch]`, on the CPU.
    """

    def __init__(
        self, model: PreTrainedModel, cache: SWAACache, seen: int, size: int, first: Tensor, lengths: Tensor
    ) -> None:
        self.cache = cache
        self.layer_types = getattr(model.config.get_text_config(), "layer_types", None)
        # A model with several types of layers has a mask for each.
        self.masks: ForwardMask | dict[str, ForwardMask] = create_masks_for_generate(
            model.config,
            torch.empty(len(lengths), size, 0, dtype=model.dtype, device=model.device),
            None,
            **{CACHE: cache},
        )
        # The same numbers in tensors that kernels read, as they change from chunk to chunk, and on the host.
        self.seen, self.lengths = (x.to(model.device, non_blocking=True) for x in (torch.tensor(seen), lengths))
        self.seen_on_host, self.first_on_host, self.lengths_on_host = torch.tensor(seen), first, lengths
        self.dispatch = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()

    def __enter__(self) -> PromptChunk:
        self.before, surroundings.chunk = surroundings.chunk, self
        return self

    def __exit__(self, *error: object) -> None:
        surroundings.chunk = self.before

    def attention(self, query: Tensor, key: Tensor, value: Tensor, layer: int, **options: Any) -> Tensor:
        """Attention of a layer, `[batch, q_len, heads, head_dim]`."""
        mask, source = self.mask(layer), self.cache.stored_after(self.seen, layer)
        info = mask.prompt_info(self.lengths, None)
        twin = functools.partial(self.mask_on_host, layer, key.shape[2])
        plan = mask.plan_for(layer, query, key, value, info, source, twin=twin)
        # A graph runs for the first time with other dispatch keys than later, for which torch.compile would make
        # every kernel twice (torch 2.11 to 2.13).
        with torch._C._ForceDispatchKeyGuard(*self.dispatch):
            out = attention(query, key, value, plan, **options)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2).contiguous()

    def mask(self, layer: int) -> ForwardMask:
        """The masks of the type of a layer."""
        if isinstance(self.masks, ForwardMask):
            return self.masks
        assert self.layer_types is not None
        return self.masks[self.layer_types[layer]]

    def mask_on_host(self, layer: int, kv_len: int) -> Mask:
        """What a layer's rows see, from numbers that the host knows; the first row is row 0."""
        seen = int(self.seen_on_host)
        mask = self.mask(layer).on_host(seen)
        source = self.cache.stored_after(self.seen_on_host, layer, self.first_on_host)
        info = mask.prompt_info(self.lengths_on_host, None)
        return offset(mask.mask_for(layer, kv_len, info, source), q=seen)


@torch.library.custom_op("swaa_flex::prompt_attention", mutates_args=())
def prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    scale: float | None,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attention of a layer in the `PromptChunk` that runs, `[batch, q_len, heads, head_dim]`."""
    assert surroundings.chunk is not None
    return surroundings.chunk.attention(
        query, key, value, layer, scale=scale, softcap=softcap, sink_logits=sink_logits
    )


@prompt_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
