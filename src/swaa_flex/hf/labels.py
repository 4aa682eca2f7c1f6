"""Where prompts end, read from the labels of a training sample."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import MaskError
from .prompt import surrounding_prompt

IGNORED = -100
"""The label of tokens that are not to be predicted."""


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

    The forward of this one model is wrapped, not hooked: peft calls it past the hooks.
    """
    if "forward" not in model.__dict__:
        vars(model)["forward"] = types.MethodType(_reading(type(model).forward), model)


def read_labels_no_more(model: PreTrainedModel) -> None:
    """Undoes `read_labels`."""
    wrapped = model.__dict__.get("forward")
    if getattr(wrapped, "reads_labels", False):
        del vars(model)["forward"]


@functools.cache
def _reading(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapped(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        if labels is not None and self.config._attn_implementation == "swaa_flex":
            kwargs = _told(labels, kwargs)
        return forward(self, *args, **kwargs)

    wrapped.reads_labels = True  # type: ignore[attr-defined]
    return wrapped


def _told(labels: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a forward, with decode rows where nobody says where prompts end."""
    lengths = kwargs.get("prompt_lengths")
    if lengths is not None:
        _refuse_longer(lengths, labels.shape[-1])
    if kwargs.get("past_key_values") is None:
        # A cache has no use here, and transformers takes packed rows for one text where there is one.
        kwargs = {"use_cache": False} | kwargs
    if lengths is not None or kwargs.get("decode_rows") is not None or surrounding_prompt().says_where:
        return kwargs
    packed = kwargs.get("attention_mask") is None
    rows = decode_rows_of(labels, kwargs.get("attention_mask"), kwargs.get("position_ids") if packed else None)
    return kwargs | {"decode_rows": rows}


def _refuse_longer(lengths: Any, tokens: int) -> None:
    if torch.compiler.is_compiling() or (isinstance(lengths, Tensor) and lengths.device.type != "cpu"):
        return
    for number, length in enumerate(torch.as_tensor(lengths).reshape(-1).tolist()):
        if length > tokens:
            raise MaskError(
                f"prompt_lengths[{number}]={length}: the sample has {tokens} tokens, so none of them is an answer; "
                "give the tokens of the prompt alone, and do not cut samples off inside it"
            )
