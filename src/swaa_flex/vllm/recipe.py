"""Which recipe a server runs, and what it cannot run with."""

from __future__ import annotations

import logging
import os
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from .. import recipes
from ..config import SWAAConfig
from ..errors import ConfigError, UnsupportedModelError
from ..hf.config import RECIPE_VARIABLE, default_recipe
from .rows import Rule

if TYPE_CHECKING:
    from vllm.config import VllmConfig

GIVEN, SAVED = '"swaa" in --additional-config', '"swaa" in the config.json of the checkpoint'
WAYS = (
    f"""--additional-config '{{"swaa": "balanced"}}', {SAVED}, """
    f"or the variable {RECIPE_VARIABLE}=balanced"
)
LOGGER = logging.getLogger("vllm.swaa_flex")  # vLLM prints what its own loggers and those below them are told


def recipe_of(vllm_config: VllmConfig) -> SWAAConfig:
    """The recipe: what the user says, else what is saved with the model, else the variable.

    Raises:
        ConfigError: if there is none, or a field of it is invalid.
    """
    given = _given(vllm_config)
    if given is None:
        _refuse_stray(vllm_config)
        given = _saved(vllm_config)
    if given is None and os.environ.get(RECIPE_VARIABLE):
        given = default_recipe()
    if given is None:
        raise ConfigError(f"the attention backend of swaa_flex has no recipe; give one by {WAYS}")
    return recipes.coerce(given, vllm_config.model_config.hf_text_config.model_type)


def check_backend(vllm_config: VllmConfig) -> None:
    """Says so if there is a recipe and another attention backend, which runs the model without it.

    Raises:
        ConfigError: if the user gave the recipe; one that is saved with the model is a warning.
    """
    if getattr(vllm_config.attention_config.backend, "name", None) == "CUSTOM":
        return
    way_out = "only --attention-backend CUSTOM serves a recipe; add it, or have full attention"
    if _given(vllm_config) is not None:
        raise ConfigError(f'{GIVEN}: {way_out} without "swaa"')
    if _saved(vllm_config) is not None:
        LOGGER.warning("%s is not used: %s as now", SAVED, way_out)


def asked_by(vllm_config: VllmConfig) -> str | None:
    """What asks for a recipe, in words; None if nothing does."""
    if _given(vllm_config) is not None:
        return GIVEN
    if _saved(vllm_config) is not None:
        return SAVED
    return RECIPE_VARIABLE if os.environ.get(RECIPE_VARIABLE) else None


def _given(vllm_config: VllmConfig) -> Any:
    given = vllm_config.additional_config
    return given.get("swaa") if isinstance(given, dict) else None


def _refuse_stray(vllm_config: VllmConfig) -> None:
    given = vllm_config.additional_config
    stray = sorted({field.name for field in fields(SWAAConfig)} & set(given if isinstance(given, dict) else ()))
    if stray:
        raise ConfigError(
            f"""--additional-config: {", ".join(stray)} outside of "swaa"; write '{{"swaa": {{"{stray[0]}": ...}}}}'"""
        )


def _saved(vllm_config: VllmConfig) -> Any:
    model = vllm_config.model_config
    return getattr(model.hf_config, "swaa", None) or getattr(model.hf_text_config, "swaa", None)


def rules_of(vllm_config: VllmConfig) -> tuple[Rule | None, ...]:
    """How the rows of each layer see; None for a layer that stays full.

    Raises:
        ConfigError: if the recipe does not fit the model, or how vLLM was asked to run.
    """
    config = recipe_of(vllm_config)
    kinds = config.resolve(vllm_config.model_config.hf_text_config.num_hidden_layers)
    if config.sliding_window is None or all(kind.full for kind in kinds):
        return tuple(None for _ in kinds)
    window, sinks, tail = config.sliding_window, config.sink_tokens, config.dense_tail
    rules = tuple(None if k.full else Rule(window, sinks, tail, k.full_attention_decode) for k in kinds)
    _check(vllm_config, [rule for rule in rules if rule is not None])
    return rules


def _check(vllm_config: VllmConfig, rules: list[Rule]) -> None:
    has_tail = any(rule.dense_tail for rule in rules)
    has_dense = has_tail or any(rule.dense_decode for rule in rules)
    if has_dense and vllm_config.cache_config.enable_prefix_caching:
        raise ConfigError(
            "prefix caching: pages of another request hold rows that were dense there, in its tail or answer, and are "
            "not in yours; start vLLM with --no-enable-prefix-caching, or take a recipe without them"
        )
    if has_dense and vllm_config.kv_transfer_config is not None:
        raise ConfigError(
            "kv_transfer_config: pages that come from elsewhere may hold rows that were dense in another request, in "
            "its tail or answer, and are not in yours; start vLLM without it, or take a recipe without them"
        )
    speculative = vllm_config.speculative_config
    if speculative is not None and has_tail:
        raise ConfigError(
            "speculative decoding with dense_tail: vLLM does not tell where prompts end then; take dense_tail=0"
        )
    if speculative is not None and getattr(speculative.attention_backend, "name", None) == "CUSTOM":
        raise ConfigError(
            "attention_backend CUSTOM in the speculative_config: drafts are verified and need no recipe; leave it out"
        )
    if vllm_config.model_config.runner_type == "pooling" and has_tail:
        raise ConfigError(
            "a model that pools with dense_tail: vLLM does not tell where prompts end; take dense_tail=0"
        )
    if vllm_config.model_config.enable_prompt_embeds:
        raise ConfigError("enable_prompt_embeds: vLLM does not tell how long such prompts are; give token ids")
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        raise ConfigError("kv_sharing_fast_prefill: layers that skip rows do not tell which; start vLLM without it")
    if vllm_config.parallel_config.use_ubatching:
        raise ConfigError("enable_dbo: halves of a batch do not tell where prompts end; start vLLM without it")
    if vllm_config.parallel_config.decode_context_parallel_size > 1:
        raise ConfigError("decode_context_parallel_size: expected 1, swaa_flex keeps the keys of a sequence together")


def rule_at(rules: tuple[Rule | None, ...], layer: int, name: str) -> Rule | None:
    """The rule of a layer.

    Raises:
        UnsupportedModelError: if it is none of the language model's, whose layers the recipe counts.
    """
    if layer >= len(rules):
        raise UnsupportedModelError(
            f"layer {name}: the recipe has rules for the {len(rules)} layers of the language model; serve this model "
            "with another --attention-backend"
        )
    return rules[layer]


def check_layer(rule: Rule, sliding_window: int | None, alibi_slopes: list[float] | None) -> None:
    """Refuses what a layer has of its own and a rule cannot be combined with.

    Raises:
        UnsupportedModelError: naming it.
    """
    if alibi_slopes is not None:
        raise UnsupportedModelError("ALiBi: swaa_flex has no position biases; use --attention-backend FLASH_ATTN")
    if sliding_window is not None and sliding_window > rule.window:
        raise UnsupportedModelError(
            f"the model's own sliding window is {sliding_window} and that of the recipe {rule.window}; take a recipe "
            f"with sliding_window={sliding_window} or more, or make these layers full_attention_layers"
        )
