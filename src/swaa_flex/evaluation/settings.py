"""Settings files of the reference implementation of arXiv 2512.10411: which configurations to run on which models."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..config import SWAAConfig
from ..errors import ConfigError


def read_settings(path: str | Path) -> dict[str, list[dict[str, Any]]]:
    """Reads a settings file: a JSON list of objects with a `swaa_config` and a `model_list`.

    Args:
        path: the file.

    Returns:
        For each model, in the order of the file, the `swaa_config`s to run on it, as `SWAAConfig.from_reference` takes
        them.

    Raises:
        ConfigError: if the file is none of that kind.
    """
    try:
        entries = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected a JSON list of swaa_config and model_list ({error})") from error
    found: dict[str, list[dict[str, Any]]] = {}
    for number, entry in enumerate(entries if isinstance(entries, list) else [None]):
        models = entry.get("model_list") if isinstance(entry, dict) else None
        if not isinstance(models, list) or not isinstance(entry.get("swaa_config"), dict):
            raise ConfigError(
                f"{path}, entry {number}: expected an object with 'swaa_config', an object, and 'model_list', a list "
                "of names or folders"
            )
        for model in models:
            found.setdefault(str(model), []).append(entry["swaa_config"])
    if not found:
        raise ConfigError(f"{path}: expected at least one entry with a model")
    return found


def named(settings: Iterable[Mapping[str, Any]], num_hidden_layers: int) -> dict[str, SWAAConfig]:
    """The configurations of a settings file under names that tell them apart, each once.

    Args:
        settings: some `swaa_config`s.
        num_hidden_layers: layers that the model does not have are dropped, as the reference does.

    Raises:
        ConfigError: if one is invalid.

    Examples:
        >>> found = named([{"sliding_window_size": 2000, "keep_first": 10, "non_sliding_layers": [1, 3, 5]}], 4)
        >>> list(found)
        ['W 2000, K 10, full 1::2']
    """
    configs = [SWAAConfig.from_reference(values, num_hidden_layers) for values in settings]
    return {_name(config, num_hidden_layers): config for config in configs}


def _name(config: SWAAConfig, layers: int) -> str:
    if config.sliding_window is None:
        return "full"
    parts = [f"W {config.sliding_window}"]
    if config.sink_tokens:
        parts.append(f"K {config.sink_tokens}")
    if config.full_attention_decode:
        decode = config.full_attention_decode
        parts.append(f"D {_layers(decode, layers)}" if isinstance(decode, tuple) else "D")
    if isinstance(config.full_attention_layers, tuple) and config.full_attention_layers:
        parts.append(f"full {_layers(config.full_attention_layers, layers)}")
    return ", ".join(parts)


def _layers(indices: tuple[int, ...], layers: int) -> str:
    """As a slice where it is one."""
    for step in range(1, layers):
        if indices == tuple(range(indices[0], layers, step)):
            return f"{indices[0]}::{step}"
    return " ".join(map(str, indices))
