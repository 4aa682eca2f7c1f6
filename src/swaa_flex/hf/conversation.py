"""What a compiled model remembers of a request, so that a further turn computes only what is new."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Conversation:
    """What lies in the cache of a compiled model.

    Attributes:
        prompts: token ids of each sequence, `[len]`.
        prompt_columns: of the cache that prompts and pads take.
        dense_tail: of the surrounding `prompt` when they were computed.
        edits: how often weights had changed in place by then.
        answers: the tokens of each decode step since then, `[sequences, 1]`.
    """

    prompts: list[Tensor]
    prompt_columns: int
    dense_tail: int | None
    edits: int
    answers: list[Tensor] = field(default_factory=list)

    @property
    def columns(self) -> int:
        """How many the cache holds."""
        return self.prompt_columns + len(self.answers)

    def new_tokens(self, prompts: list[Tensor], dense_tail: int | None) -> int:
        """How many tokens at the end of prompts are not in the cache, the same number for all of them.

        Args:
            prompts: token ids of each sequence of the next request, `[len]`.
            dense_tail: of the `prompt` that surrounds it.

        Returns:
            0 if a prompt does not begin with what is in the cache, or the numbers differ.
        """
        if dense_tail != self.dense_tail or len(prompts) != len(self.prompts):
            return 0
        counts = {len(row) - len(old) - len(self.answers) for row, old in zip(prompts, self.prompts, strict=True)}
        if len(counts) > 1 or min(counts) < 1:
            return 0
        none = torch.empty(len(prompts), 0, dtype=torch.long, device=prompts[0].device)
        answers = torch.cat([none, *self.answers], dim=1)
        for row, old, answer in zip(prompts, self.prompts, answers, strict=True):
            held = torch.cat([old, answer])
            if not torch.equal(row[: len(held)], held):
                return 0
        return counts.pop()
