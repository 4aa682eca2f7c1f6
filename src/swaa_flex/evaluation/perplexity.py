"""Perplexity of a text after a long prefix."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..tuning.identity import hashed
from . import texts
from .sample import Sample


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """How well a model predicts the end of a stretch of text.

    Samples are stretches that do not overlap, in an order that the seed decides. Their beginning is the prompt, the
    rest the continuation to be scored. `length` counts both, and the token that the tokenizer begins texts with.

    Attributes:
        name: Of the task.
        text: A text file; None for the help texts that come with Python.
        scored: Tokens of the continuation.
    """

    name: str = "ppl"
    text: str | Path | None = None
    scored: int = 256
    judge: None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.scored < 1:
            raise ConfigError(f"scored={self.scored}: expected at least 1 token")

    def facts(self) -> dict[str, Any]:
        """See `Task`."""
        return {"name": self.name, "text": hashed(texts.read(self.text)), "scored": self.scored}

    def samples(self, tokenizer: Any, length: int | None, count: int, seed: int) -> list[Sample]:
        """See `Task`."""
        ids = list(tokenizer(texts.read(self.text), add_special_tokens=False, verbose=False).input_ids)
        start = beginning(tokenizer)
        stretch = (length or 0) - len(start)
        if stretch <= self.scored:
            raise ConfigError(
                f"{self.name}: length={length}, expected more than the {self.scored + len(start)} tokens that are "
                "scored or begin a text; ask for more, or take a task with fewer scored tokens"
            )
        places = list(range(len(ids) // stretch))
        if not places:
            raise ConfigError(
                f"{self.name}: length={length}, but the text has {len(ids)} tokens; take a longer text (text=FILE)"
            )
        random.Random(f"{self.name} {length} {seed}").shuffle(places)
        return [
            _sample(place, start, ids[place * stretch :][:stretch], stretch - self.scored) for place in places[:count]
        ]


def _sample(place: int, start: list[int], ids: list[int], prefix: int) -> Sample:
    return Sample(id=str(place), prompt=(*start, *ids[:prefix]), continuations=(tuple(ids[prefix:]),))


def beginning(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before a text."""
    first = list(tokenizer("a").input_ids[:1])
    return first if first == [tokenizer.bos_token_id] else []
