"""What the rows of one step of a continuous batch see, in the terms of a kernel for sequences of different lengths.

A step computes some rows of many requests: chunks of prompts, single tokens, or tokens that wait for verification.
The kernels know sequences whose last row sees all keys, whole or through a window. So the rows of each request are cut
into stretches of one kind, and each stretch is a sequence of its own:

- *early* rows, at positions below sinks + window, where the two leave no gap: they see every key before them;
- *sliding* rows: the last `window` keys in one call, the sinks in another, merged by their log-sum-exp;
- *dense* rows, the dense tail and decode rows of full-attention decode: every key before them.

A sequence without keys costs next to nothing: every call gets all stretches, and those of another kind have no keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

STRETCHES = 4  # of a request: early, sliding, dense, and sliding again after the prompt


@dataclass(frozen=True)
class Rule:
    """How the rows of a kind of layers see.

    Attributes:
        window: keys that a sliding row sees, its own included.
        sinks: first keys of a sequence that every row sees.
        dense_tail: last rows of each prompt that are dense.
        dense_decode: whether decode rows are dense.
    """

    window: int
    sinks: int
    dense_tail: int
    dense_decode: bool


@dataclass(frozen=True)
class Stretches:
    """The rows of a step, cut.

    Attributes:
        start: first row of each stretch and the end of the last, int32 `[stretches + 1]`.
        full: keys of the stretches that see everything before them, else 0, int32 `[stretches]`.
        near: keys of the sliding stretches up to their last row, else 0, int32 `[stretches]`.
        sinks: sinks of the sliding stretches, else 0, int32 `[stretches]`; None if the rule has none.
        max_sinks: the most sinks, at least.
        block_table: pages of each stretch, int32 `[stretches, pages]`.
        max_rows: the most rows of a stretch, at least.
        max_keys: the most keys, at least.
        is_full: which rows see everything before them, bool `[rows]`; None if no row does.
    """

    start: Tensor
    full: Tensor
    near: Tensor
    sinks: Tensor | None
    max_sinks: int
    block_table: Tensor
    max_rows: int
    max_keys: int
    is_full: Tensor | None


def have_sliding(rule: Rule, computed: Tensor, lengths: Tensor, prompts: Tensor) -> bool:
    """Whether any row of a step slides.

    Args:
        rule: of the layers.
        computed: tokens of each request that earlier steps have computed, on the CPU, `[requests]`.
        lengths: tokens of each request after this step, likewise.
        prompts: tokens of each prompt, likewise.
    """
    edges = _edges(rule, computed, lengths, prompts)
    return bool((edges[:, [2, 4]] > edges[:, [1, 3]]).any())


def cut(
    rule: Rule,
    query_start: Tensor,
    lengths: Tensor,
    prompts: Tensor,
    block_table: Tensor,
    *,
    rows: int,
    max_rows: int,
    max_keys: int,
) -> Stretches:
    """Cuts the rows of a step. All tensors are on one device, which is not waited for.

    Args:
        rule: of the layers.
        query_start: first row of each request and the end of the last, `[requests + 1]`.
        lengths: tokens of each request after this step, `[requests]`.
        prompts: tokens of each prompt, `[requests]`.
        block_table: pages of each request, `[requests, pages]`.
        rows: how many there are, those that only pad the step included.
        max_rows: the most rows of a request.
        max_keys: the most keys of a request.
    """
    computed = lengths - query_start.diff()
    edges = _edges(rule, computed, lengths, prompts)
    ends, has_rows = edges[:, 1:], edges.diff(dim=1) > 0
    is_full = torch.arange(STRETCHES, device=edges.device) % 2 == 0
    start = (query_start[:-1, None] + ends - computed[:, None]).flatten()
    start = torch.cat([query_start[:1], start]).int()
    near = torch.where(has_rows & ~is_full, ends, 0).flatten().int()
    # The stretch of a row is the number of stretches that end at or before it.
    stretch = torch.searchsorted(start[1:], torch.arange(rows, device=edges.device, dtype=torch.int32), right=True)
    return Stretches(
        start=start,
        full=torch.where(has_rows & is_full, ends, 0).flatten().int(),
        near=near,
        sinks=(near > 0).int() * rule.sinks if rule.sinks else None,
        max_sinks=rule.sinks,
        block_table=block_table.repeat_interleave(STRETCHES, 0),
        # FlashAttention-2 takes 1 for exactly one row in every sequence, and stretches may have none.
        max_rows=max(2, max_rows),
        max_keys=max_keys,
        is_full=stretch % 2 == 0,
    )


def cut_decode(
    rule: Rule,
    query_start: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    sinks: Tensor,
    *,
    max_keys: int,
    dense: Tensor | None = None,
) -> Stretches:
    """One row for each request, of a rule whose decode rows slide, in tensors that keep their place.

    What is outside the window of a dense row counts as sinks. So a CUDA graph of such a step stays right when a prompt
    ends with a chunk of a single row, which may be its dense tail.

    Args:
        rule: of the layers.
        query_start: as for `cut`.
        lengths: as for `cut`.
        block_table: as for `cut`.
        sinks: is written: the sinks that are not in the window, int32 `[requests]`.
        max_keys: as for `cut`.
        dense: which rows are dense, bool `[requests]`; None if no row is.
    """
    outside = (lengths - rule.window).clamp(min=0)
    sinks.copy_(outside.clamp(max=rule.sinks))
    if dense is not None:
        sinks.copy_(torch.where(dense, outside, sinks))
    return Stretches(
        start=query_start,
        full=lengths,
        near=lengths,
        sinks=sinks if rule.sinks or rule.dense_tail else None,
        max_sinks=max_keys if rule.dense_tail else rule.sinks,
        block_table=block_table,
        max_rows=1,
        max_keys=max_keys,
        is_full=None,
    )


def in_tail(rule: Rule, lengths: Tensor, prompts: Tensor) -> Tensor:
    """Whether the last row of each request is in the dense tail of its prompt; arguments as for `have_sliding`."""
    return (lengths <= prompts) & (lengths > prompts - rule.dense_tail)


def _edges(rule: Rule, computed: Tensor, lengths: Tensor, prompts: Tensor) -> Tensor:
    """The positions between the stretches of each request, with first and end, `[requests, 5]`."""
    early = torch.full_like(lengths, rule.window + rule.sinks)
    after_prompt = lengths if rule.dense_decode else prompts
    inner = torch.stack([early, prompts - rule.dense_tail, after_prompt], 1)
    inner = inner.clamp(computed[:, None], lengths[:, None])
    edges = torch.cat([computed[:, None], inner, lengths[:, None]], 1)
    return edges.cummax(1).values


class Kernel(Protocol):
    """Attention of sequences of different lengths over pages, aligned at the last row and the last key."""

    def __call__(
        self, keys: Tensor, stretches: Stretches, max_keys: int, *, causal: bool, window: int | None
    ) -> tuple[Tensor, Tensor]:
        """The output, `[rows, heads, head_dim]`, and the log-sum-exp, `[heads, rows]`.

        Args:
            keys: how many each stretch has, int32 `[stretches]`.
            stretches: the rows and their pages.
            max_keys: the most keys.
            causal: whether rows see no later keys.
            window: the last keys that a row sees, its own included; None for all.
        """


Merge = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""Writes to its first argument what output, log-sum-exp, output and log-sum-exp of two sets of keys make together."""


def attend(rule: Rule, stretches: Stretches, kernel: Kernel, merge: Merge, out: Tensor) -> None:
    """Attention of a step.

    Args:
        rule: of the layer.
        stretches: of the step.
        kernel: that knows queries, keys and values.
        merge: joins the results over two sets of keys.
        out: is written, `[rows, heads, head_dim]`.
    """
    near, near_lse = kernel(stretches.near, stretches, stretches.max_keys, causal=True, window=rule.window)
    if stretches.sinks is None:
        out.copy_(near)
    else:
        first, first_lse = kernel(stretches.sinks, stretches, stretches.max_sinks, causal=False, window=None)
        merge(out, first, first_lse, near, near_lse)
    if stretches.is_full is not None:
        full, _ = kernel(stretches.full, stretches, stretches.max_keys, causal=True, window=None)
        torch.where(stretches.is_full[:, None, None], full, out, out=out)
