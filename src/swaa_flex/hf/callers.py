"""What calls a forward, where that decides whether its answer can be right."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError
from ..layer_mask import has_several_documents
from .labels import cache_in, packed_positions
from .surroundings import PromptInfo


class Caller(NamedTuple):
    """What a forward is part of, as seen when its mask is made.

    Attributes:
        checkpoint: whether the whole forward is inside a `torch.utils.checkpoint` that will compute it again.
        recomputation: whether it is a whole forward that a backward pass computes again.
        reentrant: whether that is for a checkpoint with `use_reentrant=True`, which is not noticed the first time.
        generation: whether `generate` of transformers calls it, without a cache.
    """

    checkpoint: bool = False
    recomputation: bool = False
    reentrant: bool = False
    generation: bool = False


def find_caller(may_lack_cache: bool) -> Caller:
    """What the forward whose mask is being made is part of.

    Checkpoints of single layers, which `gradient_checkpointing_enable` makes, do not count: masks are made outside of
    them.

    Args:
        may_lack_cache: whether the forward looks like one without a cache, so that it is worth to look for `generate`.
    """
    # torch.utils.checkpoint has no public way to ask: its hooks for saved tensors, and the id of a running backward
    # pass, say so (torch 2.11 to 2.15).
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    inside = "" if hooks is None else getattr(hooks[0], "__qualname__", "")
    recomputation = torch._C._current_graph_task_id() != -1
    return Caller(
        checkpoint=inside.startswith("_checkpoint_hook."),
        recomputation=recomputation,
        reentrant=recomputation and not inside.startswith("_recomputation_hook."),
        generation=may_lack_cache and _is_generating_without_cache(),
    )


def refuse_unknown_prompts(caller: Caller, surrounding: PromptInfo, is_told: bool) -> None:
    """Refuses a forward that cannot know where prompts end though its caller does, or did.

    Args:
        caller: what the forward is part of.
        surrounding: what the surrounding `prompt` says.
        is_told: whether a keyword of the forward, or its cache, says where prompts end.

    Raises:
        UnsupportedModelError: says what to do instead.
    """
    lost = surrounding.dense_tail is not None or (surrounding.says_where and not is_told)
    if (caller.checkpoint or caller.recomputation) and lost:
        raise UnsupportedModelError(
            "swaa_flex.prompt() around a checkpointed forward: the backward pass computes the forward again when that "
            "block may have been left, or in another thread; pass prompt_lengths= or decode_rows= to the forward "
            "instead, or checkpoint layer by layer, as transformers does"
        )
    if caller.reentrant and not is_told:
        raise UnsupportedModelError(
            "a backward pass computes a whole forward again (torch.utils.checkpoint with use_reentrant=True) that "
            "does not say where prompts end, and a swaa_flex.prompt() that was around it the first time is gone; pass "
            "prompt_lengths= or decode_rows= to the forward, or use_reentrant=False to checkpoint"
        )
    if caller.generation and not is_told and not surrounding.says_where:
        raise UnsupportedModelError(
            "generate(use_cache=False) gives all tokens anew at each step, so that the tokens of the answer cannot be "
            "told from those of the prompt; put `with swaa_flex.prompt(lengths):` around generate, or use a cache"
        )


def refuse_lost_lengths(config: PreTrainedConfig) -> None:
    """Refuses attention that was not told where prompts end though a forward that calls it was.

    Args:
        config: of the text model.

    Raises:
        UnsupportedModelError: says what to do instead.
    """
    if any(given.get(name) is not None for given in _forwards(config) for name in ("prompt_lengths", "decode_rows")):
        raise UnsupportedModelError(keywords_are_dropped(config))


def keywords_are_dropped(config: PreTrainedConfig) -> str:
    """The message for models whose layers do not get the keywords of the forward."""
    return (
        f"model type {config.model_type!r} does not hand keywords on to attention, so neither prompt_lengths= and "
        "decode_rows= nor labels say where prompts end; put `with swaa_flex.prompt(...)` around the forward"
    )


def refuse_lost_documents(config: PreTrainedConfig) -> None:
    """Refuses to make a mask for one text where a forward that calls was given several packed documents.

    Args:
        config: of the text model.

    Raises:
        UnsupportedModelError: says what to do instead.
    """
    forwards = [*_forwards(config)]
    given = next((each for each in reversed(forwards) if "position_ids" in each), None)
    positions = None if given is None else packed_positions(given)
    if positions is not None and has_several_documents(positions):
        if any(cache_in(each) is not None for each in forwards):
            raise UnsupportedModelError(
                "position_ids of packed documents, beside a cache, with which transformers takes rows for one text "
                "each: pass use_cache=False to the forward"
            )
        raise UnsupportedModelError(
            f"model type {config.model_type!r} makes its mask without position_ids, so packed documents would see "
            "each other; give each document a row of its own"
        )


def _forwards(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """What the forwards of a text model, and of the models around it, were given that are under way: inner ones first.

    Not every model hands keywords and positions on to its layers and masks, which only its callers can know.
    """
    for frame in _callers():
        if frame.f_code.co_name == "forward":
            given = frame.f_locals
            model = given.get("self")
            if isinstance(model, PreTrainedModel) and model.config.get_text_config() is config:
                yield given | given.get("kwargs", {})


def _is_generating_without_cache() -> bool:
    """Whether `generate` of transformers is among the callers and has no cache: it tells nobody that it calls."""
    generate = inspect.unwrap(GenerationMixin.generate).__code__
    found = next((frame for frame in _callers() if frame.f_code is generate), None)
    # transformers 5.17 to 5.24: the configuration with all that the keywords of generate have set in it.
    return found is not None and found.f_locals["generation_config"].use_cache is False


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
