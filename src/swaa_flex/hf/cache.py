"""`SWAACache`: a key-value cache that releases what no later row can see.

Full layers, and layers with full-attention decode, keep every key. Every other sliding-window layer keeps the sinks of
each sequence and its last `sliding_window` tokens. Columns count the tokens of the batch from the start of the cache,
left pads included; the attention mask of a layer learns from `Stored` which column lies in which slot.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.masking_utils import create_causal_mask

from ..errors import ConfigError, UnsupportedModelError
from ..layer_mask import each_sequence
from ..tracing import is_tracing
from .cache_layers import Pads, SinksAndWindowLayer, StaticSinksAndWindowLayer
from .config import kv_shape, layer_kinds, swaa_of
from .prompt import checked_lengths

_RELEASING = (SinksAndWindowLayer, StaticSinksAndWindowLayer)

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""The keyword for a cache: transformers 5.24 has renamed it, in forwards, in `generate` and in outputs."""


_SHAPING = ("model_type", "num_hidden_layers", "layer_types", "sliding_window", "attention_chunk_size")
"""Fields of a model's configuration that decide which keys its layers hold."""


class SWAACache(Cache):
    """A key-value cache for a model under sliding-window attention.

    Hand it to a forward or to `generate` as `past_key_values`, which transformers calls `cache` from 5.24 on. It grows
    with the sequence, or with `max_length` has a fixed size, as compiled forwards need it. Models whose own layers
    slide keep transformers' layers for those.

    A sliding-window layer without full-attention decode releases keys after every forward if the recipe has no
    dense tail, otherwise when decode rows arrive (the tail of a prompt sees the whole prompt). It then holds
    `sink_tokens + sliding_window - 1 + slack` tokens (`sink_tokens + sliding_window` with `max_length`). `memory` says
    how many bytes that is. Later rows cannot see what was released.

    Args:
        config: the model's configuration, with the recipe in `config.swaa`.
        max_length: the most tokens per sequence, pads included, for a cache of fixed size; None for one that grows.
        prompt_lengths: tokens of each prompt without pads, as in `swaa_flex.prompt`; may be set again before a
            second user turn.
        attention_mask: `[batch, len]` of the prompt, 0 for left pads, for forwards that are not given one.
        slack: tokens that released layers hold beyond the window, so that `crop` can take back that many. (Assisted
            generation needs none: it asks layers to hold what it may take back.)
        offloading: keep layers on the CPU while others compute, as transformers' offloaded caches do.

    Raises:
        ConfigError: if an argument makes no sense, or the recipe does not fit the model.
        UnsupportedModelError: if layers of the model use the keys of others (Gemma 3n).

    Examples:
        >>> from transformers import LlamaConfig
        >>> size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=9)
        >>> cache = SWAACache(LlamaConfig(**size, swaa="throughput"))
        >>> cache.memory()
        {'full': 0, 'window': 0, 'native': 0, 'total': 0}
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        max_length: int | None = None,
        prompt_lengths: int | Sequence[int] | Tensor | None = None,
        attention_mask: Tensor | None = None,
        slack: int = 0,
        offloading: bool = False,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise ConfigError(
                f"config: expected that of a model, as in SWAACache(model.config), got {type(config).__name__}"
            )
        for name, number, least in (("max_length", max_length, 1), ("slack", slack, 0)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < least):
                raise ConfigError(f"{name}={number!r}: expected a number of tokens, at least {least}")
        self.config = config = config.get_text_config(decoder=True)
        if getattr(config, "num_kv_shared_layers", 0):
            raise UnsupportedModelError(
                f"{config.model_type}: the last {config.num_kv_shared_layers} layers use the keys of others, which "
                "SWAACache cannot follow; take transformers' own DynamicCache or StaticCache"
            )
        self.swaa = swaa = swaa_of(config)
        self.max_length = max_length
        self.prompt_lengths = prompt_lengths
        self._pads = pads = Pads()
        if attention_mask is not None:
            pads.set(attention_mask.bool().int().argmax(-1))
        kinds = layer_kinds(config)
        stock = DynamicCache(config=config) if max_length is None else StaticCache(config, max_cache_len=max_length)
        layers: list[Any] = list(stock.layers)
        for index, layer in enumerate(layers):
            if type(layer) is StaticSlidingWindowLayer and max_length is not None:
                # transformers' own counts tokens in a Python int, for which compiled code would be made again.
                layers[index] = StaticSinksAndWindowLayer(max_length, 0, layer.max_cache_len, pads)
                layers[index].is_sliding = True
                continue
            releases = not kinds[index].full_attention_decode and swaa.sliding_window is not None
            if not releases or type(layer) not in (DynamicLayer, StaticLayer):
                continue
            assert swaa.sliding_window is not None
            size = (swaa.sink_tokens, swaa.sliding_window)
            if max_length is None:
                layers[index] = SinksAndWindowLayer(*size, pads, hold_prompt=swaa.dense_tail > 0, slack=slack)
            elif 1 < sum(size) < max_length:  # inductor cannot build the decode kernel for a single key (torch 2.11)
                layers[index] = StaticSinksAndWindowLayer(max_length, *size, pads, hold_prompt=swaa.dense_tail > 0)
        for layer in layers:
            layer.pads = pads  # torch tries the guards of one cache's graph on another, whose layers must have it too
        super().__init__(layers=layers, offloading=offloading)
        self.layers: list[Any] = layers
        self._not_updated: set[int] = set()  # layers that the forward under way has not reached
        self._is_broken = False
        self._keeps_addresses = False
        self.updates = 0  # of layers, outside of graphs
        self._origin = _Offset.of(self)  # for graphs, which cannot make one themselves (torch 2.11)

    def __copy__(self) -> SWAACache:
        """Refused: both caches would write to the same layers."""
        raise ConfigError("copy.copy of a SWAACache: it shares the layers; use copy.deepcopy(cache)")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_origin"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._origin = _Offset.of(self)

    @property
    def prompt_lengths(self) -> int | Tensor | None:
        """Tokens of each prompt without pads, or None if they are not known."""
        return self._prompt_lengths

    @prompt_lengths.setter
    def prompt_lengths(self, lengths: int | Sequence[int] | Tensor | None) -> None:
        self._prompt_lengths = checked_lengths(lengths)

    @property
    def first(self) -> Tensor | None:
        """Column of each sequence's first token, `[batch]`, as far as attention masks have told; None: column 0."""
        return self._pads.first

    @first.setter
    def first(self, first: Tensor) -> None:
        self._pads.first = first

    def memory(self) -> dict[str, int]:
        """Bytes held, by kind of layer.

        Returns:
            "full": layers that keep every key; "window": layers that keep sinks and window; "native": layers that the
            model itself restricts, states of recurrent ones included; and the "total". A layer of `tokens` keys takes
            2 * batch * kv_heads * tokens * head_dim * bytes per element.
        """
        held = {"full": 0, "window": 0, "native": 0}
        for layer in self.layers:
            kind = "native" if _is_native(layer) else "window" if isinstance(layer, _RELEASING) else "full"
            tensors = {id(t): t for t in _tensors(layer)}
            held[kind] += sum(t.numel() * t.element_size() for t in tensors.values())
        return {**held, "total": sum(held.values())}

    def size_of(self, batch_size: int, dtype: torch.dtype) -> tuple[float, float]:
        """Bytes that a cache of fixed size takes per token of `max_length`, and apart from them."""
        heads, head_dim = kv_shape(self.config)
        for layer in self.layers:  # under tensor parallelism each process has a part of them
            heads = heads if layer.keys is None else layer.keys.shape[1]
        token = 2.0 * batch_size * heads * head_dim * dtype.itemsize
        rings = [layer for layer in self.layers if isinstance(layer, StaticSinksAndWindowLayer)]
        growing = len(self.layers) - sum(1 for ring in rings if not ring.hold_prompt)
        return token * growing, token * sum(ring.slots for ring in rings)

    def start(self, first: Tensor) -> None:
        """Begins sequences in an empty cache of fixed size, the way compiled forwards need it.

        Args:
            first: column of each sequence's first token, `[batch]`.
        """
        self._pads.set(first)
        for layer in self.layers:
            if isinstance(layer, StaticSinksAndWindowLayer):
                layer.start()

    def keep_addresses(self) -> None:
        """Lets layers keep their memory where it is from request to request, as CUDA graphs need it (fixed size)."""
        self._keeps_addresses = True
        for layer in self.layers:
            if isinstance(layer, StaticSinksAndWindowLayer):
                layer.keeps_addresses = True

    def restart(self, first: Tensor) -> None:
        """Begins other sequences in a cache of fixed size that has been used.

        If it keeps its addresses, what lies in it stays, unseen: to write over it takes longer than a short prompt.

        Args:
            first: column of each sequence's first token, `[batch]`.
        """
        if not self._keeps_addresses:
            self.reset()
            self.start(first)
            return
        self._is_broken = False
        self._not_updated = set()
        self._pads.set(first)
        for layer in self.layers:
            if isinstance(layer, StaticSinksAndWindowLayer):
                layer.restart()
            else:
                layer.cumulative_length.zero_()

    def check(self, config: PreTrainedConfig) -> None:
        """Refuses a forward of another model or under another recipe than the cache was made for.

        Raises:
            ConfigError: names both.
        """
        if config is not self.config:
            for name in _SHAPING:
                own, given = (getattr(c, name, None) for c in (self.config, config))
                if own != given:
                    raise ConfigError(
                        f"the cache was made for a {self.config.model_type} model with {name}={own!r} and this one is "
                        f"{config.model_type} with {name}={given!r}; make one with SWAACache(model.config)"
                    )
        if swaa_of(config) != self.swaa:
            raise ConfigError(
                f"the cache was made for {self.swaa} and the model runs {swaa_of(config)}; make one with "
                "SWAACache(model.config) after the recipe is set"
            )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores the keys and values of new tokens; returns those that the layer's attention works on."""
        if layer_idx >= len(self.layers):
            raise ConfigError(
                f"layer {layer_idx} asks a cache that was made for {len(self.layers)} layers of a "
                f"{self.config.model_type} model; make one with SWAACache(model.config)"
            )
        self._check_shape(self.layers[layer_idx], key_states, layer_idx)
        self._refuse_longer(self.layers[layer_idx], key_states)
        if not is_tracing():
            self._refuse_other_attention(layer_idx)
            self._not_updated.discard(layer_idx)
            self.updates += 1
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    def begin_forward(self, first: Tensor | None) -> None:
        """A forward begins that runs swaa_flex: to be called when its mask is made.

        Args:
            first: column of each sequence's first token, `[batch]`, if the forward has a padding mask.
        """
        self._not_updated = set(range(len(self.layers)))
        if first is not None:
            self._pads.set(first)

    def abandon_forward(self) -> None:
        """A forward was interrupted after layers had stored its tokens: the next one is refused until `reset`."""
        self._is_broken = True

    def stored(self, layer_idx: int, keys: Tensor) -> Stored | None:
        """Which columns the keys of a layer belong to that its attention works on; None if they are not of the cache.

        Args:
            layer_idx: of the layer.
            keys: `[batch, kv_heads, kv_len, head_dim]`.
        """
        layer = self.layers[layer_idx]
        if not isinstance(layer, _RELEASING):
            return Stored(self, layer)
        return Stored(self, layer, *layer.layout) if keys.shape[2] == layer.handed_out else None

    @property
    def releases_prompts(self) -> bool:
        """Whether layers release, when decoding begins, keys that the dense tail of a later prompt would see."""
        return any(isinstance(layer, _RELEASING) and layer.hold_prompt for layer in self.layers)

    def hold_prompts(self) -> None:
        """Takes `begin_decoding` back, in a cache that keeps its addresses."""
        for layer in self.layers:
            if isinstance(layer, StaticSinksAndWindowLayer):
                layer.hold()

    def begin_decoding(self) -> None:
        """Releases what layers still hold for rows of the prompt, instead of when the first decode row arrives."""
        for layer in self.layers:
            if isinstance(layer, _RELEASING):
                layer.begin_decoding()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and first column of the keys that a layer's attention will work on.

        Being asked, before the first layer of every forward, also is the moment for what cannot happen in the layers:
        refusing an interrupted forward, and releasing prompts.
        """
        if not is_tracing():
            self._not_updated = set()  # until `begin_forward`
            self._refuse_if_interrupted()
            for layer in self.layers:  # asked of one layer only, before a forward that may be compiled
                if isinstance(layer, StaticSinksAndWindowLayer):
                    layer.expect(query_length)
        length, first = super().get_mask_sizes(query_length, layer_idx)
        if not is_tracing():
            return length, _Offset.of(self, first)
        if isinstance(self.layers[layer_idx], DynamicSlidingWindowLayer):
            # A number that varies from call to call cannot be an object in a graph (torch 2.15).
            if self.first is not None or self.prompt_lengths is not None:
                raise ConfigError(
                    f"{self.config.model_type}: a growing cache of a model with windows of its own, in a compiled "
                    "forward, knows neither pads nor prompt lengths; give the cache a max_length"
                )
            return length, first
        return length, self._origin

    def reset(self) -> None:
        """Forgets every token and what was said of them; also after an interrupted forward."""
        self._pads.forget(keep_tensor=self.max_length is not None)
        self._prompt_lengths = None
        self._is_broken = False
        for layer in self.layers:
            if type(layer) is DynamicLayer:  # transformers 5.17 keeps the length of a layer that it has reset
                layer.keys = layer.values = None
                layer.is_initialized = False
            layer.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens, as many as a negative `tokens_to_remove` says.

        Raises:
            ConfigError: if the cache has a fixed size or fewer tokens, or a layer has released what the window would
                need again.
        """
        self._refuse_if_fixed("cropped")
        if tokens_to_remove > 0 or -tokens_to_remove > self.get_seq_length():
            raise ConfigError(
                f"crop({tokens_to_remove}): expected minus the number of tokens to remove, of {self.get_seq_length()}"
            )
        releasing = [layer for layer in self.layers if isinstance(layer, SinksAndWindowLayer)]
        if not all(layer.can_crop(-tokens_to_remove) for layer in releasing):
            raise ConfigError(
                f"crop({tokens_to_remove}): the window would need keys that were released; make the cache with "
                f"slack={-tokens_to_remove} or more, or call activate_past_recording() before"
            )
        # Layers of transformers refuse in turn, after others have been cropped, or keep fewer keys than they need.
        before = [dict(vars(layer)) for layer in self.layers]
        try:
            super().crop(tokens_to_remove)
            lacking = [layer for layer in self.layers if _lacks_keys(layer)]
            refusal = None
        except (RuntimeError, ValueError, NotImplementedError) as error:
            lacking, refusal = [], error
        if lacking or refusal is not None:
            for layer, state in zip(self.layers, before, strict=True):
                vars(layer).clear()
                vars(layer).update(state)
            raise ConfigError(
                f"crop({tokens_to_remove}): layers of {self.config.model_type} with a window or state of their own "
                "have let go of what they would need again; call activate_past_recording() before the tokens that may "
                "be taken back, or reset() and compute the prompt again"
            ) from refusal

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the sequences of the batch in another order (beam search)."""
        self._move(lambda x: x.index_select(0, beam_idx.to(x.device)))
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence.

        Raises:
            ConfigError: if the cache has a fixed size.
        """
        self._refuse_if_fixed("repeated")
        self._move(lambda x: x.repeat_interleave(repeats, 0))
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some sequences of the batch.

        Raises:
            ConfigError: if the cache has a fixed size.
        """
        self._refuse_if_fixed("selected from")
        self._move(lambda x: x[indices.to(x.device)])
        super().batch_select_indices(indices)

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Moves a layer to the CPU, unless it is small and about to release keys."""
        if not isinstance(self.layers[layer_idx], _RELEASING):
            super().offload(layer_idx, only_non_sliding)

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Starts to move a layer back from the CPU, once what was moved there has arrived."""
        if torch.cuda.is_available():  # transformers 5.17 does not wait; 5.23 does so itself
            self.prefetch_stream.wait_stream(torch.cuda.current_stream(self.prefetch_stream.device))
        super().prefetch(layer_idx, only_non_sliding)

    def _move(self, change: Callable[[Tensor], Tensor]) -> None:
        """Changes what is known of each sequence as the sequences change; what is known of prompts, of their beams."""
        held = next((layer.keys for layer in self.layers if getattr(layer, "keys", None) is not None), None)
        batch = None if held is None else held.shape[0]
        if batch is not None and isinstance(self._prompt_lengths, Tensor) and self._prompt_lengths.numel() > 1:
            lengths = each_sequence(self._prompt_lengths.reshape(-1), batch, "prompt lengths")
            self._prompt_lengths = change(lengths)
        if batch is not None and self.first is not None and self.first.numel() > 1:
            self._pads.set(change(each_sequence(self.first, batch, "first columns")))

    def _refuse_if_fixed(self, verb: str) -> None:
        if self.max_length is not None:
            raise ConfigError(f"a cache of fixed size cannot be {verb}; use SWAACache(config) without max_length")

    def _refuse_if_interrupted(self) -> None:
        """After an interrupted forward some layers hold more tokens than others (not looked for on a GPU)."""
        if self._is_broken:
            raise ConfigError(
                "a forward was interrupted after layers had stored its tokens; call reset() and compute the prompt "
                "again"
            )
        lengths: list[Any] = [layer.get_seq_length() for layer in self.layers if isinstance(layer, CacheLayerMixin)]
        known = {int(n) for n in lengths if not isinstance(n, Tensor) or n.device.type == "cpu"}
        if len(known) > 1:
            raise ConfigError(
                f"the layers of the cache hold {min(known)} to {max(known)} tokens: a forward was interrupted; "
                "call reset() and compute the prompt again"
            )

    def _refuse_other_attention(self, layer_idx: int) -> None:
        """Refuses a forward for which swaa_flex made no mask: its attention does not know which keys are held."""
        if layer_idx not in self._not_updated:
            raise ConfigError(
                f"layer {layer_idx} stores keys in a SWAACache in a forward without a mask of swaa_flex: the model "
                f"runs attn_implementation={self.config._attn_implementation!r}, or was handed a mask per pair. Load "
                'it with attn_implementation="swaa_flex", call swaa_flex.adapt(model, recipe), or use another cache'
            )

    def _refuse_longer(self, layer: CacheLayerMixin, key_states: Tensor) -> None:
        """Refuses more tokens than there is room for; on a GPU in one forward only, as counting would wait for it."""
        if self.max_length is None or is_tracing():
            return
        seen: Any = layer.get_seq_length() if key_states.device.type == "cpu" else 0
        tokens = int(seen) + key_states.shape[-2]
        if tokens > self.max_length:
            raise ConfigError(
                f"the cache was made for max_length={self.max_length} tokens per sequence and is given number "
                f"{tokens}; make a longer one, or one that grows: SWAACache(config)"
            )

    def _check_shape(self, layer: CacheLayerMixin, key_states: Tensor, layer_idx: int) -> None:
        # Graphs look at the keys alone: their guards, tried on a cache whose layer has no ring, would raise in torch.
        ring = None if is_tracing() else getattr(layer, "ring", None)
        held = layer.keys if ring is None else ring[0]
        if held is None or held.dim() != 4:
            return
        expected = (held.shape[0], held.shape[1], held.shape[3])
        got = (key_states.shape[0], key_states.shape[1], key_states.shape[3])
        if expected != got:
            raise ConfigError(
                f"layer {layer_idx}: the cache holds keys of [batch, kv_heads, head_dim] = {list(expected)} and is "
                f"given {list(got)}; it belongs to another model or batch: make a new one, or call reset()"
                + (" (a cache of fixed size keeps its batch size)" if self.max_length is not None else "")
            )


def _is_native(layer: Any) -> bool:
    return bool(getattr(layer, "is_sliding", not hasattr(layer, "keys")))


def _lacks_keys(layer: Any) -> bool:
    """Whether a growing layer with a window of the model's own holds less than that window."""
    if not isinstance(layer, DynamicSlidingWindowLayer) or not layer.is_initialized:
        return False
    keys: Tensor = layer.keys  # type: ignore[assignment]  # an initialised layer has some
    return keys.shape[-2] < min(layer.sliding_window - 1, layer.get_seq_length())


def _tensors(layer: Any) -> Iterator[Tensor]:
    """What a layer of a cache holds: keys, values, a ring, and the states of recurrent layers by number."""
    for name in ("keys", "values", "ring", "held", "conv_states", "recurrent_states"):
        held = getattr(layer, name, None)
        for tensor in held.values() if isinstance(held, dict) else held if isinstance(held, tuple) else (held,):
            if isinstance(tensor, Tensor):
                yield tensor


@dataclass(frozen=True, eq=False)
class Stored:
    """Which columns the keys belong to that a cache handed to a layer's attention."""

    cache: SWAACache
    layer: CacheLayerMixin
    sink_slots: int = 0  # leading slots for the first tokens of each sequence
    start: int | Tensor = 0  # column of the slot after them (of each sequence), the rest follows in order ...
    ring: bool = False  # ... unless the slots after the sinks are a ring

    @property
    def first(self) -> Tensor | None:
        """Column of each sequence's first token, `[batch]`, None without pads."""
        return self.cache.first

    @property
    def complete(self) -> bool:
        """Whether slot and column are the same, because nothing has been released."""
        return not self.ring and isinstance(self.start, int) and self.start == 0

    def begins_at(self, first: Tensor) -> None:
        """Tells the cache in which column each sequence begins, `[batch]`."""
        if self.cache.first is not None:
            self.cache.first.copy_(first)

    def too_late_for(self, dense_tail: int) -> bool:
        """Whether keys that the tail of a prompt sees were not held for it."""
        if not isinstance(self.layer, _RELEASING) or self.layer.is_sliding:
            return False
        return dense_tail > 0 and not self.layer.hold_prompt and not self.complete and not self.ring

    @property
    def releases(self) -> bool:
        """Whether the layer releases keys."""
        return isinstance(self.layer, _RELEASING)

    def release(self, lengths_known: bool, decoding: bool) -> None:
        """To be called after attention.

        Args:
            lengths_known: whether the caller says which rows are decode rows.
            decoding: whether every sequence has had its first decode row, or nothing waits for it.
        """
        if isinstance(self.layer, SinksAndWindowLayer):
            self.layer.after_attention(decoding)
        elif isinstance(self.layer, StaticSinksAndWindowLayer):
            self.layer.after_attention(self, lengths_known, decoding)

    @property
    def awaits_prompts(self) -> bool:
        """Whether the layer has a fixed size and has released the keys that it held for the tail of a prompt."""
        layer = self.layer
        return isinstance(layer, StaticSinksAndWindowLayer) and layer.hold_prompt and not layer.holding

    def leave_prompt(self, is_open: bool) -> None:
        """Says after a forward, once keys have been released, whether more rows of a later prompt may come."""
        if isinstance(self.layer, StaticSinksAndWindowLayer):
            self.layer.prompt_is_open = is_open

    def refuse_more_of_a_prompt(self) -> None:
        """Refuses rows of a prompt that has begun after keys were released.

        Raises:
            ConfigError: says what to do instead.
        """
        if self.awaits_prompts and self.layer.prompt_is_open:  # type: ignore[attr-defined]
            raise ConfigError(
                "a later prompt arrives in several forwards, and the rows of its dense tail would have to see keys "
                "that a cache of fixed size has released by then; give it in one forward, or use SWAACache(config) "
                "without max_length"
            )


class _Offset(int):
    """The first column of a layer's keys, as `get_mask_sizes` returns it: a number that knows its cache.

    transformers hands that number on to the mask function as it is, and nothing else of the cache (5.17 to 5.24). It
    refers to the cache weakly, so that a cache that is dropped gives back its memory at once.
    """

    cache: weakref.ref[SWAACache]

    @classmethod
    def of(cls, cache: SWAACache, first: int = 0) -> _Offset:
        """The number `first`, which knows `cache`."""
        offset = cls(first)
        offset.cache = weakref.ref(cache)
        return offset


def cache_behind(kv_offset: int) -> SWAACache | None:
    """The `SWAACache` that a mask is asked for, from the offset of its keys; None for another cache or none."""
    return kv_offset.cache() if isinstance(kv_offset, _Offset) else None
