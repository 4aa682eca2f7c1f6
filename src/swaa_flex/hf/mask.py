"""What transformers' mask functions return under `attn_implementation="swaa_flex"`: plans, made when needed.

transformers asks for a mask once per forward and mask type, before the first layer; the layers hand it to the
attention function. A `ForwardMask` remembers what was asked and makes one plan per kind of layer.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig
from transformers.masking_utils import causal_mask_function

from ..algebra import Mask, negated
from ..errors import ConfigError, MaskError, UnsupportedModelError
from ..masks import (
    everything,
    from_mask_mod,
    in_sequences,
    kv_positions,
    offset,
    packed,
    rows_from,
    rows_where,
    sequence_ends,
    sinks,
    sinks_and_tail,
    window,
)
from ..plan import AttentionPlan, plan
from .cache import Stored, told_by_attention_mask
from .cache_layers import ring_columns
from .config import swaa_of
from .native import read_native, refuse_without_interface
from .prompt import PromptInfo, surrounding_prompt


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
) -> ForwardMask:
    """The mask function registered as "swaa_flex"; arguments as transformers' other mask functions."""
    assert config is not None
    if "allow_is_bidirectional_skip" in kwargs:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} asks for a bidirectional mask; swaa_flex is for causal self-attention: "
            "use attn_implementation='sdpa' for this model"
        )
    if not torch.compiler.is_compiling():
        refuse_without_interface(type(config))
    if isinstance(q_offset, Tensor):
        # A static cache hands out its counter, which `update` moves before the mask is evaluated.
        q_offset = q_offset.clone().reshape(())
    maybe_packed = attention_mask is None and not isinstance(q_offset, Tensor) and kv_length == q_length
    ends = None if attention_mask is None else sequence_ends(attention_mask)
    if not torch.compiler.is_compiling():
        told_by_attention_mask(None if ends is None else ends[0], (kv_length, kv_offset))
    native, is_packed = read_native(mask_function, local_size, use_vmap, config, maybe_packed)
    return ForwardMask(
        config=config,
        sizes=(batch_size, 1, q_length, kv_length),
        q_offset=q_offset,
        kv_offset=kv_offset,
        native=native,
        mask_function=mask_function,
        is_packed=is_packed,
        ends=ends,
        seen=0 if attention_mask is None else attention_mask.shape[-1],
        info=surrounding_prompt(),
        device=torch.device(device),
    )


class ForwardMask(BlockMask):
    """The masks of one forward and mask type, as plans by kind of layer.

    A `BlockMask` by name only: transformers passes on masks that the caller prepared if they are tensors or
    instances of it (transformers 5.17 to 5.24, masking_utils), and `generate` prepares them for static caches.
    """

    def __init__(
        self,
        *,
        config: PreTrainedConfig,
        sizes: tuple[int, int, int, int],
        q_offset: int | Tensor,
        kv_offset: int,
        native: Mask | None,
        mask_function: Callable[..., Any],
        is_packed: bool,
        ends: tuple[Tensor, Tensor] | None,
        seen: int,
        info: PromptInfo,
        device: torch.device,
    ) -> None:
        self.config = config
        self.sizes = sizes
        self.q_offset = q_offset
        self.kv_offset = kv_offset
        self.native = native  # the model's own restriction, None if only `mask_function` knows it
        self.mask_function = mask_function
        self.is_packed = is_packed
        # Of the padding mask only where each sequence begins and ends, which has one shape at every step.
        self.ends = ends
        self.seen = seen  # its length
        self.info = info
        self.device = device
        self.plans: dict[Any, AttentionPlan] = {}
        self.moved: dict[torch.device, ForwardMask] = {}
        # What is the same for all layers; a dict, as dynamo forgets attributes that are set twice.
        self.memo: dict[str, Any] = {}

    def __getitem__(self, index: Any) -> ForwardMask:
        """That of the last rows: transformers 5.24 leaves out the others before the last layers of Gemma 4.

        Raises:
            UnsupportedModelError: if the model takes another part.
        """
        everything = slice(None)
        rows = index[2] if isinstance(index, tuple) and len(index) == 4 else None
        if not isinstance(rows, slice) or (*index[:2], index[3]) != (everything,) * 3:
            raise UnsupportedModelError(
                f"{self.config.model_type}: the model takes a part of its attention mask, which swaa_flex makes as a "
                "whole; use another attn_implementation"
            )
        first, stop, step = rows.indices(self.sizes[2])
        assert stop == self.sizes[2] and step == 1
        return self._with(self.q_offset + first, self.ends, self.device, q_len=stop - first)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(batch, 1, q_len, kv_len)`."""
        return self.sizes

    def __repr__(self) -> str:
        return f"ForwardMask({list(self.sizes)}, {self.native!r})"

    __str__ = __repr__

    def to(self, device: torch.device | str, **kwargs: Any) -> ForwardMask:
        """The same on another device, one copy per device (layers spread over several GPUs)."""
        device = torch.device(device)
        if device == self.device:
            return self
        if device not in self.moved:
            q_offset = self.q_offset.to(device) if isinstance(self.q_offset, Tensor) else self.q_offset
            ends = None if self.ends is None else (self.ends[0].to(device), self.ends[1].to(device))
            self.moved[device] = self._with(q_offset, ends, device)
        return self.moved[device]

    def on_host(self, q_offset: int) -> ForwardMask:
        """The same on the CPU, for a caller that knows the offset and whatever else the masks of layers hold."""
        assert self.ends is None
        return self._with(q_offset, None, torch.device("cpu"))

    def _with(
        self,
        q_offset: int | Tensor,
        ends: tuple[Tensor, Tensor] | None,
        device: torch.device,
        q_len: int | None = None,
    ) -> ForwardMask:
        batch, heads, rows, kv_len = self.sizes
        return ForwardMask(
            config=self.config,
            sizes=(batch, heads, rows if q_len is None else q_len, kv_len),
            q_offset=q_offset,
            kv_offset=self.kv_offset,
            native=self.native,
            mask_function=self.mask_function,
            is_packed=self.is_packed,
            ends=ends,
            seen=self.seen,
            info=self.info,
            device=device,
        )

    def contiguous(self) -> ForwardMask:
        """Itself; `generate` calls it on what it hands to a compiled forward."""
        return self

    def prompt_info(
        self,
        lengths: int | list[int] | Tensor | None,
        decode_rows: Tensor | None,
        source: Stored | None,
    ) -> PromptInfo:
        """Where prompts end: what the keywords of the forward say, else the surrounding `prompt`, else the cache."""
        if "info" not in self.memo:
            info = self.info.updated(lengths, decode_rows)
            if not info.says_where and source is not None:
                info = info.updated(source.cache.prompt_lengths, None)
            self.memo["info"] = info
        known: PromptInfo = self.memo["info"]
        return known

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
        twin: Callable[[], Mask] | None = None,
    ) -> AttentionPlan:
        """The plan for a layer, made at the first layer of its kind.

        Args:
            layer: which one it is.
            query: `[batch, heads, q_len, head_dim]`.
            key: `[batch, kv_heads, kv_len, head_dim]`.
            value: likewise.
            info: what is known about prompt and decode rows.
            source: where in a `SWAACache` the keys come from, None if from elsewhere.
            position_ids: of this forward, for packed rows.
            needs_grad: whether the backward pass will run.
            module: of the layer, to warn where nobody says where prompts end; None for no warning.
            twin: makes the mask of the layer on the CPU, see `plan`.
        """
        config = swaa_of(self.config)
        if "kinds" not in self.memo:
            self.memo["kinds"] = config.resolve(self.config.num_hidden_layers)
        kind = self.memo["kinds"][layer]
        variant = (kind, needs_grad)
        if variant not in self.plans:
            if torch.compiler.is_compiling():
                _touched.append(self)
            batch, _, q_len, kv_len = self.sizes
            if source is None and key.shape[2] != kv_len:
                raise MaskError(
                    f"layer {layer} attends to {key.shape[2]} keys and the mask is for {kv_len}; the layers of "
                    "the cache must be as long as it announces"
                )
            if source is not None:
                source.cache.check(self.config)
            mask = self.mask_for(layer, key.shape[2], info, source, position_ids, module)
            self.plans[variant] = plan(
                mask,
                q_len,
                key.shape[2],
                batch=batch,
                heads=query.shape[1],
                device=self.device,
                dtype=query.dtype,
                backend=config.backend,
                q_offset=self.q_offset,
                needs_grad=needs_grad,
                head_dim=query.shape[-1],
                value_dim=value.shape[-1],
                twin=None if twin is None else twin(),
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
        config = swaa_of(self.config)
        kind = config.resolve(self.config.num_hidden_layers)[layer]
        first, stop = self._ends(source)
        if kind.full or config.sliding_window is None:
            mask = self._mask(None, None, position_ids, first, stop)
        else:
            near = window(config.sliding_window) | sinks(config.sink_tokens)
            tail = config.dense_tail if info.dense_tail is None else info.dense_tail
            if source is not None and source.too_late_for(tail):
                raise ConfigError(
                    f"dense_tail={tail}: the cache was made for a recipe without a dense tail and has released "
                    "keys that the tail would see; set dense_tail in the recipe before the cache is made"
                )
            documents = position_ids if self.is_packed else None
            inner, dense = self._rows(near, tail, kind.full_attention_decode, info, module, stop, documents)
            mask = self._mask(inner, dense, position_ids, first, stop)
        if source is not None and source.ring:
            begin = 0 if first is None else first
            ring = kv_len - source.sink_slots
            return kv_positions(mask, ring_columns(self.q_offset + 1, begin, source.sink_slots, ring))
        if source is not None and not source.complete:
            return sinks_and_tail(mask, source.sink_slots, start=source.start, first=0 if first is None else first)
        return offset(mask, kv=self.kv_offset)

    def after_attention(self, source: Stored, key: Tensor, value: Tensor, info: PromptInfo) -> None:
        """Lets the cache release what no later row can see."""
        if not source.releases:
            return
        if torch.compiler.is_compiling() and self.ends is not None and "told" not in self.memo:
            source.begins_at(self.ends[0])  # outside of graphs the cache is told before the first layer
            self.memo["told"] = True
        if source.ring:  # what it could release is released
            return
        config = swaa_of(self.config)
        tail = config.dense_tail if info.dense_tail is None else info.dense_tail
        source.release(key, value, info.says_where, self._decoding(info, tail, self._ends(source)[0]))

    def forget_if_last(self, module: nn.Module) -> None:
        """In a compiled forward, drops what was made for it, after its last layer.

        `generate` makes masks outside of compiled forwards. What a graph leaves in objects from outside, torch.compile
        has to put together again after the graph, which it cannot do for a plan.
        """
        if torch.compiler.is_compiling() and module.layer_idx == self.config.num_hidden_layers - 1:
            for mask in _touched:
                mask.plans.clear()
                mask.memo.clear()
            _touched.clear()

    def _decoding(self, info: PromptInfo, tail: int, first: Tensor | None) -> bool:
        """Whether no row of a prompt is to come that sees more than sinks and window: all sequences are decoding."""
        _, _, q_len, _ = self.sizes
        if tail == 0:
            return True
        if not info.says_where:
            return q_len == 1 and (isinstance(self.q_offset, Tensor) or self.q_offset > 0)
        if torch.compiler.is_compiling():
            return False  # unknown without a synchronisation; keeping the keys is always right
        if isinstance(info.lengths, int) and isinstance(self.q_offset, int) and first is None:
            return info.lengths < self.q_offset + q_len
        if "decoding" not in self.memo:
            if info.decode_rows is not None:
                begun: Tensor | bool = info.decode_rows.any(-1).all()
            else:
                assert info.lengths is not None
                lengths = self._each(torch.as_tensor(info.lengths, device=self.device).reshape(-1), "prompt lengths")
                ends = lengths if first is None else first + lengths
                begun = ends < self.q_offset + q_len
                if self.ends is not None:
                    begun = begun & (self.ends[1] > 0)  # else nothing but pads so far
                begun = begun.all()
            self.memo["decoding"] = bool(begun)
        return bool(self.memo["decoding"])

    def _mask(
        self,
        inner: Mask | None,
        dense: Mask | None,
        position_ids: Tensor | None,
        first: Tensor | None,
        stop: Tensor | None,
    ) -> Mask:
        """What the model allows, restricted to `inner` except in `dense` rows, at columns of the cache.

        Args:
            inner: evaluated in each sequence's own positions; None for everything.
            dense: evaluated at columns, pads included; None for none.
            position_ids: of this forward, for packed rows.
            first: column of each sequence's first token, None without pads.
            stop: one past each sequence's last column.
        """
        native, known = self.native, True
        if native is None or (self.is_packed and position_ids is None):
            native, known = everything(), False

        def in_own_positions(mask: Mask) -> Mask:
            if self.is_packed and position_ids is not None:
                batched = position_ids.shape[0] in (1, self.sizes[0])
                return packed(mask, position_ids=position_ids if batched else position_ids.expand(self.sizes[0], -1))
            return mask if first is None or stop is None else in_sequences(mask, first, stop)

        if dense is None:
            mask = in_own_positions(native if inner is None else native & inner)
        else:
            assert inner is not None
            mask = in_own_positions(native) & (in_own_positions(inner) | dense)
        return mask if known else mask & from_mask_mod(self.mask_function)

    def _rows(
        self,
        near: Mask,
        tail: int,
        decode_is_full: bool,
        info: PromptInfo,
        module: nn.Module | None,
        stop: Tensor | None,
        documents: Tensor | None,
    ) -> tuple[Mask | None, Mask | None]:
        """What rows see in their own positions, and the rows of the cache that see everything."""
        batch, _, q_len, _ = self.sizes
        if info.lengths is not None:
            lengths = info.lengths
            if isinstance(self.q_offset, Tensor) and not isinstance(lengths, Tensor):
                # Nothing is split at a row of unknown offset, and compiled code would be made again for each number.
                lengths = torch.full((1,), lengths, device=self.device)
            if isinstance(lengths, Tensor):
                lengths = lengths.to(self.device)
                lengths = self._each(lengths.reshape(-1), "prompt lengths")
            if self.is_packed:
                compiled = ", or attention_mask of ones if they are not packed (compiled forwards do not know)"
                raise MaskError(
                    "prompt lengths cannot say where the prompts of packed documents end; pass decode_rows"
                    + (compiled if torch.compiler.is_compiling() else "")
                )
            dense = rows_from(lengths - tail)
            return near | (dense if decode_is_full else dense & negated(rows_from(lengths))), None
        if info.decode_rows is not None:
            flags = info.decode_rows.to(self.device)
            if tuple(flags.shape) != (batch, q_len):
                raise MaskError(f"decode_rows: expected [{batch}, {q_len}], got {list(flags.shape)}")
            dense_rows = self._tails(flags, tail, stop, documents)
            dense_rows = dense_rows | flags if decode_is_full else dense_rows & ~flags
            return near, offset(rows_where(dense_rows), q=-self.q_offset)
        if q_len == 1:
            # One new token: a decode row. (On an empty cache it sees itself either way.)
            return (None if decode_is_full else near), None
        if module is not None and module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            warnings.warn(
                "training without knowing where prompts end: all rows count as prompt. Pass prompt_lengths= or "
                "decode_rows= to the forward, or call swaa_flex.adapt(model), which reads them from the labels",
                stacklevel=2,
            )
        if tail == 0:
            return near, None
        if module is not None:
            self._warn_of_chunks(module)
        if stop is not None and self.ends is not None and self._padding()[1]:
            return near, rows_from(stop - tail)
        return near, rows_from(self.q_offset + q_len - tail)

    def _tails(self, decode_rows: Tensor, tail: int, stop: Tensor | None, documents: Tensor | None) -> Tensor:
        """Rows among the last `tail` ones before an answer or before the end of their sequence, [batch, q_len].

        `documents` are the position ids of packed rows: where one is 0 a document begins, and another has ended.
        """
        batch, q_len = decode_rows.shape
        answers = decode_rows & ~F.pad(decode_rows, (1, 0))[:, :-1]
        index = torch.arange(q_len + 1, device=self.device)
        end = q_len if stop is None else (stop - self.q_offset).clamp(0, q_len)[:, None]
        if documents is not None:
            answers = answers | (documents == 0)
        starts = (F.pad(answers, (0, 1)) | (index == end)).expand(batch, -1)
        passed = F.pad(starts.cumsum(-1), (1, 0))  # starts before each row
        rows = index[:-1]
        return passed[:, (rows + tail).clamp(max=q_len) + 1] > passed[:, rows + 1]

    def _ends(self, source: Stored | None) -> tuple[Tensor | None, Tensor | None]:
        """First column and one past the last column of each sequence `[batch]`, or None without pads."""
        if self.ends is not None:
            return self.ends if any(self._padding()) else (None, None)
        first = None if source is None else source.first
        if first is None:
            return None, None
        first = self._each(first.to(self.device), "first columns (the attention mask of the cache)")
        return first, first + (1 << 30)  # not full_like: inductor would inline a constant into the kernel

    def _each(self, values: Tensor, name: str) -> Tensor:
        """One value per sequence, `[batch]` (or `[1]`): beams and several answers repeat what is given per prompt."""
        batch, given = self.sizes[0], values.shape[0]
        if given in (1, batch):
            return values
        if batch % given:
            raise MaskError(f"{name}: got {given} for a batch of {batch}; expected one each")
        return values.repeat_interleave(batch // given)

    def _padding(self) -> tuple[bool, bool]:
        """Whether there are left and right pads: read where that is free or long prompts repay it, else expected."""
        assert self.ends is not None
        if not self._may_read():
            return True, True
        if "padding" not in self.memo:
            pads = torch.stack([self.ends[0].amax() > 0, self.ends[1].amin() < self.seen]).tolist()
            self.memo["padding"] = pads[0], pads[1]
        padding: tuple[bool, bool] = self.memo["padding"]
        return padding

    def _may_read(self) -> bool:
        if torch.compiler.is_compiling():
            return False
        return self.device.type == "cpu" or self.sizes[2] > 1

    def _warn_of_chunks(self, module: nn.Module) -> None:
        """Warns once if one prompt comes in several forwards and nobody said where it ends."""
        if torch.compiler.is_compiling() or isinstance(self.q_offset, Tensor):
            return
        if self.q_offset > 0 and _prompt_ends.get(module) == self.q_offset:
            warnings.warn(
                "a prompt arrives in several forwards and its length is not known, so the last rows of each of them "
                "get full attention and results depend on the chunk size; with swaa_flex.prompt(lengths) around "
                "generate (or prompt_lengths= in forward) they do not",
                stacklevel=2,
            )
            _prompt_ends.clear()
            return
        _prompt_ends[module] = self.q_offset + self.sizes[2]


_touched: list[ForwardMask] = []  # masks with plans of the forward that is being traced
_prompt_ends: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
