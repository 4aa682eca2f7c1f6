"""Where the prompts of a batch end: vLLM tells it to logits processors, and not to attention backends."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor, MoveDirectionality

from .recipe import check_backend

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class PromptLengths(LogitsProcessor):
    """Changes no logits. It follows which request is in which row of the batch, before each step.

    vLLM finds it through `discovery.py` and loads one for each engine, except with speculative decoding and for
    pooling. So this is also where a recipe is missed that no backend will read.
    """

    _of: ClassVar[WeakValueDictionary[int, PromptLengths]] = WeakValueDictionary()

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        check_backend(vllm_config)
        self.lengths = torch.zeros(vllm_config.scheduler_config.max_num_seqs, dtype=torch.int32)
        self.vllm_config = vllm_config  # keeps it, so that no other one has its id
        PromptLengths._of[id(vllm_config)] = self

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> PromptLengths | None:
        """Those of the engine with this configuration; a process may have several engines."""
        return cls._of.get(id(vllm_config))

    def of_batch(self, requests: int) -> Tensor:
        """Tokens of each prompt, int32 `[requests]` on the CPU."""
        known = self.lengths[:requests]
        return F.pad(known, (0, requests - len(known)))  # rows that only pad the batch

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Requests came, went or moved."""
        if batch_update is None:
            return
        lengths = self.lengths
        for row, _, prompt, _ in batch_update.added:
            lengths[row] = 0 if prompt is None else len(prompt)
        for source, target, direction in batch_update.moved:
            if direction == MoveDirectionality.SWAP:
                lengths[[source, target]] = lengths[[target, source]]
            else:
                lengths[target] = lengths[source]

    def apply(self, logits: Tensor) -> Tensor:
        """The same logits."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """Yes."""
        return True
