"""Named configurations, and why each is what it is.

Accuracies are the paper's ("Sliding Window Attention Adaptation", arXiv 2512.10411): LongMemEval_24k
in percent, thinking / non-thinking checkpoint of Qwen3-4B, without training, unless said otherwise. Its
throughputs (1.71x and so on) are relative to full attention on one H100 with vLLM, 128k tokens in and
512 out, and were measured without sinks, which cost nothing there (a 2k window: 8.2x with 100 of them
or none). The paper has no dense tail. Recipes of this library add one, because without it the last
prompt row, which predicts the first token of the answer, cannot see past the window.

- `full`: the baseline, 73.0 / 62.0.
- `naive`: what goes wrong; a 2k window alone falls to 3.2 / 11.0.
- `paper`: 2k window, 100 sinks, half of the layers, full-attention decode: 68.8 / 50.6.
- `throughput`: decode slides too, so its cost and memory stop growing with the text, 8.2x.
  Recall is low, 16.0 / 15.6 with 10 sinks: for text whose answers are near.
- `decode_only`: no full layers, 50.0 / 17.8 with 100 sinks, 1.71x; a thinking model gains most.
- `fast`: a quarter of the layers, 53.2 / 31.4 with a 2k window and 10 sinks, 1.45x.
- `balanced`: half of the layers and a 4k window, 73.0 / 54.2 with 100 sinks, 1.24x.
- `quality`: an 8k window, 71.6 / 56.6 with 100 sinks. On RULER's multi-query needles at 128k it keeps
  67.2 / 86.0, where the same with a 2k window has 58.0 / 78.8 and full attention 85.6 / 92.8.

Which half of the layers stays full depends on the model (2k window, 10 sinks, full-attention decode):
odd layers 65.0 / 53.6 and even ones 36.0 / 17.2 for Qwen3-4B, but odd 51.6 / 24.0 and even 74.8 / 63.0
for Qwen3-30B-A3B, and odd 21.0 and even 42.6 for Llama-3.1-8B. So "half" means the odd layers, except
for model types llama and qwen3_moe, where it means the even ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from swaa_flex.config import SWAAConfig
from swaa_flex.errors import ConfigError, did_you_mean

DEFAULT = "balanced"


def get(name: str, model_type: str | None = None) -> SWAAConfig:
    """Return the configuration of a recipe.

    Args:
        name: One of `names()`.
        model_type: The `model_type` of the model's config. Recipes that keep half of the layers full
            keep the odd ones, but the even ones for "llama" and "qwen3_moe" (arXiv 2512.10411:
            Llama-3.1-8B scores 42.6 with even layers and 21.0 with odd ones).

    Raises:
        ConfigError: There is no recipe of that name.

    Examples:
        >>> from swaa_flex import recipes
        >>> recipes.get("quality").sliding_window
        8192
        >>> recipes.get("quality", model_type="llama").full_attention_layers
        '0::2'
    """
    config = _find(name).config
    if config.full_attention_layers == _ODD_HALF and model_type in _KEEP_EVEN_HALF:
        return replace(config, full_attention_layers=_EVEN_HALF)
    return config


def names() -> tuple[str, ...]:
    """Return the names of the recipes, baselines first."""
    return tuple(_RECIPES)


def describe(name: str) -> str:
    """Return what a recipe is for, in one line.

    Raises:
        ConfigError: There is no recipe of that name.
    """
    return _find(name).summary


def coerce(value: str | SWAAConfig | Mapping[str, Any] | None, model_type: str | None = None) -> SWAAConfig:
    """Return the configuration that a user means by `value`.

    Args:
        value: `None` (the default recipe), the name of a recipe, a `SWAAConfig`, or a dict of its
            fields, where a missing key takes the default of the field, as in `SWAAConfig`.
        model_type: As in `get`; it matters to recipes only.

    Raises:
        ConfigError: `value` is something else, or names or holds something invalid.

    Examples:
        >>> coerce({"sliding_window": 1024}) == SWAAConfig(sliding_window=1024)
        True
    """
    if value is None:
        return get(DEFAULT, model_type)
    if isinstance(value, str):
        return get(value, model_type)
    if isinstance(value, SWAAConfig):
        return value
    if isinstance(value, Mapping):
        return SWAAConfig.from_dict(value)
    raise ConfigError(
        f"expected a recipe name ({', '.join(_RECIPES)}), a SWAAConfig, a dict of its fields, or None "
        f"for the default recipe {DEFAULT!r}, got {value!r}"
    )


@dataclass(frozen=True, slots=True)
class _Recipe:
    summary: str
    config: SWAAConfig


_ODD_HALF = "1::2"
_EVEN_HALF = "0::2"
_QUARTER = "1::4"
_KEEP_EVEN_HALF = ("llama", "qwen3_moe")

_RECIPES = {
    "full": _Recipe(
        "full attention in every layer: the baseline",
        SWAAConfig(
            sliding_window=None,
            sink_tokens=0,
            full_attention_layers=(),
            full_attention_decode=False,
            dense_tail=0,
        ),
    ),
    "naive": _Recipe(
        "a window and nothing else: shows what goes wrong without the rest",
        SWAAConfig(
            sliding_window=2048,
            sink_tokens=0,
            full_attention_layers=(),
            full_attention_decode=False,
            dense_tail=0,
        ),
    ),
    "paper": _Recipe(
        "the training-free setting of the SWAA paper (arXiv 2512.10411), to compare with it",
        SWAAConfig(
            sliding_window=2000,
            sink_tokens=100,
            full_attention_layers=_ODD_HALF,
            full_attention_decode=True,
            dense_tail=0,
        ),
    ),
    "throughput": _Recipe(
        "every layer slides, in decode too: decode cost and memory stop growing, least recall",
        SWAAConfig(
            sliding_window=2048,
            sink_tokens=128,
            full_attention_layers=(),
            full_attention_decode=False,
            dense_tail=64,
        ),
    ),
    "decode_only": _Recipe(
        "fastest prefill with full-attention decode: for models that think before they answer",
        SWAAConfig(
            sliding_window=2048,
            sink_tokens=128,
            full_attention_layers=(),
            full_attention_decode=True,
            dense_tail=64,
        ),
    ),
    "fast": _Recipe(
        "a quarter of the layers stays full: faster prefill, some recall lost",
        SWAAConfig(
            sliding_window=2048,
            sink_tokens=128,
            full_attention_layers=_QUARTER,
            full_attention_decode=True,
            dense_tail=64,
        ),
    ),
    "balanced": _Recipe(
        "the default: half of the layers stays full, window 4096",
        SWAAConfig(
            sliding_window=4096,
            sink_tokens=128,
            full_attention_layers=_ODD_HALF,
            full_attention_decode=True,
            dense_tail=64,
        ),
    ),
    "quality": _Recipe(
        "half of the layers stays full, window 8192, longer dense tail: closest to full attention",
        SWAAConfig(
            sliding_window=8192,
            sink_tokens=128,
            full_attention_layers=_ODD_HALF,
            full_attention_decode=True,
            dense_tail=128,
        ),
    ),
}


def _find(name: str) -> _Recipe:
    if name not in _RECIPES:
        raise ConfigError(
            f"unknown recipe {name!r}: expected one of {', '.join(_RECIPES)}{did_you_mean(name, _RECIPES)}"
        )
    return _RECIPES[name]
