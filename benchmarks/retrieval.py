"""Retrieval prompts and real text for `recovery.py`, each in a part to train on and a part held out from training.

Texts are the language reference and the modules of the standard library that come with Python. No paragraph is in
both parts. Prompts of the two parts differ in wording, in the names that are asked for, and in the text around them.
"""

from __future__ import annotations

import functools
import itertools
import random
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

Part = Literal["training", "held out"]
KINDS = ("docs", "source")
TASKS = ("passkey", "multi-key")
PAIRS = 4  # in a multi-key prompt


@dataclass(frozen=True)
class Wording:
    """`{name}` is what a key belongs to: the same for all passkeys, one of `names` with several keys."""

    needle: str
    question: str
    names: tuple[str, ...] = ("",)


WORDINGS: dict[tuple[Part, str], tuple[Wording, ...]] = {
    ("training", "passkey"): (
        Wording("The access code is {key}. Keep it in mind: {key}.", "What is the access code?"),
        Wording("Note that the number of the locker is {key}.", "Which number does the locker have?"),
        Wording("My phone extension is {key}, so call {key}.", "What is my phone extension?"),
        Wording("The parcel was given the tracking number {key}.", "Give the tracking number of the parcel."),
    ),
    ("training", "multi-key"): (
        Wording(
            "The code for {name} is {key}.",
            "What is the code for {name}?",
            ("Lisbon", "Cairo", "Oslo", "Lima", "Tokyo", "Delhi", "Rome", "Quito", "Seoul", "Vienna"),
        ),
        Wording(
            "In the list, {name} has the number {key}.",
            "Which number does {name} have in the list?",
            ("Alice", "Boris", "Carmen", "David", "Elena", "Farid", "Grace", "Hugo", "Irene", "Jonas"),
        ),
        Wording(
            "The price of the {name} was {key} dollars.",
            "What was the price of the {name}?",
            ("piano", "tractor", "painting", "boat", "carpet", "camera", "diamond", "bicycle"),
        ),
    ),
    ("held out", "passkey"): (
        Wording("The secret pass key is {key}. Remember it: {key} is the pass key.", "What is the secret pass key?"),
    ),
    ("held out", "multi-key"): (
        Wording(
            "The magic number of the {name} is {key}.",
            "What is the magic number of the {name}?",
            ("tiger", "falcon", "salmon", "beetle", "rabbit", "walrus", "lizard", "donkey", "spider", "monkey"),
        ),
    ),
}


@dataclass(frozen=True)
class Prompt:
    """Token ids as the chat template makes them, and what a right answer contains."""

    input_ids: list[int]
    key: str


def prompts(
    tokenizer: Any, part: Part, task: str, tokens: int, beyond: int, count: int, seed: int = 0
) -> list[Prompt]:
    """Prompts that hide keys in text, and ask for one of them.

    Args:
        tokenizer: of the model; its chat template is applied.
        part: whose wordings and text.
        task: "passkey", one key, or "multi-key", several of which one is asked for.
        tokens: length of each prompt, to within a paragraph.
        beyond: at least so many tokens follow the last key.
        count: how many prompts.
        seed: of all that is drawn.
    """
    draw = random.Random(f"{part} {task} {tokens} {seed}")
    text = _measured(tokenizer, part)
    return [_prompt(tokenizer, draw, text, part, task, tokens, beyond) for _ in range(count)]


def _prompt(
    tokenizer: Any, draw: random.Random, text: list[tuple[str, int]], part: Part, task: str, tokens: int, beyond: int
) -> Prompt:
    wording = draw.choice(WORDINGS[part, task])
    names = draw.sample(wording.names, PAIRS if task == "multi-key" else 1)
    keys = [str(key) for key in draw.sample(range(10_000, 100_000), len(names))]
    asked = draw.randrange(len(names))
    needles = [wording.needle.format(name=name, key=key) for name, key in zip(names, keys, strict=True)]
    question = f"{wording.question.format(name=names[asked])} Answer with the number only."
    room = tokens - len(_chat(tokenizer, "\n\n".join([*needles, question])))
    first = draw.randrange(len(text))
    near: list[str] = []  # from the last to the first: what follows the keys
    far: list[str] = []
    for paragraph, length in itertools.chain(text[first:], text[:first]):
        if length > room:
            continue
        (near if beyond > 0 else far).append(paragraph)
        room, beyond = room - length, beyond - length
    places = sorted(draw.randrange(len(far) + 1) for _ in needles)
    for place, needle in zip(reversed(places), reversed(needles), strict=True):
        far.insert(place, needle)
    return Prompt(_chat(tokenizer, "\n\n".join([*far, *near, question])), keys[asked])


@functools.cache
def _measured(tokenizer: Any, part: Part) -> list[tuple[str, int]]:
    """Paragraphs of the documentation with the tokens that each takes."""
    return [(p, len(tokenizer(p).input_ids) + 1) for p in paragraphs(part, "docs")]


@functools.cache
def _tokens(tokenizer: Any, part: Part, kind: str) -> list[int]:
    ids: list[int] = tokenizer("\n\n".join(paragraphs(part, kind)), verbose=False).input_ids
    return ids


def _chat(tokenizer: Any, text: str) -> list[int]:
    chat = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer(rendered, add_special_tokens=False).input_ids
    return ids


def windows(tokenizer: Any, part: Part, kind: str, tokens: int, count: int) -> list[list[int]]:
    """Token ids of stretches of text, evenly spread; they overlap where the text is too short for so many."""
    ids = _tokens(tokenizer, part, kind)
    step = (len(ids) - tokens) / max(1, count - 1)
    return [ids[round(i * step) :][:tokens] for i in range(count)]


def paragraphs(part: Part, kind: str) -> list[str]:
    """Of the documents of one part, in order: each third document is held out, and what it says from the others."""
    documents = _documents(kind)
    held_out = [p for document in documents[::3] for p in _split(document)]
    if part == "held out":
        return list(dict.fromkeys(held_out))
    training = [p for i, document in enumerate(documents) if i % 3 for p in _split(document)]
    kept_back = set(held_out)
    return [p for p in dict.fromkeys(training) if p not in kept_back]


def _documents(kind: str) -> list[str]:
    if kind == "docs":
        return [topics[name] for name in sorted(topics)]
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [file.read_text(encoding="utf-8") for file in files]


def _split(text: str) -> Iterable[str]:
    return (p.strip("\n") for p in text.split("\n\n") if p.strip())
