"""Attention of compiled prompts: one opaque operator per layer, in layers that are compiled once for all of a kind.

A compiled model computes prompts with a copy of its modules that shares their weights (`PromptModel`). Its layers are
compiled one by one. Nothing in a layer's graph tells which layer it is, so that one graph serves all layers of a kind:
the number of the layer comes as a tensor, and cache, masks and kernels are behind the operator. They are no part of
inductor's graph, but of the CUDA graph of the whole chunk.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer

from ..attention import attention
from ..errors import UnsupportedModelError
from .attention import refuse_other_attention
from .cache import CACHE, SWAACache
from .mask import ForwardMask
from .surroundings import surroundings

NAME = "swaa_flex_prompt"
"""The attention implementation of a `PromptModel`."""


class PromptModel:
    """A model that computes chunks of prompts, on the weights of another.

    Args:
        model: whose weights it uses. It stays as it is.
        backend: of `torch.compile` for its layers, None for no compilation.
    """

    def __init__(self, model: PreTrainedModel, backend: str | Callable[..., Any] | None) -> None:
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        for module in model.modules():  # objects whose methods are hooks go on to see what happens
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
                owner = getattr(hook, "__self__", None)
                if owner is not None and not isinstance(owner, nn.Module):
                    shared[id(owner)] = owner
        try:
            self.model = copy.deepcopy(model, shared)
        except Exception as error:
            raise UnsupportedModelError(
                f"compile runs a copy of the model's modules on its weights, and {type(model).__name__} cannot be "
                f"copied ({type(error).__name__}: {error}); use generate of transformers"
            ) from error
        for module in self.model.modules():
            if isinstance(module, PreTrainedModel) and module.config._attn_implementation == "swaa_flex":
                module.config._attn_implementation_internal = NAME
            if isinstance(getattr(module, "layer_idx", None), int):
                module.swaa_layer = torch.tensor(module.layer_idx, device="cpu")
        layers = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self.layers = [layer for layer in layers if any(hasattr(module, "swaa_layer") for module in layer.modules())]
        inside = (module for layer in self.layers for module in layer.modules() if module is not layer)
        self.attends = {vars(module)["layer_idx"] for module in inside if hasattr(module, "swaa_layer")}
        self.backend = backend
        self._compiled: dict[int, Callable[..., Any]] = {}

    def __call__(self, ids: Tensor, positions: Tensor, chunk: PromptChunk, row: Tensor) -> Tensor:
        """Logits after one token of each sequence, `[batch, vocab]`.

        Args:
            ids: `[batch, size]`.
            positions: `[batch, size]`.
            chunk: what attention has to know.
            row: of the tokens after which logits are wanted, `[1]`.
        """
        if self.backend is not None and not chunk.only_stores:
            self._use_compiled(ids.shape[1], self.backend)
        try:
            with chunk:
                out = self.model(
                    input_ids=ids,
                    position_ids=positions,
                    attention_mask=chunk.masks,
                    use_cache=False,
                    logits_to_keep=row,
                )
        finally:
            for layer in self.layers:
                layer._compiled_call_impl = None  # it refers to the layer, whose weights would wait for the collector
        return out.logits[:, -1]  # type: ignore[no-any-return]

    def _use_compiled(self, size: int, backend: str | Callable[..., Any]) -> None:
        """Lets each layer run what is compiled for chunks of a size: torch.compile counts variants per code object."""
        if size not in self._compiled:
            own = types.FunctionType(_call.__code__.replace(), _call.__globals__, f"layer_of_{size}_tokens")
            self._compiled[size] = torch.compile(own, fullgraph=True, dynamic=False, backend=backend)
        for layer in self.layers:
            layer._compiled_call_impl = functools.partial(self._compiled[size], layer)


def _call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return layer._call_impl(*args, **kwargs)


class PromptChunk:
    """What attention has to know while a `PromptModel` runs a chunk of prompts; a context manager around the model.

    Args:
        model: whose cache it is.
        cache: of fixed size, before the chunk.
        size: columns of the chunk, pads included.
        lengths: tokens of each prompt, `[batch]`.
        pads_after: how many of the last columns are pads, 0-d. The cache does not keep them.
        only_stores: whether keys and values are stored, which makes room for them, and nothing else is computed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: SWAACache,
        size: int,
        lengths: Tensor,
        pads_after: Tensor,
        only_stores: bool = False,
    ) -> None:
        self.cache, self.lengths, self.pads_after, self.only_stores = cache, lengths, pads_after, only_stores
        self.layer_types = getattr(model.config.get_text_config(), "layer_types", None)
        # A model with several types of layers has a mask for each.
        self.masks: ForwardMask | dict[str, ForwardMask] = create_masks_for_generate(
            model.config,
            torch.empty(len(lengths), size, 0, dtype=model.dtype, device=model.device),
            None,
            **{CACHE: cache},
        )
        self.reached: set[int] = set()  # layers
        self.dispatch = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()

    def __enter__(self) -> PromptChunk:
        self.before, surroundings.chunk = surroundings.chunk, self
        return self

    def __exit__(self, *error: object) -> None:
        surroundings.chunk = self.before

    def attention(self, query: Tensor, key: Tensor, value: Tensor, layer: int, **options: Any) -> Tensor:
        """Stores the new keys and values of a layer, and computes its attention, `[batch, q_len, heads, head_dim]`."""
        # A compiled layer runs for the first time with other dispatch keys than later, for which torch.compile would
        # make every kernel twice (torch 2.11 to 2.13).
        with torch._C._ForceDispatchKeyGuard(*self.dispatch):
            return self._attention(query, key, value, layer, **options)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, layer: int, **options: Any) -> Tensor:
        self.reached.add(layer)
        key, value = self.cache.update(key, value, layer)
        source = self.cache.stored(layer, key)
        assert source is not None
        if self.only_stores:
            out = query.new_zeros(*query.shape[:3], value.shape[3])
        else:
            mask = self.mask(layer)
            plan = mask.plan_for(layer, query, key, value, mask.prompt_info(self.lengths, None), source)
            out = attention(query, key, value, plan, **options)
        source.layer.cumulative_length.sub_(self.pads_after)  # type: ignore[attr-defined]
        source.release(lengths_known=True, decoding=False)
        return out.transpose(1, 2).contiguous()

    def mask(self, layer: int) -> ForwardMask:
        """The masks of the type of a layer."""
        if isinstance(self.masks, ForwardMask):
            return self.masks
        assert self.layer_types is not None
        return self.masks[self.layer_types[layer]]


@torch.library.custom_op("swaa_flex::prompt_attention", mutates_args=())
def prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: Tensor,
    scale: float | None,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attention of a layer in the `PromptChunk` that runs, `[batch, q_len, heads, head_dim]`; see there."""
    assert surroundings.chunk is not None
    return surroundings.chunk.attention(
        query, key, value, int(layer), scale=scale, softcap=softcap, sink_logits=sink_logits
    )


@prompt_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def prompt_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of a `PromptModel`, see `attention_forward`."""
    refuse_other_attention(dropout, **kwargs)
    return prompt_attention(query, key, value, module.swaa_layer, scaling, softcap, s_aux), None


AttentionInterface.register(NAME, prompt_attention_forward)
