"""`config.swaa`: the SWAA configuration as part of a model's config."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from .. import recipes
from ..config import LayerKind, SWAAConfig
from ..errors import ConfigError

RECIPE_VARIABLE = "SWAA_FLEX_RECIPE"
"""The environment variable that replaces the default recipe; `swaa-flex run --swaa` sets it."""


class StoredConfig(dict[str, Any]):
    """A `SWAAConfig` as the plain dict that is written to config.json, with the parsed one at hand.

    torch.compile cannot trace the parsing, hence the attribute; fields that are set are parsed at once.
    """

    def __init__(self, parsed: SWAAConfig) -> None:
        super().__init__(parsed.to_dict())
        self.parsed = parsed

    def __setitem__(self, field: str, value: Any) -> None:
        self.update({field: value})

    def update(self, *fields: Any, **more: Any) -> None:
        """As a dict does it; raises ConfigError as `SWAAConfig` does, and then changes nothing."""
        self.parsed = SWAAConfig.from_dict({**self, **dict(*fields, **more)})
        super().update(self.parsed.to_dict())

    def __deepcopy__(self, memo: object) -> StoredConfig:
        return StoredConfig(self.parsed)

    def __reduce__(self) -> tuple[type[StoredConfig], tuple[SWAAConfig]]:
        return StoredConfig, (self.parsed,)


class SWAAAttribute:
    """`config.swaa`: reads as a plain dict or None, takes a recipe name, a `SWAAConfig` or a dict.

    It is an attribute of the class `PreTrainedConfig` because `from_pretrained(..., swaa=...)` accepts exactly the
    keywords that the config class has as attributes (transformers 5.17 to 5.24). The value lives in the instance,
    so `save_pretrained` writes it. A composite config passes it on to the text model's.
    """

    def __get__(self, config: PreTrainedConfig | None, owner: type) -> StoredConfig | None:
        return None if config is None else config.__dict__.get("swaa")

    def __set__(self, config: PreTrainedConfig, value: str | SWAAConfig | dict[str, Any] | None) -> None:
        if value is None:
            stored = None
        else:
            text = config.get_text_config()
            stored = StoredConfig(recipes.coerce(value, getattr(text, "model_type", None)))
            layers = getattr(text, "num_hidden_layers", None)
            if layers is not None:
                kinds = stored.parsed.resolve(layers)
                if not isinstance(value, StoredConfig):  # that is put back, and has been warned of
                    _warn_if_idle(stored.parsed, kinds, text)
        config.__dict__["swaa"] = stored
        inner = config.get_text_config()
        if inner is not config:
            inner.__dict__["swaa"] = stored


def _warn_if_idle(swaa: SWAAConfig, kinds: Sequence[LayerKind], model: PreTrainedConfig) -> None:
    """Warns of each second layer, say, where these are just the ones that a model with windows of its own has full."""
    own = getattr(model, "layer_types", None) or ()
    near = getattr(model, "sliding_window", None) or getattr(model, "attention_chunk_size", None) or 0
    full = [layer for layer, kind in enumerate(own) if kind == "full_attention"]
    if not isinstance(swaa.full_attention_layers, str) or (swaa.sliding_window or 0) < near or len(full) == len(own):
        return
    if full and len(kinds) == len(own) and all(kinds[layer].full for layer in full):
        some = ", ".join(map(str, full[:4])) + ", ..." * (len(full) > 4)
        warnings.warn(
            f"the recipe changes nothing: full_attention_layers={swaa.full_attention_layers!r} keeps all layers full "
            f"that are full in this model ({some}); name fewer of them, as in full_attention_layers=[{full[-1]}]",
            stacklevel=4,
        )


setattr(PreTrainedConfig, "swaa", SWAAAttribute())  # noqa: B010 (mypy knows no such attribute)


def default_recipe() -> str | SWAAConfig:
    """The recipe of models that come without one: what `SWAA_FLEX_RECIPE` says, else `recipes.DEFAULT`.

    The variable holds the name of a recipe or a JSON object with the fields of a `SWAAConfig`. It is an environment
    variable so that the processes of a launcher inherit it.

    Raises:
        ConfigError: if the variable holds something else.
    """
    recipe = os.environ.get(RECIPE_VARIABLE, recipes.DEFAULT)
    try:
        if recipe.lstrip().startswith("{"):
            return SWAAConfig.from_json(recipe)
        recipes.get(recipe)
    except ConfigError as error:
        raise ConfigError(f"{RECIPE_VARIABLE}: {error}") from error
    return recipe


def swaa_of(config: PreTrainedConfig) -> SWAAConfig:
    """The configuration a model runs with: `config.swaa`, or the default recipe."""
    stored = config.swaa
    if stored is None:
        config.swaa = default_recipe()
        stored = config.swaa
    parsed: SWAAConfig = stored.parsed
    return parsed


def kv_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """Heads of keys and values, and their size, as the configuration of a text model says them, or implies."""
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, head_dim
