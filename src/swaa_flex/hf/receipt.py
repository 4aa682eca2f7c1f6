"""Proof that what a forward was told has reached its attention: not every model hands keywords on to its layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError
from .callers import keywords_are_dropped


@dataclass
class Receipt:
    """Goes with the keywords of one forward; attention signs it, and the forward looks at it afterwards.

    Attributes:
        is_signed: whether the keywords have reached attention.
    """

    is_signed: bool = False

    def check(self, config: PreTrainedConfig) -> None:
        """Raises UnsupportedModelError, which says what to do instead, if the keywords have not arrived."""
        if not self.is_signed:
            raise UnsupportedModelError(keywords_are_dropped(config))


def refuse_dropped_keywords(model: PreTrainedModel, rows_are_packed: bool = False) -> None:
    """Finds out with a forward of four tokens whether keywords, and the positions of packed rows, reach attention.

    Raises:
        UnsupportedModelError: if they do not.
    """
    receipt = Receipt()
    ids = torch.zeros(1, 4, dtype=torch.long, device=model.device)
    positions = {"position_ids": torch.arange(4, device=model.device)[None] % 2} if rows_are_packed else {}
    with torch.no_grad():
        model(input_ids=ids, use_cache=False, swaa_receipt=receipt, prompt_lengths=None, **positions)
    receipt.check(model.config)
