"""What an evaluation is made of: samples, the tasks they come from, and the judges of answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ..tuning.reasoning import KNOWN, Marks


@dataclass(frozen=True)
class Sample:
    """Something to answer, or something to score.

    Attributes:
        id: Unique among the samples of a task, length and seed.
        prompt: Token ids `[len]`, the chat template applied.
        answers: To be answered: the right answers, which a judge looks for.
        new_tokens: To be answered: tokens that the answer may have.
        continuations: To be scored: token ids that follow the prompt. One is a text whose perplexity is asked for,
            several are the choices of a multiple-choice question.
        right: Multiple choice: index of the right continuation.
        question: The question as text, without the text around it, for a model as judge; may be empty.
        opening: The opening of a thinking block that the prompt ends with, such as `"<think>"`, and whitespace; or
            empty. A model does not write it again, so judges put it before the answer.
        marks: What the model puts around its reasoning.
        reasoned: The prompt asks for reasoning, then for a line that begins with "Answer:".
    """

    id: str
    prompt: tuple[int, ...]
    answers: tuple[str, ...] = ()
    new_tokens: int = 0
    continuations: tuple[tuple[int, ...], ...] = ()
    right: int | None = None
    question: str = ""
    opening: str = ""
    marks: Marks = KNOWN
    reasoned: bool = False


Judge = Callable[[str, Sample], float]
"""How right an answer is, from 0 to 1. Gets the text that the model wrote, with its thinking, and the sample."""


class Task(Protocol):
    """Makes samples of one kind."""

    @property
    def name(self) -> str:
        """What tables call it."""

    @property
    def judge(self) -> Judge | None:
        """Scores the answers; None where continuations are scored."""

    def facts(self) -> dict[str, Any]:
        """All besides tokenizer, length, count and seed that decides samples and verdicts, as JSON values."""

    def samples(self, tokenizer: Any, length: int | None, count: int, seed: int) -> list[Sample]:
        """The first `count` samples, or as many as there are. More of them begin with the same ones.

        Args:
            tokenizer: of the model, one of transformers.
            length: of a prompt in tokens, or of prompt and continuation where a text's perplexity is asked for.
            count: how many.
            seed: of all that is drawn.

        Raises:
            ConfigError: if there are no such samples.
        """
