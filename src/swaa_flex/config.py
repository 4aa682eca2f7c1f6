"""`SWAAConfig`: which keys each layer may see, as a value that is saved with the model."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeAlias

from swaa_flex.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from .algebra import Mask

BACKENDS = ("auto", "flash", "triton", "cpp", "chunked")

LayerSet: TypeAlias = str | list[int] | tuple[int, ...]
"""Layer indices, or a slice of `range(num_hidden_layers)` written as a string, such as "1::2"."""


@dataclass(frozen=True, slots=True)
class SWAAConfig:
    """Sliding-window attention for a model trained with full attention.

    A query of a sliding-window layer sees the last `sliding_window` keys, itself included, and the
    first `sink_tokens` keys of its sequence. `full_attention_layers`, `full_attention_decode` and
    `dense_tail` say which layers and rows see every earlier key instead. Window, sinks, full layers
    and full-attention decode are those of "Sliding Window Attention Adaptation" (arXiv 2512.10411);
    the dense tail is the Tri-shape pattern of MInference and SCBench.

    A layer set is a list of indices or a Python slice written as a string and applied to
    `range(num_hidden_layers)`: "1::2" the odd layers, "1::4" every fourth one, "-2:" the last two.
    Configs are hashable, and equal when they say the same in the same notation.

    Attributes:
        sliding_window: Keys a query sees, counting itself. `None`: every layer is full.
        sink_tokens: Keys at positions below this stay visible to every later query.
        full_attention_layers: Layers that stay full causal; `()` for none.
        full_attention_decode: Whether decode rows of the sliding-window layers are full causal rows;
            a layer set limits it to those layers.
        dense_tail: The last rows of the prompt that are full causal rows in every layer.
        backend: The kernel: "auto", "flash", "triton", "cpp" or "chunked".

    Raises:
        ConfigError: A field has a value of the wrong type or out of its range.

    Examples:
        >>> from swaa_flex.config import SWAAConfig
        >>> config = SWAAConfig(sliding_window=2048, full_attention_layers=[3, 1])
        >>> config.full_attention_layers
        (1, 3)
        >>> SWAAConfig.from_json(config.to_json()) == config
        True
    """

    sliding_window: int | None = 4096
    sink_tokens: int = 128
    full_attention_layers: LayerSet = "1::2"
    full_attention_decode: bool | LayerSet = True
    dense_tail: int = 64
    backend: str = "auto"

    def __post_init__(self) -> None:
        """Check every field and bring the layer sets into one form."""
        if self.sliding_window is not None:
            _check_int(
                "sliding_window",
                self.sliding_window,
                minimum=1,
                expected="at least 1 token as an int, or None for full attention in every layer",
            )
        for field in ("sink_tokens", "dense_tail"):
            _check_int(field, getattr(self, field), minimum=0, expected="a number of tokens as an int, 0 for none")
        full_layers = _layer_set("full_attention_layers", self.full_attention_layers)
        object.__setattr__(self, "full_attention_layers", full_layers)
        if not isinstance(self.full_attention_decode, bool):
            # An empty set is the same as False; one spelling keeps equal configs equal.
            decode_layers = _layer_set("full_attention_decode", self.full_attention_decode) or False
            object.__setattr__(self, "full_attention_decode", decode_layers)
        if self.backend not in BACKENDS:
            raise ConfigError(
                f"backend={self.backend!r}: expected one of {', '.join(BACKENDS)}"
                f"{did_you_mean(self.backend, BACKENDS)}"
            )

    def resolve(self, num_hidden_layers: int) -> tuple[LayerKind, ...]:
        """Return what each layer of a model does.

        Args:
            num_hidden_layers: How many decoder layers the model has.

        Raises:
            ConfigError: A layer set names a layer that the model does not have, or its slice selects
                none. Layer sets have no say, hence no errors, where `sliding_window` is `None`.

        Examples:
            >>> config = SWAAConfig(full_attention_layers="1::2", full_attention_decode=[0])
            >>> [kind.full for kind in config.resolve(4)]
            [False, True, False, True]
            >>> [kind.full_attention_decode for kind in config.resolve(4)]
            [True, True, False, True]
        """
        _check_int("num_hidden_layers", num_hidden_layers, minimum=1, expected="at least 1 layer as an int")
        layers = range(num_hidden_layers)
        if self.sliding_window is None:
            return tuple(LayerKind(full=True, full_attention_decode=True) for _ in layers)
        full = _select("full_attention_layers", self.full_attention_layers, num_hidden_layers)
        decode: Collection[int]
        if isinstance(self.full_attention_decode, bool):
            decode = layers if self.full_attention_decode else ()
        else:
            decode = _select("full_attention_decode", self.full_attention_decode, num_hidden_layers)
        return tuple(
            LayerKind(full=layer in full, full_attention_decode=layer in full or layer in decode) for layer in layers
        )

    def mask_for(self, layer: int, num_hidden_layers: int, *, prompt_length: int | Tensor | None = None) -> Mask:
        """The mask of one layer, in positions of the sequence (query row q is the token at position q).

        Args:
            layer: index of the decoder layer.
            num_hidden_layers: how many decoder layers the model has.
            prompt_length: tokens of the prompt, an int or `[batch]`: rows from there on are decode rows, the
                `dense_tail` rows before it the dense tail. `None`: all rows are prompt rows without a tail.

        Raises:
            ConfigError: `layer` is out of range, or `resolve` refuses the number of layers.

        Examples:
            >>> config = SWAAConfig(sliding_window=2048, full_attention_layers=[1])
            >>> config.mask_for(0, 4, prompt_length=9000)
            causal & (window(2048) | sinks(128) | rows_from(8936))
            >>> config.mask_for(1, 4)
            causal
        """
        from .layer_mask import QueryRows, layer_mask  # masks need torch, which a configuration does without

        kinds = self.resolve(num_hidden_layers)
        if not 0 <= layer < num_hidden_layers:
            raise ConfigError(f"layer={layer}: expected 0 to {num_hidden_layers - 1}, the layers of this model")
        # No rows of a forward are meant, so none of them comes alone.
        without_tail = 0 if prompt_length is None else None
        rows = QueryRows(q_len=0, prompt_lengths=prompt_length, dense_tail=without_tail)
        return layer_mask(self, kinds[layer], rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values, layer indices as lists."""
        values = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SWAAConfig:
        """Read what `to_dict` returns; a missing key takes the default of its field.

        Raises:
            ConfigError: `values` is no mapping, has a key that is no field, or a value is invalid.
        """
        _check_keys(values, tuple(field.name for field in fields(cls)))
        return cls(**values)

    def to_json(self) -> str:
        """Return the fields as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> SWAAConfig:
        """Read what `to_json` returns.

        Raises:
            ConfigError: `text` is not JSON, or `from_dict` refuses it.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"expected a JSON object with fields of SWAAConfig, got {text!r}") from error
        return cls.from_dict(values)

    @classmethod
    def from_reference(cls, values: Mapping[str, Any], num_hidden_layers: int | None = None) -> SWAAConfig:
        """Read a configuration of the reference implementation of arXiv 2512.10411.

        The reference has no dense tail, so it is 0 here. A missing key is off, as it is there.

        Args:
            values: Any of `sliding_window_size` (`None` or 0: full attention), `keep_first`,
                `force_fa_decode` (bool or layer indices) and `non_sliding_layers` (the full layers).
            num_hidden_layers: Its layer lists run past the last layer of small models; given the
                number of layers, what is out of range is dropped. Without it, `resolve` refuses it.

        Raises:
            ConfigError: `values` is no mapping, has an unknown key, or a value is invalid.

        Examples:
            >>> SWAAConfig.from_reference(
            ...     {"sliding_window_size": 2000, "non_sliding_layers": [1, 3, 5]}, num_hidden_layers=4
            ... ).full_attention_layers
            (1, 3)
        """
        _check_keys(values, ("sliding_window_size", "keep_first", "force_fa_decode", "non_sliding_layers"))

        def tokens(field: str) -> int:
            value = values.get(field, 0)
            _check_int(field, value, minimum=0, expected="a number of tokens as an int, 0 for none")
            return int(value)

        def layers(field: str) -> tuple[int, ...]:
            indices = _indices(field, values.get(field, ()), expected="a list of layer indices")
            return tuple(i for i in indices if num_hidden_layers is None or i < num_hidden_layers)

        window = values.get("sliding_window_size")
        decode = values.get("force_fa_decode", False)
        return cls(
            sliding_window=None if window is None else tokens("sliding_window_size") or None,
            sink_tokens=tokens("keep_first"),
            full_attention_layers=layers("non_sliding_layers"),
            full_attention_decode=decode if isinstance(decode, bool) else layers("force_fa_decode"),
            dense_tail=0,
        )


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What one layer does.

    Attributes:
        full: The layer keeps full causal attention.
        full_attention_decode: Its decode rows are full causal rows. Always true of a full layer.
    """

    full: bool
    full_attention_decode: bool


def _check_int(field: str, value: object, *, minimum: int, expected: str) -> None:
    # bool is an int to Python, but True tokens is a slip of the user's.
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ConfigError(f"{field}={value!r}: expected {expected}")


def _check_keys(values: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if not isinstance(values, Mapping):
        raise ConfigError(f"expected a dict with keys among {', '.join(known)}, got {values!r}")
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key {key!r}: expected one of {', '.join(known)}{did_you_mean(key, known)}")


def _layer_set(field: str, value: object) -> str | tuple[int, ...]:
    expected = 'a list of layer indices such as [1, 3], a slice such as "1::2", or () for no layer'
    if not isinstance(value, str):
        return _indices(field, value, expected=expected)
    if not re.fullmatch(r"(-?[0-9]+)?(:(-?[0-9]+)?){1,2}", value):
        raise ConfigError(f"{field}={value!r}: expected {expected}")
    if _parse_slice(value).step == 0:
        raise ConfigError(f"{field}={value!r}: a slice cannot have step 0; leave it out to take every layer")
    return value


def _indices(field: str, value: object, *, expected: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{field}={value!r}: expected {expected}")
    for place, index in enumerate(value):
        _check_int(f"{field}[{place}]", index, minimum=0, expected="a layer index as an int, counted from 0")
    repeated = sorted({index for index in value if value.count(index) > 1})
    if repeated:
        raise ConfigError(f"{field}={value!r}: expected each layer once, but {repeated} are repeated")
    return tuple(sorted(value))


def _select(field: str, layer_set: LayerSet, num_hidden_layers: int) -> Collection[int]:
    if isinstance(layer_set, str):
        selected = range(num_hidden_layers)[_parse_slice(layer_set)]
        if not selected:
            raise ConfigError(
                f"{field}={layer_set!r}: the slice selects none of the model's {num_hidden_layers} layers; "
                "write () if no layer is meant"
            )
        return selected
    for index in layer_set:
        if index >= num_hidden_layers:
            raise ConfigError(
                f"{field}: layer {index} of {num_hidden_layers} does not exist; "
                f"use indices 0 to {num_hidden_layers - 1}, or a slice such as '1::2'"
            )
    return layer_set


def _parse_slice(text: str) -> slice:
    return slice(*(int(part) if part else None for part in text.split(":")))
