"""The model's own restriction of attention, read from the functions that transformers composes for it."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin
from transformers.masking_utils import causal_mask_function

from ..algebra import Mask
from ..errors import UnsupportedModelError
from ..masks import causal, window
from ..tracing import is_tracing

# Functions of transformers.masking_utils from which plain causal, sliding and packed masks are put together.
_SLIDING = "sliding_window_overlay.<locals>.inner_mask"
_PACKED = "packed_sequence_mask_function.<locals>.inner_mask"
_KNOWN_PARTS = {
    "causal_mask_function",
    "and_masks.<locals>.and_mask",
    _SLIDING,
    _PACKED,
    "remap_positions_for_packed_sequence.<locals>.inner_mask",
}


class Native(NamedTuple):
    """What the model itself allows.

    Attributes:
        mask: in positions, with geometry; None if only transformers' mask function knows it.
        is_packed: whether the rows are those of several documents.
        document_ids: of packed rows, `[batch | 1, len]`; None where a compiled graph cannot look for them.
    """

    mask: Mask | None
    is_packed: bool = False
    document_ids: Tensor | None = None


def read_native(
    mask_function: Callable[..., Any],
    local_size: int | None,
    use_vmap: bool,
    config: PreTrainedConfig,
    maybe_packed: bool,
) -> Native:
    """What the model itself allows, from the functions that transformers has put together for it.

    Args:
        mask_function: what transformers has composed.
        local_size: the window of layers that slide, None for others.
        use_vmap: whether it has parts that come from elsewhere, and so has to be mapped over pairs.
        config: of the model.
        maybe_packed: whether transformers could have taken the rows for packed ones.
    """
    if mask_function is causal_mask_function:
        return Native(causal())
    if is_tracing():
        # Closures cannot be looked into here; what remains of the known ones is a sliding or packed causal mask.
        # (Without cache and padding mask transformers always says packed in a compiled graph.)
        if use_vmap or mask_function.__name__ != "and_mask" or getattr(config, "attention_chunk_size", None):
            return Native(None, maybe_packed)
        return Native(causal() & window(local_size) if local_size else causal(), maybe_packed)
    parts = dict(_parts(mask_function))
    documents = parts.get(_PACKED)
    ids = None if documents is None else inspect.getclosurevars(documents).nonlocals["packed_sequence_mask"]
    sliding = _SLIDING in parts
    if use_vmap or not parts.keys() <= _KNOWN_PARTS or (sliding and not local_size):
        return Native(None, documents is not None, ids)
    native = causal() & window(local_size) if sliding and local_size else causal()
    return Native(native, documents is not None, ids)


def _parts(function: Callable[..., Any]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """A function and the functions in its closure, by qualified name."""
    yield getattr(function, "__qualname__", repr(function)), function
    for cell in getattr(function, "__closure__", None) or ():
        inside = cell.cell_contents
        for part in inside if isinstance(inside, (tuple, list)) else (inside,):
            if callable(part) and not isinstance(part, Tensor):
                yield from _parts(part)


def has_recurrent_layers(config: PreTrainedConfig) -> bool:
    """Whether layers of the model carry a state from token to token, as transformers' cache for it says."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=config).layers)


@functools.cache
def _calls_attention_by_name(configuration: str) -> bool:
    """Whether the modeling file beside a configuration's does; it is read, as it may not have been imported yet."""
    package, _, name = configuration.rpartition(".")
    if not name.startswith("configuration_"):
        return True  # unknown: of a user's own module
    try:
        spec = importlib.util.find_spec(f"{package}.{name.replace('configuration_', 'modeling_')}")
    except ImportError:
        spec = None
    if spec is None or spec.origin is None:
        return True
    return "ALL_ATTENTION_FUNCTIONS" in Path(spec.origin).read_text(encoding="utf-8")


def refuse_without_interface(config_class: type) -> None:
    """Refuses a model whose code does not call attention functions by name: it would run full attention.

    Raises:
        UnsupportedModelError: if the modeling file beside the config's does not use the attention interface.
    """
    if not _calls_attention_by_name(config_class.__module__):
        raise UnsupportedModelError(
            f"model type {getattr(config_class, 'model_type', '')!r} does not call attention by name "
            "through transformers' AttentionInterface, so swaa_flex cannot change it; use another model, or "
            "attn_implementation='eager' for full attention"
        )
