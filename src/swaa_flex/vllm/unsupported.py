"""What the plugin does under a vLLM that it does not support: nothing, but for a line where a recipe is asked for."""

from __future__ import annotations

import logging
from contextlib import suppress

from .. import __version__
from .recipe import LOGGER, asked_by

SUPPORTED = "0.23"  # as the extra `vllm` in pyproject.toml


def is_supported(version: str) -> bool:
    """Whether the plugin serves recipes with this version of vLLM, `vllm.__version__`."""
    return version.split(".")[:2] == SUPPORTED.split(".")


def say_where_a_recipe_is_asked_for() -> None:
    """Has the log of an engine that is to serve a recipe say that it does not. May be called again.

    Plugins are not told how an engine is configured. But each engine logs its configuration once, as it starts, and a
    filter of that log sees it. It leaves the log as it is.
    """
    logging.getLogger("vllm.v1.engine.core").addFilter(_look_for_a_recipe)


def _look_for_a_recipe(record: logging.LogRecord) -> bool:
    for config in record.args if isinstance(record.args, tuple) else ():
        # In a version where the fields are other ones, serving without the line is better than not serving.
        with suppress(AttributeError):
            if asked := asked_by(config):
                _say(asked)
    return True


def _say(asked: str) -> None:
    import vllm

    LOGGER.warning(
        "%s is not used, attention stays as it is: swaa_flex %s serves recipes with vLLM %s, and this is vLLM %s",
        asked,
        __version__,
        SUPPORTED,
        vllm.__version__,
    )
