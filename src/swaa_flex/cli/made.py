"""The models that a program makes, and which of them do not run the recipe that `swaa-flex run` was given."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedConfig, PreTrainedModel

from .. import recipes
from ..config import SWAAConfig
from ..errors import listed
from ..files import is_first_process
from ..hf import NAME


class _Made(NamedTuple):
    """A model that was made: its config outlives it, and says what it ran last."""

    model: weakref.ref[PreTrainedModel]
    name: str
    config: PreTrainedConfig


@contextmanager
def missed(recipe: str | SWAAConfig, asked_for: str) -> Iterator[None]:
    """Names at the end, on stderr, the models that were made meanwhile and do not run a recipe.

    Args:
        recipe: what they are to run.
        asked_for: how the user has said so.
    """
    made: list[_Made] = []
    post_init = PreTrainedModel.post_init

    @functools.wraps(post_init)
    def recorded(model: PreTrainedModel) -> None:
        post_init(model)  # type: ignore[no-untyped-call]
        parts = {id(module) for module in model.modules()}  # whose own post_init has run before
        made[:] = [one for one in made if id(one.model()) not in parts]
        source = f" ({model.name_or_path})" if model.name_or_path else ""
        made.append(_Made(weakref.ref(model), f"{type(model).__name__}{source}", model.config))

    PreTrainedModel.post_init = recorded  # type: ignore[method-assign]
    try:
        yield
    finally:
        PreTrainedModel.post_init = post_init  # type: ignore[method-assign]
        lines = list(dict.fromkeys(f"{one.name} {why}" for one in made if (why := _why_not(one.config, recipe))))
        if lines and is_first_process():
            warning = listed(f"Warning: {asked_for} was not run by these models of the program:", lines)
            Console(stderr=True, highlight=False).print(Text(warning, style="bold yellow"), soft_wrap=True)


def _why_not(config: PreTrainedConfig, recipe: str | SWAAConfig) -> str | None:
    """Why the model of a config does not run a recipe; None if it does."""
    text = config.get_text_config(decoder=True)  # MusicGen has an encoder of texts as well
    if text._attn_implementation != NAME:
        return (
            f"has attn_implementation={text._attn_implementation!r}; the program is to load it with "
            f'attn_implementation="{NAME}"'
        )
    if config.swaa is not None and config.swaa.parsed != recipes.coerce(recipe, getattr(text, "model_type", None)):
        return f"has a recipe of its own, {config.swaa.parsed.to_dict()}"
    return None
