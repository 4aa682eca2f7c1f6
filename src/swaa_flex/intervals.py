"""Interval arithmetic of mask geometry: where a block of query rows can look, and where it surely does.

A mask answers for a block of consecutive query rows with two short unions of half-open kv intervals
(`Bounds`): the *superset* covers every key that some row of the block may see, the *subset* holds only keys
that every row sees. Endpoints are linear expressions (`Linear`) over tensors plus Python integers, so that the
longest possible interval is often known from the Python integers alone: window and causality are both
anchored at the query row, and their difference is a number. That number bounds the width of index lists
without asking the device.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .tracing import is_tracing

MAX_INTERVALS = 6
"""Longest union a mask may state; what exceeds it is hulled (superset) or dropped (subset)."""

_FAR = 1 << 30  # beyond every index, and still far from overflow in int32 sums of a few of them


class Symbol:
    """A tensor of integers, broadcastable to `[batch, heads, row_blocks]`, told apart by identity."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Linear(NamedTuple):
    """`sum(coefficient * symbol) + offset`."""

    symbols: tuple[tuple[Symbol, int], ...] = ()
    offset: int = 0

    def plus(self, other: Linear | int, sign: int = 1) -> Linear:
        """The sum with `sign` times another expression."""
        if not isinstance(other, Linear):
            return Linear(self.symbols, self.offset + sign * other)
        offset = self.offset + sign * other.offset
        symbols = self.symbols
        for symbol, coefficient in other.symbols:
            total = sign * coefficient
            rest = []
            for term in symbols:
                if term[0] is symbol:
                    total += term[1]
                else:
                    rest.append(term)
            symbols = (*rest, (symbol, total)) if total != 0 else tuple(rest)
        return Linear(symbols, offset)

    def minus(self, other: Linear | int) -> Linear:
        """The difference."""
        return self.plus(other, -1)

    def value(self) -> Tensor | int:
        """The number, or the tensor of numbers."""
        total: Tensor | int = self.offset
        for symbol, coefficient in self.symbols:
            total = total + (symbol.value if coefficient == 1 else symbol.value * coefficient)
        return total

    def comparable(self, other: Linear) -> bool:
        """Whether the difference of the two is a Python integer."""
        if len(self.symbols) != len(other.symbols):
            return False
        for symbol, coefficient in self.symbols:
            found = False
            for theirs, count in other.symbols:
                if theirs is symbol and count == coefficient:
                    found = True
            if not found:
                return False
        return True


def symbolic(value: Tensor | int) -> Linear:
    """`value` as a linear expression: a new symbol, or a plain number."""
    return Linear(((Symbol(value), 1),)) if isinstance(value, Tensor) else Linear(offset=value)


class Rows(NamedTuple):
    """A block of consecutive query rows: its first and last row, inclusive."""

    first: Linear
    last: Linear

    def shift(self, delta: Linear | int) -> Rows:
        """The same rows counted from elsewhere."""
        return Rows(self.first.plus(delta), self.last.plus(delta))


class Interval(NamedTuple):
    """Keys in `[max(starts), min(stops))`; no start or no stop means unbounded on that side.

    `length` is an upper bound known from elsewhere; the endpoints may imply a smaller one.
    """

    starts: tuple[Linear, ...] = ()
    stops: tuple[Linear, ...] = ()
    length: int | None = None

    def intersect(self, other: Interval) -> Interval:
        """Keys in both intervals."""
        return Interval(
            _merge_ends(self.starts, other.starts, larger=True),
            _merge_ends(self.stops, other.stops, larger=False),
            _smaller(self.length, other.length),
        )

    def shift(self, delta: Linear | int) -> Interval:
        """The same interval in key coordinates moved by `delta`."""
        return Interval(
            tuple(s.plus(delta) for s in self.starts), tuple(s.plus(delta) for s in self.stops), self.length
        )

    def max_length(self) -> int | None:
        """A bound of the length from Python integers alone, or None."""
        bound = self.length
        for start in self.starts:
            for stop in self.stops:
                if stop.comparable(start):
                    bound = _smaller(bound, stop.offset - start.offset)
        return None if bound is None else max(bound, 0)

    def max_blocks(self, block_size: int) -> int | None:
        """How many blocks of keys the interval can touch, from Python integers alone, or None."""
        length = self.max_length()
        # n keys touch at most ceil((n - 1) / block) + 1 blocks.
        bound = None if length is None else (length + block_size - 2) // block_size + 1 if length > 0 else 0
        for start in self.starts:
            for stop in self.stops:
                if len(start.symbols) == 0 and len(stop.symbols) == 0:
                    bound = _smaller(bound, max(-(-stop.offset // block_size) - start.offset // block_size, 0))
        return bound

    def values(self) -> tuple[Tensor | int, Tensor | int]:
        """Start and stop as numbers or tensors."""
        return _extreme(self.starts, -_FAR, largest=True), _extreme(self.stops, _FAR, largest=False)

    def when(self, condition: Tensor) -> Interval:
        """This interval where `condition` (broadcastable to `[batch, heads, row_blocks]`), empty elsewhere."""
        stop = torch.where(condition, _FAR, -_FAR)
        return Interval(self.starts, (*self.stops, symbolic(stop)), self.max_length())


_EMPTY = Interval(stops=(Linear(offset=-_FAR),), length=0)

Union = tuple[Interval, ...]
EVERYTHING: Union = (Interval(),)
NOTHING: Union = ()


class Bounds(NamedTuple):
    """What a mask says of a block of rows."""

    superset: Union
    subset: Union

    def shift(self, delta: Linear | int) -> Bounds:
        """The same bounds in key coordinates moved by `delta`."""
        return Bounds(tuple(i.shift(delta) for i in self.superset), tuple(i.shift(delta) for i in self.subset))

    def clip(self, interval: Interval) -> Bounds:
        """Both unions within an interval."""
        return Bounds(
            tuple(i.intersect(interval) for i in self.superset),
            tuple(i.intersect(interval) for i in self.subset),
        )


def intersection(left: Bounds, right: Bounds) -> Bounds:
    """Bounds of `left & right`."""
    superset, subset = (
        tuple(x.intersect(y) for x in a for y in b)
        for a, b in ((left.superset, right.superset), (left.subset, right.subset))
    )
    return Bounds(_hull_excess(superset), subset[:MAX_INTERVALS])


def union(left: Bounds, right: Bounds) -> Bounds:
    """Bounds of `left | right`."""
    return Bounds(
        _hull_excess(_absorb(left.superset + right.superset)),
        _absorb(left.subset + right.subset)[:MAX_INTERVALS],
    )


def complement(bounds: Bounds) -> Bounds:
    """What is certainly seen is certainly not in the complement, and the other way round."""
    return Bounds(_hull_excess(_complement(bounds.subset)), _complement(bounds.superset)[:MAX_INTERVALS])


def where(condition: Tensor, then: Bounds, otherwise: Bounds) -> Bounds:
    """Bounds of one mask where `condition` (as in `Interval.when`) holds, of another elsewhere."""
    superset, subset = (
        tuple(_select(condition, a, b) for a, b in itertools.zip_longest(x, y, fillvalue=_EMPTY))
        for x, y in ((then.superset, otherwise.superset), (then.subset, otherwise.subset))
    )
    return Bounds(superset, subset)


def conditional(some: Tensor, all_: Tensor) -> Bounds:
    """Bounds of a mask that looks at the row only: everything where true, nothing where false.

    Args:
        some: bool, broadcastable to `[batch, heads, row_blocks]`: some row of the block may satisfy it.
        all_: bool of the same shape: every row of the block does.
    """
    return Bounds((Interval().when(some),), (Interval().when(all_),))


def _smaller(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def _merge_ends(left: tuple[Linear, ...], right: tuple[Linear, ...], larger: bool) -> tuple[Linear, ...]:
    """Both sets of endpoints, keeping the tighter one of each comparable pair."""
    if len(left) == 0 or len(right) == 0:
        return left + right
    merged = list(left)
    for end in right:
        at = 0
        while at < len(merged) and not merged[at].comparable(end):
            at += 1
        if at == len(merged):
            merged.append(end)
        elif larger:
            merged[at] = Linear(end.symbols, max(end.offset, merged[at].offset))
        else:
            merged[at] = Linear(end.symbols, min(end.offset, merged[at].offset))
    return tuple(merged)


def _extreme(ends: tuple[Linear, ...], default: int, largest: bool) -> Tensor | int:
    values = [end.value() for end in ends]
    return functools.reduce(_maximum if largest else _minimum, values) if values else default


def _maximum(a: Tensor | int, b: Tensor | int) -> Tensor | int:
    if isinstance(b, Tensor):
        return torch.maximum(a, b) if isinstance(a, Tensor) else _at_least(b, a)
    return _at_least(a, b) if isinstance(a, Tensor) else max(a, b)


def _at_least(tensor: Tensor, number: int) -> Tensor:
    """`tensor.clamp(min=number)`.

    Inductor on the CPU cannot compile a clamp that is then divided ("vr must not be None for symbol q0", torch 2.13;
    what later versions can is not known).
    """
    if is_tracing():
        return torch.where(tensor < number, number, tensor)
    return tensor.clamp(min=number)


def _minimum(a: Tensor | int, b: Tensor | int) -> Tensor | int:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.minimum(a, b)
    if isinstance(a, Tensor):
        return a.clamp(max=b)
    return b.clamp(max=a) if isinstance(b, Tensor) else min(a, b)


def _absorb(intervals: Union) -> Union:
    """If one of the intervals is everything, the others add nothing."""
    return EVERYTHING if any(len(i.starts) + len(i.stops) == 0 for i in intervals) else intervals


def _hull_excess(intervals: Union) -> Union:
    if len(intervals) <= MAX_INTERVALS:
        return intervals
    kept, excess = intervals[: MAX_INTERVALS - 1], intervals[MAX_INTERVALS - 1 :]
    low: Tensor | int = _FAR
    high: Tensor | int = -_FAR
    for interval in excess:
        start, stop = interval.values()
        if isinstance(start, Tensor) or isinstance(stop, Tensor):
            empty = start >= stop
            assert isinstance(empty, Tensor)
            start, stop = torch.where(empty, _FAR, start), torch.where(empty, -_FAR, stop)
        elif stop <= start:
            continue
        low, high = _minimum(low, start), _maximum(high, stop)
    return (*kept, Interval((symbolic(low),), (symbolic(high),)))


def _complement(intervals: Union) -> Union:
    """Complement of a union: the intersection of `(-inf, start) | [stop, inf)` over its intervals."""
    result: Union = EVERYTHING
    for interval in intervals:
        sides: list[Interval] = []
        if interval.starts:
            sides.append(Interval(stops=(_single(interval.starts, -_FAR, largest=True),)))
        if interval.stops:
            sides.append(Interval(starts=(_single(interval.stops, _FAR, largest=False),)))
        result = tuple(a.intersect(b) for a in result for b in sides)
    return result


def _single(ends: tuple[Linear, ...], default: int, largest: bool) -> Linear:
    return ends[0] if len(ends) == 1 else symbolic(_extreme(ends, default, largest))


def _select(condition: Tensor, then: Interval, otherwise: Interval) -> Interval:
    starts, stops = (torch.where(condition, a, b) for a, b in zip(then.values(), otherwise.values(), strict=True))
    lengths = then.max_length(), otherwise.max_length()
    length = None if lengths[0] is None or lengths[1] is None else max(lengths[0], lengths[1])
    return Interval((symbolic(starts),), (symbolic(stops),), length)
