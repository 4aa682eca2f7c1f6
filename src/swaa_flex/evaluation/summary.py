"""What the samples come to: a value with its interval per configuration, task and length, and what sets it off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from . import statistics
from .statistics import Interval


@dataclass(frozen=True)
class Comparison:
    """How a configuration differs from full attention on the same samples.

    Attributes:
        difference: its value minus that of full attention.
        interval: 95 %, of the difference.
        p: two-sided; McNemar's exact test where all scores are 0 or 1, otherwise a permutation test. One test per
            configuration, task and length; not corrected for their number.
    """

    difference: float
    interval: Interval
    p: float


@dataclass(frozen=True)
class Cell:
    """One configuration on one task and length.

    Attributes:
        config: Its name.
        task: The task's.
        length: In tokens; None for a task that has its own.
        metric: "score", the mean of scores from 0 to 1, or "perplexity", of all tokens of all samples.
        samples: How many there are.
        value: The score or perplexity.
        interval: 95 %: Wilson's where all scores are 0 or 1, otherwise of a bootstrap over the samples.
        against_full: None for full attention itself, and where it was not measured.
        positions: Perplexity by position in the text, in buckets named by their first position.
    """

    config: str
    task: str
    length: int | None
    metric: str
    samples: int
    value: float
    interval: Interval
    against_full: Comparison | None
    positions: dict[int, float] | None = None


@dataclass(frozen=True)
class Summary:
    """What an evaluation came to.

    Attributes:
        model: The model's name.
        seed: Of the samples.
        configs: The fields of each configuration, by name.
        baseline: The configuration with full attention, if there is one.
        cells: By task and length, then by configuration in the order given.
    """

    model: str
    seed: int
    configs: dict[str, dict[str, Any]]
    baseline: str | None
    cells: tuple[Cell, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def cells(
    task: str, length: int | None, results: Mapping[str, Sequence[Mapping[str, Any]]], baseline: str | None
) -> list[Cell]:
    """One cell per configuration.

    Args:
        task: the name of the task.
        length: of its samples.
        results: of each configuration, for the same samples in the same order.
        baseline: the configuration that the others are compared with.
    """
    metric = "score" if "score" in next(iter(results.values()))[0] else "perplexity"
    measure, compare = (_score, _compare_scores) if metric == "score" else (_perplexity, _compare_perplexities)
    values = {name: _values(of_config, metric) for name, of_config in results.items()}
    return [
        Cell(
            name,
            task,
            length,
            metric,
            len(values[name]),
            *measure(values[name]),
            None if baseline is None or name == baseline else compare(values[name], values[baseline]),
            _positions(of_config) if metric == "perplexity" else None,
        )
        for name, of_config in results.items()
    ]


def _values(results: Sequence[Mapping[str, Any]], metric: str) -> Tensor:
    """`[samples, 1]` scores, or `[samples, 2]` sums and numbers of log-probabilities."""
    fields = ("score",) if metric == "score" else ("logprob", "tokens")
    return torch.tensor([[result[field] for field in fields] for result in results], dtype=torch.float64)


def _score(scores: Tensor) -> tuple[float, Interval]:
    if _are_verdicts(scores):
        return float(scores.mean()), statistics.wilson(int(scores.sum()), len(scores))
    return float(scores.mean()), statistics.bootstrap(scores, lambda means: means[:, 0])


def _compare_scores(scores: Tensor, full: Tensor) -> Comparison:
    difference = float(scores.mean() - full.mean())
    if _are_verdicts(scores) and _are_verdicts(full):
        gained, lost = int((scores > full).sum()), int((scores < full).sum())
        interval = statistics.paired_shares(gained, lost, len(scores))
        return Comparison(difference, interval, statistics.mcnemar(gained, lost))
    interval = statistics.bootstrap(scores - full, lambda means: means[:, 0])
    return Comparison(difference, interval, statistics.sign_flips((scores - full)[:, 0]))


def _are_verdicts(scores: Tensor) -> bool:
    return bool(((scores == 0) | (scores == 1)).all())


def _perplexity(sums: Tensor) -> tuple[float, Interval]:
    return float(_of_means(sums.mean(0))), statistics.bootstrap(sums, _of_means)


def _compare_perplexities(sums: Tensor, full: Tensor) -> Comparison:
    both = torch.cat([sums, full], 1)

    def difference(means: Tensor) -> Tensor:
        return _of_means(means[..., :2]) - _of_means(means[..., 2:])

    interval = statistics.bootstrap(both, difference)
    return Comparison(float(difference(both.mean(0))), interval, statistics.sign_flips(sums[:, 0] - full[:, 0]))


def _of_means(means: Tensor) -> Tensor:
    """Perplexity from mean sums and numbers of log-probabilities, `[..., 2]` to `[...]`."""
    return (-means[..., 0] / means[..., 1]).exp()


def _positions(results: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    sums: dict[int, Tensor] = {}
    for result in results:
        for begin, (logprob, tokens) in result["positions"].items():
            part = torch.tensor([logprob, tokens], dtype=torch.float64)
            sums[int(begin)] = sums.get(int(begin), torch.zeros(2, dtype=torch.float64)) + part
    return {begin: float(_of_means(sums[begin])) for begin in sorted(sums)}
