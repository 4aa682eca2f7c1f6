"""What a model makes of samples: greedy answers, log-probabilities, choices.

Prompts end where the samples say, so what is generated or scored after them are decode rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..hf.cache import CACHE
from ..hf.prompt import prompt

if TYPE_CHECKING:
    from .sample import Sample, Task

BUCKET = 128  # tokens of a text whose log-probabilities are kept as one sum


@torch.no_grad()
def results(model: Any, tokenizer: Any, task: Task, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """The results of one batch of a task's samples.

    Args:
        model: in evaluation mode, with a `generation_config` that is greedy.
        tokenizer: of the model.
        task: whose judge gives the scores of answers.
        samples: of that task.

    Returns:
        One per sample: `score` and `answer` where a judge compares; `score` and `logprobs` (sum and tokens of each
        continuation) for a choice; `logprob`, `tokens` and their `positions` for the perplexity of a continuation.
    """
    choices = len(samples[0].continuations)
    if choices == 0:
        assert task.judge is not None
        answered = zip(samples, answers(model, tokenizer, samples), strict=True)
        return [{"score": float(task.judge(text, sample)), "answer": text} for sample, text in answered]
    if choices == 1:
        read = zip(samples, continuation_log_probs(model, samples), strict=True)
        return [{"logprob": float(row.sum()), "tokens": len(row)} | _positions(sample, row) for sample, row in read]
    return [_choice(sample, choice_log_probs(model, sample)) for sample in samples]


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the model's and the tokenizer's.

    Raises:
        ConfigError: if there are none.
    """
    of_model = model.generation_config.eos_token_id
    found = {*(of_model if isinstance(of_model, list) else [of_model]), tokenizer.eos_token_id} - {None}
    if not found:
        raise ConfigError("neither the model nor the tokenizer has an end-of-text token; set tokenizer.eos_token")
    return sorted(found)


def answers(model: Any, tokenizer: Any, samples: Sequence[Sample]) -> list[str]:
    """Greedy answers, each up to the token that ends it or to its sample's `new_tokens`."""
    lengths = [len(sample.prompt) for sample in samples]
    input_ids, attention_mask = _left_padded([sample.prompt for sample in samples], model.device)
    with prompt(lengths):
        out = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max(sample.new_tokens for sample in samples),
        )
    stops = set(stop_tokens(model, tokenizer))
    texts = []
    for sample, row in zip(samples, out[:, max(lengths) :].tolist(), strict=True):
        written = row[: sample.new_tokens]
        end = next((place for place, token in enumerate(written) if token in stops), len(written))
        # As written: where the marks of a thinking block are special tokens, judges need them.
        texts.append(str(tokenizer.decode(written[:end], skip_special_tokens=False)))
    return texts


def continuation_log_probs(model: Any, samples: Sequence[Sample]) -> list[Tensor]:
    """The log-probability of each token of the only continuation of each sample, float64 `[len]`."""
    rows = [sample.prompt + sample.continuations[0] for sample in samples]
    longest = max(len(sample.continuations[0]) for sample in samples)
    input_ids, attention_mask = _left_padded(rows, model.device)
    padded = {}
    if not attention_mask.all():  # the model would count pads as positions, which matters where they are learned
        padded = {"attention_mask": attention_mask, "position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0)}
    with prompt([len(sample.prompt) for sample in samples]):
        logits = model(
            input_ids,
            **padded,
            logits_to_keep=longest + 1,
            use_cache=False,
        ).logits[:, :-1]
    found = _log_probs(logits, input_ids[:, -longest:])
    return [row[longest - len(sample.continuations[0]) :] for row, sample in zip(found, samples, strict=True)]


def choice_log_probs(model: Any, sample: Sample) -> list[Tensor]:
    """The log-probability of each token of each continuation of a sample, float64 `[len]`; the prompt is read once."""
    choices = sample.continuations
    longest = max(map(len, choices))
    written = torch.tensor([[*choice, *[choice[-1]] * (longest - len(choice))] for choice in choices])
    written = written.to(model.device)
    with prompt(len(sample.prompt)):
        read = model(torch.tensor([sample.prompt], device=model.device), logits_to_keep=1, use_cache=True)
        logits = read.logits.expand(len(choices), -1, -1)
        if longest > 1:
            cache = read[CACHE]
            cache.batch_repeat_interleave(len(choices))
            later = model(written[:, :-1], **{CACHE: cache})
            logits = torch.cat([logits, later.logits], 1)
    return [row[: len(choice)] for row, choice in zip(_log_probs(logits, written), choices, strict=True)]


def _choice(sample: Sample, log_probs: Sequence[Tensor]) -> dict[str, Any]:
    likeliest = max(range(len(log_probs)), key=lambda choice: float(log_probs[choice].mean()))
    sums = [[float(row.sum()), len(row)] for row in log_probs]
    return {"score": float(likeliest == sample.right), "choice": likeliest, "logprobs": sums}


def _positions(sample: Sample, log_probs: Tensor) -> dict[str, Any]:
    """Sum and number of log-probabilities by position in the text, in buckets named by where they begin."""
    found: dict[str, list[float]] = {}
    place = 0
    while place < len(log_probs):
        begin = (len(sample.prompt) + place) // BUCKET * BUCKET
        part = log_probs[place : begin + BUCKET - len(sample.prompt)]
        found[str(begin)] = [float(part.sum()), len(part)]
        place += len(part)
    return {"positions": found}


def _log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """`[batch, len, vocabulary]` and `[batch, len]` to float64 `[batch, len]` on the CPU."""
    return -F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none").double().cpu()


def _left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask `[batch, longest]`. Which token pads does not matter: no row sees it."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
