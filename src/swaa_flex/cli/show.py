"""`swaa-flex show`: a mask as a picture, in the terminal and as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from .. import recipes, viz
from ..algebra import Mask
from ..config import LayerKind, SWAAConfig
from ..layer_mask import QueryRows, layer_mask
from . import expression, paths


def show(
    mask: Annotated[str, typer.Argument(help="An expression (in quotes), or the name of a recipe.")],
    length: Annotated[
        int | None,
        typer.Option(
            "--len",
            min=1,
            show_default=False,
            help="Query rows, and keys unless --kv-len is given. Default: 256, for a recipe four windows.",
        ),
    ] = None,
    kv_len: Annotated[int | None, typer.Option(min=1, help="Keys, where they are not as many as the rows.")] = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default=False,
            help="Rows and keys per block. Default: what the kernels use, 128, or less for short lengths.",
        ),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Also write the picture to this file (needs matplotlib).")
    ] = None,
) -> None:
    """Show a mask: which of its blocks are skipped, partial or full, and which pairs it shows.

    A mask says for each query row which keys it sees. Kernels work in blocks of
    rows and keys: a block without a visible pair is skipped, a full block (every
    pair visible) needs no mask, and only in a partial one the mask is asked pair
    by pair. The picture has both: the blocks, and the pairs in partial blocks.

    [bold]Expressions[/]

      causal        the keys at or before the row
      window(W)     the keys above row - W; with causal: W keys, its own included
      sinks(K)      the first K keys
      rows_from(N)  every key, for the rows at or after N
      everything    every key
      offset(mask, q=N, kv=M)  the mask at (row + N, key + M)
      & | ~ ( )     and, or, not, grouping

    [bold]Recipes[/] show a prompt in their sliding-window layers: the keys before the
    row that are in the window or sinks, and all of them for the dense tail.
    'swaa-flex recipes' lists the names.

    [bold]Examples[/]

      swaa-flex show "causal & (window(64) | sinks(8))" --len 256
      swaa-flex show "causal & window(300) & ~sinks(20)" --block-size 128
      swaa-flex show "offset(causal & window(64), q=96)" --len 32 --kv-len 128
      swaa-flex show balanced --len 20000 --png balanced.png
    """
    if png is not None and png.suffix.lower() != ".png":
        raise typer.BadParameter(f"{png}: expected a file name that ends in .png", param_hint="'--png'")
    paths.write_file("--png", png)
    title = None
    if mask in recipes.names():
        config = recipes.get(mask)
        length = length or 4 * (config.sliding_window or 64)
        shown = recipe_mask(config, length)
        title = f"{mask}: {shown!r}"
    else:
        shown = expression.parse(mask)
        length = length or 256
    kv_len = kv_len or length
    console = Console(highlight=False)
    console.print(viz.terminal(shown, length, kv_len, block_size=block_size, title=title))
    if png is not None:
        png.parent.mkdir(parents=True, exist_ok=True)
        viz.draw(shown, length, kv_len, path=png, block_size=block_size, title=title)
        console.print(Text(f"\nwrote {png}"), soft_wrap=True)


def recipe_mask(config: SWAAConfig, prompt_length: int) -> Mask:
    """What a prompt of `prompt_length` tokens sees in a sliding-window layer.

    Example:
        >>> recipe_mask(SWAAConfig(sliding_window=2048, sink_tokens=0, dense_tail=64), 10_000)
        causal & (window(2048) | rows_from(9936))
    """
    kind = LayerKind(full=False, full_attention_decode=config.full_attention_decode is not False)
    mask = layer_mask(config, kind, QueryRows(q_len=prompt_length, prompt_lengths=prompt_length))
    return mask.for_rows(0, prompt_length - 1)
