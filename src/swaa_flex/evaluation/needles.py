"""Needles in a haystack: facts hidden in a long text, and a question about them at its end.

The tasks are those of RULER (arXiv 2404.06654), in words of our own: needles with one key or several, of which some
are distractors, with one value or several, and variable tracking.
"""

from __future__ import annotations

import functools
import random
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from ..errors import ConfigError
from ..tuning.identity import hashed
from . import texts
from .judges import name_of, substring_all
from .prompts import Prompt, ask, check
from .sample import Judge, Sample

SLACK = 3
"""Tokens by which a prompt may be shorter than asked for."""


@dataclass(frozen=True, kw_only=True)
class _Haystack:
    """What the tasks have in common.

    A prompt has at most `length` tokens, and is at most a few tokens shorter. The text begins at a random place, goes
    on from its beginning when it comes to its end, and is cut off where the prompt is full. Needles are at random
    depths, each at the end of a sentence. The score is the share of the right answers that are found.

    Attributes:
        name: Of the task.
        text: A text file for the haystack; None for the help texts that come with Python.
        noise: Take a few sentences, over and over, in place of a real text.
        style: "direct", or "cot" for reasoning before the answer.
        template: Further arguments of `apply_chat_template`.
        new_tokens: Tokens that an answer may have; None for as many as the answers take, or 1024 with reasoning.
    """

    name: str
    text: str | Path | None = None
    noise: bool = False
    style: str = "direct"
    template: Mapping[str, Any] = field(default_factory=dict)
    new_tokens: int | None = None

    def __post_init__(self) -> None:
        check(self.style, self.new_tokens)
        if self.noise and self.text is not None:
            raise ConfigError(f"noise=True, text={str(self.text)!r}: expected one of them; leave out the other")

    @property
    def judge(self) -> Judge:
        """See `Task`."""
        return substring_all

    def facts(self) -> dict[str, Any]:
        """See `Task`."""
        return asdict(self) | {"text": hashed(self._haystack()), "judge": name_of(self.judge)}

    def samples(self, tokenizer: Any, length: int | None, count: int, seed: int) -> list[Sample]:
        """See `Task`."""
        if length is None:
            raise ConfigError(f"{self.name}: expected a length in tokens, got None; say how long prompts are to be")
        haystack = self._haystack()
        return [self._sample(tokenizer, haystack, length, seed, number) for number in range(count)]

    @abstractmethod
    def _hidden(self, draw: random.Random) -> tuple[list[str], str, list[str]]:
        """Needles from the first to the last, a question, and its answers."""

    def _haystack(self) -> str:
        return " ".join(texts.NOISE) if self.noise else texts.read(self.text)

    def _sample(self, tokenizer: Any, haystack: str, length: int, seed: int, number: int) -> Sample:
        draw = random.Random(f"{self.name} {length} {seed} {number}")
        needles, question, answers = self._hidden(draw)
        depths = sorted(draw.random() for _ in needles)
        begin = _sentence_end(haystack, draw.randrange(len(haystack)))
        endless = f"{haystack[begin:]} {haystack[:begin]} "

        @functools.cache  # the last one looked at is the one that is taken
        def prompt(chars: int) -> Prompt:
            text = (endless * (chars // len(endless) + 1))[:chars]
            content = f"{INTRODUCTION}\n\n{_with_needles(text, needles, depths)}\n\n{question}"
            return ask(tokenizer, [{"role": "user", "content": content}], self.style, self.template)

        asked = prompt(_longest(lambda chars: len(prompt(chars).ids), length))
        new_tokens = 1024 if self.style == "cot" else 16 + 16 * len(answers)
        return Sample(
            id=str(number),
            prompt=asked.ids,
            answers=tuple(answers),
            new_tokens=self.new_tokens or new_tokens,
            question=question,
            opening=asked.opening,
            marks=asked.marks,
            reasoned=self.style == "cot",
        )


@dataclass(frozen=True, kw_only=True)
class Needles(_Haystack):
    """Keys that have values, some of which are asked for.

    Attributes:
        keys: How many keys are hidden.
        asked: How many of them are asked for; the others are distractors.
        values: How many values each key has, all of which are asked for.
        words: Values are words in place of numbers of seven digits.
    """

    keys: int = 1
    asked: int = 1
    values: int = 1
    words: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("keys", self.keys, most=100)
        _check_count("asked", self.asked, most=self.keys)
        _check_count("values", self.values, most=100)
        words = self.keys * (1 + self.values)
        if self.words and words > len(_WORDS):
            raise ConfigError(
                f"keys={self.keys} and values={self.values} as words: {words} words, and there are {len(_WORDS)}; "
                "take fewer, or numbers"
            )

    def _hidden(self, draw: random.Random) -> tuple[list[str], str, list[str]]:
        kind = "word" if self.words else "number"
        names = _names(draw, self.keys * (1 + self.values if self.words else 1))
        keys, others = names[: self.keys], names[self.keys :]
        numbers = draw.sample(range(1_000_000, 10_000_000), self.keys * self.values)
        drawn = others if self.words else list(map(str, numbers))
        values = {key: drawn[place * self.values :][: self.values] for place, key in enumerate(keys)}
        start = f"The secret {kind} of" if self.values == 1 else f"One secret {kind} of"
        needles = [f"{start} {key} is {value}." for key in keys for value in values[key]]
        draw.shuffle(needles)
        asked = keys[: self.asked]
        answers = [value for key in asked for value in values[key]]
        what = f"is the secret {kind}" if len(answers) == 1 else f"are all the secret {kind}s"
        question = f"What {what} of {_listed(asked)}? Reply with the {kind}{'s' if len(answers) > 1 else ''} only."
        return needles, question, answers


@dataclass(frozen=True, kw_only=True)
class VariableTracking(_Haystack):
    """Chains of assignments, `VAR B = VAR A`; all variables that have the value of one chain are asked for.

    Attributes:
        chains: How many chains are hidden; all but one are distractors.
        hops: Assignments of a variable to another one in each chain.
    """

    chains: int = 2
    hops: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("chains", self.chains, most=100)
        _check_count("hops", self.hops, most=100)

    def _hidden(self, draw: random.Random) -> tuple[list[str], str, list[str]]:
        length = self.hops + 1
        variables: dict[str, None] = {}
        while len(variables) < self.chains * length:
            variables["".join(draw.choices(ascii_uppercase, k=5))] = None
        names = list(variables)
        chains = [names[place : place + length] for place in range(0, len(names), length)]
        values = draw.sample(range(10_000, 100_000), self.chains)
        assignments = [
            [f"VAR {chain[0]} = {value}.", *(f"VAR {b} = VAR {a}." for a, b in pairwise(chain))]
            for chain, value in zip(chains, values, strict=True)
        ]
        # Chains run into each other, but each is in order.
        turns = [chain for chain in range(self.chains) for _ in range(length)]
        draw.shuffle(turns)
        needles = [assignments[chain].pop(0) for chain in turns]
        question = (
            f"Which variables have the value {values[0]}, assigned to them directly or through other variables? "
            "Reply with the names of all of them only."
        )
        return needles, question, chains[0]


INTRODUCTION = "Some facts are hidden in the following text. Remember them: there is a question about them at the end."


def _with_needles(text: str, needles: Sequence[str], depths: Sequence[float]) -> str:
    """The text with needles at the ends of the sentences that go on at their depths."""
    parts = []
    done = 0
    for needle, depth in zip(needles, depths, strict=True):
        place = max(done, _sentence_end(text, int(depth * len(text))))
        before = text[done:place]
        blank = "" if before[-1:].isspace() or not before else " "
        parts += [before, blank, needle, " "]
        done = place
    return "".join([*parts, text[done:]])


_SENTENCE_END = re.compile(r"[.!?:]\s+|\n\s*\n")
_WORD_END = re.compile(r"\s+")


def _sentence_end(text: str, begin: int) -> int:
    """Where the sentence that goes on at `begin` ends; or the word, if the sentence goes on for too long."""
    for end in _SENTENCE_END, _WORD_END:
        found = end.search(text, begin, begin + 300)
        if found:
            return found.end()
    return begin


def _longest(size: Callable[[int], int], limit: int) -> int:
    """The number of characters that makes a prompt as long as it may be.

    Args:
        size: tokens of a prompt with so many characters of text, which grow about evenly.
        limit: tokens that it may have.

    Returns:
        A number whose size is at most `limit`, and less by at most `SLACK` if there is one.
    """
    fits, tokens = 0, size(0)
    if tokens > limit:
        raise ConfigError(f"length={limit}: the question and its needles alone take {tokens} tokens; ask for more")
    exceeds, too_many = fits, tokens
    while too_many <= limit:
        fits, tokens = exceeds, too_many
        exceeds = fits + 5 * (limit - tokens + 1)
        too_many = size(exceeds)
    while limit - tokens > SLACK and exceeds - fits > 1:
        guess = fits + (limit - tokens) * (exceeds - fits) // (too_many - tokens)
        chars = min(max(guess, fits + 1), exceeds - 1)
        found = size(chars)
        if found <= limit:
            fits, tokens = chars, found
        else:
            exceeds, too_many = chars, found
    return fits


def _check_count(name: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise ConfigError(f"{name}={value}: expected 1 to {most}")


def _listed(names: Sequence[str]) -> str:
    *before, last = names
    return f"{', '.join(before)} and {last}" if before else last


def _names(draw: random.Random, count: int) -> list[str]:
    """Names such as "amber-otter", each only once."""
    return draw.sample(_WORDS, count)


_ADJECTIVES = (
    "amber brave calm clever crimson dusty eager early fancy fierce frozen gentle giant golden hollow humble icy "
    "ivory jolly late lively loyal lucky mellow misty modest narrow noble pale plain polite proud purple quick "
    "quiet rapid rusty scarlet shiny shy silent silver sleepy slow smooth solid steady stormy sturdy subtle sunny "
    "tender tidy tiny velvet warm wide wild wise young"
)
_NOUNS = (
    "anchor apple badger basket beetle bridge candle canyon carpet castle cherry cloud comet copper desert donkey "
    "dragon eagle ember falcon feather fiddle forest fountain garden glacier hammer harbor helmet island jacket "
    "kettle ladder lantern lemon lizard marble meadow mirror needle otter paddle parrot pebble pepper pillow "
    "planet pocket rabbit ribbon rocket saddle salmon shadow spider temple tiger tunnel turtle valley walnut "
    "walrus whistle window"
)
_WORDS = [f"{adjective}-{noun}" for adjective in _ADJECTIVES.split() for noun in _NOUNS.split()]
