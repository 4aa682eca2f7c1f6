"""Layers of `SWAACache` that keep sinks and window: one that grows until something is released, one of fixed size."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer

from ..tracing import is_tracing

if TYPE_CHECKING:
    from .cache import Stored


class Pads:
    """Column of each sequence's first token: one tensor for a cache and all of its layers, at one address."""

    first: Tensor | None = None

    def set(self, first: Tensor) -> None:
        """Takes the columns `[batch]`."""
        if self.first is None or self.first.shape != first.shape or self.first.device != first.device:
            self.first = first.to(torch.long, copy=True)
            _keep_address(self.first)
        else:
            self.first.copy_(first)

    def forget(self, keep_tensor: bool) -> None:
        """Back to no pads."""
        if keep_tensor and self.first is not None:
            self.first.zero_()
        else:
            self.first = None


class SinksAndWindowLayer(DynamicLayer):
    """Keys of the first tokens and of the last ones, in order; everything until something is released."""

    keys: Any  # transformers makes them when the first ones come
    values: Any

    def __init__(self, sink_tokens: int, sliding_window: int, pads: Pads, hold_prompt: bool, slack: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pads = pads
        self.sink_tokens = sink_tokens
        self.sliding_window = sliding_window
        self.slack = slack
        self.hold_prompt = hold_prompt
        self._forget()

    def _forget(self) -> None:
        self.record_past = False
        self.length = 0
        self.layout: tuple[int, int] = (0, 0)  # sink slots, and column of the slot after them
        self.handed_out = 0  # keys, to the last forward
        self.due = False  # a release that waits for `crop`

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.length += key_states.shape[-2]
        keys, values = super().update(key_states, value_states)
        self.handed_out = keys.shape[-2]
        return keys, values

    def after_attention(self, decoding: bool) -> None:
        """See `Stored.release`."""
        if self.hold_prompt and not decoding:
            return
        if self.record_past:
            self.due = True
        else:
            self._release()

    def begin_decoding(self) -> None:
        if not self.record_past:
            self._release()

    def _release(self) -> None:
        self.due = False
        start = self.layout[1]
        kept_from = self.length - (self.sliding_window - 1) - self.slack
        if kept_from <= (start or self.sink_tokens):
            return
        self.keys, self.values = (self._without(x, kept_from) for x in (self.keys, self.values))
        self.layout = (self.sink_tokens, kept_from)

    def _without(self, x: Tensor, kept_from: int) -> Tensor:
        """`x` without what lies between the sinks and column `kept_from`."""
        slots, start = self.layout
        tail = x[:, :, kept_from - start + slots :]
        if self.pads.first is None:
            return torch.cat([x[:, :, : self.sink_tokens], tail], dim=2)
        slot = torch.arange(self.sink_tokens, device=x.device)
        column = self.pads.first.to(x.device)[:, None] + slot
        held_in = torch.where(column < start, slot, column - start + slots).clamp(max=x.shape[2] - 1)
        return torch.cat([_take(x, held_in), tail], dim=2)

    def can_crop(self, tokens: int) -> bool:
        """Whether the layer holds the window of the token that comes after taking back that many."""
        start = self.layout[1]
        return start == 0 or tokens == 0 or self.length - tokens - (self.sliding_window - 1) >= start

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.length += tokens_to_remove
        if self.due:
            self._release()

    def activate_past_recording(self) -> None:
        self.record_past = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.keys.shape[-2] if self.is_initialized else 0) + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self._forget()


class StaticSinksAndWindowLayer(StaticLayer):
    """Keys of the first tokens and a ring of the last ones, at fixed addresses; every key while it waits for decoding.

    The token at position p of its sequence lies in slot p if it is a sink, otherwise in slot
    sink_tokens + (p - sink_tokens) % sliding_window.
    """

    keys: Any  # transformers makes them when the first ones come
    values: Any

    def __init__(
        self, max_length: int, sink_tokens: int, sliding_window: int, pads: Pads, hold_prompt: bool = False
    ) -> None:
        super().__init__(max_length)
        self.pads = pads
        self.max_length = max_length
        self.sink_tokens = sink_tokens
        self.sliding_window = sliding_window
        self.slots = sink_tokens + sliding_window
        self.hold_prompt = hold_prompt
        self.ring: tuple[Tensor, Tensor] | None = None
        self.keeps_addresses = False  # for CUDA graphs: what holds a prompt is not given back when decoding begins
        self.held: tuple[Tensor, Tensor] | None = None
        self._forget()

    def _forget(self) -> None:
        self.holding = self.hold_prompt  # the layer is an ordinary static one until decoding begins
        self.empty = self.was_empty = True
        self.lengths_known = False
        self.prompt_is_open = False  # a prompt has begun after the release, and more rows of it may come
        self.layout: tuple[int, int | Tensor, bool] = (0, 0, False)
        self.handed_out = 0  # keys, to the last forward
        # Keys and values from which `after_attention` fills the ring. Attention may work on more heads than are stored
        # (multi-head latent attention, JetMoE).
        self.to_keep: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.max_cache_len = self.max_length if self.holding else self.slots
        super().lazy_initialization(key_states, value_states)
        if self.pads.first is None:
            self.pads.set(torch.zeros(key_states.shape[0], dtype=torch.long, device=key_states.device))
        if not self.holding:
            self.ring = self.keys, self.values
        elif self.ring is None:
            # Made here, not where decoding begins: that may be inside a CUDA graph, which would own the memory.
            self.ring = self._empty_ring(self.keys), self._empty_ring(self.values)

    def _empty_ring(self, like: Tensor) -> Tensor:
        ring = like.new_zeros((*like.shape[:2], self.slots, like.shape[3]))
        _keep_address(ring)
        return ring

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.expect(key_states.shape[-2])
        self.was_empty = self.empty
        keys, values = self._stored(key_states, value_states)
        self.handed_out = keys.shape[-2]
        return keys, values

    def _stored(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that attention works on, those of the new tokens included."""
        new = key_states.shape[-2]
        if self.holding:
            self.layout, self.empty = (0, 0, False), False
            keys, values = super().update(key_states, value_states)
            return keys, values
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen = self.cumulative_length.clone()
        self.cumulative_length.add_(new)
        if self.empty:
            self.layout, self.empty, self.to_keep = (0, 0, False), False, (key_states, value_states)
            return key_states, value_states
        if new == 1:
            self.layout = (self.sink_tokens, 0, True)
            slot = self._slot_of(seen)
            batch = torch.arange(slot.shape[0], device=slot.device)
            self.keys[batch, :, slot] = key_states[:, :, 0]
            self.values[batch, :, slot] = value_states[:, :, 0]
            return self.keys, self.values
        start = (seen - (self.sliding_window - 1)).expand(self.first.shape[0])  # of the window of the first new row
        self.layout = (self.sink_tokens, start, False)
        size = self.sink_tokens, self.sliding_window
        ring, added = (self.keys, self.values), (key_states, value_states)
        self.to_keep = _fused(_unrolled, ring, added, start, self.first, *size)
        return self.to_keep

    @property
    def first(self) -> Tensor:
        first = self.pads.first
        assert first is not None
        return first.to(self.keys.device)  # layers may lie on several

    def _slot_of(self, column: Tensor) -> Tensor:
        """The slot of the token in a column, 0-d or `[batch, n]` (some slot, where there is none)."""
        first = self.first if column.dim() == 0 else self.first[:, None]
        return _slots(column - first, self.sink_tokens, self.sliding_window)

    def after_attention(self, out: Stored, lengths_known: bool, decoding: bool) -> None:
        """See `Stored.release`; `out` says which columns the keys belong to."""
        if self.holding:
            self.lengths_known = lengths_known
            first_token = self.was_empty and not lengths_known
            if decoding and not first_token and not is_tracing():
                self.begin_decoding()
            return
        if self.to_keep is None:  # the new keys have been written to the ring at once
            return
        unrolled, self.to_keep = self.to_keep, None
        start = out.start if isinstance(out.start, Tensor) else torch.full_like(self.first, out.start)
        size = self.sink_tokens, self.sliding_window
        ring = self.keys, self.values
        _fused(_roll, ring, unrolled, start, self.first, self.cumulative_length, out.sink_slots, *size)

    def _columns(self) -> Tensor:
        return ring_columns(self.cumulative_length, self.first, self.sink_tokens, self.sliding_window)

    def expect(self, query_length: int) -> None:
        """One new token is a decode row, unless the caller says where prompts end."""
        # Not inside a compiled graph: that would be one more graph for the first token, and holding on is right too.
        if is_tracing():
            return
        if self.holding and query_length == 1 and not self.empty and not self.lengths_known:
            self.begin_decoding()

    def start(self) -> None:
        """Begins sequences; from here on every forward takes the same path, the first one too."""
        if not self.is_initialized:
            assert self.ring is not None
            self.lazy_initialization(self.ring[0][:, :, :0], self.ring[1][:, :, :0])
        self.empty = False
        self.lengths_known = True

    def begin_decoding(self) -> None:
        """From every key to sinks and ring."""
        if not self.holding:
            return
        column = self._columns().clamp(min=0)
        assert self.ring is not None
        for ring, held in zip(self.ring, (self.keys, self.values), strict=True):
            ring.copy_(_take(held, column))
        self.held = (self.keys, self.values) if self.keeps_addresses else None
        self.keys, self.values = self.ring
        self.max_cache_len = self.slots
        self.holding = False

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.holding:
            return self.max_length, 0
        if self.empty:
            return query_length, 0
        return (self.slots if query_length == 1 else self.slots - 1 + query_length), 0

    def get_max_length(self) -> int:
        return self.max_length

    def restart(self) -> None:
        """Begins other sequences, as `reset` and `start` do, at the same addresses; nothing is written over."""
        self._forget()
        self.empty, self.lengths_known = False, True
        self.hold()
        self.cumulative_length.zero_()

    def hold(self) -> None:
        """Back from the ring to the keys of the prompt, where they lie still."""
        if self.held is not None:
            self.keys, self.values = self.held
            self.max_cache_len = self.max_length
            self.holding = True

    def reset(self) -> None:
        if self.keeps_addresses:
            self.hold()
        elif self.hold_prompt and not self.holding:
            self.keys = self.values = self.held = None
            self.is_initialized = False
            self.cumulative_length.zero_()
        super().reset()
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            for held in (self.keys, self.values):
                held.copy_(held.index_select(0, beam_idx.to(held.device)))  # stays at its address


def _keep_address(tensor: Tensor) -> None:
    """Tells torch.compile that the tensor stays where it is, as transformers does for its static layers."""
    if not is_tracing():
        torch._dynamo.mark_static_address(tensor)


def ring_columns(length: int | Tensor, first: Tensor | int, sink_tokens: int, sliding_window: int) -> Tensor:
    """The column in each slot of `StaticSinksAndWindowLayer`, -1 for empty ones: `[batch, slots]` or `[1, slots]`.

    Args:
        length: columns so far.
        first: column of each sequence's first token, `[batch]`, or 0.
        sink_tokens: slots for the first tokens.
        sliding_window: slots of the ring.
    """
    if not isinstance(first, Tensor):
        assert isinstance(length, Tensor)
        first = torch.full((1,), first, device=length.device)
    first = first[:, None]
    slot = torch.arange(sink_tokens + sliding_window, device=first.device)
    newest = length - 1 - first
    laps = torch.div(newest - slot, sliding_window, rounding_mode="floor")
    position = torch.where(slot < sink_tokens, slot, slot + laps.clamp(min=0) * sliding_window)
    return torch.where(position <= newest, position + first, -1)


Pair = tuple[Tensor, Tensor]
"""Keys and values, `[batch, kv_heads, len, head_dim]` each."""


def _unrolled(ring: Pair, new: Pair, start: Tensor, first: Tensor, sink_tokens: int, sliding_window: int) -> Pair:
    """Sinks, the window before column `start + sliding_window - 1` in order, and the new tokens from there on.

    Args:
        ring: of `StaticSinksAndWindowLayer`.
        new: keys and values of the new tokens.
        start: column of each sequence's first key in the window, `[batch]`.
        first: column of each sequence's first token, `[batch]`.
        sink_tokens: slots for the first tokens.
        sliding_window: slots of the ring.
    """
    held = sink_tokens + sliding_window - 1
    index = torch.arange(held + new[0].shape[2], device=start.device)
    positions = (start - first)[:, None] + index - sink_tokens
    slots = torch.where(index < sink_tokens, index, _slots(positions, sink_tokens, sliding_window))
    is_new, number = (index >= held)[:, None], (index - held).clamp(min=0)
    keys, values = (torch.where(is_new, n[:, :, number], _take(r, slots)) for r, n in zip(ring, new, strict=True))
    return keys, values


def _roll(
    ring: Pair,
    unrolled: Pair,
    start: Tensor,
    first: Tensor,
    length: Tensor,
    sink_slots: int,
    sink_tokens: int,
    sliding_window: int,
) -> None:
    """Writes to the ring what is left in it after `length` columns.

    Args:
        ring: of `StaticSinksAndWindowLayer`.
        unrolled: `sink_slots` sinks, and then the keys and values of the columns from `start` on.
        start: a column for each sequence, `[batch]`.
        first: column of each sequence's first token, `[batch]`.
        length: columns so far, 0-d.
        sink_slots: 0, or `sink_tokens`.
        sink_tokens: slots for the first tokens.
        sliding_window: slots of the ring.
    """
    column = ring_columns(length, first, sink_tokens, sliding_window)
    source = column - start[:, None] + sink_slots
    if sink_slots:
        source = torch.where(column < start[:, None], column - first[:, None], source)
    source = source.clamp(min=0)
    for slots, held in zip(ring, unrolled, strict=True):
        slots.copy_(_take(held, source))


def _slots(positions: Tensor, sink_tokens: int, sliding_window: int) -> Tensor:
    """The slot of the token at each position of its sequence (some slot, before the first one)."""
    beyond = positions - sink_tokens
    return torch.where(beyond < 0, positions.clamp(min=0), sink_tokens + beyond % sliding_window)


def _fused(function: Callable[..., Any], ring: Pair, *args: Any) -> Any:
    """Calls `function`, on a GPU compiled: its dozens of small operations become one or two kernels."""
    if is_tracing() or not ring[0].is_cuda:
        return function(ring, *args)
    return _compiled(function)(ring, *args)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _take(x: Tensor, slots: Tensor) -> Tensor:
    """`x[b, :, slots[b]]` for `x` `[batch, kv_heads, len, head_dim]` and `slots` `[batch, kept]`."""
    return x.gather(2, slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
