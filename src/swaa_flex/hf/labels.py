"""Where prompts end, read from the labels of training samples."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import MaskError
from ..layer_mask import document_starts
from ..tracing import is_tracing
from .cache import CACHE
from .surroundings import surroundings

IGNORED = -100
"""The label of tokens that are not to be predicted."""


def decode_rows_of(labels: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
    """The decode rows of training samples: the tokens that have a label, in samples that begin with a prompt.

    A sample (in a packed row: a document) has a prompt if its first two tokens have no label. One that is labelled
    from its start is plain text, whose rows all count as prompt. (The first label alone says nothing: collators that
    pack documents remove it from plain text as well.)

    Args:
        labels: `[batch, len]`, -100 for tokens that are not to be predicted.
        attention_mask: `[batch, len]`, 0 for pads, which are no tokens of the sample.
        position_ids: `[batch, len]` or `[1, len]` of packed rows: a document begins where they do not go up by one.

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
        begins = begins | document_starts(position_ids)
    start = torch.where(begins, index, 0).cummax(-1).values
    second = (start + 1).clamp(max=labels.shape[-1] - 1)
    begins_with_prompt = unlabelled.gather(-1, start) & unlabelled.gather(-1, second) & (second > start)
    return ~unlabelled & begins_with_prompt


def told_by_labels(given: dict[str, Any], virtual_tokens: int = 0) -> dict[str, Any]:
    """The arguments of a forward with labels, with decode rows where nobody says where prompts end.

    Args:
        given: the arguments by name, `labels` among them.
        virtual_tokens: how many of them peft puts before each text, in embeddings or in a cache. They are no prompt.

    Raises:
        MaskError: if the labels do not say where prompts end, or prompt lengths do not fit the sample.
    """
    labels, padding, lengths = given["labels"], given.get("attention_mask"), given.get("prompt_lengths")
    if labels.dim() != 2 or (padding is not None and (not isinstance(padding, Tensor) or padding.dim() != 2)):
        return given
    cache = cache_in(given)
    if cache is None:
        # A cache has no use here, and transformers takes packed rows for one text where there is one.
        given = {"use_cache": False} | given
    before = 0 if cache is None or is_tracing() else int(cache.get_seq_length())
    if lengths is not None:
        _refuse_longer(lengths, before + labels.shape[-1])
    if lengths is not None or given.get("decode_rows") is not None or surroundings.prompt.says_where:
        return given
    if before > 0 and getattr(cache, "prompt_lengths", None) is not None:
        return given
    text = labels
    if given.get("input_ids") is None and virtual_tokens > 0 and before == 0:
        text = labels[:, virtual_tokens:]
    if padding is not None:  # of virtual tokens and those in a cache too
        padding = padding[:, -text.shape[1] :]
    decode_rows = decode_rows_of(text, padding, packed_positions(given))
    if not is_tracing():
        if before not in (0, virtual_tokens):
            _refuse_continued(text, padding, decode_rows)
        if given.get("input_ids") is None and text is labels:
            _refuse_embedded(decode_rows)
    return given | {"decode_rows": F.pad(decode_rows, (labels.shape[1] - text.shape[1], 0))}


_WAY_OUT = (
    "pass prompt_lengths= (tokens of the prompt, with those in the cache or before the text) or decode_rows= to the "
    "forward, or call swaa_flex.adapt on the model of peft"
)


def cache_in(given: dict[str, Any]) -> Any:
    """The cache among the arguments of a forward, None if there is none."""
    return next((given[name] for name in (CACHE, "past_key_values") if given.get(name) is not None), None)


def packed_positions(given: dict[str, Any]) -> Tensor | None:
    """The position ids of a forward that may be those of packed rows, `[batch | 1, len]`.

    With a padding mask or a cache transformers takes rows for one sequence each (5.17 to 5.24).
    """
    positions = given.get("position_ids")
    if given.get("attention_mask") is not None or not isinstance(positions, Tensor) or positions.dim() != 2:
        return None
    return positions if cache_in(given) is None else None


def _refuse_continued(labels: Tensor, padding: Tensor | None, decode_rows: Tensor) -> None:
    """Refuses labels from the first token on after tokens in a cache, of which nobody says what they are."""
    real = torch.ones_like(labels, dtype=torch.bool) if padding is None else padding.bool()
    if bool(((labels != IGNORED) & real & ~decode_rows).any()):
        raise MaskError(
            "labels that go on after tokens in a cache do not say whether those are a prompt, and these its answer, "
            f"or the beginning of a text; {_WAY_OUT}"
        )


def _refuse_embedded(decode_rows: Tensor) -> None:
    """Refuses to take embeddings without a label for a prompt."""
    if bool(decode_rows.any()):
        raise MaskError(
            "labels of inputs_embeds: embeddings without a label may be a prompt, or the virtual tokens that peft's "
            f"prompt tuning puts before a text; {_WAY_OUT}"
        )


def _refuse_longer(lengths: Any, tokens: int) -> None:
    if is_tracing() or (isinstance(lengths, Tensor) and lengths.device.type != "cpu"):
        return
    for number, length in enumerate(torch.as_tensor(lengths).reshape(-1).tolist()):
        if length != int(length) or length < 0:
            raise MaskError(f"prompt_lengths[{number}]={length}: expected a number of tokens")
        if length > tokens:
            raise MaskError(
                f"prompt_lengths[{number}]={length}: the sample has {tokens} tokens, so none of them is an answer; "
                "give the tokens of the prompt alone, and do not cut samples off inside it"
            )
