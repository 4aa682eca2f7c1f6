"""How a question is put to a model: directly, or with reasoning before the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import ConfigError, did_you_mean
from ..tuning.data import opened_thinking, prompt_ids
from ..tuning.reasoning import Marks, marks_of

Messages = Sequence[Mapping[str, str]]

REASONING = (
    "Think step by step. Then write the final answer, and nothing else, on a last line that begins with Answer:"
)
CUES = {"direct": "Answer:", "cot": "Reasoning:"}
"""What a prompt without a chat template ends with, by style: "direct", or "cot" for chain of thought."""


class Prompt(NamedTuple):
    """A question as it is put to a model.

    Attributes:
        ids: Token ids `[len]`.
        opening: Of a thinking block that the prompt ends with, or empty.
        marks: What the model puts around its reasoning.
    """

    ids: tuple[int, ...]
    opening: str
    marks: Marks


def check(style: str, new_tokens: int | None) -> None:
    """Raises a ConfigError unless there is such a style, and an answer may have a token at least."""
    if style not in CUES:
        raise ConfigError(
            f"style={style!r}: expected 'direct', or 'cot' for reasoning before the answer{did_you_mean(style, CUES)}"
        )
    if new_tokens is not None and new_tokens < 1:
        raise ConfigError(f"new_tokens={new_tokens}: expected at least 1, or None for as many as the style takes")


def ask(tokenizer: Any, messages: Messages, style: str, template: Mapping[str, Any]) -> Prompt:
    """The prompt that asks for an answer, the chat template applied once.

    Without a chat template the prompt is the text, and ends with "Answer:" or "Reasoning:".

    Args:
        tokenizer: of transformers.
        messages: the conversation up to the answer.
        style: "direct"; or "cot", which asks for reasoning and lets models think that can.
        template: further arguments of `apply_chat_template`.

    Raises:
        ConfigError: if the template refuses the messages, or has the model think where it is to answer directly.
    """
    if style == "cot":
        messages = added(messages, REASONING)
    messages, template = prepared(tokenizer, messages, style, template)
    opening = opened_thinking(tokenizer, messages, **template)
    if opening and style == "direct":
        raise ConfigError(
            "style='direct': the chat template has the model think before it answers; take style='cot', with enough "
            "new_tokens, or another chat_template="
        )
    return Prompt(tuple(prompt_ids(tokenizer, messages, **template)), opening, marks_of(tokenizer, template))


def thinks_always(tokenizer: Any) -> bool:
    """Whether the chat template has the model think even if it is told not to."""
    messages, template = prepared(tokenizer, [{"role": "user", "content": "Hello"}], "direct", {})
    return bool(opened_thinking(tokenizer, messages, **template))


def prepared(
    tokenizer: Any, messages: Messages, style: str, template: Mapping[str, Any]
) -> tuple[Messages, dict[str, Any]]:
    """What to give to a chat template, if there is one: whether to think. And the cue where there is none."""
    if tokenizer.chat_template is not None:
        return messages, {"enable_thinking": style == "cot", **template}
    return messages if "chat_template" in template else added(messages, CUES[style]), dict(template)


def added(messages: Messages, text: str) -> Messages:
    """The messages with one more paragraph at the end of the last one."""
    *before, last = messages
    return [*before, {**last, "content": f"{last['content'].rstrip()}\n\n{text}"}]
