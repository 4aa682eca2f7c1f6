"""Proof that what a forward was told has reached its attention: not every model hands keywords on to its layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError


@dataclass
class Receipt:
    """Goes with the keywords of one forward; attention signs it, and the forward looks at it afterwards.

    Attributes:
        is_signed: whether the keywords have reached attention.
        is_packed: whether the masks of that attention take the rows for several documents.
    """

    is_signed: bool = False
    is_packed: bool = False

    def sign(self, is_packed: bool) -> None:
        """Says that attention was reached."""
        self.is_signed, self.is_packed = True, self.is_packed or is_packed

    def check(self, config: PreTrainedConfig, is_told: bool, rows_are_packed: bool) -> None:
        """Refuses what did not arrive.

        Args:
            config: of the model.
            is_told: whether the forward was told where prompts end.
            rows_are_packed: whether the forward was given rows of several documents.

        Raises:
            UnsupportedModelError: says what to do instead.
        """
        if (is_told or rows_are_packed) and not self.is_signed:
            raise UnsupportedModelError(
                f"model type {config.model_type!r} does not hand keywords on to attention, so neither prompt_lengths= "
                "and decode_rows= nor labels say where prompts end; put `with swaa_flex.prompt(...)` around the "
                "forward"
            )
        if rows_are_packed and not self.is_packed:
            raise UnsupportedModelError(
                f"model type {config.model_type!r} makes its mask without position_ids, so packed documents would see "
                "each other; give each document a row of its own"
            )


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
    receipt.check(model.config, True, rows_are_packed)
