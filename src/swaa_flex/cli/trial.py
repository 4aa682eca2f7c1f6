"""What one recipe makes of a model: answers, perplexity, and how much of the text it looks at and keeps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import SWAAConfig
from ..hf import adapt, prompt, restore
from ..masks import Mask
from .passkey import Passkey, found

SCORED = 200  # tokens at the end of the text, whose perplexity is measured
ANSWER = 12  # tokens that an answer may take


@dataclass(frozen=True)
class Trial:
    """What a recipe was measured to do.

    Attributes:
        recipe: Its name.
        keys: The hidden number of each passkey prompt.
        answers: The number in the answer to each, None for an answer without one.
        perplexity: Of the last `SCORED` tokens of a text, given those before.
        attended: Visible share of the causal query-key pairs of a prompt, mean of the layers.
        kept: Share of its keys that the first token after a prompt may look at, mean of the layers.
        seconds: For all of the answers and the perplexity.
    """

    recipe: str
    keys: tuple[str, ...]
    answers: tuple[str | None, ...]
    perplexity: float
    attended: float
    kept: float
    seconds: float

    @property
    def right(self) -> int:
        """How many of the hidden numbers were found."""
        return sum(given == key for given, key in zip(self.answers, self.keys, strict=True))


def run(
    model: Any,
    tokenizer: Any,
    recipe: str,
    config: SWAAConfig,
    prompts: Sequence[Passkey],
    text: Tensor,
    step: Callable[[str, str], None],
) -> Trial:
    """Measures a recipe on passkey prompts and on a text. Full attention is the model's own, not this library's.

    Args:
        model: in evaluation mode; it stays adapted afterwards.
        tokenizer: of the model.
        recipe: the name to measure under.
        config: what to adapt the model to.
        prompts: passkey prompts.
        text: token ids `[1, len]`, longer than `SCORED`.
        step: told the recipe, and what of it comes next.
    """
    restore(model) if config.sliding_window is None else adapt(model, config)
    started = time.perf_counter()
    answers = []
    for number, passkey in enumerate(prompts, 1):
        step(recipe, f"passkey {number} of {len(prompts)}")
        answers.append(found(answer(model, tokenizer, passkey.input_ids)))
    step(recipe, "perplexity")
    measured = perplexity(model, text, SCORED)
    seconds = time.perf_counter() - started
    layers = model.config.get_text_config().num_hidden_layers
    attended, kept = reach(config, layers, prompts[0].input_ids.shape[1])
    keys = tuple(passkey.key for passkey in prompts)
    return Trial(recipe, keys, tuple(answers), measured, attended, kept, seconds)


def scaled(config: SWAAConfig, sliding_window: int) -> SWAAConfig:
    """A recipe for short prompts: windows and sinks so much smaller that a window of 2048 becomes `sliding_window`.

    The dense tail stays: it is there for the question, which is no shorter in a short prompt.

    >>> from swaa_flex import recipes
    >>> scaled(recipes.get("quality"), 128).sliding_window
    512
    """
    if config.sliding_window is None:
        return config
    factor = sliding_window / 2048
    return replace(
        config,
        sliding_window=max(1, round(config.sliding_window * factor)),
        sink_tokens=min(config.sink_tokens, max(1, round(config.sink_tokens * factor))),
    )


@torch.no_grad()
def answer(model: Any, tokenizer: Any, input_ids: Tensor) -> str:
    """What the model says after a prompt `[1, len]`, greedily."""
    input_ids = input_ids.to(model.device)
    length = input_ids.shape[1]
    with prompt(length):
        tokens = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=ANSWER,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(tokens[0, length:], skip_special_tokens=True))


@torch.no_grad()
def perplexity(model: Any, text: Tensor, scored: int) -> float:
    """Perplexity of the last tokens of a text `[1, len]`, as if the model had written them after the others."""
    text = text.to(model.device)
    with prompt(text.shape[1] - scored):
        logits = model(text, logits_to_keep=scored + 1).logits[0, :-1]
    return float(F.cross_entropy(logits.float(), text[0, -scored:]).exp())


def reach(config: SWAAConfig, num_hidden_layers: int, prompt_length: int) -> tuple[float, float]:
    """How much of a prompt its own rows look at, and how much of it the first token after it may look at.

    Returns:
        Visible pairs over causal pairs of the prompt, and visible keys over keys of the row after it, both as means
        of the layers. Counted in the masks.
    """
    kinds = config.resolve(num_hidden_layers)
    seen = {}
    for kind in set(kinds):
        mask = config.mask_for(kinds.index(kind), num_hidden_layers, prompt_length=prompt_length)
        seen[kind] = _visible(mask, prompt_length + 1)
    attended = sum(float(seen[kind][:-1].sum()) for kind in kinds) / len(kinds)
    kept = sum(float(seen[kind][-1].sum()) for kind in kinds) / len(kinds)
    return attended / (prompt_length * (prompt_length + 1) / 2), kept / (prompt_length + 1)


def real_text(tokenizer: Any, tokens: int) -> Tensor:
    """The beginning of the Python documentation that comes with Python, ids `[1, tokens]`."""
    text = "".join(topics[name] for name in ("objects", "types", "compound", "specialnames"))
    return torch.tensor([tokenizer(text).input_ids[:tokens]])


def _visible(mask: Mask, length: int) -> Tensor:
    """The mask evaluated pair by pair, bool `[length, length]`."""
    index = torch.arange(length)
    any_ = torch.zeros((), dtype=torch.int64)
    return mask(any_, any_, index[:, None], index)
