"""What transformers' mask functions return under `attn_implementation="swaa_flex"`: plans, made when needed.

transformers asks for a mask once per forward and mask type, before the first layer; the layers hand it to the
attention function. A `ForwardMask` holds what the forward knows and makes one plan per kind of layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import causal_mask_function

from ..algebra import Mask, describe
from ..config import SWAAConfig
from ..errors import ConfigError, MaskError, UnsupportedModelError
from ..layer_mask import QueryRows, document_starts, each_sequence, has_several_documents, layer_mask
from ..masks import everything, from_mask_mod, kv_positions, offset, sequence_ends, sinks_and_tail
from ..plan import AttentionPlan, plan
from ..tracing import is_tracing
from .cache import Stored, SWAACache, cache_behind
from .cache_layers import ring_columns
from .callers import Caller, find_caller, refuse_lost_documents, refuse_lost_lengths, refuse_unknown_prompts
from .config import layer_kinds, swaa_of
from .native import Native, has_recurrent_layers, read_native, refuse_without_interface
from .prompt import overruled
from .surroundings import PromptInfo, surroundings


def make_forward_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    config: PreTrainedConfig | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Any:
    """The mask function registered as "swaa_flex"; arguments as transformers' other mask functions.

    Returns:
        A `ForwardMask`; for an encoder inside of a composite model the mask of transformers for "sdpa".
    """
    assert config is not None
    if "allow_is_bidirectional_skip" in kwargs:
        _refuse_bidirectional(config)
        return AttentionMaskInterface()["sdpa"](
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            config=config,
            local_size=local_size,
            use_vmap=use_vmap,
            device=device,
            **kwargs,
        )
    eager = not is_tracing()
    if eager:
        refuse_without_interface(type(config))
    if attention_mask is not None and attention_mask.dim() != 2:
        raise MaskError(f"attention_mask: expected [batch, len], 0 for pads, got {describe(attention_mask)}")
    if isinstance(q_offset, Tensor):
        # A static cache hands out its counter, which `update` moves before the mask is evaluated.
        q_offset = q_offset.clone().reshape(())
    cache = cache_behind(kv_offset)
    is_whole = cache is None and not isinstance(q_offset, Tensor) and kv_length == q_length
    ends = None if attention_mask is None else sequence_ends(attention_mask)
    native = read_native(mask_function, local_size, use_vmap, config, attention_mask is None and is_whole)
    if eager and native.is_packed and has_recurrent_layers(config):
        raise UnsupportedModelError(
            f"model type {config.model_type!r} has recurrent layers, whose state goes from one packed document to the "
            "next; give each document a row of its own"
        )
    if eager and is_whole and not native.is_packed:
        refuse_lost_documents(config)
    if eager and cache is not None:
        cache.begin_forward(None if ends is None else ends[0])
    return ForwardMask(
        Forward(
            config=config,
            recipe=swaa_of(config),
            batch=batch_size,
            q_len=q_length,
            kv_len=kv_length,
            q_offset=q_offset,
            # As a plain number, also in graphs, where that of a SWAACache is always 0.
            kv_offset=int(kv_offset) if eager else 0 if cache is not None else kv_offset,
            native=native,
            mask_function=mask_function,
            ends=ends,
            seen=0 if attention_mask is None else attention_mask.shape[-1],
            device=torch.device(device),
            cache=cache,
            prompt=surroundings.prompt,
            caller=find_caller(is_whole) if eager else Caller(),
            last_layer=_last_layer(config, local_size is not None) if eager else None,
        )
    )


@dataclass(frozen=True, eq=False)
class Forward:
    """What one forward knows, for one type of mask. It is the forward's alone, and goes with it.

    Attributes:
        config: of the text model.
        recipe: what the model ran when the forward began, which a recomputation of its layers runs too.
        batch: sequences.
        q_len: query rows.
        kv_len: keys, those that a layer of this type holds included.
        q_offset: column of the first row, an int or a 0-d tensor.
        kv_offset: column of the first key.
        native: what the model itself allows.
        mask_function: of transformers, which knows it too.
        ends: column of the first token of each sequence and column behind its last one, `[batch]` each: what is kept
            of the padding mask, in one shape at every step. None without a padding mask.
        seen: columns of the padding mask.
        device: of the query.
        cache: a `SWAACache` that holds its keys, None for any other or none.
        prompt: what the surrounding `prompt` said when the forward began.
        caller: what the forward is part of.
        last_layer: the last layer that gets this mask, where it was made outside of graphs; None inside.
    """

    config: PreTrainedConfig
    recipe: SWAAConfig
    batch: int
    q_len: int
    kv_len: int
    q_offset: int | Tensor
    kv_offset: int
    native: Native
    mask_function: Callable[..., Any]
    ends: tuple[Tensor, Tensor] | None
    seen: int
    device: torch.device
    cache: SWAACache | None
    prompt: PromptInfo
    caller: Caller
    last_layer: int | None


class ForwardMask(BlockMask):
    """The masks of one forward and mask type, as plans by kind of layer.

    A `BlockMask` by name only: transformers passes on masks that the caller prepared if they are tensors or
    instances of it (transformers 5.17 to 5.24, masking_utils), and `generate` prepares them for static caches.
    """

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.plans: dict[Any, AttentionPlan] = {}
        self.moved: dict[torch.device, ForwardMask] = {}
        # What is the same for all layers; a dict, as dynamo forgets attributes that are set twice.
        self.memo: dict[str, Any] = {}

    def __getitem__(self, index: Any) -> ForwardMask:
        """That of the last rows: transformers 5.24 leaves out the others before the last layers of Gemma 4.

        Raises:
            UnsupportedModelError: if the model takes another part.
        """
        forward, everything = self.forward, slice(None)
        rows = index[2] if isinstance(index, tuple) and len(index) == 4 else None
        if not isinstance(rows, slice) or (*index[:2], index[3]) != (everything,) * 3:
            raise UnsupportedModelError(
                f"{forward.config.model_type}: the model takes a part of its attention mask, which swaa_flex makes as "
                "a whole; use another attn_implementation"
            )
        first, stop, step = rows.indices(forward.q_len)
        assert stop == forward.q_len and step == 1
        return ForwardMask(replace(forward, q_offset=forward.q_offset + first, q_len=stop - first))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(batch, 1, q_len, kv_len)`. A model that is handed the mask looks at it, a layer does not."""
        if is_tracing() and self.forward.last_layer is not None:
            self.memo["in model"] = True
        return self.forward.batch, 1, self.forward.q_len, self.forward.kv_len

    @property
    def ndim(self) -> int:
        """4, as of the mask that it stands for."""
        return 4

    def __repr__(self) -> str:
        return f"ForwardMask({list(self.shape)}, {self.forward.native.mask!r})"

    __str__ = __repr__

    def to(self, device: torch.device | str, **kwargs: Any) -> ForwardMask:
        """The same on another device, one copy per device (layers spread over several GPUs)."""
        device, forward = torch.device(device), self.forward
        if device == forward.device:
            return self
        if device not in self.moved:
            offset, ends, ids = forward.q_offset, forward.ends, forward.native.document_ids
            self.moved[device] = ForwardMask(
                replace(
                    forward,
                    q_offset=offset.to(device) if isinstance(offset, Tensor) else offset,
                    ends=None if ends is None else (ends[0].to(device), ends[1].to(device)),
                    native=forward.native._replace(document_ids=None if ids is None else ids.to(device)),
                    device=device,
                )
            )
        return self.moved[device]

    def contiguous(self) -> ForwardMask:
        """Itself; `generate` calls it on what it hands to a compiled forward."""
        return self

    def stored(self, layer: int, keys: Tensor) -> Stored | None:
        """Which columns of a `SWAACache` a layer's keys belong to; None if they come from elsewhere."""
        cache = self.forward.cache
        return None if cache is None or layer >= len(cache.layers) else cache.stored(layer, keys)

    def prompt_info(self, lengths: int | list[int] | Tensor | None, decode_rows: Tensor | None) -> PromptInfo:
        """Where prompts end: what the keywords of the forward say, else the surrounding `prompt`, else the cache.

        Args:
            lengths: the keyword `prompt_lengths`.
            decode_rows: the keyword of that name.

        Raises:
            UnsupportedModelError: if nobody says it to a forward whose caller knows, or knew.
        """
        if "info" not in self.memo:
            forward = self.forward
            info = overruled(forward.prompt, lengths, decode_rows)
            is_told = lengths is not None or decode_rows is not None
            if not is_told and not is_tracing() and self._slides():
                refuse_lost_lengths(forward.config)
            if not info.says_where and forward.cache is not None:
                info = overruled(info, forward.cache.prompt_lengths, None)
                is_told = info.says_where
            if not is_tracing() and self._slides():
                refuse_unknown_prompts(forward.caller, forward.prompt, is_told)
            self.memo["info"] = info
        known: PromptInfo = self.memo["info"]
        return known

    def _slides(self) -> bool:
        """Whether it makes a difference to some layer which rows are decode rows."""
        window = self.forward.recipe.sliding_window
        return window is not None and window < self.forward.kv_len and not all(k.full for k in self._kinds())

    def _kinds(self) -> Any:
        if "kinds" not in self.memo:
            self.memo["kinds"] = layer_kinds(self.forward.config)
        return self.memo["kinds"]

    def plan_for(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        info: PromptInfo,
        source: Stored | None,
        position_ids: Tensor | None = None,
        needs_grad: bool = False,
        module: nn.Module | None = None,
    ) -> AttentionPlan:
        """The plan for a layer, made at the first layer of its kind.

        Args:
            layer: which one it is.
            query: `[batch, heads, q_len, head_dim]`.
            key: `[batch, kv_heads, kv_len, head_dim]`.
            value: `[batch, kv_heads, kv_len, value_dim]`.
            info: what is known about prompt and decode rows.
            source: where in a `SWAACache` the keys come from, None if from elsewhere.
            position_ids: of this forward, for packed rows.
            needs_grad: whether the backward pass will run.
            module: of the layer, to warn where nobody says where prompts end; None for no warning.
        """
        forward = self.forward
        kind = self._kinds()[layer]
        # What a graph has left is not for a layer outside of it, when layers are compiled one by one.
        variant = (kind, needs_grad, is_tracing())
        if variant not in self.plans:
            if source is None and key.shape[2] != forward.kv_len:
                raise MaskError(
                    f"layer {layer} attends to {key.shape[2]} keys and the mask is for {forward.kv_len}; the layers "
                    "of the cache must be as long as it announces"
                )
            if source is not None:
                source.cache.check(forward.config)
            mask = self.mask_for(layer, key.shape[2], info, source, position_ids, module)
            self.plans[variant] = plan(
                mask,
                forward.q_len,
                key.shape[2],
                batch=forward.batch,
                heads=query.shape[1],
                device=forward.device,
                dtype=query.dtype,
                backend=forward.recipe.backend,
                q_offset=forward.q_offset,
                needs_grad=needs_grad,
                head_dim=query.shape[-1],
                value_dim=value.shape[-1],
            )
        return self.plans[variant]

    def mask_for(
        self,
        layer: int,
        kv_len: int,
        info: PromptInfo,
        source: Stored | None,
        position_ids: Tensor | None = None,
        module: nn.Module | None = None,
    ) -> Mask:
        """What the rows of a layer see, at columns of the cache; `kv_len` keys, otherwise see `plan_for`."""
        forward, kind = self.forward, self._kinds()[layer]
        first, stop = self._ends(source)
        tail = self._tail(info)
        if not kind.full and source is not None and source.too_late_for(tail):
            raise ConfigError(
                f"dense_tail={tail}: the cache was made for a recipe without a dense tail and has released "
                "keys that the tail would see; set dense_tail in the recipe before the cache is made"
            )
        if source is not None and tail > 0 and self._has_prompt_rows(info):
            source.refuse_more_of_a_prompt()
        rows = QueryRows(
            q_len=forward.q_len,
            q_offset=forward.q_offset,
            batch=forward.batch,
            device=forward.device,
            prompt_lengths=info.lengths,
            decode_rows=info.decode_rows,
            dense_tail=info.dense_tail,
            first=first,
            stop=stop,
            document_ids=self._document_ids(position_ids, kind.full),
        )
        if module is not None and not kind.full and not rows.end_is_known and forward.q_len > 1:
            self._warn_of_unknown_prompts(module, tail)
        native = forward.native.mask
        unknown = native is None or (forward.native.is_packed and rows.document_ids is None)
        mask = layer_mask(forward.recipe, kind, rows, everything() if unknown else native)
        if unknown:
            mask = mask & from_mask_mod(forward.mask_function)
        if source is not None and source.ring:
            begin = 0 if first is None else first
            ring = kv_len - source.sink_slots
            return kv_positions(mask, ring_columns(forward.q_offset + 1, begin, source.sink_slots, ring))
        if source is not None and not source.complete:
            return sinks_and_tail(mask, source.sink_slots, start=source.start, first=0 if first is None else first)
        return offset(mask, kv=forward.kv_offset)

    def after_attention(self, source: Stored, info: PromptInfo) -> None:
        """Lets the cache release what no later row can see."""
        if not source.releases:
            return
        if is_tracing() and self.forward.ends is not None and "told" not in self.memo:
            source.begins_at(self.forward.ends[0])  # outside of graphs the cache is told before the first layer
            self.memo["told"] = True
        if source.awaits_prompts and self._may_read():
            source.leave_prompt(self._prompt_is_open(info, self._ends(source)[0]))
        if not source.ring:  # what it could release is released
            tail = self._tail(info)
            source.release(info.says_where, self._decoding(info, tail, self._ends(source)[0]))

    def forget_after(self, layer: int) -> None:
        """In a graph, drops what was made for it in a mask from outside, after the last layer that gets the mask.

        `generate` makes masks outside of compiled forwards. What a graph leaves in objects from outside, torch.compile
        has to put together again after the graph, which it cannot do for a plan. The graph of a single layer ends with
        it.
        """
        last = self.forward.last_layer
        if is_tracing() and last is not None and (layer == last or "in model" not in self.memo):
            self.plans.clear()
            self.memo.clear()

    def _tail(self, info: PromptInfo) -> int:
        """The dense rows at the end of each prompt: those of the surrounding `prompt`, else of the recipe."""
        return self.forward.recipe.dense_tail if info.dense_tail is None else info.dense_tail

    def _has_prompt_rows(self, info: PromptInfo) -> bool:
        """Whether rows of a prompt may be among those of this forward, as far as can be said without waiting."""
        if not self._may_read() or info.lengths is not None:
            return True
        if info.decode_rows is not None:
            return not bool(info.decode_rows.all())
        return self.forward.q_len > 1

    def _prompt_is_open(self, info: PromptInfo, first: Tensor | None) -> bool:
        """Whether more rows of a prompt may come after this forward."""
        forward = self.forward
        if info.lengths is not None:
            return bool((self._prompt_ends(info.lengths, first) > forward.q_offset + forward.q_len).any())
        if info.decode_rows is not None:
            return not bool(info.decode_rows[:, -1].all())
        return forward.q_len > 1

    def _prompt_ends(self, lengths: int | Tensor, first: Tensor | None) -> Tensor:
        """Column behind the prompt of each sequence, `[batch]` or `[1]`."""
        forward = self.forward
        each = torch.as_tensor(lengths, device=forward.device).reshape(-1)
        each = each_sequence(each, forward.batch, "prompt lengths")
        return each if first is None else first + each

    def _decoding(self, info: PromptInfo, tail: int, first: Tensor | None) -> bool:
        """Whether no row of a prompt is to come that sees more than sinks and window: all sequences are decoding."""
        forward = self.forward
        if tail == 0:
            return True
        if not info.says_where:
            return forward.q_len == 1 and (isinstance(forward.q_offset, Tensor) or forward.q_offset > 0)
        if is_tracing():
            return False  # unknown without a synchronisation; keeping the keys is always right
        end = forward.q_offset + forward.q_len
        if isinstance(info.lengths, int) and isinstance(end, int) and first is None:
            return info.lengths < end
        if "decoding" not in self.memo:
            if info.decode_rows is not None:
                begun: Tensor | bool = info.decode_rows.any(-1).all()
            else:
                assert info.lengths is not None
                begun = self._prompt_ends(info.lengths, first) < end
                if forward.ends is not None:
                    begun = begun & (forward.ends[1] > 0)  # else nothing but pads so far
                begun = begun.all()
            self.memo["decoding"] = bool(begun)
        return bool(self.memo["decoding"])

    def _document_ids(self, position_ids: Tensor | None, is_full: bool) -> Tensor | None:
        """The documents of packed rows, `[batch | 1, q_len]`; None if rows are not packed, or it does not matter."""
        native = self.forward.native
        if not native.is_packed:
            self._refuse_unseen_documents(position_ids)
        if not native.is_packed or native.document_ids is not None:
            return native.document_ids
        if position_ids is not None:
            ids = document_starts(position_ids).cumsum(-1)
            return ids if ids.shape[0] in (1, self.forward.batch) else ids.expand(self.forward.batch, -1)
        if is_full:
            return None  # transformers' own mask function knows the documents
        raise UnsupportedModelError(
            f"model type {self.forward.config.model_type!r} does not tell attention the positions of its rows, so "
            "that a compiled forward cannot know whether they are packed documents; pass attention_mask of ones if "
            "they are not, or do not compile"
        )

    def _refuse_unseen_documents(self, position_ids: Tensor | None) -> None:
        """Refuses packed documents that transformers takes for one text: with a cache, or in some families always."""
        forward = self.forward
        if position_ids is None or position_ids.dim() != 2 or forward.q_len != forward.kv_len:
            return
        # Positions of left pads, which a padding mask or a SWAACache knows of, are all the same too.
        knows_pads = forward.ends is not None or (forward.cache is not None and forward.cache.first is not None)
        if knows_pads or "one text" in self.memo or is_tracing():
            return
        if forward.device.type != "cpu" and not torch.is_grad_enabled():
            return  # looking would make the host wait, which a prompt is not worth
        if has_several_documents(position_ids):
            raise UnsupportedModelError(
                "position_ids begin again within a row, as those of packed documents do, but transformers makes a "
                "mask for one text, as it does with a cache (pass use_cache=False) and for some models always (here "
                f"{forward.config.model_type!r}: give each document a row of its own)"
            )
        self.memo["one text"] = True

    def _ends(self, source: Stored | None) -> tuple[Tensor | None, Tensor | None]:
        """Column of the first token of each sequence and column behind its last one, `[batch]`, None without pads."""
        forward = self.forward
        if forward.ends is not None:
            left, right = self._padding()
            return (forward.ends[0] if left or right else None), (forward.ends[1] if right else None)
        first = None if source is None else source.first
        if first is None:
            return None, None
        name = "first columns (the attention mask of the cache)"
        return each_sequence(first.to(forward.device), forward.batch, name), None

    def _padding(self) -> tuple[bool, bool]:
        """Whether there are left and right pads: read where that is free or long prompts repay it, else expected."""
        ends = self.forward.ends
        assert ends is not None
        if not self._may_read():
            return True, True
        if "padding" not in self.memo:
            pads = torch.stack([ends[0].amax() > 0, ends[1].amin() < self.forward.seen]).tolist()
            self.memo["padding"] = pads[0], pads[1]
        padding: tuple[bool, bool] = self.memo["padding"]
        return padding

    def _may_read(self) -> bool:
        if is_tracing():
            return False
        return self.forward.device.type == "cpu" or self.forward.q_len > 1

    def _warn_of_unknown_prompts(self, module: nn.Module, tail: int) -> None:
        """Warns where a prompt is not known to be one: in training, and once if it comes in several forwards."""
        if is_tracing():
            return
        if module.training and torch.is_grad_enabled():
            warnings.warn(
                "training without knowing where prompts end: all rows count as prompt. Pass prompt_lengths= or "
                "decode_rows= to the forward, or call swaa_flex.adapt(model), which reads them from the labels",
                stacklevel=2,
            )
        begin, prompt_ends = self.forward.q_offset, surroundings.prompt_ends
        if tail == 0 or isinstance(begin, Tensor):
            return
        if begin > 0 and prompt_ends.get(module) == begin:
            warnings.warn(
                "a prompt arrives in several forwards and its length is not known, so the last rows of each of them "
                "get full attention and results depend on the chunk size; with swaa_flex.prompt(lengths) around "
                "generate (or prompt_lengths= in forward) they do not",
                stacklevel=2,
            )
            prompt_ends.clear()
            return
        prompt_ends[module] = begin + self.forward.q_len


def _refuse_bidirectional(config: PreTrainedConfig) -> None:
    """Refuses a model that is an encoder itself: only one inside of a composite model runs with "sdpa" instead."""
    if config.swaa is not None or not config.base_config_key:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} asks for a bidirectional mask; swaa_flex is for causal self-attention: "
            "use attn_implementation='sdpa' for this model"
        )


def _last_layer(config: PreTrainedConfig, slides: bool) -> int:
    """The last layer that attends and gets a mask with a window of the model's own (`slides`), or without one."""
    types = getattr(config, "layer_types", None) or ()
    own = [
        layer
        for layer, kind in enumerate(types)
        if kind not in _WITHOUT_ATTENTION and (kind in _SLIDING_TYPES) == slides
    ]
    return own[-1] if own else config.num_hidden_layers - 1


# Of transformers' names for the types of layers, 5.17 to 5.24 (configuration_utils).
_WITHOUT_ATTENTION = frozenset({"linear_attention", "conv", "mamba", "moe", "sparse", "dense"})
_SLIDING_TYPES = frozenset({"sliding_attention", "chunked_attention", "hybrid_sliding"})
