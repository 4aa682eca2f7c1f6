"""`prompt`: where the prompt ends, for calls that cannot pass it as a keyword."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..algebra import describe, holds_integers, is_whole
from ..errors import MaskError
from ..tracing import is_tracing
from .surroundings import NOTHING_KNOWN, PromptInfo, surroundings


@contextmanager
def prompt(
    lengths: int | Sequence[int] | Tensor | None = None,
    decode_rows: Tensor | None = None,
    dense_tail: int | None = None,
) -> Iterator[None]:
    """Tells the model where prompts end, around `generate` or any forward.

    Rows at positions at or after the length of their prompt are decode rows, whatever the shape of the forward
    they come in: chunked prefill, assisted decoding, several turns. The keywords `prompt_lengths` and
    `decode_rows` of a forward do the same for that forward. An inner `prompt` replaces an outer one as a whole, and a
    thread knows only those that were entered in it.

    Args:
        lengths: tokens of each prompt, pads excluded: one int for all sequences, or one per sequence `[batch]`.
        decode_rows: bool `[batch, q_len]`, which rows of the forward are decode rows, where one threshold is not
            enough.
        dense_tail: replaces the recipe's number of full-attention rows at the end of each prompt.

    Raises:
        MaskError: if both `lengths` and `decode_rows` are given, or a value makes no sense.

    Examples:
        >>> import swaa_flex
        >>> with swaa_flex.prompt(lengths=[900, 1200]):
        ...     pass  # model.generate(**batch)
    """
    if dense_tail is not None and (isinstance(dense_tail, bool) or not isinstance(dense_tail, int) or dense_tail < 0):
        raise MaskError(f"dense_tail={dense_tail!r}: expected a number of rows, 0 for none")
    before, own = surroundings.prompt, PromptInfo(*_checked(lengths, decode_rows), dense_tail)
    surroundings.prompt = own
    try:
        yield
    finally:
        others = surroundings.prompt is not own
        surroundings.prompt = NOTHING_KNOWN if others else before
    if others:
        raise MaskError(
            "another prompt() of this thread was entered inside this one and not left again, so forwards may have "
            "run under it; do not await inside prompt(), or pass prompt_lengths= to the forwards"
        )


def overruled(
    info: PromptInfo, lengths: int | Sequence[int] | Tensor | None, decode_rows: Tensor | None
) -> PromptInfo:
    """What is known of prompts, overruled by what the keywords of a forward say of them.

    Raises:
        MaskError: if both are given, or a value makes no sense.
    """
    if lengths is None and decode_rows is None:
        return info
    return PromptInfo(*_checked(lengths, decode_rows), info.dense_tail)


def checked_lengths(lengths: int | Sequence[int] | Tensor | None) -> int | Tensor | None:
    """Prompt lengths as one int or a tensor `[batch]`, or None.

    Raises:
        MaskError: if they are no whole numbers.
    """
    return _checked(lengths, None)[0]


def _checked(
    lengths: int | Sequence[int] | Tensor | None, decode_rows: Tensor | None
) -> tuple[int | Tensor | None, Tensor | None]:
    if lengths is not None and decode_rows is not None:
        raise MaskError("give either prompt lengths or decode_rows: each says where the prompt ends")
    if decode_rows is not None and (
        not isinstance(decode_rows, Tensor) or decode_rows.dtype != torch.bool or decode_rows.dim() != 2
    ):
        raise MaskError(f"decode_rows: expected bool [batch, q_len], got {describe(decode_rows)}")
    if lengths is None:
        return None, None if decode_rows is None else _own(decode_rows)
    if not isinstance(lengths, Tensor):
        several = isinstance(lengths, Iterable) and not isinstance(lengths, str)
        numbers = [_whole(length) for length in (lengths if several else [lengths])]  # type: ignore[union-attr]
        if len(set(numbers)) == 1:
            return numbers[0], None  # known without reading a tensor, so the plan can be split there
        lengths = torch.tensor(numbers)
    if not holds_integers(lengths, 0, 1):
        raise MaskError(f"prompt lengths: expected ints [batch], got {lengths.dtype} of shape {list(lengths.shape)}")
    if lengths.device.type == "cpu" and not is_tracing() and bool((lengths < 0).any()):
        raise MaskError(f"prompt lengths: expected numbers of tokens, got {lengths.tolist()}")
    return _own(lengths), None


def _own(given: Tensor) -> Tensor:
    """A copy of a caller's tensor, who may go on to write to it."""
    return given if is_tracing() else given.clone()


def _whole(length: Any) -> int:
    if isinstance(length, bool) or not is_whole(length) or length < 0:
        raise MaskError(f"prompt lengths: expected numbers of tokens, got {length!r}")
    return length if isinstance(length, int) else operator.index(length)
