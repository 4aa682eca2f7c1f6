"""A mask as a picture: which blocks the kernel skips, masks or takes whole, over what the mask says of each pair.

`draw` makes a matplotlib figure (a PNG), `terminal` something for rich to print. Both take their blocks from
`swaa_flex.build_block_mask`, which looks at no pairs, and their pairs from calling the mask, so a picture shows
both sides of what makes a mask fast and right. Long sequences are sampled; memory does not grow with the square
of the length.
"""

from __future__ import annotations

import itertools
import math
import os
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.style import Style
from rich.text import Text
from torch import Tensor

from .algebra import checked
from .block_mask import BLOCK_SIZE, build_block_mask, check_sizes, list_width, row_block_bounds
from .errors import MaskError
from .masks import Mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(
    mask: Mask,
    q_len: int,
    kv_len: int,
    *,
    path: str | os.PathLike[str] | None = None,
    block_size: int | None = None,
    title: str | None = None,
    b: int = 0,
    h: int = 0,
    device: torch.device | str = "cpu",
) -> Figure:
    """Draws a mask with matplotlib (`pip install 'swaa-flex[plot]'`).

    Query rows go down, keys go right. A full block is blue, a skipped one grey; in a partial block, the pairs that
    the mask shows are orange and those it hides pale. A pixel that stands for many pairs shows, from up to 8 x 8 of
    them, what most of those that the kernel computes are, so that nothing is too thin to be seen. The legend counts
    the blocks, the line above the picture the visible pairs: exactly up to 67 million pairs in partial blocks, else
    as an estimate from pairs drawn in every partial block, marked ≈.

    Args:
        mask: the mask; query row i and key j are indices i and j (see `masks.offset` for others).
        q_len: number of query rows.
        kv_len: number of keys.
        path: where to save the figure, as a PNG unless its suffix names another format that matplotlib writes.
        block_size: rows and keys per block. Without it 128, FlexAttention's own, or less for short lengths so that
            there are blocks to see; the picture says which.
        title: stands above the picture; the mask itself if None.
        b: the sequence to draw, of a mask that holds tensors `[batch, ...]`.
        h: the query head to draw, of a mask that tells heads apart.
        device: where to evaluate the mask, the device of its tensors.

    Returns:
        The figure. It belongs to no window and no pyplot state, so there is nothing to close.

    Raises:
        MaskError: if `mask` is no `Mask`, a length or the block size is not positive, or the mask has no sequence `b`
            or head `h`.
        ImportError: if matplotlib is not installed.

    Example:
        >>> from swaa_flex.masks import causal, sinks, window
        >>> draw(causal() & (window(64) | sinks(8)), 256, 256)
        <Figure size 1410x1558 with 1 Axes>
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ModuleNotFoundError as error:
        raise ImportError("swaa_flex.viz.draw needs matplotlib: pip install 'swaa-flex[plot]'") from error
    survey = _Survey.of(mask, q_len, kv_len, block_size, b, h, device)
    heading = textwrap.wrap(title or repr(mask), 68, max_lines=4, placeholder=" …")

    # Laid out in inches from the top, so that text keeps its size whatever the shape of the picture.
    width, height = 6.0, min(6.0, max(0.75, 6.0 * q_len / kv_len))
    left, right, bottom = 0.75, 0.3, 0.85
    top = 0.22 * len(heading) + 0.72
    total_width, total_height = left + width + right, top + height + bottom
    figure = Figure(figsize=(total_width, total_height), dpi=200, facecolor="white")

    def text(x: float, y: float, content: str, size: float, colour: str, **kwargs: Any) -> None:
        figure.text(x / total_width, 1 - y / total_height, content, size=size, color=colour, va="top", **kwargs)

    text(left, 0.12, "\n".join(heading), 10, _INK, weight="bold", linespacing=1.25)
    text(left, 0.22 * len(heading) + 0.14, " · ".join(survey.captions()), 8, _FAINT_INK)
    axes = figure.add_axes((left / total_width, bottom / total_height, width / total_width, height / total_height))
    rows, cols = _Axis.fine(q_len, survey.block_size), _Axis.fine(kv_len, survey.block_size)
    pixels = _blend(survey.shares(rows, cols), _PAPER).numpy()
    # The last pixel of an axis may stand for more than there is.
    extent = (0, pixels.shape[1] * cols.per_pixel, pixels.shape[0] * rows.per_pixel, 0)
    axes.imshow(pixels, extent=extent, aspect="auto", interpolation="nearest")
    axes.set(xlim=(0, kv_len), ylim=(q_len, 0))
    _rule(axes, survey, 200 * width)

    for i, (label, meaning, count) in enumerate(survey.legend()):
        x, y = left + i * width / 3, top + height + 0.25
        swatches = {"full": ("full",), "partial": ("visible", "hidden"), "skipped": ("skipped",)}[label]
        for place, swatch in enumerate(swatches):
            corner = ((x + 0.08 * place) / total_width, 1 - (y + 0.15) / total_height)
            size = (0.16 / len(swatches) / total_width, 0.16 / total_height)
            figure.add_artist(
                Rectangle(corner, *size, transform=figure.transFigure, facecolor=_hex(_PAPER[swatch]), linewidth=0)
            )
        text(x + 0.24, y, f"{label}  {count}", 8, _INK, weight="bold")
        text(x + 0.24, y + 0.19, meaning, 7, _FAINT_INK)
    if path is not None:
        figure.savefig(path)
    return figure


def terminal(
    mask: Mask,
    q_len: int,
    kv_len: int,
    *,
    block_size: int | None = None,
    title: str | None = None,
    b: int = 0,
    h: int = 0,
    device: torch.device | str = "cpu",
) -> RenderableType:
    """The picture of `draw` for a terminal: `rich.print(terminal(mask, 256, 256))`.

    It takes the width there is, up to 72 pixels. Without colours (a pipe, `NO_COLOR`, a terminal of 16 colours) it
    is made of characters instead.

    Args:
        mask: the mask; query row i and key j are indices i and j.
        q_len: number of query rows.
        kv_len: number of keys.
        block_size: rows and keys per block, chosen as in `draw` if None.
        title: stands above the picture; the mask itself if None.
        b: the sequence to draw, of a mask that holds tensors `[batch, ...]`.
        h: the query head to draw, of a mask that tells heads apart.
        device: where to evaluate the mask, the device of its tensors.

    Raises:
        MaskError: if `mask` is no `Mask`, a length or the block size is not positive, or the mask has no sequence `b`
            or head `h`.

    Example:
        >>> from rich.console import Console
        >>> from swaa_flex.masks import causal, window
        >>> Console(width=80, color_system=None).print(terminal(causal() & window(64), 256, 256))
        causal & window(64)
        visible pairs: 21.9% of 65,536
        blocks of 16 × 16 to suit the length (kernels use 128)
        ...
    """
    return _TerminalPicture(_Survey.of(mask, q_len, kv_len, block_size, b, h, device), title or repr(mask))


# --- what is shown -----------------------------------------------------------------------------------------

_BlockLists = tuple[Tensor, Tensor]
"""How many kv blocks each row block lists, `[row_blocks]`, and which, `[row_blocks, width]`."""

_PARTIAL, _FULL = 1, 2
_EXACT_PAIRS = 1 << 26
_PAIRS_AT_ONCE = 1 << 22
_MOST_LISTED = 1 << 26  # blocks
_SAMPLES = 8
"""Rows, and keys, that are looked at for a pixel."""


@dataclass(frozen=True, eq=False)
class _Survey:
    """A mask at given lengths: what the kernel does with each block, and what the mask says of the pairs."""

    mask: Mask
    q_len: int
    kv_len: int
    block_size: int
    chosen: bool  # the block size, by this module
    b: Tensor
    h: Tensor
    partial: _BlockLists
    full: _BlockLists
    visible: float  # visible pairs, of all
    exact: bool

    @classmethod
    def of(
        cls,
        mask: Mask,
        q_len: int,
        kv_len: int,
        block_size: int | None,
        b: int,
        h: int,
        device: torch.device | str,
    ) -> _Survey:
        checked("mask", mask)
        for name, index, own in (("b", b, mask.batch_size), ("h", h, mask.num_heads)):
            if index < 0 or (own is not None and index >= own):
                last = "" if own is None else f" to {own - 1}, what {mask!r} holds tensors for"
                raise MaskError(f"{name}={index}: expected an index from 0{last}")
        chosen = block_size is None
        if block_size is None:
            block_size = _readable_block_size(max(q_len, kv_len))
        elif block_size < 1:
            raise MaskError(f"block_size={block_size}: expected at least 1 row and key per block")
        cls._refuse_too_many_blocks(mask, q_len, kv_len, block_size, device)
        blocks = build_block_mask(
            mask, q_len, kv_len, batch=mask.batch_size, heads=mask.num_heads, device=device, block_size=block_size
        )
        assert blocks.full_kv_num_blocks is not None and blocks.full_kv_indices is not None
        partial = _selected(blocks.kv_num_blocks, b, h), _selected(blocks.kv_indices, b, h)
        full = _selected(blocks.full_kv_num_blocks, b, h), _selected(blocks.full_kv_indices, b, h)
        place = torch.tensor(b, device=device), torch.tensor(h, device=device)
        pairs = min(block_size, q_len) * min(block_size, kv_len)
        unsampled = int(partial[0].sum()) * pairs <= _EXACT_PAIRS
        survey = cls(mask, q_len, kv_len, block_size, chosen, *place, partial, full, math.nan, unsampled)
        object.__setattr__(survey, "visible", survey._count_visible() / (q_len * kv_len))
        return survey

    @staticmethod
    def _refuse_too_many_blocks(
        mask: Mask, q_len: int, kv_len: int, block_size: int, device: torch.device | str
    ) -> None:
        few = min(q_len, block_size)  # lists are as wide for all rows
        check_sizes(mask, q_len, kv_len, mask.batch_size, mask.num_heads)
        width = list_width(row_block_bounds(mask, few, kv_len, block_size, device), kv_len, block_size)
        if math.ceil(q_len / block_size) * width > _MOST_LISTED:
            raise MaskError(
                f"{q_len} x {kv_len} with block_size={block_size}: so many blocks do not fit into memory; "
                "take fewer rows and keys, or a larger block size"
            )

    def captions(self) -> tuple[str, str]:
        """What share of the pairs is visible, and what the blocks are."""
        about = "" if self.exact else "≈ "
        share = f"visible pairs: {about}{_percent(self.visible)} of {self.q_len * self.kv_len:,}"
        blocks = f"blocks of {self.block_size} × {self.block_size}"
        if self.chosen and self.block_size != BLOCK_SIZE:
            blocks += f" to suit the length (kernels use {BLOCK_SIZE})"
        return share, blocks

    def legend(self) -> tuple[tuple[str, str, str], ...]:
        """Each class of block with what it means and how many there are."""
        blocks = math.ceil(self.q_len / self.block_size) * math.ceil(self.kv_len / self.block_size)
        partial, full = int(self.partial[0].sum()), int(self.full[0].sum())
        meanings = (
            ("full", "every pair visible, no mask", full),
            ("partial", "mask decides pair by pair", partial),
            ("skipped", "never computed", blocks - partial - full),
        )
        return tuple((label, why, f"{count:,} ({_percent(count / blocks)})") for label, why, count in meanings)

    def shares(self, rows: _Axis, cols: _Axis) -> Tensor:
        """Per pixel how many of the pairs looked at are in a full block, or visible or hidden in a partial one.

        Returns:
            float `[pixel rows, pixel columns, 3]`.
        """
        keys = cols.samples(self.b.device)
        at_once = max(1, _PAIRS_AT_ONCE // (_SAMPLES * keys.numel()))
        parts = []
        for queries in rows.samples(self.b.device).split(at_once):
            q, kv = queries.reshape(-1, 1), keys.reshape(1, -1)
            classes = self._classes(q[:, 0] // self.block_size)[:, kv[0] // self.block_size]
            visible = self.mask(self.b, self.h, q, kv).expand(classes.shape)
            kinds = (classes == _FULL, (classes == _PARTIAL) & visible, (classes == _PARTIAL) & ~visible)
            shape = queries.shape[0], queries.shape[1], keys.shape[0], keys.shape[1]
            parts.append(torch.stack([kind.view(shape).sum((1, 3)) for kind in kinds], dim=-1))
        return torch.cat(parts).float().cpu()

    def _classes(self, row_blocks: Tensor) -> Tensor:
        """The class of every kv block in the given row blocks, `[len(row_blocks), kv_blocks]`, 0 for skipped."""
        kv_blocks = math.ceil(self.kv_len / self.block_size)
        # One more column takes what unused slots of the lists write.
        table = torch.zeros(len(row_blocks), kv_blocks + 1, dtype=torch.uint8, device=row_blocks.device)
        for label, (counts, indices) in ((_PARTIAL, self.partial), (_FULL, self.full)):
            used = torch.arange(indices.shape[1], device=row_blocks.device) < counts[row_blocks, None]
            table.scatter_(1, torch.where(used, indices[row_blocks], kv_blocks).long(), label)
        return table[:, :-1]

    def _count_visible(self) -> float:
        """Visible pairs: all of a full block, in partial blocks those found, or an estimate from random pairs."""
        blocks = int(self.partial[0].sum())
        sides = tuple(min(self.block_size, length) for length in (self.q_len, self.kv_len))
        looked_at = sides if self.exact else (max(1, math.isqrt(_EXACT_PAIRS // blocks)),) * 2
        generator = torch.Generator().manual_seed(0)
        found = 0
        for row_block, kv_block in self._partial_blocks(max(1, _PAIRS_AT_ONCE // math.prod(looked_at))):
            within_q, within_kv = (
                torch.arange(side)[None, :]
                if self.exact
                else torch.randint(side, (len(row_block), count), generator=generator)
                for side, count in zip(sides, looked_at, strict=True)
            )
            q = (row_block[:, None] * self.block_size + within_q.to(row_block.device))[:, :, None]
            kv = (kv_block[:, None] * self.block_size + within_kv.to(row_block.device))[:, None, :]
            inside = (q < self.q_len) & (kv < self.kv_len)
            seen = self.mask(self.b, self.h, q.clamp(max=self.q_len - 1), kv.clamp(max=self.kv_len - 1))
            found += int((seen & inside).sum())
        return int(self.full[0].sum()) * self.block_size**2 + found * math.prod(sides) / math.prod(looked_at)

    def _partial_blocks(self, at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The row block and the kv block of the partial blocks, `[n]` each, n at most `at_once`."""
        counts, indices = self.partial
        rows_at_once = max(1, _PAIRS_AT_ONCE // indices.shape[1])
        for first in range(0, len(counts), rows_at_once):
            rows = slice(first, first + rows_at_once)
            row, slot = (torch.arange(indices.shape[1], device=indices.device) < counts[rows, None]).nonzero(
                as_tuple=True
            )
            yield from zip((row + first).split(at_once), indices[rows][row, slot].long().split(at_once), strict=True)


@dataclass(frozen=True)
class _Axis:
    """How an axis of `length` indices becomes pixels."""

    length: int
    per_pixel: int
    enlarged: int = 1  # pixels per index, where there are more pixels than indices

    @classmethod
    def fine(cls, length: int, block_size: int) -> _Axis:
        """For a figure: at most 640 pixels that do not cut blocks."""
        return cls(length, _whole_blocks(math.ceil(length / 640), block_size))

    @classmethod
    def coarse(cls, length: int, longest: int, pixels: int, block_size: int) -> _Axis:
        """For a terminal: both axes to one scale that does not cut blocks, unless one were hardly to be seen."""
        per_pixel = _whole_blocks(math.ceil(longest / pixels), block_size)
        enlarged = max(1, pixels // longest)
        least = pixels // 4
        if length * enlarged < least * per_pixel:
            per_pixel = _whole_blocks(math.ceil(length / least), block_size)
            enlarged = max(1, least // length)
        return cls(length, per_pixel, enlarged)

    def samples(self, device: torch.device) -> Tensor:
        """The indices to look at for each pixel, `[pixels, at most 8]`."""
        pixels = math.ceil(self.length / self.per_pixel)
        first = torch.arange(pixels)[:, None] * self.per_pixel
        if self.per_pixel <= _SAMPLES:
            within = torch.arange(self.per_pixel)
        else:
            # Somewhere in each eighth, not to fall in step with a regular pattern; the ends, not to miss an edge.
            within = torch.rand(_SAMPLES, generator=torch.Generator().manual_seed(0)) + torch.arange(_SAMPLES)
            within = (within * self.per_pixel / _SAMPLES).long()
            within[0], within[-1] = 0, self.per_pixel - 1
        samples = (first + within).clamp(max=self.length - 1)
        return samples.repeat_interleave(self.enlarged, dim=0).to(device)


def _selected(lists: Tensor, b: int, h: int) -> Tensor:
    """`[batch | 1, heads | 1, ...]` for one sequence and one head."""
    return lists[min(b, lists.shape[0] - 1), min(h, lists.shape[1] - 1)]


def _readable_block_size(length: int) -> int:
    """The largest power of two from 4 to 128 that makes at least 16 blocks of a length, or 4."""
    return max(4, min(BLOCK_SIZE, 1 << max(0, (length // 16).bit_length() - 1)))


def _whole_blocks(per_pixel: int, block_size: int) -> int:
    """The next number that divides the block size or is a multiple of it."""
    while block_size % per_pixel and per_pixel % block_size:
        per_pixel += 1
    return per_pixel


def _percent(share: float) -> str:
    if 0 < share < 0.001:
        return "<0.1%"
    return ">99.9%" if 0.999 < share < 1 else f"{share:.1%}"


# --- how it looks ------------------------------------------------------------------------------------------

_Colour = tuple[int, int, int]

_INK, _FAINT_INK = "#1c2733", "#66727f"
_PAPER: dict[str, _Colour] = {
    "full": (47, 109, 181),
    "visible": (240, 160, 48),
    "hidden": (252, 232, 200),
    "skipped": (239, 242, 245),
}
_SCREEN: dict[str, _Colour] = {"full": (59, 130, 216), "visible": (240, 160, 48), "hidden": (142, 114, 80)}
_GLYPHS = {"full": "█", "visible": "▓", "hidden": "░", "skipped": "·"}
_ASCII_GLYPHS = {"full": "#", "visible": "+", "hidden": "-", "skipped": "."}
_GLYPH_STYLES = {"full": "bright_blue", "visible": "yellow", "hidden": "yellow", "skipped": "bright_black"}
_ASCII = str.maketrans({"×": "x", "≈": "~", "·": "|", "┌": "+", "┐": "+", "└": "+", "┘": "+", "─": "-", "│": "|"})


def _blend(shares: Tensor, palette: dict[str, _Colour]) -> Tensor:
    """The colour of each pixel, uint8 `[rows, columns, 3]`; black for what is in no block, unless the palette says.

    A pixel belongs to the class that is most of it, as blue and orange have no meaningful mixture; visible and hidden
    have one.
    """
    names = ("full", "visible", "hidden", "skipped")
    full, visible, hidden, nothing = torch.tensor([palette.get(name, (0, 0, 0)) for name in names]).float().unbind()
    in_partial = shares[..., 1:].sum(-1, keepdim=True)
    mixture = (shares[..., 1:2] * visible + shares[..., 2:] * hidden) / in_partial.clamp(min=1)
    colours = torch.where(in_partial >= shares[..., :1], mixture, full)
    return torch.where(shares.sum(-1, keepdim=True) > 0, colours, nothing).round().to(torch.uint8)


def _rule(axes: Axes, survey: _Survey, dots: float) -> None:
    """Ticks at block borders, and lines between blocks where there is room for them."""
    step = survey.block_size
    while max(survey.q_len, survey.kv_len) > 8 * step:
        step *= 2
    axes.set_xticks(_ticks(survey.kv_len, step))
    axes.set_yticks(_ticks(survey.q_len, step))
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("key", size=8, color=_FAINT_INK)
    axes.set_ylabel("query row", size=8, color=_FAINT_INK)
    axes.tick_params(length=2.5, width=0.6, color=_FAINT_INK, labelcolor=_FAINT_INK, labelsize=7)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if max(survey.q_len, survey.kv_len) * 8 <= survey.block_size * dots:
        for place in range(survey.block_size, survey.kv_len, survey.block_size):
            axes.axvline(place, color="white", linewidth=0.6)
        for place in range(survey.block_size, survey.q_len, survey.block_size):
            axes.axhline(place, color="white", linewidth=0.6)


def _ticks(length: int, step: int) -> list[int]:
    """Multiples of a step, and the length itself where there is room for it."""
    ticks = list(range(0, length + 1, step))
    return ticks if length - ticks[-1] < step / 2 else [*ticks, length]


def _hex(colour: _Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


@dataclass(frozen=True, eq=False)
class _TerminalPicture:
    survey: _Survey
    title: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        survey = self.survey
        in_colour = console.color_system in ("256", "truecolor") and not console.no_color and not options.ascii_only
        margin = max(len("row 0"), len(str(survey.q_len - 1)))
        pixels = max(8, min(72, options.max_width - margin - 3))
        longest = max(survey.q_len, survey.kv_len)
        shares = survey.shares(
            *(_Axis.coarse(n, longest, pixels, survey.block_size) for n in (survey.q_len, survey.kv_len))
        )
        if len(shares) % 2:
            shares = torch.cat([shares, torch.zeros_like(shares[:1])])
        glyphs = _ASCII_GLYPHS if options.ascii_only else _GLYPHS
        lines = _half_blocks(shares) if in_colour else _characters(shares, glyphs)

        def say(line: Text) -> Text:
            if options.ascii_only:
                line.plain = line.plain.translate(_ASCII)
            return line

        width, last = shares.shape[1], str(survey.kv_len - 1)
        yield say(Text(self.title, style="bold"))
        for caption in survey.captions():
            yield say(Text(caption, style="dim"))
        yield Text()
        first = "key 0" if width > len("key 0") + len(last) else ""
        yield Text(" " * (margin + 2) + first + last.rjust(width - len(first)), style="dim")
        yield say(Text(f"{' ' * (margin + 1)}┌{'─' * width}┐", style="dim"))
        for i, line in enumerate(lines):
            label = "row 0" if i == 0 else str(survey.q_len - 1) if i == len(lines) - 1 else ""
            edge = say(Text("│", style="dim"))
            yield Text.assemble((label.rjust(margin) + " ", "dim"), edge, line, edge)
        yield say(Text(f"{' ' * (margin + 1)}└{'─' * width}┘", style="dim"))
        legend = survey.legend()
        widest = max(len(count) for *_, count in legend)
        for label, meaning, count in legend:
            names = ("visible", "hidden") if label == "partial" else (label,) * 2
            swatch = Text(" " * (margin + 2))
            for name in names:
                if not in_colour:
                    swatch.append(glyphs[name], _GLYPH_STYLES[name])
                elif name in _SCREEN:
                    swatch.append("█", Style(color=_hex(_SCREEN[name])))
                else:
                    swatch.append(" ")
            yield Text.assemble(
                swatch, f" {label:8}", (count.ljust(widest + 2), "bold"), (meaning, "dim"), no_wrap=True
            )


def _half_blocks(shares: Tensor) -> list[Text]:
    """Two pixels to a character: the upper half has the colour of the text, the lower that of the background."""
    colours = _blend(shares, _SCREEN).tolist()
    empty = (shares.sum(-1) == 0).tolist()
    lines = []
    for y in range(0, len(colours), 2):
        upper, lower = (
            [None if nothing else _hex(colour) for nothing, colour in zip(empty[i], colours[i], strict=True)]
            for i in (y, y + 1)
        )
        line = Text()
        for (above, below), run in itertools.groupby(zip(upper, lower, strict=True)):
            if above is None:
                character, style = " " if below is None else "▄", Style(color=below)
            else:
                character, style = "█" if above == below else "▀", Style(color=above, bgcolor=below)
            line.append(character * len(list(run)), style)
        lines.append(line)
    return lines


def _characters(shares: Tensor, glyphs: dict[str, str]) -> list[Text]:
    """Two pixels to a character: the class that is most of it, skipped only if all of it is."""
    names = ("full", "visible", "hidden", "skipped")
    both = shares[0::2] + shares[1::2]
    in_partial = both[..., 1:].sum(-1)
    kinds = torch.where(in_partial >= both[..., 0], 1 + both[..., 1:].argmax(-1), 0)
    kinds = torch.where(both.sum(-1) > 0, kinds, names.index("skipped"))
    lines = []
    for row in kinds.tolist():
        line = Text()
        for kind, run in itertools.groupby(row):
            line.append(glyphs[names[kind]] * len(list(run)), _GLYPH_STYLES[names[kind]])
        lines.append(line)
    return lines
