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

import hashlib
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import intervals
from .errors import MaskError
from .intervals import EVERYTHING, NOTHING, Bounds, Interval, Linear, Rows, symbolic

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
    "window",
]

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Mask:
    """A FlexAttention `mask_mod` that composes with `&`, `|` and `~` and knows its geometry.

    Masks are immutable. Two masks are equal if they have the same structure and the same values; tensors and
    user functions compare by identity. Use the functions of this module to make one.
    """

    _precedence: ClassVar[int] = 3

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """Whether query row `q_idx` of batch entry `b` and query head `h` sees key `kv_idx`.

        Takes integer tensors that broadcast together (scalars inside FlexAttention) and returns a bool tensor
        that broadcasts to their common shape.
        """
        raise NotImplementedError

    def bounds(self, rows: Rows) -> Bounds:
        """The keys that some row of the block may see, and keys that every row of it sees."""
        raise NotImplementedError

    def __and__(self, other: Mask) -> Mask:
        return _And(_flat(_And, self) + _flat(_And, other)) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        return _Or(_flat(_Or, self) + _flat(_Or, other)) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        return self.mask if isinstance(self, _Not) else _Not(self)

    def __bool__(self) -> bool:
        raise MaskError("a mask has no truth value; combine masks with & | ~ instead of and, or, not")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    @property
    def batch_size(self) -> int | None:
        """Number of sequences that the tensors in the mask are for, or None if it is the same for all."""
        return self._common("batch_size")

    @property
    def num_heads(self) -> int | None:
        """Number of query heads that the mask distinguishes, or None if it is the same for all."""
        return self._common("num_heads")

    @property
    def structure(self) -> tuple[Any, ...]:
        """What kind of mask this is, without its values: masks of one structure share compiled code."""
        return (type(self).__name__, *(_structure(value) for value in self._values()))

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that name the mask across processes and machines.

        Raises:
            MaskError: if the mask holds a tensor, or a function with a closure: their values have no stable name.
        """
        return hashlib.sha256(repr(_stable(self)).encode()).hexdigest()[:16]

    def for_rows(self, first: int, last: int) -> Mask:
        """An equal mask for query rows `first` to `last` (inclusive), simpler where that is known.

        >>> (causal() & (window(8) | rows_from(100))).for_rows(100, 120)
        causal
        >>> (causal() & (window(8) | rows_from(100))).for_rows(0, 99)
        causal & window(8)
        """
        return self

    def row_breaks(self) -> frozenset[int]:
        """Query rows at which `for_rows` changes its answer."""
        return frozenset()

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, f.name) for f in fields(self) if f.compare)  # type: ignore[arg-type]

    def _identity(self) -> tuple[Any, ...]:
        return (type(self), *(_identity(value) for value in self._values()))

    def _common(self, attribute: str) -> int | None:
        sizes = {getattr(mask, attribute) for value in self._values() for mask in _masks_in(value)} - {None}
        if len(sizes) > 1:
            raise MaskError(
                f"the parts of {self!r} hold tensors for different numbers ({attribute} "
                f"{sorted(sizes)}); build them all for the same batch and heads"
            )
        return sizes.pop() if sizes else None


# --- primitives --------------------------------------------------------------------------------------------


def everything() -> Mask:
    """Every row sees every key."""
    return _Everything()


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
        if start.dim() > 1 or start.is_floating_point():
            raise MaskError(f"rows_from takes an int or an integer tensor [batch], not {_describe(start)}")
        return _RowsFrom(start)
    return _RowsFrom(_checked_int("rows_from", start, None))


def rows_where(flags: Tensor) -> Mask:
    """Rows whose flag is set see every key, the others none.

    Args:
        flags: bool `[q_len]` or `[batch, q_len]`.
    """
    if flags.dtype != torch.bool or flags.dim() not in (1, 2):
        raise MaskError(f"rows_where takes a bool tensor [q_len] or [batch, q_len], not {_describe(flags)}")
    flat = _drop_single_batch(flags)
    counts = torch.nn.functional.pad(flat.cumsum(-1, dtype=torch.int32), (1, 0))
    return _RowsWhere(flags, flat, counts)


def documents(document_ids: Tensor) -> Mask:
    """A row sees the keys of its own document, in both directions (combine with `causal()`).

    Args:
        document_ids: integers `[len]` or `[batch, len]`; the tokens of a document are contiguous.

    Raises:
        MaskError: if a document is not contiguous (checked on CPU tensors only: it needs the values).
    """
    table = _DocumentTable.of(document_ids, "documents")
    return _Documents(document_ids, table)


def heads(selected: Tensor | Sequence[bool], then: Mask, otherwise: Mask) -> Mask:
    """`then` for the selected query heads, `otherwise` for the rest.

    Args:
        selected: bool `[heads]`, one flag per query head.
        then: the mask of the selected heads.
        otherwise: the mask of the other heads.
    """
    flags = selected if isinstance(selected, Tensor) else torch.tensor(selected)
    if flags.dtype != torch.bool or flags.dim() != 1:
        raise MaskError(f"heads takes bool flags [heads], not {_describe(flags)}")
    return _Heads(flags, then, otherwise)


def from_mask_mod(mask_mod: MaskMod) -> Mask:
    """A user's own `mask_mod(b, h, q_idx, kv_idx)`. It knows no geometry, but what it is ANDed with may.

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
        kv: added to key indices, likewise.
    """
    for name, value in (("q", q), ("kv", kv)):
        if isinstance(value, Tensor) and value.dim() != 0:
            raise MaskError(f"offset takes an int or a 0-d tensor for {name}, not {_describe(value)}")
    if isinstance(q, int) and isinstance(kv, int) and q == 0 and kv == 0:
        return mask
    return _Offset(mask, q, kv)


def kv_positions(mask: Mask, positions: Tensor) -> Mask:
    """`mask` for keys stored in slots: slot s holds the key of position `positions[s]`, or none if that is -1.

    Args:
        mask: a mask in positions.
        positions: integers `[kv_len]` or `[batch, kv_len]`, in any order.
    """
    if positions.dim() not in (1, 2) or positions.is_floating_point():
        raise MaskError(
            f"kv_positions takes integers [kv_len] or [batch, kv_len], not {_describe(positions)}"
        )
    return _KvPositions(mask, positions, _drop_single_batch(positions))


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
    if document_ids is not None:
        return _Packed(mask, document_ids, _DocumentTable.of(document_ids, "packed"))
    assert position_ids is not None
    steps = position_ids.diff(dim=-1, prepend=position_ids[..., :1] - 1) != 1
    table = _DocumentTable.of(steps.cumsum(-1), "packed")
    return _Packed(mask, position_ids, table)


def left_padded(mask: Mask, attention_mask: Tensor) -> Mask:
    """`mask` in each sequence's own positions, counted from its first real token; pads are never seen.

    Padding on the right is allowed too; ones must be contiguous. Rows that are pads see nothing.

    Args:
        mask: evaluated at positions counted from the first real token of each sequence.
        attention_mask: `[batch, kv_len]` (or `[kv_len]`), 1 or True for real tokens, 0 or False for pads.

    Raises:
        MaskError: if a sequence has pads between real tokens (checked on CPU tensors only).
    """
    if attention_mask.dim() not in (1, 2):
        raise MaskError(
            f"left_padded takes an attention mask [batch, kv_len], not {_describe(attention_mask)}"
        )
    real = _drop_single_batch(attention_mask).bool()
    length = real.shape[-1]
    first = real.int().argmax(-1)
    stop = length - real.flip(-1).int().argmax(-1)
    stop = torch.where(real.any(-1), stop, 0)
    if attention_mask.device.type == "cpu" and not torch.compiler.is_compiling():
        gaps = (stop - first != real.sum(-1)) & real.any(-1)
        if bool(gaps.any()):
            row = int(torch.atleast_1d(gaps).int().argmax())
            raise MaskError(
                f"attention_mask has pads between real tokens in sequence {row}; expected padding at the ends "
                "only: move the pads to the left of each sequence"
            )
    return _Padded(mask, attention_mask, first, stop)


# --- implementations ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class _Everything(Mask):
    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx >= kv_idx

    def bounds(self, rows: Rows) -> Bounds:
        return Bounds(EVERYTHING, EVERYTHING)

    def __repr__(self) -> str:
        return "everything"


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
    start: int | Tensor

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        start = self.start
        return q_idx >= (start[b] if isinstance(start, Tensor) and start.numel() > 1 else start)

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
        return ~everything() if last < self.start else self

    def row_breaks(self) -> frozenset[int]:
        return frozenset() if isinstance(self.start, Tensor) else frozenset({self.start})

    @property
    def batch_size(self) -> int | None:
        return self.start.numel() if isinstance(self.start, Tensor) and self.start.numel() > 1 else None

    def __repr__(self) -> str:
        return f"rows_from({_brief(self.start)})"


@dataclass(frozen=True, eq=False, repr=False)
class _RowsWhere(Mask):
    source: Tensor
    flags: Tensor = field(compare=False)
    counts: Tensor = field(compare=False)

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return _look_up(self.flags, b, q_idx)

    def bounds(self, rows: Rows) -> Bounds:
        length = self.flags.shape[-1]
        first, last = rows.first.value(), rows.last.value()
        assert isinstance(first, Tensor) and isinstance(last, Tensor)
        stop = (last + 1).clamp(0, length)
        set_rows = _per_block(self.counts, stop) - _per_block(self.counts, first.clamp(0, length))
        return intervals.conditional(set_rows > 0, set_rows == last - first + 1)

    @property
    def batch_size(self) -> int | None:
        return _batch_of(self.flags)

    def __repr__(self) -> str:
        return f"rows_where({_brief(self.source)})"


@dataclass(frozen=True, eq=False, repr=False)
class _Documents(Mask):
    source: Tensor
    table: _DocumentTable = field(compare=False)

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.table.same(b, q_idx, kv_idx)

    def bounds(self, rows: Rows) -> Bounds:
        (start, _), (last_start, last_stop) = self.table.at(rows.first), self.table.at(rows.last)
        _, first_stop = self.table.at(rows.first)
        return Bounds(
            (Interval((symbolic(start),), (symbolic(last_stop),)),),
            (Interval((symbolic(last_start),), (symbolic(first_stop),)),),
        )

    @property
    def batch_size(self) -> int | None:
        return self.table.batch_size

    def __repr__(self) -> str:
        return f"documents({_brief(self.source)})"


@dataclass(frozen=True, eq=False, repr=False)
class _Heads(Mask):
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

    def row_breaks(self) -> frozenset[int]:
        return self.then.row_breaks() | self.otherwise.row_breaks()

    @property
    def num_heads(self) -> int | None:
        return self.selected.shape[0]

    def __repr__(self) -> str:
        return f"heads({_brief(self.selected)}, {self.then!r}, {self.otherwise!r})"


@dataclass(frozen=True, eq=False, repr=False)
class _Function(Mask):
    mask_mod: MaskMod

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.mask_mod(b, h, q_idx, kv_idx)

    def bounds(self, rows: Rows) -> Bounds:
        return Bounds(EVERYTHING, NOTHING)

    def __repr__(self) -> str:
        return getattr(self.mask_mod, "__name__", repr(self.mask_mod))


@dataclass(frozen=True, eq=False, repr=False)
class _And(Mask):
    masks: tuple[Mask, ...]
    _precedence: ClassVar[int] = 2

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        result = self.masks[0](b, h, q_idx, kv_idx)
        for mask in self.masks[1:]:
            result = result & mask(b, h, q_idx, kv_idx)
        return result

    def bounds(self, rows: Rows) -> Bounds:
        result = self.masks[0].bounds(rows)
        for mask in self.masks[1:]:
            result = intervals.intersection(result, mask.bounds(rows))
        return result

    def for_rows(self, first: int, last: int) -> Mask:
        masks = [mask.for_rows(first, last) for mask in self.masks]
        if any(_is_nothing(mask) for mask in masks):
            return ~everything()
        return _combine(_And, [mask for mask in masks if not isinstance(mask, _Everything)], everything())

    def row_breaks(self) -> frozenset[int]:
        return frozenset().union(*(mask.row_breaks() for mask in self.masks))

    def __repr__(self) -> str:
        return " & ".join(_parenthesised(mask, self._precedence) for mask in self.masks)


@dataclass(frozen=True, eq=False, repr=False)
class _Or(Mask):
    masks: tuple[Mask, ...]
    _precedence: ClassVar[int] = 1

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        result = self.masks[0](b, h, q_idx, kv_idx)
        for mask in self.masks[1:]:
            result = result | mask(b, h, q_idx, kv_idx)
        return result

    def bounds(self, rows: Rows) -> Bounds:
        result = self.masks[0].bounds(rows)
        for mask in self.masks[1:]:
            result = intervals.union(result, mask.bounds(rows))
        return result

    def for_rows(self, first: int, last: int) -> Mask:
        masks = [mask.for_rows(first, last) for mask in self.masks]
        if any(isinstance(mask, _Everything) for mask in masks):
            return everything()
        return _combine(_Or, [mask for mask in masks if not _is_nothing(mask)], ~everything())

    def row_breaks(self) -> frozenset[int]:
        return frozenset().union(*(mask.row_breaks() for mask in self.masks))

    def __repr__(self) -> str:
        return " | ".join(_parenthesised(mask, self._precedence) for mask in self.masks)


@dataclass(frozen=True, eq=False, repr=False)
class _Not(Mask):
    mask: Mask

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ~self.mask(b, h, q_idx, kv_idx)

    def bounds(self, rows: Rows) -> Bounds:
        return intervals.complement(self.mask.bounds(rows))

    def for_rows(self, first: int, last: int) -> Mask:
        return ~self.mask.for_rows(first, last)

    def row_breaks(self) -> frozenset[int]:
        return self.mask.row_breaks()

    def __repr__(self) -> str:
        return f"~{_parenthesised(self.mask, self._precedence)}"


@dataclass(frozen=True, eq=False, repr=False)
class _Offset(Mask):
    mask: Mask
    q: int | Tensor
    kv: int | Tensor

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.mask(b, h, q_idx + self.q, kv_idx + self.kv)

    def bounds(self, rows: Rows) -> Bounds:
        kv = symbolic(self.kv)
        return self.mask.bounds(rows.shift(symbolic(self.q))).shift(Linear().minus(kv))

    def for_rows(self, first: int, last: int) -> Mask:
        if isinstance(self.q, Tensor):
            return self
        return _Offset(self.mask.for_rows(first + self.q, last + self.q), self.q, self.kv)

    def row_breaks(self) -> frozenset[int]:
        if isinstance(self.q, Tensor):
            return frozenset()
        q = self.q
        return frozenset(row - q for row in self.mask.row_breaks())

    def __repr__(self) -> str:
        moved = [f"{name}={_brief(v)}" for name, v in (("q", self.q), ("kv", self.kv)) if not _is_zero(v)]
        return f"offset({', '.join([repr(self.mask), *moved])})"


@dataclass(frozen=True, eq=False, repr=False)
class _KvPositions(Mask):
    mask: Mask
    source: Tensor
    positions: Tensor = field(compare=False)

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        position = _look_up(self.positions, b, kv_idx)
        return (position >= 0) & self.mask(b, h, q_idx, position)

    def bounds(self, rows: Rows) -> Bounds:
        return Bounds(EVERYTHING, NOTHING)

    @property
    def batch_size(self) -> int | None:
        return _batch_of(self.positions) or self.mask.batch_size

    def __repr__(self) -> str:
        return f"kv_positions({self.mask!r}, {_brief(self.source)})"


@dataclass(frozen=True, eq=False, repr=False)
class _Packed(Mask):
    mask: Mask
    source: Tensor
    table: _DocumentTable = field(compare=False)

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        start = self.table.start_of(b, q_idx)
        return self.table.same(b, q_idx, kv_idx) & self.mask(b, h, q_idx - start, kv_idx - start)

    def bounds(self, rows: Rows) -> Bounds:
        """Keys of the block's first document, of those that begin and end inside the block, of the last."""
        first_start, first_stop = (symbolic(v) for v in self.table.at(rows.first))
        last_start, last_stop = (symbolic(v) for v in self.table.at(rows.last))
        one_document = last_start.value() == first_start.value()
        assert isinstance(one_document, Tensor)
        first = self._in_document(rows, first_start, first_stop)
        last = self._in_document(rows, last_start, last_stop)
        between = Interval((first_stop, rows.first), (last_start, rows.last.plus(1)))
        return Bounds(
            intervals.union(
                Bounds((*first.superset, between), NOTHING), Bounds(last.superset, NOTHING)
            ).superset,
            tuple(interval.when(one_document) for interval in first.subset),
        )

    def _in_document(self, rows: Rows, start: Linear, stop: Linear) -> Bounds:
        own = self.mask.bounds(rows.shift(Linear().minus(start)))
        return own.shift(start).clip(Interval((start,), (stop,)))

    @property
    def batch_size(self) -> int | None:
        return self.table.batch_size or self.mask.batch_size

    def __repr__(self) -> str:
        return f"packed({self.mask!r}, {_brief(self.source)})"


@dataclass(frozen=True, eq=False, repr=False)
class _Padded(Mask):
    mask: Mask
    source: Tensor
    first: Tensor = field(compare=False)
    stop: Tensor = field(compare=False)

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        batched = self.first.dim() == 1
        first, stop = (self.first[b], self.stop[b]) if batched else (self.first, self.stop)
        real = (kv_idx >= first) & (kv_idx < stop) & (q_idx >= first)
        return real & self.mask(b, h, q_idx - first, kv_idx - first)

    def bounds(self, rows: Rows) -> Bounds:
        first, stop = (symbolic(v[:, None, None] if v.dim() == 1 else v) for v in (self.first, self.stop))
        own = (
            self.mask.bounds(rows.shift(Linear().minus(first))).shift(first).clip(Interval((first,), (stop,)))
        )
        all_real = rows.first.minus(first).value() >= 0
        assert isinstance(all_real, Tensor)
        return Bounds(own.superset, tuple(interval.when(all_real) for interval in own.subset))

    @property
    def batch_size(self) -> int | None:
        return self.first.shape[0] if self.first.dim() == 1 else self.mask.batch_size

    def __repr__(self) -> str:
        return f"left_padded({self.mask!r}, {_brief(self.source)})"


@dataclass(frozen=True, eq=False)
class _DocumentTable:
    """Per token: the number, the first token and the end of its document, each `[len]` or `[batch, len]`."""

    ids: Tensor
    starts: Tensor
    stops: Tensor

    @classmethod
    def of(cls, document_ids: Tensor, user: str) -> _DocumentTable:
        if document_ids.dim() not in (1, 2) or document_ids.is_floating_point():
            raise MaskError(f"{user} takes integers [len] or [batch, len], not {_describe(document_ids)}")
        ids = _drop_single_batch(document_ids)
        length = ids.shape[-1]
        index = torch.arange(length, device=ids.device)
        begins = ids.diff(dim=-1, prepend=ids[..., :1] - 1) != 0
        starts = torch.where(begins, index, 0).cummax(-1).values
        ends = ids.diff(dim=-1, append=ids[..., -1:] - 1) != 0
        stops = torch.where(ends, index + 1, length).flip(-1).cummin(-1).values.flip(-1)
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            for row, (row_ids, row_begins) in enumerate(
                zip(torch.atleast_2d(ids), torch.atleast_2d(begins), strict=True)
            ):
                numbers, times = row_ids[row_begins].unique(return_counts=True)
                if bool((times > 1).any()):
                    raise MaskError(
                        f"{user}: document {numbers[times > 1][0].item()} of sequence {row} is not contiguous; "
                        "give each stretch of tokens an id of its own"
                    )
        return cls(ids, starts, stops)

    @property
    def batch_size(self) -> int | None:
        return _batch_of(self.ids)

    def same(self, b: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return _look_up(self.ids, b, q_idx) == _look_up(self.ids, b, kv_idx)

    def start_of(self, b: Tensor, q_idx: Tensor) -> Tensor:
        return _look_up(self.starts, b, q_idx)

    def at(self, row: Linear) -> tuple[Tensor, Tensor]:
        """First token and end of the document of a row per block (rows past the last count as the last)."""
        index = row.value()
        assert isinstance(index, Tensor)
        index = index.clamp(0, self.ids.shape[-1] - 1)
        return _per_block(self.starts, index), _per_block(self.stops, index)


def _look_up(table: Tensor, b: Tensor, index: Tensor) -> Tensor:
    return table[index] if table.dim() == 1 else table[b, index]


def _per_block(table: Tensor, index: Tensor) -> Tensor:
    """`table[..., index]` per sequence: table `[len]` or `[batch, len]`, index `[batch | 1, 1, row_blocks]`."""
    if table.dim() == 1:
        return table[index]
    batch = torch.arange(table.shape[0], device=table.device)[:, None, None]
    return table[batch, index]


def _drop_single_batch(tensor: Tensor) -> Tensor:
    return tensor[0] if tensor.dim() == 2 and tensor.shape[0] == 1 else tensor


def _batch_of(tensor: Tensor) -> int | None:
    return tensor.shape[0] if tensor.dim() == 2 else None


def _flat(kind: type[_And] | type[_Or], mask: Mask) -> tuple[Mask, ...]:
    return mask.masks if isinstance(mask, kind) else (mask,)


def _combine(kind: type[_And] | type[_Or], masks: list[Mask], neutral: Mask) -> Mask:
    flat = tuple(part for mask in masks for part in _flat(kind, mask))
    return neutral if not flat else flat[0] if len(flat) == 1 else kind(flat)


def _is_nothing(mask: Mask) -> bool:
    return isinstance(mask, _Not) and isinstance(mask.mask, _Everything)


def _is_zero(value: int | Tensor) -> bool:
    return not isinstance(value, Tensor) and value == 0


def _parenthesised(mask: Mask, outer: int) -> str:
    return f"({mask!r})" if mask._precedence < outer else repr(mask)


def _masks_in(value: object) -> list[Mask]:
    if isinstance(value, Mask):
        return [value]
    return [part for part in value if isinstance(part, Mask)] if isinstance(value, tuple) else []


def _identity(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_identity(part) for part in value)
    return ("id", id(value)) if isinstance(value, Tensor) else value


def _structure(value: Any) -> Any:
    if isinstance(value, Mask):
        return value.structure
    if isinstance(value, tuple):
        return tuple(_structure(part) for part in value)
    if isinstance(value, Tensor):
        return ("tensor", value.dim(), value.dtype, value.numel() == 1)
    return type(value) if isinstance(value, int) else getattr(value, "__code__", value)


def _stable(value: Any) -> Any:
    if isinstance(value, Mask):
        return (type(value).__name__, *(_stable(part) for part in value._values()))
    if isinstance(value, tuple):
        return tuple(_stable(part) for part in value)
    if isinstance(value, types.FunctionType) and not value.__closure__ and not value.__defaults__:
        return _stable_code(value.__code__)
    if isinstance(value, int):
        return value
    raise MaskError(
        f"{type(value).__name__} in the mask has no stable fingerprint; only masks of integers and of functions "
        "without closure have one"
    )


def _stable_code(code: types.CodeType) -> Any:
    constants = tuple(_stable_code(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts)
    return (code.co_code.hex(), code.co_names, constants)


def _checked_int(name: str, value: object, minimum: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise MaskError(f"{name} takes an integer, not {value!r}")
    if minimum is not None and value < minimum:
        raise MaskError(f"{name}({value}): expected an integer of at least {minimum}")
    return value  # type: ignore[return-value]


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"


def _brief(value: int | Tensor) -> str:
    return f"<{_describe(value)}>" if isinstance(value, Tensor) else str(value)
