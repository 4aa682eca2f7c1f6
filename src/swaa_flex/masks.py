"""Attention masks that compose and know their own geometry.

A `Mask` is a FlexAttention `mask_mod`: called with `b, h, q_idx, kv_idx` it says whether query row `q_idx` sees
key `kv_idx`. It also answers, for a whole block of query rows, which keys some row may see and which keys every
row sees (`Mask.bounds`). From that `swaa_flex.build_block_mask` derives block lists without looking at pairs.

    >>> from swaa_flex.masks import causal, sinks, window
    >>> causal() & (window(2048) | sinks(128))
    causal & (window(2048) | sinks(128))

Conventions: `window(W)` lets row q see the keys above q - W, so together with `causal()` W keys including its
own (as in transformers); `sinks(K)` are the keys below K.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import intervals
from .algebra import (
    LARGEST,
    Everything,
    Mask,
    MaskMod,
    Span,
    brief,
    checked,
    describe,
    holds_integers,
    is_whole,
    negated,
    shifted,
)
from .errors import MaskError
from .intervals import EVERYTHING, NOTHING, Bounds, Interval, Linear, Rows, symbolic
from .sequences import (
    Documents,
    KvPositions,
    Packed,
    Padded,
    RowsWhere,
    SinksAndTail,
    drop_single_batch,
)
from .tracing import is_tracing

__all__ = [
    "Mask",
    "causal",
    "documents",
    "everything",
    "from_mask_mod",
    "heads",
    "kv_positions",
    "left_padded",
    "offset",
    "packed",
    "rows_from",
    "rows_where",
    "sinks",
    "sinks_and_tail",
    "window",
]

# --- primitives --------------------------------------------------------------------------------------------


def everything() -> Mask:
    """Every row sees every key."""
    return Everything()


def causal() -> Mask:
    """Row q sees the keys at or before q.

    >>> causal() & window(3)
    causal & window(3)
    """
    return _Causal()


def window(sliding_window: int) -> Mask:
    """Row q sees the keys after q - `sliding_window`: with `causal()`, that many keys including its own.

    Raises:
        MaskError: unless `sliding_window` is a positive integer.
    """
    return _Window(_checked_int("window", sliding_window, 1))


def sinks(sink_tokens: int) -> Mask:
    """Every row sees the keys below `sink_tokens` (Xiao et al. 2023, "attention sinks").

    Raises:
        MaskError: unless `sink_tokens` is an integer of at least 0.
    """
    return _Sinks(_checked_int("sinks", sink_tokens, 0))


def rows_from(start: int | Tensor) -> Mask:
    """Rows at or after `start` see every key, the others none.

    `causal() & (window(W) | rows_from(prompt_lengths))` is sliding-window attention in the prompt and full
    attention while decoding.

    Args:
        start: an integer, or an integer tensor `[batch]` (or `[1]`, or 0-d) with one start per sequence.
    """
    if isinstance(start, Tensor):
        if not holds_integers(start, 0, 1):
            raise MaskError(f"rows_from takes an int or an integer tensor [batch], not {describe(start)}")
        return _RowsFrom(start)
    return _RowsFrom(_checked_int("rows_from", start))


def rows_where(flags: Tensor) -> Mask:
    """Rows whose flag is set see every key, the others none.

    Args:
        flags: bool `[rows]` or `[batch, rows]`, by row index, `q_offset` included: one for each row that the mask is
            used for.
    """
    if not isinstance(flags, Tensor) or flags.dtype != torch.bool or flags.dim() not in (1, 2):
        raise MaskError(f"rows_where takes a bool tensor [q_len] or [batch, q_len], not {describe(flags)}")
    flat = drop_single_batch(flags).clone()
    counts = torch.nn.functional.pad(flat.cumsum(-1, dtype=torch.int32), (1, 0))
    return RowsWhere(flags, flat, counts)


def documents(document_ids: Tensor) -> Mask:
    """A row sees the keys of its own document, in both directions (combine with `causal()`).

    Args:
        document_ids: integers `[len]` or `[batch, len]`, for all rows and keys; the tokens of a document are
            contiguous.

    Raises:
        MaskError: if a document is not contiguous (checked on CPU tensors only: it needs the values).
    """
    return Documents.of(document_ids, document_ids, "documents")


def heads(selected: Tensor | Sequence[bool], then: Mask, otherwise: Mask) -> Mask:
    """`then` for the selected query heads, `otherwise` for the rest.

    Args:
        selected: bool `[heads]`, one flag per query head.
        then: the mask of the selected heads.
        otherwise: the mask of the other heads.
    """
    flags = selected if selected is None or isinstance(selected, (Tensor, str)) else torch.as_tensor(selected)
    if not isinstance(flags, Tensor) or flags.dtype != torch.bool or flags.dim() != 1:
        raise MaskError(f"heads takes bool flags [heads], not {describe(flags)}")
    return _Heads(flags, checked("heads", then), checked("heads", otherwise))


def from_mask_mod(mask_mod: MaskMod) -> Mask:
    """A user's own `mask_mod(b, h, q_idx, kv_idx)`. It knows no geometry, but what it is ANDed with may.

    Inside `packed`, `left_padded` and `offset` it is also called with indices outside of a sequence, and what it then
    says does not count; a table that it reads has to be long enough, or the index clamped.

    >>> causal() & window(64) & from_mask_mod(lambda b, h, q, kv: (q + kv) % 3 == 0)
    causal & window(64) & <lambda>
    """
    if isinstance(mask_mod, Mask):
        return mask_mod
    if not callable(mask_mod):
        raise MaskError(f"from_mask_mod takes a function (b, h, q_idx, kv_idx) -> bool, not {mask_mod!r}")
    return _Function(mask_mod)


# --- combinators -------------------------------------------------------------------------------------------


def offset(mask: Mask, q: int | Tensor = 0, kv: int | Tensor = 0) -> Mask:
    """`mask` evaluated at `(q_idx + q, kv_idx + kv)`: a query that continues a cache, a cache without its start.

    Args:
        mask: any mask.
        q: added to query indices, an int or a 0-d integer tensor (which may change in place between calls).
        kv: added to key indices, an int or a 0-d integer tensor too.

    Raises:
        MaskError: if `q` or `kv` is something else. Where the mask is used, also if indices and offsets add up to more
            than 2^30 - 1 either way (not checked in tensors on other devices than the CPU).
    """
    for name, value in (("q", q), ("kv", kv)):
        if not (holds_integers(value, 0) if isinstance(value, Tensor) else is_whole(value)):
            raise MaskError(f"offset takes an int or a 0-d integer tensor for {name}, not {describe(value)}")
    checked("offset", mask)
    q, kv = (v if isinstance(v, Tensor) else _checked_offset(v) for v in (q, kv))
    if isinstance(q, int) and isinstance(kv, int) and q == 0 and kv == 0:
        return mask
    return _Offset(mask, q, kv)


def kv_positions(mask: Mask, positions: Tensor) -> Mask:
    """`mask` for keys stored in slots: slot s holds the key of position `positions[s]`, or none if that is -1.

    Args:
        mask: a mask in positions.
        positions: integers `[kv_len]` or `[batch, kv_len]`, in any order.
    """
    if not holds_integers(positions, 1, 2):
        raise MaskError(f"kv_positions takes integers [kv_len] or [batch, kv_len], not {describe(positions)}")
    return KvPositions(checked("kv_positions", mask), positions, drop_single_batch(positions))


def sinks_and_tail(mask: Mask, sink_slots: int, *, start: int | Tensor, first: int | Tensor = 0) -> Mask:
    """`mask` for a cache that keeps the first keys of a sequence and its last ones, and has released those between.

    Slot s below `sink_slots` holds key `first + s`, the slots after them the keys `start`, `start + 1`, and so on. A
    sink slot whose key lies at or after `start` is empty: its key is in the tail. So is a tail slot before `first`.

    Args:
        mask: evaluated at the keys' own indices.
        sink_slots: how many slots hold first keys.
        start: the first key of the tail, an int or an integer tensor (0-d or `[batch]`).
        first: the first key of each sequence (not 0 where it is padded on the left), likewise.

    >>> sinks_and_tail(causal() & window(64), 4, start=900)
    sinks_and_tail(causal & window(64), 4, start=900, first=0)
    """
    for name, value in (("start", start), ("first", first)):
        if isinstance(value, Tensor) and not holds_integers(value, 0, 1):
            raise MaskError(f"sinks_and_tail: {name} is an int or integers [batch], not {describe(value)}")
        if not isinstance(value, Tensor):
            _checked_int(f"sinks_and_tail: {name}", value)
    return SinksAndTail(checked("sinks_and_tail", mask), _checked_int("sinks_and_tail", sink_slots, 0), start, first)


def packed(mask: Mask, *, document_ids: Tensor | None = None, position_ids: Tensor | None = None) -> Mask:
    """`mask` in each document's own positions: windows and sinks start again at its first token.

    Rows see keys of their own document only. Give one of the two descriptions of the packing.

    Args:
        mask: evaluated at positions counted from each document's first token.
        document_ids: integers `[len]` or `[batch, len]`; the tokens of a document are contiguous.
        position_ids: integers, same shapes; a document starts wherever they do not go up by one.

    Raises:
        MaskError: if not exactly one is given, or a document is not contiguous (checked on CPU tensors).
    """
    if (document_ids is None) == (position_ids is None):
        raise MaskError("packed takes either document_ids= or position_ids=, exactly one of them")
    checked("packed", mask)
    if document_ids is not None:
        return Packed(mask, Documents.of(document_ids, document_ids, "packed"))
    if not holds_integers(position_ids, 1, 2):
        raise MaskError(f"packed takes integers [len] or [batch, len], not {describe(position_ids)}")
    assert position_ids is not None
    steps = position_ids.diff(dim=-1, prepend=position_ids[..., :1] - 1) != 1
    return Packed(mask, Documents.of(position_ids, steps.cumsum(-1), "packed"))


def left_padded(mask: Mask, attention_mask: Tensor) -> Mask:
    """`mask` in each sequence's own positions, counted from its first real token; pads are never seen.

    Padding on the right is allowed too; ones must be contiguous. Rows before the first real token see nothing.

    Args:
        mask: evaluated at positions counted from the first real token of each sequence.
        attention_mask: `[batch, kv_len]` (or `[kv_len]`), 1 or True for real tokens, 0 or False for pads.

    Raises:
        MaskError: if a sequence has pads between real tokens (checked on CPU tensors only).
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() not in (1, 2):
        raise MaskError(f"left_padded takes an attention mask [batch, kv_len], not {describe(attention_mask)}")
    return Padded(checked("left_padded", mask), attention_mask, *sequence_ends(drop_single_batch(attention_mask)))


def sequence_ends(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first real token of each sequence, and one past its last (0 without real tokens)."""
    real = attention_mask.bool()
    first = real.int().argmax(-1)
    stop = torch.where(real.any(-1), real.shape[-1] - real.flip(-1).int().argmax(-1), 0)
    if attention_mask.device.type == "cpu" and not is_tracing():
        gaps = (stop - first != real.sum(-1)) & real.any(-1)
        if bool(gaps.any()):
            row = int(torch.atleast_1d(gaps).int().argmax())
            raise MaskError(
                f"attention_mask has pads between real tokens in sequence {row}; expected padding at the ends "
                "only: move the pads to the left of each sequence (to the right, where peft adds virtual tokens)"
            )
    return first, stop


def in_sequences(mask: Mask, first: Tensor, stop: Tensor) -> Mask:
    """`left_padded` of sequences that are known by their ends, `[batch]`."""
    return Padded(mask, first, first, stop)


# --- implementations ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class _Causal(Mask):
    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx >= kv_idx

    def bounds(self, rows: Rows) -> Bounds:
        return Bounds((Interval(stops=(rows.last.plus(1),)),), (Interval(stops=(rows.first.plus(1),)),))

    def __repr__(self) -> str:
        return "causal"


@dataclass(frozen=True, eq=False, repr=False)
class _Window(Mask):
    sliding_window: int

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx - kv_idx < self.sliding_window

    def bounds(self, rows: Rows) -> Bounds:
        reach = 1 - self.sliding_window
        return Bounds((Interval((rows.first.plus(reach),)),), (Interval((rows.last.plus(reach),)),))

    def __repr__(self) -> str:
        return f"window({self.sliding_window})"


@dataclass(frozen=True, eq=False, repr=False)
class _Sinks(Mask):
    sink_tokens: int

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx < self.sink_tokens

    def bounds(self, rows: Rows) -> Bounds:
        interval = Interval(stops=(Linear(offset=self.sink_tokens),))
        return Bounds((interval,), (interval,))

    def __repr__(self) -> str:
        return f"sinks({self.sink_tokens})"


@dataclass(frozen=True, eq=False, repr=False)
class _RowsFrom(Mask):
    _per_sequence = ("start",)
    start: int | Tensor

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        start = self.start
        if isinstance(start, Tensor) and start.dim() == 1:
            start = start[b if start.numel() > 1 else b * 0]
        return q_idx >= start

    def bounds(self, rows: Rows) -> Bounds:
        start = self.start
        if isinstance(start, Tensor) and start.numel() > 1:
            start = start[:, None, None]
        some, all_ = rows.last.value() >= start, rows.first.value() >= start
        if isinstance(some, Tensor) and isinstance(all_, Tensor):
            return intervals.conditional(some, all_)
        return Bounds(EVERYTHING if some else NOTHING, EVERYTHING if all_ else NOTHING)

    def for_rows(self, first: int, last: int) -> Mask:
        if isinstance(self.start, Tensor):
            return self
        if first >= self.start:
            return everything()
        return negated(everything()) if last < self.start else self

    def row_breaks(self) -> tuple[int, ...]:
        return () if isinstance(self.start, Tensor) else (self.start,)

    @property
    def batch_size(self) -> int | None:
        return self.start.numel() if isinstance(self.start, Tensor) and self.start.numel() > 1 else None

    def __repr__(self) -> str:
        return f"rows_from({brief(self.start)})"


@dataclass(frozen=True, eq=False, repr=False)
class _Heads(Mask):
    _looks_at_heads = True

    selected: Tensor
    then: Mask
    otherwise: Mask

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        chosen = self.selected[h]
        return (chosen & self.then(b, h, q_idx, kv_idx)) | (~chosen & self.otherwise(b, h, q_idx, kv_idx))

    def bounds(self, rows: Rows) -> Bounds:
        return intervals.where(self.selected[:, None], self.then.bounds(rows), self.otherwise.bounds(rows))

    def for_rows(self, first: int, last: int) -> Mask:
        return _Heads(self.selected, self.then.for_rows(first, last), self.otherwise.for_rows(first, last))

    def row_breaks(self) -> tuple[int, ...]:
        return self.then.row_breaks() + self.otherwise.row_breaks()

    @property
    def num_heads(self) -> int | None:
        return self.selected.shape[0]

    def __repr__(self) -> str:
        return f"heads({brief(self.selected)}, {self.then!r}, {self.otherwise!r})"


@dataclass(frozen=True, eq=False, repr=False)
class _Function(Mask):
    _looks_at_heads = True  # for all we know

    mask_mod: MaskMod

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.mask_mod(b, h, q_idx, kv_idx)

    def bounds(self, rows: Rows) -> Bounds:
        return Bounds(EVERYTHING, NOTHING)

    def __repr__(self) -> str:
        return getattr(self.mask_mod, "__name__", repr(self.mask_mod))


@dataclass(frozen=True, eq=False, repr=False)
class _Offset(Mask):
    _per_sequence = ("q", "kv")
    mask: Mask
    q: int | Tensor
    kv: int | Tensor

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        q, kv = (v[b] if isinstance(v, Tensor) and v.dim() == 1 else v for v in (self.q, self.kv))
        return self.mask(b, h, q_idx + q, kv_idx + kv)

    def bounds(self, rows: Rows) -> Bounds:
        kv = symbolic(self.kv)
        return self.mask.bounds(rows.shift(symbolic(self.q))).shift(Linear().minus(kv))

    def for_rows(self, first: int, last: int) -> Mask:
        if isinstance(self.q, Tensor):
            return self
        return _Offset(self.mask.for_rows(first + self.q, last + self.q), self.q, self.kv)

    def row_breaks(self) -> tuple[int, ...]:
        if isinstance(self.q, Tensor):
            return ()
        q = self.q
        return tuple(row - q for row in self.mask.row_breaks())

    def check_indices(self, rows: Span, keys: Span) -> None:
        self.mask.check_indices(shifted(self, "query rows", rows, self.q), shifted(self, "keys", keys, self.kv))

    def __repr__(self) -> str:
        moved = [f"{name}={brief(v)}" for name, v in (("q", self.q), ("kv", self.kv)) if not _is_zero(v)]
        return f"offset({', '.join([repr(self.mask), *moved])})"


def _checked_offset(value: object) -> int:
    if not isinstance(value, (int, torch.SymInt)):  # torch 2.11 does not trace `index`
        value = operator.index(value)  # type: ignore[arg-type]
    return _checked_int("offset", value)


def _is_zero(value: int | Tensor) -> bool:
    return not isinstance(value, Tensor) and value == 0


def _checked_int(name: str, value: object, minimum: int = -LARGEST) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise MaskError(f"{name} takes an integer, not {value!r}")
    if value < minimum:
        raise MaskError(f"{name}({value}): expected an integer of at least {minimum}")
    if isinstance(value, int) and value > LARGEST:
        raise MaskError(f"{name}({value}): expected an integer of at most {LARGEST}")
    return value  # type: ignore[return-value]
