"""Masks whose geometry comes from tensors that describe each sequence: documents, padding, slots, row flags."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import intervals
from .algebra import Mask, TableSizes, brief, describe, holds_integers
from .errors import MaskError
from .intervals import EVERYTHING, NOTHING, Bounds, Interval, Linear, Rows, symbolic


@dataclass(frozen=True, eq=False, repr=False)
class RowsWhere(Mask):
    """See `masks.rows_where`."""

    source: Tensor
    flags: Tensor = field(compare=False)
    counts: Tensor = field(compare=False)
    lengths: Tensor | None = field(default=None, compare=False)

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return _look_up(self.flags, b, q_idx, self.lengths)

    def with_lengths(self, entries: int) -> Mask:
        return replace(self, lengths=_lengths(self.flags, entries))

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

    @property
    def table_sizes(self) -> TableSizes:
        return self.flags.shape[-1], None

    def __repr__(self) -> str:
        return f"rows_where({brief(self.source)})"


@dataclass(frozen=True, eq=False, repr=False)
class Documents(Mask):
    """See `masks.documents`."""

    source: Tensor
    table: DocumentTable = field(compare=False)

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.table.same(b, q_idx, kv_idx)

    def with_lengths(self, entries: int) -> Mask:
        return replace(self, table=self.table.with_lengths(entries))

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

    @property
    def table_sizes(self) -> TableSizes:
        return self.table.sizes

    def __repr__(self) -> str:
        return f"documents({brief(self.source)})"


@dataclass(frozen=True, eq=False, repr=False)
class KvPositions(Mask):
    """See `masks.kv_positions`."""

    mask: Mask
    source: Tensor
    positions: Tensor = field(compare=False)
    lengths: Tensor | None = field(default=None, compare=False)

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        position = _look_up(self.positions, b, kv_idx, self.lengths)
        return (position >= 0) & self.mask(b, h, q_idx, position)

    def with_lengths(self, entries: int) -> Mask:
        return replace(self, lengths=_lengths(self.positions, entries))

    def bounds(self, rows: Rows) -> Bounds:
        return Bounds(EVERYTHING, NOTHING)

    @property
    def batch_size(self) -> int | None:
        return _batch_of(self.positions) or self.mask.batch_size

    @property
    def table_sizes(self) -> TableSizes:
        return self.mask.table_sizes[0], self.positions.shape[-1]

    def __repr__(self) -> str:
        return f"kv_positions({self.mask!r}, {brief(self.source)})"


@dataclass(frozen=True, eq=False, repr=False)
class Packed(Mask):
    """See `masks.packed`."""

    mask: Mask
    source: Tensor
    table: DocumentTable = field(compare=False)

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        start = self.table.start_of(b, q_idx)
        return self.table.same(b, q_idx, kv_idx) & self.mask(b, h, q_idx - start, kv_idx - start)

    def with_lengths(self, entries: int) -> Mask:
        return replace(self, table=self.table.with_lengths(entries))

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
            intervals.union(Bounds((*first.superset, between), NOTHING), Bounds(last.superset, NOTHING)).superset,
            tuple(interval.when(one_document) for interval in first.subset),
        )

    def _in_document(self, rows: Rows, start: Linear, stop: Linear) -> Bounds:
        own = self.mask.bounds(rows.shift(Linear().minus(start)))
        return own.shift(start).clip(Interval((start,), (stop,)))

    @property
    def batch_size(self) -> int | None:
        return self.table.batch_size or self.mask.batch_size

    @property
    def table_sizes(self) -> TableSizes:
        return self.table.sizes

    def __repr__(self) -> str:
        return f"packed({self.mask!r}, {brief(self.source)})"


@dataclass(frozen=True, eq=False, repr=False)
class Padded(Mask):
    """See `masks.left_padded`."""

    _per_sequence = ("source", "first", "stop")  # the source may be the first column itself
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
        own = self.mask.bounds(rows.shift(Linear().minus(first))).shift(first).clip(Interval((first,), (stop,)))
        all_real = rows.first.minus(first).value() >= 0
        assert isinstance(all_real, Tensor)
        return Bounds(own.superset, tuple(interval.when(all_real) for interval in own.subset))

    @property
    def batch_size(self) -> int | None:
        return self.first.shape[0] if self.first.dim() == 1 else self.mask.batch_size

    @property
    def table_sizes(self) -> TableSizes:
        return None, None  # of positions; keys after the attention mask are pads

    def __repr__(self) -> str:
        return f"left_padded({self.mask!r}, {brief(self.source)})"


@dataclass(frozen=True, eq=False, repr=False)
class SinksAndTail(Mask):
    """See `masks.sinks_and_tail`."""

    _per_sequence = ("start", "first")
    mask: Mask
    sink_slots: int
    start: int | Tensor
    first: int | Tensor

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        start, first = (
            v[b if v.shape[0] > 1 else b * 0] if isinstance(v, Tensor) and v.dim() == 1 else v
            for v in (self.start, self.first)
        )
        in_tail = kv_idx >= self.sink_slots
        column = kv_idx + torch.where(in_tail, start - self.sink_slots, first)
        held = torch.where(in_tail, column >= first, column < start)
        return held & self.mask(b, h, q_idx, column)

    def bounds(self, rows: Rows) -> Bounds:
        start, first = (
            symbolic(v[:, None, None] if isinstance(v, Tensor) and v.dim() == 1 else v)
            for v in (self.start, self.first)
        )
        own = self.mask.bounds(rows)
        sinks = own.clip(Interval((first,), (first.plus(self.sink_slots), start))).shift(Linear().minus(first))
        tail = own.clip(Interval((start, first))).shift(Linear(offset=self.sink_slots).minus(start))
        return intervals.union(sinks, tail)

    def for_rows(self, first: int, last: int) -> Mask:
        return SinksAndTail(self.mask.for_rows(first, last), self.sink_slots, self.start, self.first)

    def row_breaks(self) -> tuple[int, ...]:
        return self.mask.row_breaks()

    @property
    def batch_size(self) -> int | None:
        ends = [v for v in (self.start, self.first) if isinstance(v, Tensor) and v.dim() == 1 and v.shape[0] > 1]
        return ends[0].shape[0] if ends else self.mask.batch_size

    @property
    def table_sizes(self) -> TableSizes:
        return self.mask.table_sizes[0], None

    def __repr__(self) -> str:
        return (
            f"sinks_and_tail({self.mask!r}, {self.sink_slots}, start={brief(self.start)}, first={brief(self.first)})"
        )


@dataclass(frozen=True, eq=False)
class DocumentTable:
    """Per token: the number, the first token and the end of its document, each `[len]` or `[batch, len]`."""

    ids: Tensor
    starts: Tensor
    stops: Tensor
    lengths: Tensor | None = None

    @classmethod
    def of(cls, document_ids: Tensor, user: str) -> DocumentTable:
        """The table of contiguous documents; `user` is named in errors."""
        if not holds_integers(document_ids, 1, 2):
            raise MaskError(f"{user} takes integers [len] or [batch, len], not {describe(document_ids)}")
        ids = drop_single_batch(document_ids)
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

    @property
    def sizes(self) -> TableSizes:
        """See `Mask.table_sizes`."""
        return self.ids.shape[-1], self.ids.shape[-1]

    def same(self, b: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """Whether row and key are of one document."""
        return _look_up(self.ids, b, q_idx, self.lengths) == _look_up(self.ids, b, kv_idx, self.lengths)

    def start_of(self, b: Tensor, q_idx: Tensor) -> Tensor:
        """First token of the row's document."""
        return _look_up(self.starts, b, q_idx, self.lengths)

    def with_lengths(self, entries: int) -> DocumentTable:
        """See `Mask.with_lengths`."""
        return replace(self, lengths=_lengths(self.ids, entries))

    def at(self, row: Linear) -> tuple[Tensor, Tensor]:
        """First token and end of the document of a row per block (rows past the last count as the last)."""
        index = row.value()
        assert isinstance(index, Tensor)
        index = index.clamp(0, self.ids.shape[-1] - 1)
        return _per_block(self.starts, index), _per_block(self.stops, index)


def _look_up(table: Tensor, b: Tensor, index: Tensor, lengths: Tensor | None) -> Tensor:
    # Inside other combinators indices can point past the sequence; those pairs are masked, but must not be read.
    # (Not clamp: FlexAttention's FLASH backend knows no maximum, torch 2.11.)
    length = table.shape[-1] if lengths is None else lengths[b]
    index = torch.where((index >= 0) & (index < length), index, 0)
    return table[index] if table.dim() == 1 else table[b, index]


def _lengths(table: Tensor, entries: int) -> Tensor:
    return torch.full((entries,), table.shape[-1], dtype=torch.int32, device=table.device)


def _per_block(table: Tensor, index: Tensor) -> Tensor:
    """`table[..., index]` per sequence: table `[len]` or `[batch, len]`, index `[batch | 1, 1, row_blocks]`."""
    if table.dim() == 1:
        return table[index]
    batch = torch.arange(table.shape[0], device=table.device)[:, None, None]
    return table[batch, index]


def _batch_of(tensor: Tensor) -> int | None:
    return tensor.shape[0] if tensor.dim() == 2 else None


def drop_single_batch(tensor: Tensor) -> Tensor:
    """`[1, len]` as `[len]`: the same for every sequence."""
    return tensor[0] if tensor.dim() == 2 and tensor.shape[0] == 1 else tensor
