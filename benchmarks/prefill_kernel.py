"""Prefill attention of one layer under a window and sinks, against what one would call instead.

    python benchmarks/prefill_kernel.py [--quick] [--out docs/benchmarks]

Useful work counts visible pairs only, sinks included (methods without sinks have fewer pairs). The floor is that work
at the measured matmul rate, or the tensors read and written once, whatever takes longer. The error is the largest
difference to float64 attention in sampled rows, the first and the last among them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runner
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import swaa_flex
from swaa_flex.masks import causal, sinks, window

SINKS, BLOCK = 128, 128
SHAPES = ((32, 8, 128), (9, 3, 64), (64, 8, 64))
LENGTHS = tuple(1 << n for n in (13, 15, 17, 19, 20))


@dataclass(frozen=True)
class Case:
    """What is computed: full causal attention without a window, all rows or the last ones only."""

    length: int
    sliding_window: int | None = 2048
    sink_tokens: int = SINKS
    shape: tuple[int, int, int] = SHAPES[0]  # heads, kv heads, head_dim
    backward: bool = False
    last_rows: int | None = None

    @property
    def rows(self) -> int:
        return self.last_rows or self.length

    @property
    def pairs(self) -> int:
        """Visible pairs of one head."""
        most = min((self.sliding_window or self.length) + self.sink_tokens, self.length)
        short = max(0, most - 1 - (self.length - self.rows))  # rows that see fewer than most keys
        return self.rows * most - short * (short + 1) // 2

    @property
    def tera(self) -> float:
        """Useful TFLOP: two products of a multiplication and an addition each, five more backward."""
        heads, _, head_dim = self.shape
        return 4 * self.pairs * heads * head_dim * (3.5 if self.backward else 1) / 1e12

    @property
    def gigabytes(self) -> float:
        """Query, key, value and output once; backward these and their gradients."""
        heads, kv_heads, head_dim = self.shape
        elements = 2 * (self.rows * heads + self.length * kv_heads) * head_dim
        return elements * runner.itemsize() * (3 if self.backward else 1) / 1e9


@dataclass(frozen=True)
class Config:
    cases: tuple[Case, ...]
    matmul: float  # TFLOP/s
    bandwidth: float  # GB/s, copy


@dataclass(frozen=True)
class Result:
    method: str
    length: int
    sliding_window: int | None
    shape: tuple[int, int, int]
    backward: bool
    milliseconds: float | None
    floor_ms: float
    teraflops: float | None = None  # of useful work
    error: float | None = None
    peak_gib: float | None = None  # query, key and value, and what the call allocates
    note: str = ""


def main() -> None:
    given = runner.arguments(__doc__).parse_args()
    runner.needs_gpu(given.quick)
    config = Config(cases(given.quick), runner.matmul_rate(), runner.copy_bandwidth())
    facts = {"matmul_tflops": round(config.matmul, 2), "copy_bandwidth_gb_s": round(config.bandwidth, 1)}
    methods = [name for name, method in METHODS.items() if method.on in ("", runner.device())]
    report = runner.Report(f"prefill_kernel_{runner.device()}", config, line, given.out, facts)
    jobs = [
        Job(config, method, shape, backward)
        for method in methods
        for shape in dict.fromkeys(case.shape for case in config.cases)
        for backward in (False, True)
        if any((case.shape, case.backward) == (shape, backward) for case in config.cases)
    ]
    runner.run(jobs, report, processes=14)
    order = list(METHODS)
    report.results.sort(key=lambda r: (r.shape, r.backward, r.sliding_window or 0, r.length, order.index(r.method)))
    report.close(table(report.results), plot)


def cases(quick: bool) -> tuple[Case, ...]:
    if quick:
        return tuple(Case(length, 256, 16, (4, 2, 64), b) for length in (1024, 4096) for b in (False, True))
    long = [Case(length) for length in LENGTHS]
    windows = [Case(length, w) for w in (512, 4096) for length in LENGTHS[1:3]]
    shapes = [Case(length, shape=shape) for shape in SHAPES[1:] for length in LENGTHS[1:3]]
    backward = [Case(length, backward=True) for length in LENGTHS[:3]]
    return (*long, *windows, *shapes, *backward)


# --- what is measured -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One method, for all cases of a shape."""

    config: Config
    method: str
    shape: tuple[int, int, int]
    backward: bool

    @property
    def gib(self) -> float:
        return 8

    @property
    def cases(self) -> list[Case]:
        own = [c for c in self.config.cases if (c.shape, c.backward) == (self.shape, self.backward)]
        return sorted(own, key=lambda case: (case.sliding_window or 0, case.length))

    def prepare(self) -> Callable[[], Iterator[Result]]:
        ready: dict[Case, Callable[[], Tensor]] = {}
        try:
            for case in self.cases:
                # One kernel for all lengths is compiled for the first length, and again for the second.
                if METHODS[self.method].per_length and case.length <= 1 << 17:
                    ready[case] = self.call(case)
                    ready[case]()
                elif case.length == min(case.length for case in self.cases):
                    for length in (case.length, case.length + BLOCK):
                        self.call(dataclasses.replace(case, length=length))()
        except Exception as error:  # what cannot run is a result
            note = runner.noted(error)
            return functools.partial(self.failed, note)
        return functools.partial(self.measure, ready)

    def measure(self, ready: dict[Case, Callable[[], Tensor]]) -> Iterator[Result]:
        method, cuda = METHODS[self.method], runner.device() == "cuda"
        last, took = None, 0.0
        for case in self.cases:
            if last and took * (case.length / last.length) ** (2 if method.full else 1) > 3000:
                yield self.result(case, note="not run: seconds")
                continue
            try:
                call = ready.get(case) or self.call(case)
                error = None if case.backward else largest_error(call(), *inputs(case), case, method)
                size = sum(x.nbytes for x in inputs(case))  # made now, not after the memory is counted
                if cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                    held = torch.cuda.memory_allocated() - size
                took = runner.milliseconds(call, repeats=15, seconds=0.5)
                peak = (torch.cuda.max_memory_allocated() - held) / runner.GIB if cuda else None
            except torch.OutOfMemoryError:
                yield self.result(case, note="out of memory")
                continue
            last = case
            yield self.result(case, took, error, peak)

    def call(self, case: Case) -> Callable[[], Tensor]:
        attend = METHODS[self.method].make(case, *inputs(case))
        if not case.backward:
            return torch.no_grad()(lambda: attend(*inputs(case)))

        def both() -> Tensor:
            tensors = inputs(case)
            return torch.autograd.grad(attend(*tensors), tensors, tensors[0].detach())[0]

        return both

    def result(
        self,
        case: Case,
        ms: float | None = None,
        error: float | None = None,
        peak: float | None = None,
        note: str = "",
    ) -> Result:
        method = METHODS[self.method]
        near = None if method.full else case.sliding_window
        done = dataclasses.replace(case, sliding_window=near, sink_tokens=case.sink_tokens if method.sinks else 0)
        floor = max(done.tera / self.config.matmul, done.gigabytes / self.config.bandwidth) * 1e3
        rate = None if ms is None else done.tera / ms * 1e3
        fields = (self.method, case.length, case.sliding_window, case.shape, case.backward)
        return Result(*fields, ms, floor, rate, error, peak, note)

    def failed(self, note: str) -> Iterator[Result]:
        for case in self.cases:
            yield self.result(case, note=note)


@functools.lru_cache(1)
def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as a transformers model makes them: `[batch, len, heads, head_dim]` in memory."""
    generator = torch.Generator(runner.device()).manual_seed(0)
    heads, kv_heads, head_dim = case.shape
    dtype = torch.bfloat16 if runner.device() == "cuda" else torch.float32

    def random(length: int, number: int) -> Tensor:
        shape = (1, length, number, head_dim)
        x = torch.randn(shape, device=runner.device(), dtype=dtype, generator=generator).transpose(1, 2)
        return x.detach().requires_grad_(case.backward)

    return random(case.rows, heads), random(case.length, kv_heads), random(case.length, kv_heads)


def mask_of(case: Case) -> swaa_flex.Mask:
    if case.sliding_window is None:
        return causal()
    return causal() & (window(case.sliding_window) | sinks(case.sink_tokens))


@torch.no_grad()
def largest_error(out: Tensor, query: Tensor, key: Tensor, value: Tensor, case: Case, method: Method) -> float:
    """To float64 attention under the method's mask, in 24 rows of two heads."""
    (heads, kv_heads, head_dim), count = case.shape, case.rows
    rows = torch.cat([torch.arange(8), torch.randint(0, count, (8,)), torch.arange(count - 8, count)]).to(out.device)
    keys = torch.arange(case.length, device=out.device)
    distance = rows[:, None] + (case.length - count) - keys
    visible = distance >= 0
    if not method.full and case.sliding_window is not None:
        visible &= (distance < case.sliding_window) | ((keys < case.sink_tokens) & method.sinks)
    worst = 0.0
    for head in (0, heads - 1):
        kv_head = head * kv_heads // heads
        scores = query[0, head, rows].double() @ key[0, kv_head].double().T / head_dim**0.5
        expected = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value[0, kv_head].double()
        worst = max(worst, (out[0, head, rows].double() - expected).abs().max().item())
    return worst


# --- the methods ----------------------------------------------------------------------------------------------

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    make: Callable[..., Attend]
    full: bool = False  # full causal attention
    sinks: bool = True
    per_length: bool = False  # compiled for each length apart
    on: str = ""  # the kind of device it runs on, if not on any


def ours(backend: str, mask_included: bool = False) -> Callable[..., Attend]:
    def make(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Attend:
        mask = mask_of(case)
        if mask_included:
            return lambda q, k, v: swaa_flex.attention(q, k, v, mask, backend=backend)
        ready = swaa_flex.plan(
            mask,
            case.length,
            case.length,
            batch=1,
            heads=case.shape[0],
            device=query.device,
            dtype=query.dtype,
            backend=backend,
            needs_grad=case.backward,
            head_dim=case.shape[2],
        )
        return lambda q, k, v: swaa_flex.attention(q, k, v, ready)

    return make


def stock_flex(mask_included: bool) -> Callable[..., Attend]:
    def make(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Attend:
        near, first = case.sliding_window, case.sink_tokens

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return (q >= kv) & ((q - kv < near) | (kv < first))

        make_mask = torch.compile(runner.own(create_block_mask), dynamic=False)
        attend = torch.compile(runner.own(flex_attention), dynamic=False)

        def build() -> Any:
            return make_mask(mask_mod, None, None, case.length, case.length, device=query.device)

        ready = None if mask_included else build()
        return lambda q, k, v: attend(q, k, v, block_mask=ready or build(), enable_gqa=True)

    return make


def sdpa(backend: SDPBackend) -> Callable[..., Attend]:
    def make(case: Case, *tensors: Tensor) -> Attend:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

        return attend

    return make


def fa4(windowed: bool) -> Callable[..., Attend]:
    def make(case: Case, *tensors: Tensor) -> Attend:
        from flash_attn.cute.interface import flash_attn_func

        near = {"window_size": (case.sliding_window - 1, 0)} if windowed and case.sliding_window else {}

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out = flash_attn_func(*(x.transpose(1, 2) for x in (query, key, value)), causal=True, **near)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return attend

    return make


def varlen(case: Case, *tensors: Tensor) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    # It has no grouped queries in torch 2.11.
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    ends = torch.tensor([0, case.length], dtype=torch.int32, device=runner.device())

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        group = query.shape[1] // key.shape[1]
        if not grouped:
            key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        turned = (x[0].transpose(0, 1) for x in (query, key, value))
        size = (case.sliding_window - 1, 0)
        out = varlen_attn(*turned, ends, ends, case.length, case.length, window_size=size, **grouped)
        return out.transpose(0, 1)[None]

    return attend


INCLUDED = ", mask included"
METHODS = {
    "swaa_flex, flash": Method(ours("flash"), on="cuda"),
    "swaa_flex, flash, mask included": Method(ours("flash", mask_included=True), on="cuda"),
    "swaa_flex, triton": Method(ours("triton"), on="cuda"),
    "swaa_flex, triton, mask included": Method(ours("triton", mask_included=True), on="cuda"),
    "swaa_flex, chunked": Method(ours("chunked"), on="cpu"),
    "stock flex": Method(stock_flex(mask_included=False), per_length=True),
    "stock flex, mask included": Method(stock_flex(mask_included=True), per_length=True),
    "FlashAttention-4 window, no sinks": Method(fa4(windowed=True), sinks=False, on="cuda"),
    "varlen_attn window, no sinks": Method(varlen, sinks=False, on="cuda"),
    "FlashAttention-4 full": Method(fa4(windowed=False), full=True, sinks=False, on="cuda"),
    "sdpa cuDNN full": Method(sdpa(SDPBackend.CUDNN_ATTENTION), full=True, sinks=False, on="cuda"),
    "sdpa flash full": Method(sdpa(SDPBackend.FLASH_ATTENTION), full=True, sinks=False),
}


# --- what is printed ------------------------------------------------------------------------------------------


def line(r: Result) -> str:
    shape = f"{r.shape[0]}/{r.shape[1]}x{r.shape[2]}"
    name = f"{r.method:<34} {shape:<9} W {r.sliding_window} {r.length:>8}{' fwd+bwd' if r.backward else ''}"
    if r.milliseconds is None:
        return f"{name} {r.note}"
    error = "" if r.error is None else f"  error {r.error:.4f}"
    ratio = r.milliseconds / r.floor_ms
    return f"{name} {r.milliseconds:10.3f} ms {r.teraflops:6.4g} TFLOP/s {ratio:6.2f} x floor{error}"


def table(results: list[Result]) -> Table:
    view = Table("heads", "window", "tokens", "method", "ms", "useful TFLOP/s", "x floor", "peak GiB")
    for r in results:
        case = (f"{r.shape[0]}/{r.shape[1]} x {r.shape[2]}", str(r.sliding_window), f"{r.length:,}")
        name = r.method + (", backward too" if r.backward else "")
        if r.milliseconds is None or r.teraflops is None:
            view.add_row(*case, name, r.note[:30])
            continue
        peak = "" if r.peak_gib is None else f"{r.peak_gib:.1f}"
        ratio = f"{r.milliseconds / r.floor_ms:.2f}"
        view.add_row(*case, name, f"{r.milliseconds:.3f}", f"{r.teraflops:.1f}", ratio, peak)
    return view


def plot(data: dict[str, Any], path: Path) -> None:
    plt = runner.pyplot()
    results = [Result(**r) for r in data["results"]]
    shape, near = results[0].shape if len({tuple(r.shape) for r in results}) == 1 else list(SHAPES[0]), None
    chosen = [r for r in results if list(r.shape) == list(shape) and not r.backward and r.milliseconds is not None]
    near = max({r.sliding_window for r in chosen}, key=lambda w: sum(r.sliding_window == w for r in chosen))
    chosen = [r for r in chosen if r.sliding_window == near]
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    methods = list(dict.fromkeys(r.method for r in chosen))
    alone = [method for method in methods if not method.endswith(INCLUDED)]
    for method in methods:
        points = [r for r in chosen if r.method == method]
        included = method.endswith(INCLUDED)
        style = {
            "color": f"C{alone.index(method.removesuffix(INCLUDED))}",
            "linestyle": ":" if included else "-" if method.startswith("swaa") else "--",
            "marker": "x" if included else "o",
            "markersize": 4,
        }
        axes[0].plot([r.length for r in points], [r.milliseconds for r in points], label=method, **style)
        axes[1].plot([r.length for r in points], [r.teraflops for r in points], **style)
    axes[0].set(yscale="log", ylabel="milliseconds")
    axes[1].axhline(data["matmul_tflops"], color="grey", linestyle=":", label="matmul rate")
    axes[1].set(ylabel="useful TFLOP/s", ylim=(0, None))
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens")
        axis.grid(alpha=0.3, which="both")
    figure.legend(fontsize=8, loc="outside right")
    heads, kv_heads, head_dim = shape
    figure.suptitle(f"{runner.card(data)}: one layer, {heads}/{kv_heads} heads of {head_dim}, window {near} and sinks")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
