"""lm-evaluation-harness: its model for transformers, which here says where prompts end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM
from torch import Tensor

from ..errors import UnsupportedModelError
from ..hf.config import swaa_of
from ..hf.prompt import prompt

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""What lm_eval scores: its texts (None in rolling perplexity), tokens of the context, tokens of the continuation."""


class HarnessLM(HFLM):  # type: ignore[misc]
    """lm_eval's `HFLM` for models under swaa_flex.

    lm_eval scores a continuation in one forward of context and continuation, which does not show where the prompt
    ends. Here the context is the prompt, so that the rows of the continuation are decode rows, as if the model had
    generated it. Rolling perplexity has no prompt: all rows slide, without a dense tail. `generate_until` is HFLM's.

    Written for lm_eval 0.4.13.

    Args:
        pretrained: as in `HFLM`.
        options: as in `HFLM`; others, such as `swaa`, go to `from_pretrained`. `attn_implementation` is "swaa_flex"
            unless it is given.
    """

    def __init__(self, pretrained: Any, **options: Any) -> None:
        self._lengths: dict[tuple[int, ...], int] = {}  # prompt lengths by row, as `_row` has it
        super().__init__(pretrained, **({"attn_implementation": "swaa_flex"} | options))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts: all rows are prompt rows, without a dense tail."""
        with prompt(dense_tail=0):
            result: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        return result

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes of the model beside its results, here with the recipe."""
        config = self.model.config
        swaa = swaa_of(config).to_dict() if config._attn_implementation == "swaa_flex" else None
        info: dict[str, Any] = super().get_model_info()
        return info | {"swaa": swaa}

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if not requests or requests[0][0] is None:
            return self._scored(requests, {}, disable_tqdm, override_bs)
        # What lm_eval would score in one row, or in rows that look the same, may differ in where the prompt ends.
        # Requests are told apart by coming in different rounds; nearly always there is one.
        rounds: list[tuple[dict[tuple[int, ...], int], list[int]]] = []
        for number, (_, context, continuation) in enumerate(requests):
            tokens = (context + continuation)[-(self.max_length + 1) :]  # cut off at the left, as lm_eval does
            row, length = _row(tokens[:-1]), len(tokens) - len(continuation)
            for lengths, members in rounds:
                if lengths.setdefault(row, length) == length:
                    members.append(number)
                    break
            else:
                rounds.append(({row: length}, [number]))
        results = [(0.0, False)] * len(requests)
        for lengths, members in rounds:
            scored = self._scored([requests[number] for number in members], lengths, disable_tqdm, override_bs)
            for number, result in zip(members, scored, strict=True):
                results[number] = result
        return results

    def _scored(
        self, requests: Sequence[Request], lengths: dict[tuple[int, ...], int], *options: Any
    ) -> list[tuple[float, bool]]:
        self._lengths = lengths
        try:
            results: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *options)
        finally:
            self._lengths = {}
        return results

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        if not self._lengths or bool((inps == 1).all()):  # all ones: a trial of the batch size
            return super()._model_call(inps, attn_mask, labels)
        lengths = [self._lengths.get(_row(row)) for row in inps.tolist()]
        known = [length for length in lengths if length is not None]
        if len(known) < len(lengths):
            raise UnsupportedModelError(
                "this version of lm_eval scores other tokens than those of its requests, so where their prompts end "
                "is not known; swaa_flex is made for lm_eval 0.4.13: pip install lm_eval==0.4.13"
            )
        with prompt(known):
            return super()._model_call(inps, attn_mask, labels)


def _row(tokens: list[int]) -> tuple[int, ...]:
    """The tokens of a row without the zeros at its end: lm_eval pads with them."""
    end = len(tokens)
    while end and tokens[end - 1] == 0:
        end -= 1
    return tuple(tokens[:end])
