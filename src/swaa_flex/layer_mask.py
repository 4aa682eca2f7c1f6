"""What a recipe lets the rows of a layer see: the one place where recipe, kind of layer and rows become a mask.

Columns count the tokens of the batch from the start of the cache, pads included. Positions count the tokens of each
sequence; in a packed row, those of each document. The mask is in columns. Caches that have released keys, and keys in
slots, come after it (`masks.sinks_and_tail`, `masks.kv_positions`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .algebra import Mask, negated
from .config import LayerKind, SWAAConfig
from .errors import MaskError
from .masks import causal, in_sequences, offset, packed, rows_from, rows_where, sinks, window
from .tracing import is_tracing

_FAR = 1 << 30  # behind the last column of every sequence


@dataclass(frozen=True, eq=False)
class QueryRows:
    """What is known of the query rows of a forward.

    Attributes:
        q_len: how many there are.
        q_offset: column of the first one, an int or a 0-d tensor.
        batch: number of sequences.
        device: where tensors of the mask go.
        prompt_lengths: tokens of each prompt without pads, an int or integers `[prompts]`, or None. Where the batch
            has several sequences for each prompt (beams), each length counts for all of them.
        decode_rows: bool `[batch, q_len]`, which rows are decode rows, or None.
        dense_tail: replaces that of the recipe, or None.
        first: column of the first token of each sequence, `[batch]`, or None without pads.
        stop: column behind the last token of each sequence, `[batch]`, or None without pads at the end.
        document_ids: `[batch | 1, q_len]` of packed rows, each document with an id of its own, or None if rows are not
            packed.
    """

    q_len: int
    q_offset: int | Tensor = 0
    batch: int = 1
    device: torch.device | str = "cpu"
    prompt_lengths: int | Tensor | None = None
    decode_rows: Tensor | None = None
    dense_tail: int | None = None
    first: Tensor | None = None
    stop: Tensor | None = None
    document_ids: Tensor | None = None

    @property
    def end_is_known(self) -> bool:
        """Whether somebody has said where prompts end."""
        return self.prompt_lengths is not None or self.decode_rows is not None


def layer_mask(config: SWAAConfig, kind: LayerKind, rows: QueryRows, native: Mask | None = None) -> Mask:
    """What the rows of a layer see of keys that lie in their columns.

    Without prompt lengths and decode rows, a row that comes alone is a decode row, and the others are a prompt (in
    packed rows: each document is one).

    Args:
        config: the recipe.
        kind: what it makes of the layer.
        rows: what is known of them.
        native: what the model itself allows, in positions; causal if None.

    Raises:
        MaskError: if what is said of the rows does not fit them, or cannot be said of packed rows.

    Examples:
        >>> config = SWAAConfig(sliding_window=8, sink_tokens=2, full_attention_layers=(), dense_tail=1)
        >>> kind = LayerKind(full=False, full_attention_decode=True)
        >>> layer_mask(config, kind, QueryRows(q_len=40, prompt_lengths=30))
        causal & (window(8) | sinks(2) | rows_from(29))
        >>> layer_mask(config, LayerKind(full=True, full_attention_decode=True), QueryRows(q_len=40))
        causal
    """
    native = causal() if native is None else native
    if kind.full or config.sliding_window is None:
        return _in_positions(native, rows)
    near: Mask = window(config.sliding_window)
    if config.sink_tokens:
        near = near | sinks(config.sink_tokens)
    tail = config.dense_tail if rows.dense_tail is None else rows.dense_tail
    if rows.prompt_lengths is not None:
        dense = _rows_of_lengths(rows, tail, kind.full_attention_decode)
        return _in_positions(native & (near | dense), rows)
    if rows.decode_rows is None and rows.q_len == 1:
        # A decode row. (On an empty cache it sees itself either way.)
        return _in_positions(native if kind.full_attention_decode else native & near, rows)
    dense_columns = _dense_columns(rows, tail, kind.full_attention_decode)
    if dense_columns is None:
        return _in_positions(native & near, rows)
    return _in_positions(native, rows) & (_in_positions(near, rows) | dense_columns)


def each_sequence(values: Tensor, batch: int, name: str) -> Tensor:
    """One value per sequence, `[batch]` (or `[1]`): beams and several answers repeat what is given per prompt.

    Raises:
        MaskError: if the batch is no multiple of their number; names them by `name`.
    """
    given = values.shape[0]
    if given in (1, batch):
        return values
    if given == 0 or batch % given:
        raise MaskError(f"{name}: got {given} for a batch of {batch}; expected one each")
    return values.repeat_interleave(batch // given)


def document_starts(position_ids: Tensor) -> Tensor:
    """Which tokens of packed rows begin a document: where positions do not go up by one.

    Args:
        position_ids: integers `[..., len]`.

    Returns:
        Bool `[..., len]`; the first token begins one in any case.
    """
    return position_ids.diff(dim=-1, prepend=position_ids[..., :1]) != 1


def has_several_documents(position_ids: Tensor) -> bool:
    """Whether position ids begin again within a row. It reads the answer, which makes the host wait for a GPU."""
    return bool(document_starts(position_ids)[..., 1:].any())


def _in_positions(mask: Mask, rows: QueryRows) -> Mask:
    """`mask`, which is in positions, at columns."""
    if rows.document_ids is not None:
        return packed(mask, document_ids=rows.document_ids)
    first, stop = rows.first, rows.stop
    if first is None:
        return mask
    return in_sequences(mask, first, first + _FAR if stop is None else stop)


def _rows_of_lengths(rows: QueryRows, tail: int, decode_is_full: bool) -> Mask:
    """The dense rows, in positions, of prompts whose lengths are known."""
    lengths = rows.prompt_lengths
    assert lengths is not None
    if rows.document_ids is not None:
        compiled = ", or attention_mask of ones if they are not packed (compiled forwards do not know)"
        raise MaskError(
            "prompt lengths cannot say where the prompts of packed documents end; pass decode_rows"
            + (compiled if is_tracing() else "")
        )
    if isinstance(rows.q_offset, Tensor) and not isinstance(lengths, Tensor):
        # Nothing is split at a row of unknown offset, and compiled code would be made again for each number.
        lengths = torch.full((1,), lengths, device=rows.device)
    if isinstance(lengths, Tensor):
        lengths = each_sequence(lengths.to(rows.device).reshape(-1), rows.batch, "prompt lengths")
    dense = rows_from(lengths - tail)
    return dense if decode_is_full else dense & negated(rows_from(lengths))


def _dense_columns(rows: QueryRows, tail: int, decode_is_full: bool) -> Mask | None:
    """The dense rows, by column, where prompt lengths are not known; None for none."""
    flags = rows.decode_rows
    if flags is None:
        if tail == 0:
            return None
        if rows.document_ids is None:
            last = rows.q_offset + rows.q_len if rows.stop is None else rows.stop
            return rows_from(last - tail)
        flags = torch.zeros(rows.batch, rows.q_len, dtype=torch.bool, device=rows.device)
    flags = flags.to(rows.device)
    if tuple(flags.shape) != (rows.batch, rows.q_len):
        raise MaskError(f"decode_rows: expected [{rows.batch}, {rows.q_len}], got {list(flags.shape)}")
    tails = _tails(flags, tail, rows)
    return offset(rows_where(tails | flags if decode_is_full else tails & ~flags), q=-rows.q_offset)


def _tails(decode_rows: Tensor, tail: int, rows: QueryRows) -> Tensor:
    """Rows among the last `tail` ones before an answer or before the end of their sequence, `[batch, q_len]`."""
    answers = decode_rows & ~F.pad(decode_rows, (1, 0))[:, :-1]
    index = torch.arange(rows.q_len + 1, device=decode_rows.device)
    end = rows.q_len if rows.stop is None else (rows.stop - rows.q_offset).clamp(0, rows.q_len)[:, None]
    if rows.document_ids is not None:
        answers = answers | (rows.document_ids.diff(dim=-1, prepend=rows.document_ids[..., :1]) != 0)
    ends = (F.pad(answers, (0, 1)) | (index == end)).expand(rows.batch, -1)
    passed = ends.cumsum(-1)  # ends up to each row, its own included
    row = index[:-1]
    return passed[:, (row + tail).clamp(max=rows.q_len)] > passed[:, row]
