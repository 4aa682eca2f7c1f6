"""`config.swaa`: the SWAA configuration as part of a model's config."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from transformers import PreTrainedConfig

from .. import recipes
from ..config import LayerKind, SWAAConfig
from ..errors import ConfigError
from .native import refuse_without_interface

RECIPE_VARIABLE = "SWAA_FLEX_RECIPE"
"""The environment variable that replaces the default recipe; `swaa-flex run --swaa` sets it."""


class StoredConfig(dict[str, Any]):
    """A `SWAAConfig` as the plain dict that is written to config.json, with the parsed one at hand.

    torch.compile cannot trace the parsing, hence the attribute `parsed`. A field that is set is parsed at once. What
    would not reach the model in this way is refused: to remove a field, or to edit a list in place.

    Attributes:
        parsed: what the dict says.
        chose_attention: whether this recipe, and nothing else, is why the config's implementation is "swaa_flex".
        num_hidden_layers: how many layers the model had when the recipe was set, None if its config does not say.
    """

    def __init__(
        self, parsed: SWAAConfig, chose_attention: bool = False, num_hidden_layers: int | None = None
    ) -> None:
        super().__init__()
        self.chose_attention = chose_attention
        self.num_hidden_layers = num_hidden_layers
        self._show(parsed)

    def __setitem__(self, field: str, value: Any) -> None:
        self.update({field: value})

    def __ior__(self, fields: Any) -> StoredConfig:  # type: ignore[override, misc]
        self.update(fields)
        return self

    def update(self, *fields: Any, **more: Any) -> None:
        """As a dict does it; raises ConfigError for what does not fit, and then changes nothing."""
        parsed = SWAAConfig.from_dict({**self, **dict(*fields, **more)})
        if self.num_hidden_layers is not None:
            parsed.resolve(self.num_hidden_layers)
        self._show(parsed)

    def setdefault(self, field: str, default: Any = None) -> Any:
        """As a dict does it; raises ConfigError for what is no field, since all fields are there."""
        self.update({field: self.get(field, default)})
        return self[field]

    def pop(self, field: str, *default: Any) -> Any:
        """As a dict does it with what is not there, which is how transformers cleans a config that it saves."""
        if field in self:
            _refuse_edit()
        return super().pop(field, *default)

    def __delitem__(self, field: str) -> NoReturn:
        _refuse_edit()

    def popitem(self) -> NoReturn:
        """Refused with a ConfigError, as `clear` and `del` are."""
        _refuse_edit()

    def clear(self) -> NoReturn:
        """Refused with a ConfigError, as `popitem` and `del` are."""
        _refuse_edit()

    def __deepcopy__(self, memo: object) -> StoredConfig:
        return StoredConfig(self.parsed, self.chose_attention, self.num_hidden_layers)

    def __reduce__(self) -> tuple[type[StoredConfig], tuple[SWAAConfig, bool, int | None]]:
        return StoredConfig, (self.parsed, self.chose_attention, self.num_hidden_layers)

    def _show(self, parsed: SWAAConfig) -> None:
        self.parsed = parsed
        values = parsed.to_dict().items()
        super().update((field, _ReadOnly(value) if isinstance(value, list) else value) for field, value in values)


def _refuse_edit(*_: object, **__: object) -> NoReturn:
    raise ConfigError(
        "config.swaa: expected a new value for a field, as in config.swaa['full_attention_layers'] = [1, 3]; fields "
        "cannot be removed, nor lists in it edited in place"
    )


class _ReadOnly(list[int]):
    """Layers in a `StoredConfig`, a list to whoever reads them or writes JSON; copies of it are plain lists."""

    append = clear = extend = insert = pop = remove = reverse = sort = _refuse_edit
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse_edit

    def __reduce__(self) -> tuple[type[list[int]], tuple[list[int]]]:
        return list, ([*self],)


class SWAAAttribute:
    """`config.swaa`: reads as a plain dict or None, takes a recipe name, a `SWAAConfig` or a dict.

    It is an attribute of the class `PreTrainedConfig` because `from_pretrained(..., swaa=...)` accepts exactly the
    keywords that the config class has as attributes (transformers 5.17 to 5.24). The value lives in the instance,
    so `save_pretrained` writes it. A composite config passes it on to the text model's.

    A recipe is enough to choose "swaa_flex" where no implementation has been asked for, so `from_pretrained` needs no
    `attn_implementation` beside `swaa`, nor beside a config.json that has "swaa". Where another one has been asked
    for, that one runs, and a warning says so.
    """

    def __get__(self, config: PreTrainedConfig | None, owner: type) -> StoredConfig | None:
        return None if config is None else config.__dict__.get("swaa")

    def __set__(self, config: PreTrainedConfig, value: str | SWAAConfig | dict[str, Any] | None) -> None:
        text = config.get_text_config()
        before = text.__dict__.get("swaa")
        if value is not None and text._attn_implementation in (None, "swaa_flex"):
            refuse_without_interface(type(text))
        set_recipe(config, value)
        stored = config.swaa
        if stored is None:
            if isinstance(before, StoredConfig) and before.chose_attention:
                _choose_attention(config, None)
        elif text._attn_implementation in (None, "swaa_flex"):
            stored.chose_attention |= text._attn_implementation is None
            _choose_attention(config, "swaa_flex")
        else:
            warnings.warn(
                f"attn_implementation={text._attn_implementation!r} is what the model runs, so its recipe is idle: "
                f"swaa={stored.parsed.to_dict()}. Leave out attn_implementation to run the recipe, or load the model "
                "with swaa=None and without attn_implementation to be without it",
                stacklevel=3,
            )
        if stored is not None and before is None:
            _warn_of_variable(stored.parsed, text)


def set_recipe(config: PreTrainedConfig, value: str | SWAAConfig | dict[str, Any] | None) -> None:
    """Stores a recipe in the config of a model and in that of its text model, whatever implementation they have.

    Args:
        config: of the whole model.
        value: what `config.swaa` takes.

    Raises:
        ConfigError: if the recipe is invalid or does not fit the model's number of layers.
    """
    text, stored = config.get_text_config(), None
    if value is not None:
        before = text.__dict__.get("swaa")
        stored = StoredConfig(recipes.coerce(value, getattr(text, "model_type", None)))
        stored.chose_attention = isinstance(before, StoredConfig) and before.chose_attention
        layers = getattr(text, "num_hidden_layers", None)
        stored.num_hidden_layers = layers
        if layers is not None:
            kinds = stored.parsed.resolve(layers)
            if not isinstance(value, StoredConfig):  # that is put back, and has been warned of
                _warn_if_idle(stored.parsed, kinds, text)
    config.__dict__["swaa"] = text.__dict__["swaa"] = stored


def _choose_attention(config: PreTrainedConfig, implementation: str | None) -> None:
    """Sets the implementation of a model and its text model where that is open, or opens it again with None.

    A model that has been built is left alone, since it cannot do without one: building settles the implementation of
    experts, which is None before.
    """
    for each in (config, config.get_text_config()):
        unbuilt = each._experts_implementation is None
        if each._attn_implementation is None or (implementation is None and unbuilt):
            each._attn_implementation_internal = implementation


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


def _warn_of_variable(swaa: SWAAConfig, model: PreTrainedConfig) -> None:
    """Warns where `SWAA_FLEX_RECIPE`, or `swaa-flex run --swaa`, asks for another recipe than the model brings."""
    asked_for = os.environ.get(RECIPE_VARIABLE)
    if asked_for is not None and recipes.coerce(default_recipe(), getattr(model, "model_type", None)) != swaa:
        warnings.warn(
            f"{RECIPE_VARIABLE}={asked_for!r} (swaa-flex run --swaa) is for models without a recipe of their own. This"
            f" one has a recipe and runs it: {swaa.to_dict()}. For the other, load the model with swaa=..., or take "
            'the key "swaa" out of its config.json',
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
    if not isinstance(stored, StoredConfig):  # none, or a plain dict that was loaded before this package was imported
        set_recipe(config, default_recipe() if stored is None else stored)
        stored = config.swaa
    parsed: SWAAConfig = stored.parsed
    return parsed


def layer_kinds(config: PreTrainedConfig) -> tuple[LayerKind, ...]:
    """What each layer of a model does, by its number: of all the layers that it had when its recipe was set.

    `assistant_early_exit` of transformers makes the config say fewer for a while, and so do layers that were removed.
    A recipe for the layers of the whole model goes on to hold for those that are left.

    Args:
        config: of the text model.
    """
    recipe = swaa_of(config)
    layers = config.swaa.num_hidden_layers
    return recipe.resolve(max(layers or 0, config.num_hidden_layers))


def kv_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """Heads of keys and values, and their size, as the configuration of a text model says them, or implies."""
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, head_dim
