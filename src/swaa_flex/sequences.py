"""Masks whose geometry comes from tensors that describe each sequence: documents, padding, slots, row flags."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import intervals
from .algebra import Mask, Span, brief, check_table, describe, holds_integers, known_range, within_reach
from .errors import MaskError
from .intervals import EVERYTHING, NOTHING, Bounds, Interval, Linear, Rows, symbolic
from .tracing import is_tracing


@dataclass(frozen=True, eq=False, repr=False)
class RowsWhere(Mask):
    """See `masks.rows_where`."""

    source: Tensor
    flags: Tensor = field(compare=False)
    counts: Tensor = field(compare=False)
    lengths: Tensor | None = field(default=None, compare=False)

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        known, flag = _look_up(self.flags, b, q_idx, self.lengths)
        return known & flag

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

    def check_indices(self, rows: Span, keys: Span) -> None:
        check_table(self, "query rows", self.flags.shape[-1], rows)

    def __repr__(self) -> str:
        return f"rows_where({brief(self.source)})"


@dataclass(frozen=True, eq=False, repr=False)
class Documents(Mask):
    """See `masks.documents`. Per token, `[len]` or `[batch, len]`: the first token of its document, and its end."""

    source: Tensor
    starts: Tensor = field(compare=False)
    stops: Tensor = field(compare=False)
    lengths: Tensor | None = field(default=None, compare=False)

    @classmethod
    def of(cls, source: Tensor, document_ids: Tensor, user: str) -> Documents:
        """Contiguous documents; `user` is named in errors."""
        if not holds_integers(document_ids, 1, 2):
            raise MaskError(f"{user} takes integers [len] or [batch, len], not {describe(document_ids)}")
        ids = drop_single_batch(document_ids)
        length = ids.shape[-1]
        index = torch.arange(length, device=ids.device)
        begins = ids.diff(dim=-1, prepend=ids[..., :1] - 1) != 0
        starts = torch.where(begins, index, 0).cummax(-1).values
        ends = ids.diff(dim=-1, append=ids[..., -1:] - 1) != 0
        stops = torch.where(ends, index + 1, length).flip(-1).cummin(-1).values.flip(-1)
        if ids.device.type == "cpu" and not is_tracing():
            for row, (row_ids, row_begins) in enumerate(
                zip(torch.atleast_2d(ids), torch.atleast_2d(begins), strict=True)
            ):
                numbers, times = row_ids[row_begins].unique(return_counts=True)
                if bool((times > 1).any()):
                    raise MaskError(
                        f"{user}: document {numbers[times > 1][0].item()} of sequence {row} is not contiguous; "
                        "give each stretch of tokens an id of its own"
                    )
        return cls(source, starts, stops)

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        known_row, own = _look_up(self.starts, b, q_idx, self.lengths)
        known_key, other = _look_up(self.starts, b, kv_idx, self.lengths)
        return known_row & known_key & (own == other)

    def start_of(self, b: Tensor, q_idx: Tensor) -> Tensor:
        """First token of the row's document."""
        _, start = _look_up(self.starts, b, q_idx, self.lengths)
        return start

    def with_lengths(self, entries: int) -> Mask:
        return replace(self, lengths=_lengths(self.starts, entries))

    def bounds(self, rows: Rows) -> Bounds:
        (start, _), (last_start, last_stop) = self.at(rows.first), self.at(rows.last)
        _, first_stop = self.at(rows.first)
        every_row = Interval((symbolic(last_start),), (symbolic(first_stop),))
        return Bounds((Interval((symbolic(start),), (symbolic(last_stop),)),), (every_row.when(self.known(rows)),))

    def at(self, row: Linear) -> tuple[Tensor, Tensor]:
        """First token and end of the document of a row per block (of the nearest row where that has none)."""
        index = row.value()
        assert isinstance(index, Tensor)
        index = index.clamp(0, self.starts.shape[-1] - 1)
        return _per_block(self.starts, index), _per_block(self.stops, index)

    def known(self, rows: Rows) -> Tensor:
        """Whether each row of a block has a document."""
        first, last = rows.first.value(), rows.last.value()
        assert isinstance(first, Tensor) and isinstance(last, Tensor)
        return (first >= 0) & (last < self.starts.shape[-1])

    @property
    def batch_size(self) -> int | None:
        return _batch_of(self.starts)

    def check_indices(self, rows: Span, keys: Span) -> None:
        check_table(self, "query rows", self.starts.shape[-1], rows)
        check_table(self, "keys", self.starts.shape[-1], keys)

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
        known, position = _look_up(self.positions, b, kv_idx, self.lengths)
        return known & (position >= 0) & self.mask(b, h, q_idx, position)

    def with_lengths(self, entries: int) -> Mask:
        return replace(self, lengths=_lengths(self.positions, entries))

    def bounds(self, rows: Rows) -> Bounds:
        return Bounds(EVERYTHING, NOTHING)

    @property
    def batch_size(self) -> int | None:
        return self._common("batch_size", _batch_of(self.positions))

    def check_indices(self, rows: Span, keys: Span) -> None:
        check_table(self, "keys", self.positions.shape[-1], keys)
        self.mask.check_indices(rows, None)

    def __repr__(self) -> str:
        return f"kv_positions({self.mask!r}, {brief(self.source)})"


@dataclass(frozen=True, eq=False, repr=False)
class Packed(Mask):
    """See `masks.packed`."""

    mask: Mask
    documents: Documents

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        start = self.documents.start_of(b, q_idx)
        return self.documents(b, h, q_idx, kv_idx) & self.mask(b, h, q_idx - start, kv_idx - start)

    def bounds(self, rows: Rows) -> Bounds:
        """Keys of the block's first document, of those that begin and end inside the block, of the last."""
        first_start, first_stop = (symbolic(v) for v in self.documents.at(rows.first))
        last_start, last_stop = (symbolic(v) for v in self.documents.at(rows.last))
        one_document = last_start.value() == first_start.value()
        assert isinstance(one_document, Tensor)
        one_document = one_document & self.documents.known(rows)
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

    def check_indices(self, rows: Span, keys: Span) -> None:
        self.documents.check_indices(rows, keys)
        self.mask.check_indices(None, None)

    def __repr__(self) -> str:
        return f"packed({self.mask!r}, {brief(self.documents.source)})"


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
        return self._common("batch_size", self.first.shape[0] if self.first.dim() == 1 else None)

    def check_indices(self, rows: Span, keys: Span) -> None:
        self.mask.check_indices(None, None)  # keys after the attention mask are pads

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
        held = (column >= first) & (in_tail | (column < start))
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
        return self._common("batch_size", ends[0].shape[0] if ends else None)

    def check_indices(self, rows: Span, keys: Span) -> None:
        self.mask.check_indices(rows, None if keys is None else self._keys(keys))

    def _keys(self, slots: tuple[int, int]) -> Span:
        """The keys that are in slots, if the host knows them."""
        first, start = known_range(self.first), known_range(self.start)
        if first is None or start is None:
            return None
        last_sink = min(start[1], first[1] + min(slots[1], self.sink_slots))
        stop = last_sink if slots[1] <= self.sink_slots else start[1] + slots[1] - self.sink_slots
        return within_reach(self, "keys", (first[0], max(stop, last_sink)))

    def __repr__(self) -> str:
        return (
            f"sinks_and_tail({self.mask!r}, {self.sink_slots}, start={brief(self.start)}, first={brief(self.first)})"
        )


def _look_up(table: Tensor, b: Tensor, index: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Whether a table has an entry at an index, and the entry (its first one where not)."""
    length = table.shape[-1] if lengths is None else lengths[b]
    known = (index >= 0) & (index < length)
    index = torch.where(known, index, 0)  # not clamp: FlexAttention's FLASH backend knows no maximum (torch 2.11)
    return known, table[index] if table.dim() == 1 else table[b, index]


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
