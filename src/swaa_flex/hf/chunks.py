"""Into which chunks a compiled model cuts a prompt."""

from __future__ import annotations

import functools

SMALLEST = 128
"""Tokens of the smallest chunk, and what the sizes of all are multiples of."""

OVERHEAD = 192
"""What a chunk costs besides its tokens, in tokens: reading the weights, and what does not fill a GPU."""


def ladder(largest: int) -> tuple[int, ...]:
    """The sizes of chunks, ascending: doubling from the smallest one up to `largest`.

    >>> ladder(1024)
    (128, 256, 512, 1024)
    """
    sizes = [largest]
    while sizes[0] > SMALLEST:
        sizes.insert(0, max(SMALLEST, -(-sizes[0] // 2 // SMALLEST) * SMALLEST))
    return tuple(sizes)


def cut(length: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The chunks of a prompt that waste least, ascending, so that pads are all in the first one.

    Args:
        length: tokens of the prompt.
        sizes: of chunks, ascending.

    Examples:
        >>> cut(600, ladder(1024)), cut(900, ladder(1024)), cut(2100, ladder(1024))
        ((128, 512), (1024,), (128, 1024, 1024))
    """
    whole, rest = divmod(length, sizes[-1])
    return (*sorted(_rest(rest, sizes)), *[sizes[-1]] * whole)


@functools.cache
def _rest(length: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    if length == 0:
        return ()
    alone = (min(size for size in sizes if size >= length),)
    within = [size for size in sizes if size < length]
    if not within:
        return alone
    several = (within[-1], *_rest(length - within[-1], sizes))
    return min(alone, several, key=lambda parts: sum(parts) + OVERHEAD * len(parts))


def most_pads(max_length: int, sizes: tuple[int, ...]) -> int:
    """The most pads that the chunks of a prompt of up to `max_length` tokens hold."""
    # Just above a multiple of the smallest size there are most, and whole chunks of the largest size add none.
    lengths = range(1, min(max_length, sizes[-1]) + 1, SMALLEST)
    return max(sum(cut(length, sizes)) - length for length in lengths)
