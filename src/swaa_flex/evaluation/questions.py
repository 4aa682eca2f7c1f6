"""Questions from a file: to be answered freely, or by choosing among answers."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from ..errors import ConfigError
from ..tuning import data
from ..tuning.identity import hashed
from .judges import name_of, substring, words
from .prompts import ask, check, prepared
from .sample import Judge, Sample

NEW_TOKENS = {"direct": 64, "cot": 1024}
"""That an answer may have, by style, unless told otherwise."""


@dataclass(kw_only=True)
class _FromFile(ABC):
    """What the tasks have in common.

    Samples are rows of the file, in an order that the seed decides. With a length, only rows whose prompt has at most
    so many tokens are among them. Rows that cannot be used are left out, and such as the chat template refuses.

    Attributes:
        path: A `.jsonl` file, a `.json` file that holds a list, or a `.parquet` file.
        template: Further arguments of `apply_chat_template`.
        left_out: A line for each row that is left out: its number, from 0, and what is wrong with it.
    """

    path: str | Path
    template: Mapping[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(init=False, repr=False, default_factory=list)
    _rows: list[Any] = field(init=False, repr=False, default_factory=list)

    def samples(self, tokenizer: Any, length: int | None, count: int, seed: int) -> list[Sample]:
        """See `Task`."""
        rows = list(self._rows)
        random.Random(seed).shuffle(rows)
        found: list[Sample] = []
        lengths = []
        for row in rows:
            if len(found) == count:
                break
            try:
                sample = self._sample(tokenizer, row)
            except ConfigError as error:
                refused = f"row {row.row}: {error}"
                self.left_out += [] if refused in self.left_out else [refused]
                continue
            lengths.append(len(sample.prompt))
            if length is None or len(sample.prompt) <= length:
                found.append(sample)
        if lengths and not found:
            raise ConfigError(
                f"{self.path}: length={length}, but the shortest prompt has {min(lengths)} tokens; ask for more"
            )
        if rows and not lengths:
            raise ConfigError(f"{self.path}: no row can be asked; {self.left_out[-1]}")
        return found

    @abstractmethod
    def _sample(self, tokenizer: Any, row: Any) -> Sample: ...


@dataclass(kw_only=True)
class Questions(_FromFile):
    """Questions to be answered freely.

    A row has `prompt`, which is all of the user's text, or `messages`, and `answer`; `question`, the question without
    the text around it, is for a model as judge (`swaa_flex.tuning.read_samples`).

    Attributes:
        style: "direct", the prompt as it is; or "cot", which asks for reasoning and then the answer.
        judge: Of the answers.
        new_tokens: Tokens that an answer may have; None for 64, or 1024 with reasoning.

    Raises:
        ConfigError: if the file has no row that can be used, or there is no such style.
    """

    style: str = "direct"
    judge: Judge = substring
    new_tokens: int | None = None

    def __post_init__(self) -> None:
        check(self.style, self.new_tokens)
        rows, self.left_out = data.read_samples(self.path)
        for row in rows:
            if words(row.answer or ""):
                self._rows.append(row)
            else:
                self.left_out.append(f"row {row.row}: no answer with letters or digits, which judges compare")
        _check_any(self.path, self._rows, self.left_out)

    @property
    def name(self) -> str:
        """See `Task`."""
        return f"qa:{Path(self.path).stem}"

    def facts(self) -> dict[str, Any]:
        """See `Task`."""
        return {
            "name": self.name,
            "rows": hashed([asdict(row) for row in self._rows]),
            "style": self.style,
            "template": dict(self.template),
            "judge": name_of(self.judge),
            "new_tokens": self.new_tokens,
        }

    def _sample(self, tokenizer: Any, row: data.Sample) -> Sample:
        asked = ask(tokenizer, row.prompt, self.style, self.template)
        return Sample(
            id=str(row.row),
            prompt=asked.ids,
            answers=(row.answer or "",),
            new_tokens=self.new_tokens or NEW_TOKENS[self.style],
            question=row.question or "",
            opening=asked.opening,
            marks=asked.marks,
            reasoned=self.style == "cot",
        )


_COLUMNS = ("context", "prompt", "question", "answer", "choices", *(f"choice_{letter}" for letter in ascii_uppercase))


@dataclass(frozen=True)
class _ChoiceRow:
    row: int
    text: str
    choices: tuple[str, ...]
    right: int


@dataclass(kw_only=True)
class Choices(_FromFile):
    """Questions with choices, of which the likeliest counts as the model's.

    A row has `prompt` or `context`, `question`, or both; `choices`, a list of texts; and `answer`, the index of the
    right one from 0, or its letter. The columns of LongBench-v2, `choice_A` to `choice_D`, do as well.

    Attributes:
        letters: The prompt lists the choices, and their letters are scored; else the choices themselves are scored
            and the prompt does not list them, which suits small models and such without a chat template.

    Raises:
        ConfigError: if the file has no row that can be used.
    """

    letters: bool = True
    judge: None = field(init=False, default=None)

    def __post_init__(self) -> None:
        for number, row in enumerate(data._rows(Path(self.path), _COLUMNS)):
            if row is data._BLANK:
                continue
            try:
                self._rows.append(_choice_row(number, row))
            except data._BadRowError as error:
                self.left_out.append(f"row {number}: {error}")
        _check_any(self.path, self._rows, self.left_out)

    @property
    def name(self) -> str:
        """See `Task`."""
        return f"choice:{Path(self.path).stem}"

    def facts(self) -> dict[str, Any]:
        """See `Task`."""
        return {
            "name": self.name,
            "rows": hashed([asdict(row) for row in self._rows]),
            "template": dict(self.template),
            "letters": self.letters,
        }

    def _sample(self, tokenizer: Any, row: _ChoiceRow) -> Sample:
        text = row.text
        if self.letters:
            listed = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, row.choices, strict=False)]
            text = "\n".join([f"{text}\n", *listed, "\nReply with the letter of the right choice only."])
        messages, template = prepared(tokenizer, [{"role": "user", "content": text}], "direct", self.template)
        choices = ascii_uppercase[: len(row.choices)] if self.letters else row.choices
        prompt, continuations = data.choices(tokenizer, messages, choices, **template)
        return Sample(
            id=str(row.row),
            prompt=tuple(prompt),
            continuations=tuple(map(tuple, continuations)),
            right=row.right,
        )


def _choice_row(number: int, row: object) -> _ChoiceRow:
    if isinstance(row, data._BadRowError):
        raise row
    if not isinstance(row, dict):
        raise data._BadRowError("expected an object with 'question', 'choices' and 'answer'")
    texts = [data._text(row[name], name) for name in ("context", "prompt", "question") if row.get(name) is not None]
    if not texts:
        raise data._BadRowError("neither 'question' nor 'prompt'")
    if len(texts) > 1 and texts[-1] in texts[-2]:
        texts.pop()  # the prompt has the question already
    choices = row.get("choices")
    if choices is None:
        choices = [row[f"choice_{letter}"] for letter in ascii_uppercase if row.get(f"choice_{letter}") is not None]
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(ascii_uppercase):
        raise data._BadRowError(f"expected 'choices', a list of 2 to {len(ascii_uppercase)} texts")
    lettered = zip(choices, ascii_uppercase, strict=False)
    stripped = tuple(data._text(choice, f"choice {letter}").strip() for choice, letter in lettered)
    return _ChoiceRow(number, "\n\n".join(texts), stripped, _right(row.get("answer"), len(stripped)))


def _right(answer: object, choices: int) -> int:
    letters = ascii_uppercase[:choices]
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().upper() in letters:
        return letters.index(answer.strip().upper())
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < choices:
        return answer
    raise data._BadRowError(f"answer is {answer!r}, expected 0 to {choices - 1}, or A to {letters[-1]}")


def _check_any(path: str | Path, rows: Sequence[object], left_out: Sequence[str]) -> None:
    if not rows:
        first = f"The first: {left_out[0]}" if left_out else "It is empty."
        raise ConfigError(f"{path}: none of its {len(left_out)} rows can be used; correct them. {first}")
