"""Where prompts end, read from the labels of a training sample."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import MaskError, UnsupportedModelError
from .cache import CACHE
from .prompt import surrounding_prompt

IGNORED = -100
"""The label of tokens that are not to be predicted."""
_DROPPING = frozenset({"nemotron", "stablelm"})
"""Model types whose layers do not hand keywords of a forward on to attention (transformers 5.17 to 5.24)."""


def decode_rows_of(labels: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
    """The decode rows of training samples: the tokens that have a label, in samples that begin with a prompt.

    A sample (in a packed row: a document) has a prompt if its first two tokens have no label. One that is labelled
    from its start is plain text, whose rows all slide. (The first label alone says nothing: collators that pack
    documents remove it from plain text as well.)

    Args:
        labels: `[batch, len]`, -100 for tokens that are not to be predicted.
        attention_mask: `[batch, len]`, 0 for pads, which are no tokens of the sample.
        position_ids: `[batch, len]` or `[1, len]` of packed rows: each document begins at 0.

    Returns:
        Bool `[batch, len]`, as `decode_rows` of a forward.
    """
    index = torch.arange(labels.shape[-1], device=labels.device)
    unlabelled = labels == IGNORED
    begins = (index == 0).expand(labels.shape)
    if attention_mask is not None:
        real = attention_mask.bool()
        begins = begins | (real & ~F.pad(real, (1, 0))[:, :-1])
    if position_ids is not None:
        begins = begins | (position_ids == 0)
    start = torch.where(begins, index, 0).cummax(-1).values
    prompts = unlabelled & F.pad(unlabelled, (0, 1))[:, 1:]
    return ~unlabelled & prompts.gather(-1, start)


def read_labels(model: PreTrainedModel) -> None:
    """Makes forwards with labels know where prompts end, unless they are told otherwise.

    The forward of this one model is wrapped, not hooked: peft calls it past the hooks. Models other than causal
    language models, whose labels are something else, and those with a forward of somebody else's stay as they are.
    """
    plain = type(model).forward
    if not {"labels", "logits_to_keep"} <= inspect.signature(plain).parameters.keys():
        return
    slot = _slot(model)
    found = model.__dict__.get(slot)
    # What pickle leaves of a wrapped forward is the plain one, as an attribute.
    if found is None or getattr(found, "__func__", None) is plain:
        vars(model)[slot] = types.MethodType(_reading(plain), model)


def read_labels_no_more(model: PreTrainedModel) -> None:
    """Undoes `read_labels`."""
    plain, slot = type(model).forward, _slot(model)
    if getattr(model.__dict__.get(slot), "__func__", None) is _reading(plain):
        del vars(model)[slot]
        if slot != "forward":
            vars(model)[slot] = types.MethodType(plain, model)


def _slot(model: PreTrainedModel) -> str:
    """The attribute that holds a model's own forward: another one if accelerate has put its hooks around it."""
    return "_old_forward" if "_old_forward" in model.__dict__ else "forward"


@functools.cache
def _reading(forward: Any) -> Any:
    names = tuple(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def wrapped(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        labels = given.get("labels")
        if self.config._attn_implementation != "swaa_flex":
            return forward(self, *args, **kwargs)
        if labels is not None:
            args, kwargs = (), _told(labels, given)
        if kwargs.get("prompt_lengths") is not None or kwargs.get("decode_rows") is not None:
            refuse_dropped_keywords(
                self.config,
                "neither prompt_lengths= and decode_rows= nor labels say where prompts end; put "
                "`with swaa_flex.prompt(...)` around the forward",
            )
        return forward(self, *args, **kwargs)

    return wrapped


def _told(labels: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward, with decode rows where nobody says where prompts end."""
    padding, lengths = given.get("attention_mask"), given.get("prompt_lengths")
    if labels.dim() != 2 or (padding is not None and (not isinstance(padding, Tensor) or padding.dim() != 2)):
        return given
    if lengths is not None:
        _refuse_longer(lengths, labels.shape[-1])
    if given.get(CACHE) is None and given.get("past_key_values") is None:
        # A cache has no use here, and transformers takes packed rows for one text where there is one.
        given = {"use_cache": False} | given
    if lengths is not None or given.get("decode_rows") is not None or surrounding_prompt().says_where:
        return given
    positions = given.get("position_ids") if padding is None else None
    return given | {"decode_rows": decode_rows_of(labels, padding, positions)}


def refuse_dropped_keywords(config: PreTrainedConfig, therefore: str) -> None:
    """Refuses a model whose attention does not learn what the keywords of a forward say of its prompts."""
    if config.model_type in _DROPPING:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} does not hand keywords on to attention, so {therefore}"
        )


def _refuse_longer(lengths: Any, tokens: int) -> None:
    if torch.compiler.is_compiling() or (isinstance(lengths, Tensor) and lengths.device.type != "cpu"):
        return
    for number, length in enumerate(torch.as_tensor(lengths).reshape(-1).tolist()):
        if length != int(length) or length < 0:
            raise MaskError(f"prompt_lengths[{number}]={length}: expected a number of tokens")
        if length > tokens:
            raise MaskError(
                f"prompt_lengths[{number}]={length}: the sample has {tokens} tokens, so none of them is an answer; "
                "give the tokens of the prompt alone, and do not cut samples off inside it"
            )
