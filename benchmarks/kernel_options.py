"""Prefill attention under window 2048 and 128 sinks: options, block orders and ways to write the mask, side by side.

    python benchmarks/kernel_options.py [--quick] [--only NUMBER ...] [--out docs/benchmarks]

What swaa_flex chose from this, and what it dropped, is in docs/performance-log.md. The error is the largest difference
to float64 attention in sampled rows, the first and the last ones among them. Needs a CUDA device, but for `--quick`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import runner
import torch
import torch.nn.functional as F
from prefill_kernel import Case, Method, fa4, inputs, largest_error, mask_of, ours, sdpa, stock_flex
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import swaa_flex
from swaa_flex.kernels import DECODE_OPTIONS
from swaa_flex.masks import causal, rows_from, sinks, window

W, K, TAIL = 2048, 128, 64
WINDOW = causal() & (window(W) | sinks(K))


BIG, MIDDLE = Case(1 << 17, W, K), Case(1 << 15, W, K)
FULL = Case(1 << 15, None, 0)
LAST = Case(1 << 17, None, 0, last_rows=TAIL)
SMALL_HEADS = (Case(1 << 17, W, K, (9, 3, 64)), Case(1 << 15, W, K, (64, 8, 64)))


def name_of(case: Case) -> str:
    work = "tail" if case.last_rows else "window" if case.sliding_window else "full"
    length = f"{case.length >> 10}k" if case.length % 1024 == 0 else str(case.length)
    return f"{work} {length} {case.shape[0]}/{case.shape[1]}x{case.shape[2]}"


def tiles(m: int, n: int, warps: int, stages: int, **more: Any) -> dict[str, Any]:
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages, **more}


PRE, TMA, SAFE = {"PRESCALE_QK": True}, {"USE_TMA": True}, {"ROWS_GUARANTEED_SAFE": True}
MASKS = {
    "own": WINDOW,
    # The same pairs in those blocks that are partial, in fewer operations.
    "distance": lambda b, h, q, kv: ((q - kv >= 0) & (q - kv < W)) | ((kv < K) & (q >= kv)),
    "no sinks": lambda b, h, q, kv: (q >= kv) & (q - kv < W),
    "no sinks, distance": lambda b, h, q, kv: (q - kv >= 0) & (q - kv < W),
}


@dataclass(frozen=True)
class Variant:
    name: str
    case: Case
    how: str  # a method of `calls`
    options: tuple[tuple[str, Any], ...] = ()
    mask: str = "own"
    order: str = "ascending"
    split: bool = True
    block: int = 128
    dynamic: bool = False


def flex(name: str, case: Case = BIG, options: dict[str, Any] | None = None, **more: Any) -> Variant:
    backend = {} if "BACKEND" in (options or {}) else {"BACKEND": "TRITON"}
    return Variant(name, case, "flex", tuple((backend | (options or {})).items()), **more)


def variants(quick: bool) -> list[list[Variant]]:
    """Groups: each is prepared by one process."""
    if quick:
        shape = (4, 2, 64)
        case, last = Case(4096, W, K, shape), Case(4096, None, 0, shape, last_rows=TAIL)
        return [[Variant("ours", case, "ours"), flex("defaults", case, {"PRESCALE_QK": True})], tail(last)[:2]]
    flash = {"BACKEND": "FLASH"}
    ragged = Case((1 << 17) - 37, W, K)
    small = tiles(64, 64, 4, 3)
    large = tiles(128, 128, 8, 3)
    tma = small | TMA
    narrow = {
        "64x64 4w 3s tma": tma,
        "128x64 4w 3s tma": tiles(128, 64, 4, 3) | TMA,
        "128x128 8w 3s tma": large | TMA,
        "128x64 8w 3s tma": tiles(128, 64, 8, 3) | TMA,
    }
    return [
        [
            *[Variant("fa4 window, no sinks", c, "fa4") for c in (BIG, MIDDLE, *SMALL_HEADS)],
            *[Variant("ours, triton", BIG, "ours_triton"), Variant("ours, flash", BIG, "ours_flash")],
        ],
        [flex("flash", c, flash) for c in (BIG, MIDDLE, FULL, *SMALL_HEADS)],
        [flex("flash, 192 rows", c, flash, block=192) for c in SMALL_HEADS],
        [
            *[Variant("stock flex", MIDDLE, "stock"), flex("defaults", MIDDLE), flex("defaults")],
            *[flex("64x64 4w 3s tma", MIDDLE, tma), flex("128x128 8w 3s", MIDDLE, large)],
        ],
        [
            flex("64x64 4w 3s", options=small),
            flex("64x64 4w 3s tma", options=tma),
            flex("64x64 4w 3s pre tma", options=tma | PRE),
            flex("64x64 4w 2s tma", options=tiles(64, 64, 4, 2) | TMA),
            flex("64x64 4w 4s tma", options=tiles(64, 64, 4, 4) | TMA),
        ],
        [
            flex("128x128 8w 3s", options=large),
            flex("128x128 8w 3s tma", options=large | TMA),
            flex("128x128 8w 2s tma", options=tiles(128, 128, 8, 2) | TMA),
            flex("128x64 8w 3s tma", options=tiles(128, 64, 8, 3) | TMA),
            flex("128x64 8w 4s tma", options=tiles(128, 64, 8, 4) | TMA),
        ],
        [
            flex("64x128 4w 2s tma", options=tiles(64, 128, 4, 2) | TMA),
            flex("64x128 4w 3s tma", options=tiles(64, 128, 4, 3) | TMA),
            flex("64x128 8w 3s tma", options=tiles(64, 128, 8, 3) | TMA),
            flex("64x32 4w 4s tma", options=tiles(64, 32, 4, 4) | TMA),
            flex("64x64 4w 3s tma, blocks of 64", options=tma, block=64),
        ],
        [
            flex("64x64 4w 3s tma", ragged, tma, dynamic=True),
            flex("64x64 4w 3s tma, as if divisible", ragged, tma | {"IS_DIVISIBLE": True}, dynamic=True),
            flex("128x128 8w 3s", ragged, large, dynamic=True),
            flex("128x128 8w 3s tma", ragged, large | TMA, dynamic=True),
            flex("defaults", ragged, dynamic=True),
        ],
        [
            *[flex("128x64 4w 3s", options=tiles(128, 64, 4, 3)), flex("128x64 8w 2s", options=tiles(128, 64, 8, 2))],
            *[flex("64x64 4w 2s", options=tiles(64, 64, 4, 2)), flex("64x64 4w 4s", options=tiles(64, 64, 4, 4))],
            *[flex("64x128 4w 2s", options=tiles(64, 128, 4, 2)), flex("64x32 4w 3s", options=tiles(64, 32, 4, 3))],
        ],
        [
            flex("64x64 4w 3s tma, diagonal first", options=tma, order="descending"),
            flex("64x64 4w 3s tma, diagonal first, safe", options=tma | SAFE, order="descending"),
            flex("64x64 4w 3s tma, all partial", options=tma, split=False),
            flex("dynamic", dynamic=True),
            flex("dynamic, divisible", options={"IS_DIVISIBLE": True}, dynamic=True),
        ],
        [flex(f"64x64 4w 3s tma, mask: {m}", options=tma, mask=m) for m in MASKS if m != "own"],
        [flex(f"flash, mask: {m}", options=flash, mask=m) for m in MASKS if m != "own"],
        # Wrong, but it tells what evaluating masks costs.
        [flex("flash, no masks (wrong)", options=flash, order="all full")],
        *[[flex("defaults", c)] + [flex(name, c, options) for name, options in narrow.items()] for c in SMALL_HEADS],
        [
            *[Variant("sdpa cuDNN", FULL, "cudnn"), Variant("fa4", FULL, "fa4"), flex("defaults", FULL)],
            *[flex("64x64 4w 3s tma", FULL, tma), flex("128x128 8w 3s", FULL, large)],
            flex("128x128 8w 3s tma", FULL, large | TMA),
        ],
        tail(LAST),
    ]


def tail(case: Case) -> list[Variant]:
    names = ("tail_triton", "tail_folded_16", "tail_folded_8", "tail_sdpa", "tail_fa4")
    return [Variant(name.replace("_", " "), case, name) for name in names]


@dataclass(frozen=True)
class Config:
    sliding_window: int
    sink_tokens: int
    tail: int
    matmul: float  # TFLOP/s


@dataclass(frozen=True)
class Result:
    case: str
    variant: str
    milliseconds: float | None
    teraflops: float | None  # of useful work
    error: float | None
    note: str = ""


def main() -> None:
    parser = runner.arguments(__doc__)
    parser.add_argument("--only", nargs="+", type=int, choices=range(len(variants(False))), help="groups, by number")
    given = parser.parse_args()
    runner.needs_gpu(given.quick)
    rate = runner.matmul_rate()
    config = Config(W, K, TAIL, rate)
    report = runner.Report(
        f"kernel_options_{runner.device()}", config, line, given.out, {"matmul_tflops": round(rate)}
    )
    groups = variants(given.quick)
    if given.only:
        groups = [groups[number] for number in given.only]
    runner.run([Group(tuple(group)) for group in groups], report, processes=14)
    report.results.sort(key=lambda r: (r.case, r.milliseconds or 1e9))
    report.close(table(report.results))


# --- what is measured -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    variants: tuple[Variant, ...]

    @property
    def gib(self) -> float:
        return 9

    @torch.no_grad()
    def prepare(self) -> Callable[[], Iterator[Result]]:
        ready: list[tuple[Variant, Callable[..., Tensor] | str]] = []
        for variant in self.variants:
            tensors = inputs(variant.case)
            try:
                call = CALLS[variant.how](variant, *tensors)
                call(*tensors)
                runner.synchronise()
                ready.append((variant, call))
            except Exception as error:  # what cannot run is a result
                ready.append((variant, runner.noted(error)))
        return functools.partial(self.measure, ready)

    @torch.no_grad()
    def measure(self, ready: list[tuple[Variant, Callable[..., Tensor] | str]]) -> Iterator[Result]:
        for variant, call in ready:
            if isinstance(call, str):
                yield Result(name_of(variant.case), variant.name, None, None, None, call)
                continue
            tensors = inputs(variant.case)
            error = largest_error(call(*tensors), *tensors, variant.case, method_of(variant))
            ms = runner.milliseconds(functools.partial(call, *tensors), repeats=15, seconds=1)
            done = variant.case if method_of(variant).sinks else dataclasses.replace(variant.case, sink_tokens=0)
            yield Result(name_of(variant.case), variant.name, ms, done.tera / ms * 1e3, error)

    def failed(self, note: str) -> Iterator[Result]:
        for variant in self.variants:
            yield Result(name_of(variant.case), variant.name, None, None, None, note)


def method_of(variant: Variant) -> Method:
    """What the error is measured against."""
    return Method(CALLS[variant.how], full=variant.how == "cudnn", sinks=variant.how != "fa4")


def reordered(block_mask: BlockMask) -> BlockMask:
    """Each list of partial blocks the other way round: the diagonal first."""
    count, indices = block_mask.kv_num_blocks, block_mask.kv_indices
    slot = torch.arange(indices.shape[-1], device=indices.device, dtype=torch.int32)
    flipped = indices.gather(-1, (count[..., None] - 1 - slot).clamp(min=0).long()).contiguous()
    return rebuilt(block_mask, kv_indices=flipped)


def all_full(block_mask: BlockMask) -> BlockMask:
    """Partial blocks listed as full ones, in front of them."""
    partial, full = block_mask.kv_num_blocks, block_mask.full_kv_num_blocks
    width = block_mask.kv_indices.shape[-1]
    slot = torch.arange(width, device=partial.device)
    shifted = block_mask.full_kv_indices.gather(-1, (slot - partial[..., None]).clamp(min=0).long())
    both = torch.where(slot < partial[..., None], block_mask.kv_indices, shifted).int().contiguous()
    return rebuilt(
        block_mask, kv_num_blocks=torch.zeros_like(partial), full_kv_num_blocks=partial + full, full_kv_indices=both
    )


def rebuilt(block_mask: BlockMask, **changes: Any) -> BlockMask:
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "mask_mod", "BLOCK_SIZE")
    fields = {name: getattr(block_mask, name) for name in names} | changes
    return BlockMask(
        seq_lengths=block_mask.seq_lengths,
        q_num_blocks=None,
        q_indices=None,
        full_q_num_blocks=None,
        full_q_indices=None,
        **fields,
    )


def flex_call(variant: Variant, query: Tensor, key: Tensor, value: Tensor) -> Callable[..., Tensor]:
    mask, lengths = mask_of(variant.case), (query.shape[2], key.shape[2])
    if variant.block == 192:
        make = torch.compile(create_block_mask)
        block_mask = make(MASKS["distance"], None, None, *lengths, device=query.device, BLOCK_SIZE=(192, 128))
    elif variant.split:
        block_mask = swaa_flex.build_block_mask(mask, *lengths, device=query.device, block_size=variant.block)
    else:
        bounds = swaa_flex.block_mask.row_block_bounds(mask, *lengths, variant.block, query.device)
        block_mask = swaa_flex.block_mask.layout(mask, bounds, *lengths, device=query.device, separate_full=False)
    if variant.order == "descending":
        block_mask = reordered(block_mask)
    if variant.order == "all full":
        block_mask = all_full(block_mask)
    if variant.mask != "own":
        block_mask = rebuilt(block_mask, mask_mod=MASKS[variant.mask])
    options = dict(variant.options) if query.is_cuda else None
    compiled = torch.compile(runner.own(flex_attention), fullgraph=True, dynamic=variant.dynamic)
    return functools.partial(compiled, block_mask=block_mask, enable_gqa=True, kernel_options=options)


def of_case(make: Callable[..., Callable[..., Tensor]]) -> Callable[..., Callable[..., Tensor]]:
    """A method of prefill_kernel.py as one of variants."""
    return lambda variant, *tensors: make(variant.case, *tensors)


def tail_triton(variant: Variant, query: Tensor, key: Tensor, value: Tensor) -> Callable[..., Tensor]:
    first = key.shape[2] - query.shape[2]
    block_mask = swaa_flex.build_block_mask(
        rows_from(first) & causal(), query.shape[2], key.shape[2], device=query.device, q_offset=first
    )
    compiled = torch.compile(runner.own(flex_attention), fullgraph=True, dynamic=False)
    options = {"BACKEND": "TRITON"} if query.is_cuda else None
    return functools.partial(compiled, block_mask=block_mask, enable_gqa=True, kernel_options=options)


def tail_folded(rows: int) -> Callable[..., Callable[..., Tensor]]:
    """The decode kernel, which splits the keys, on stretches of rows that stand in the batch dimension."""

    def make(variant: Variant, query: Tensor, key: Tensor, value: Tensor) -> Callable[..., Tensor]:
        folds, length = query.shape[2] // rows, key.shape[2]
        first = length - query.shape[2] + rows * torch.arange(folds, device=query.device)

        def mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return q + first[b] >= kv

        blocks = -(-length // 128)
        indices = torch.arange(blocks, device=query.device, dtype=torch.int32).repeat(folds, 1, 1, 1)
        number = torch.full((folds, 1, 1), blocks, device=query.device, dtype=torch.int32)
        block_mask = BlockMask.from_kv_blocks(
            number, indices, mask_mod=mask, seq_lengths=(rows, length), compute_q_blocks=False
        )
        compiled = torch.compile(runner.own(flex_attention), fullgraph=True, dynamic=False)
        options = {"BACKEND": "TRITON_DECODE"} | DECODE_OPTIONS
        options = options if query.is_cuda else None

        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            folded = query.unflatten(2, (folds, rows))[0].transpose(0, 1)  # [folds, heads, rows, head_dim]
            out = compiled(folded, key, value, block_mask=block_mask, enable_gqa=True, kernel_options=options)
            return out.transpose(0, 1).flatten(1, 2)[None]

        return call

    return make


def tail_sdpa(variant: Variant, *tensors: Tensor) -> Callable[..., Tensor]:
    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        bias = causal_lower_right(query.shape[2], key.shape[2])
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=True)

    return call


CALLS: dict[str, Callable[..., Callable[..., Tensor]]] = {
    "flex": flex_call,
    "ours": of_case(ours("auto")),
    "ours_triton": of_case(ours("triton")),
    "ours_flash": of_case(ours("flash")),
    "stock": of_case(stock_flex(mask_included=False)),
    "cudnn": of_case(sdpa(SDPBackend.CUDNN_ATTENTION)),
    "fa4": of_case(fa4(windowed=True)),
    "tail_triton": tail_triton,
    "tail_folded_16": tail_folded(16),
    "tail_folded_8": tail_folded(8),
    "tail_sdpa": tail_sdpa,
    "tail_fa4": of_case(fa4(windowed=True)),
}


# --- what is printed ------------------------------------------------------------------------------------------


def line(result: Result) -> str:
    name = f"{result.case:<22} {result.variant:<34}"
    if result.milliseconds is None:
        return f"{name} {result.note}"
    return f"{name} {result.milliseconds:9.3f} ms {result.teraflops:6.0f} TFLOP/s  error {result.error:.4f}"


def table(results: list[Result]) -> Table:
    view = Table("case", "variant", "ms", "useful TFLOP/s", "largest error")
    for r in results:
        if r.milliseconds is None:
            view.add_row(r.case, r.variant, r.note[:40])
        else:
            view.add_row(r.case, r.variant, f"{r.milliseconds:.3f}", f"{r.teraflops:.0f}", f"{r.error:.4f}")
    return view


if __name__ == "__main__":
    main()
