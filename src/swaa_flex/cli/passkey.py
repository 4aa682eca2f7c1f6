"""Passkey prompts: a number hidden in a text that has nothing to do with it, and a question at the end.

The task is that of Mohtashami and Jaggi 2023, "Landmark Attention".
"""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
NEEDLE = (
    "The secret pass key is {key}. Remember it: the secret pass key is {key}. I repeat, the secret pass key is {key}."
)
QUESTION = "\n\nWhat is the secret pass key? Answer with the number only."


@dataclass(frozen=True, eq=False)
class Passkey:
    """A prompt and what it hides.

    Attributes:
        input_ids: `[1, tokens]`.
        key: The number to be found, as text.
        distance: Tokens between the last mention of the number and the end of the question.
    """

    input_ids: Tensor
    key: str
    distance: int


def passkeys(tokenizer: Any, tokens: int, beyond: int, count: int, seed: int = 0) -> list[Passkey]:
    """Makes prompts that hide a number each, evenly spread over the part that is out of a window's reach.

    Args:
        tokenizer: of the model; its chat template is applied once, if it has one.
        tokens: length of each prompt at most; at least that less one sentence.
        beyond: more than this many tokens of text follow the number.
        count: how many prompts.
        seed: of the numbers.

    Returns:
        The prompts, from the number nearest to the start to the one nearest to the end.
    """
    draw = random.Random(seed)
    return [
        _passkey(tokenizer, str(draw.randint(10_000, 99_999)), tokens, beyond, (i + 0.5) / count) for i in range(count)
    ]


def found(text: str) -> str | None:
    """The number that an answer names first, or None.

    >>> found("The secret pass key is 71432.")
    '71432'
    """
    number = re.search(r"\d+", text)
    return number[0] if number else None


def _passkey(tokenizer: Any, key: str, tokens: int, beyond: int, depth: float) -> Passkey:
    needle = NEEDLE.format(key=key)

    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    # Tokens of joined sentences are at most those of its parts, so a prompt is never longer than asked.
    room = tokens - _encode(tokenizer, f" {needle}{QUESTION}").shape[1]
    before: list[str] = []
    after: list[str] = []
    to_fill = depth * (room - beyond)
    used = 0
    for sentence in itertools.cycle(FILLER):
        used += length(" " + sentence)
        if used > room:
            break
        (before if used <= to_fill else after).append(sentence)
    text = " ".join([*before, needle, *after]) + QUESTION
    input_ids = _encode(tokenizer, text)
    return Passkey(input_ids, key, distance=length(text[text.rindex(key) + len(key) :]))


def _encode(tokenizer: Any, text: str) -> Tensor:
    if tokenizer.chat_template is None:
        ids = tokenizer(text).input_ids
    else:
        chat = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(rendered, add_special_tokens=False).input_ids  # the template writes them
    return torch.tensor([ids])
