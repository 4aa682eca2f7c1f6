"""How sure a measured value is, and whether two configurations differ: intervals of 95 % and p values.

All comparisons are paired: both configurations answered the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

Z = 1.959964  # quantile of the normal distribution that leaves 2.5 % above it
RESAMPLES = 2000
AT_ONCE = 100  # of them, for memory


class Interval(NamedTuple):
    """A confidence interval of 95 %."""

    low: float
    high: float


def wilson(right: int, samples: int) -> Interval:
    """The score interval of a share (Wilson 1927), which holds for shares of 0 and 1 and for few samples too.

    Args:
        right: samples that were right.
        samples: all of them, at least one.

    Examples:
        >>> low, high = wilson(8, 10)
        >>> round(low, 3), round(high, 3)
        (0.49, 0.943)
    """
    share = right / samples
    centre = share + Z**2 / (2 * samples)
    half = Z * math.sqrt(share * (1 - share) / samples + Z**2 / (4 * samples**2))
    low, high = ((centre + side * half) / (1 + Z**2 / samples) for side in (-1, 1))
    return Interval(max(0.0, min(low, share)), min(1.0, max(high, share)))  # rounding must not leave out the share


def bootstrap(values: Tensor, statistic: Callable[[Tensor], Tensor], seed: int = 0) -> Interval:
    """The percentile interval of a statistic over samples drawn again with replacement (Efron 1979).

    Few samples vary less when they are drawn again than they would have by chance, so the percentiles lie further out
    (Hesterberg 2015, expanded percentiles). A single sample has no interval: both ends are its value.

    Args:
        values: numbers of each sample, `[samples, columns]`.
        statistic: of the columns' means, `[resamples, columns]` to `[resamples]`; ratios of sums are ratios of means.
        seed: of the drawing, so that the same values have the same interval.

    Examples:
        >>> bootstrap(torch.tensor([[0.5], [0.5]]), lambda means: means[:, 0])
        Interval(low=0.5, high=0.5)
    """
    generator = torch.Generator().manual_seed(seed)
    values = values.double()
    size = (AT_ONCE, len(values))
    draws = (torch.randint(len(values), size, generator=generator) for _ in range(0, RESAMPLES, AT_ONCE))
    # The same as `values[drawn]`, in a fraction of the time.
    means = torch.cat([values.index_select(0, drawn.flatten()).view(*size, -1).mean(1) for drawn in draws])
    level = _expanded(len(values))
    low, high = statistic(means).quantile(torch.tensor([level, 1 - level], dtype=torch.float64)).tolist()
    return Interval(low, high)


def _expanded(samples: int) -> float:
    """The share of each tail: that of a normal distribution beyond the quantile of Student's t, widened."""
    freedom = samples - 1
    if freedom == 0:
        return 0.0
    t = Z + (Z**3 + Z) / (4 * freedom) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * freedom**2)
    return NormalDist().cdf(-t * math.sqrt(samples / freedom))


def paired_shares(gained: int, lost: int, samples: int) -> Interval:
    """The interval of the difference of two shares of the same samples (Bonett and Price 2012).

    A normal interval with one sample added to each kind of change, so that it keeps a width where nothing changed.

    Args:
        gained: samples that only the one configuration has right.
        lost: samples that only the other one has right.
        samples: all of them.

    Examples:
        >>> low, high = paired_shares(gained=0, lost=0, samples=98)
        >>> round(low, 3), round(high, 3)
        (-0.028, 0.028)
    """
    up, down = (gained + 1) / (samples + 2), (lost + 1) / (samples + 2)
    half = Z * math.sqrt((up + down - (up - down) ** 2) / (samples + 2))
    return Interval(max(-1.0, up - down - half), min(1.0, up - down + half))


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p value of McNemar's test: would a coin fall so unevenly?

    Args:
        gained: samples that only the one configuration has right.
        lost: samples that only the other one has right.

    Examples:
        >>> round(mcnemar(1, 8), 4)
        0.0391
    """
    changed = gained + lost
    rarer = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * rarer / (1 << changed))


def sign_flips(differences: Tensor, seed: int = 0) -> float:
    """The two-sided p value of paired differences by permutation: which of two results is whose is left to chance.

    Exact where there are few samples, otherwise of random permutations (Phipson and Smyth 2010).

    Args:
        differences: of each sample, `[samples]`.
        seed: of the permutations.

    Examples:
        >>> sign_flips(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
        0.0625
    """
    differences = differences.double()
    count = len(differences)
    observed = differences.sum().abs() * (1 - 1e-9)  # equal sums may differ in the last digit
    if 2**count <= RESAMPLES:
        flipped = (torch.arange(2**count)[:, None] >> torch.arange(count)) % 2
        return _as_far(flipped, differences, observed) / len(flipped)
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(2, (AT_ONCE, count), generator=generator) for _ in range(0, RESAMPLES, AT_ONCE))
    return (sum(_as_far(flipped, differences, observed) for flipped in draws) + 1) / (RESAMPLES + 1)


def _as_far(flipped: Tensor, differences: Tensor, observed: Tensor) -> int:
    """How many sums with these signs are as far from 0; `[permutations, samples]`, 1 for a difference turned round."""
    return int((((1 - 2 * flipped).double() @ differences).abs() >= observed).sum())
