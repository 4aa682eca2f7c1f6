"""`adapt` and `restore`: SWAA on a loaded model, and back."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

from transformers import PreTrainedConfig, PreTrainedModel

from .. import recipes
from ..config import SWAAConfig
from ..errors import UnsupportedModelError
from .adapted import give_adapted_class, give_plain_class_back
from .config import default_recipe, set_recipe
from .native import refuse_without_interface

ModelT = TypeVar("ModelT", bound=PreTrainedModel)

_BEFORE = "_attention_before_swaa"  # on the model: implementation of each of its configs, in order


def adapt(model: ModelT, recipe_or_config: str | SWAAConfig | dict[str, Any] = recipes.DEFAULT) -> ModelT:
    """Switches a loaded model to sliding-window attention, in place.

    Adapting again replaces the configuration; `restore` puts back the attention the model had before. Forwards with
    `labels` read from them where prompts end, if nothing else says so: tokens with a label are decode rows, in samples
    whose first two tokens have none.

    Args:
        model: a causal language model of transformers, or one with adapters of peft.
        recipe_or_config: the name of a recipe, a `SWAAConfig`, or its fields as a dict.

    Returns:
        The same model.

    Raises:
        ConfigError: if the configuration is invalid or does not fit the model's number of layers.
        UnsupportedModelError: if it is no model of transformers, or its code does not use transformers' attention
            interface.

    Examples:
        >>> import swaa_flex
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=9)
        >>> model = LlamaForCausalLM(LlamaConfig(**size))
        >>> swaa_flex.adapt(model, "quality").config.swaa["sliding_window"]
        8192
        >>> swaa_flex.restore(model).config._attn_implementation
        'sdpa'
    """
    base = _base(model)
    refuse_without_interface(type(base.config.get_text_config()))
    set_recipe(base.config, recipe_or_config)
    if base.config._attn_implementation != "swaa_flex":
        setattr(base, _BEFORE, [config._attn_implementation for config in _configs(base)])
    base.set_attn_implementation("swaa_flex")
    tuned = getattr(model, "active_peft_config", None)
    give_adapted_class(base, getattr(tuned, "num_virtual_tokens", None) or 0)
    return model


def restore(model: ModelT) -> ModelT:
    """Undoes `adapt`: the attention implementation the model had before, and no `config.swaa`.

    A model that was loaded with `attn_implementation="swaa_flex"`, or with a recipe, had none before and gets "sdpa",
    the default of transformers, or "eager" where it does not support that.

    Args:
        model: a model that `adapt` or `from_pretrained` switched to sliding-window attention.

    Returns:
        The same model.
    """
    base = _base(model)
    configs, before = _configs(base), base.__dict__.get(_BEFORE)
    if before is not None and len(before) == len(configs):
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation
    else:  # adapted from the start, or put together anew since
        try:
            base.set_attn_implementation("sdpa" if before is None else before[0])
        except ValueError:  # GPT-OSS has no sdpa, which lacks its sinks
            base.set_attn_implementation("eager")
    for config in configs:
        config.swaa = None
    base.__dict__.pop(_BEFORE, None)
    give_plain_class_back(base)
    return model


@contextlib.contextmanager
def full_attention(config: PreTrainedConfig) -> Iterator[None]:
    """Full attention in all layers of the model that runs with this config, for as long as the context lasts.

    Args:
        config: of a model under `attn_implementation="swaa_flex"`.
    """
    before = config.swaa
    parsed = recipes.coerce(default_recipe()) if before is None else before.parsed
    set_recipe(config, dataclasses.replace(recipes.get("full"), backend=parsed.backend))
    try:
        yield
    finally:
        set_recipe(config, before)


def _base(model: Any) -> PreTrainedModel:
    """The model of transformers, without what torch.compile and peft have put around it."""
    base = getattr(model, "_orig_mod", model)
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    if not isinstance(base, PreTrainedModel):
        raise UnsupportedModelError(
            f"expected a model of transformers, got {type(model).__name__}; load one with "
            "AutoModelForCausalLM.from_pretrained"
        )
    return base


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The model's config and those of its submodels, each once."""
    found: dict[int, PreTrainedConfig] = {id(model.config): model.config}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            found.setdefault(id(module.config), module.config)
    return list(found.values())
