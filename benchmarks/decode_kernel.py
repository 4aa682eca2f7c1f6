"""One token's attention over a long cache: FlexAttention's decode kernel, its defaults and our options, against SDPA.

    python benchmarks/decode_kernel.py [--out docs/benchmarks]     (needs a CUDA device, but for --quick)

Prints microseconds and the share of the measured read bandwidth. This is what the options in kernels.py come from.
Short caches take turns, as in a model with many layers: one alone would stay in the cache of the processor.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import runner
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import swaa_flex
from swaa_flex.kernels import DECODE_OPTIONS
from swaa_flex.masks import causal

IN_TURN = 1 << 29  # bytes of caches
OPTIONS: dict[str, dict[str, Any]] = {
    "flex defaults": {},
    "flex, ours": DECODE_OPTIONS,
    "flex, BLOCK_N 128": DECODE_OPTIONS | {"BLOCK_N": 128},
}


@dataclass(frozen=True)
class Config:
    heads: int
    kv_heads: int
    head_dim: int
    cases: tuple[tuple[int, int], ...]  # batch, keys
    bandwidth: float  # GB/s


@dataclass(frozen=True)
class Result:
    method: str
    batch: int
    length: int
    microseconds: float | None
    bandwidth_share: float | None
    note: str = ""


def main() -> None:
    given = runner.arguments(__doc__).parse_args()
    runner.needs_gpu(given.quick)
    cases = ((1, 2304),) if given.quick else ((1, 131072), (8, 32768), (1, 8192), (1, 2304))
    config = Config(32, 8, 128, cases, runner.read_bandwidth())
    facts = {"read_bandwidth_gb_s": round(config.bandwidth, 1)}
    report = runner.Report(f"decode_kernel_{runner.device()}", config, line, given.out, facts)
    runner.run([Job(config, batch, length) for batch, length in cases], report)
    report.close(table(report.results))


@dataclass(frozen=True)
class Job:
    """All methods for one cache."""

    config: Config
    batch: int
    length: int

    @property
    def gib(self) -> float:
        return 3 + 8 * self.config.kv_heads * self.config.head_dim * self.batch * self.length / runner.GIB

    @torch.no_grad()
    def prepare(self) -> Callable[[], Iterator[Result]]:
        device, config = runner.device(), self.config
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        query = torch.randn(self.batch, config.heads, 1, config.head_dim, device=device, dtype=dtype)
        shape = (self.batch, config.kv_heads, self.length, config.head_dim)
        size = 2 * math.prod(shape) * dtype.itemsize
        count = max(2, -(-IN_TURN // size)) if device == "cuda" else 1
        caches = [torch.randn(2, *shape, device=device, dtype=dtype).unbind(0) for _ in range(count)]
        ready = calls(query, *caches[0])
        for call in ready.values():
            call(*caches[0])
        return functools.partial(self.measure, ready, caches, size)

    @torch.no_grad()
    def measure(self, ready: dict[str, Call], caches: list[tuple[Tensor, Tensor]], size: int) -> Iterator[Result]:
        floor = size / self.config.bandwidth / 1e3
        for method, call in ready.items():
            micro = timed(call, caches)
            yield Result(method, self.batch, self.length, micro, floor / micro)

    def failed(self, note: str) -> Iterator[Result]:
        yield Result("all", self.batch, self.length, None, None, note)


Call = Callable[[Tensor, Tensor], Tensor]
"""Attention of the query to keys and values."""


def calls(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Call]:
    length, device = key.shape[2], query.device
    position = torch.tensor(length - 1, device=device)
    backend = "triton" if query.is_cuda else "cpp"
    ready = swaa_flex.plan(
        causal(), 1, length, batch=len(key), heads=query.shape[1], device=device, backend=backend, q_offset=position
    )
    block_mask = ready.segments[0].block_mask

    def flex(chosen: dict[str, Any]) -> Call:
        compiled = torch.compile(runner.own(flex_attention), fullgraph=True, dynamic=False)
        options = {"BACKEND": "TRITON_DECODE"} | chosen if query.is_cuda else None
        fixed = {"block_mask": block_mask, "enable_gqa": True, "kernel_options": options}
        return lambda key, value: compiled(query, key, value, **fixed)

    def sdpa(backend: SDPBackend) -> Call:
        def call(key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

        return call

    stock = {"sdpa flash": SDPBackend.FLASH_ATTENTION}
    if query.is_cuda:
        stock["sdpa cuDNN"] = SDPBackend.CUDNN_ATTENTION
    return {name: sdpa(backend) for name, backend in stock.items()} | {n: flex(o) for n, o in OPTIONS.items()}


def timed(call: Call, caches: list[tuple[Tensor, Tensor]]) -> float:
    """Microseconds of a call, the median of replays of a CUDA graph with one for each of the caches."""
    if runner.device() == "cpu":
        return runner.milliseconds(lambda: call(*caches[0])) * 1e3
    for _ in range(3):
        call(*caches[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for cache in caches:
            call(*cache)
    times = []
    for _ in range(30):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / len(caches) * 1e3)
    return statistics.median(times)


def line(result: Result) -> str:
    name = f"{result.batch} x {result.length:>6}  {result.method:<18}"
    if result.microseconds is None:
        return f"{name} {result.note}"
    return f"{name} {result.microseconds:8.1f} us  {result.bandwidth_share:5.2f} of the bandwidth"


def table(results: list[Result]) -> Table:
    view = Table("batch", "keys", "method", "us", "share of the bandwidth", title="one token")
    for r in results:
        cells = ("-", r.note) if r.microseconds is None else (f"{r.microseconds:.1f}", f"{r.bandwidth_share:.2f}")
        view.add_row(str(r.batch), str(r.length), r.method, *cells)
    return view


if __name__ == "__main__":
    main()
