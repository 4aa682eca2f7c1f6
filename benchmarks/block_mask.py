"""Building a block mask: `build_block_mask` against FlexAttention's `create_block_mask`, eager and compiled.

    python benchmarks/block_mask.py [--quick] [--out docs/benchmarks]

Prints the floor first: the bytes of the lists, written once at the measured copy bandwidth. Writes JSON and a plot.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runner
import torch
from rich.table import Table
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import swaa_flex
from swaa_flex.masks import causal, sinks, window

METHODS = ("build_block_mask", "create_block_mask", "create_block_mask compiled")


@dataclass(frozen=True)
class Config:
    lengths: tuple[int, ...]
    sliding_window: int = 2048
    sink_tokens: int = 128
    bandwidth: float = 0.0  # GB/s, copy
    repeats: int = 20
    memory_limit: int = 4 << 30  # bytes; a dense mask larger than this is not tried


@dataclass(frozen=True)
class Result:
    method: str
    length: int
    milliseconds: float | None  # median; None: not run
    peak_mib: float | None  # allocated while building (CUDA only)
    lists_mib: float | None  # what stays: the index lists
    first_call_s: float | None  # compilation included
    floor_milliseconds: float | None = None
    note: str = ""


def main() -> None:
    given = runner.arguments(__doc__).parse_args()
    last = 13 if given.quick else 20
    bandwidth = runner.copy_bandwidth()
    config = Config(tuple(1 << n for n in range(10, last + 1)), bandwidth=bandwidth)
    if runner.device() == "cuda":
        config = dataclasses.replace(config, memory_limit=int(runner.capacity_gib() * 0.9) << 30)
    facts = {"copy_bandwidth_gb_s": round(bandwidth, 1)}
    report = runner.Report(f"block_mask_{runner.device()}", config, line, given.out, facts)
    runner.run([Job(config)], report)
    report.close(table(report.results), plot)


@dataclass(frozen=True)
class Job:
    config: Config

    @property
    def gib(self) -> float:
        return 1

    def prepare(self) -> Callable[[], Iterator[Result]]:
        return self.measure

    def measure(self) -> Iterator[Result]:
        for length in self.config.lengths:
            for method in METHODS:
                yield measure(method, length, self.config)

    def failed(self, note: str) -> Iterator[Result]:
        yield Result("all", 0, None, None, None, None, note=note)


def measure(method: str, length: int, config: Config) -> Result:
    device = runner.device()
    mask = causal() & (window(config.sliding_window) | sinks(config.sink_tokens))
    if method == "build_block_mask":

        def build() -> BlockMask:
            return swaa_flex.build_block_mask(mask, length, length, device=device)

    else:
        # Eager it materialises a bool and an int8 per pair, and sums them in int64 over blocks.
        needed = length**2 * 10
        if method == "create_block_mask" and needed > config.memory_limit:
            return Result(method, length, None, None, None, None, note=f"needs about {needed >> 30} GiB")
        function = create_block_mask
        if method == "create_block_mask compiled":  # for one length, which is its fastest
            function = torch.compile(runner.own(create_block_mask), dynamic=False)
        near, sink_tokens = config.sliding_window, config.sink_tokens

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return (q >= kv) & ((q - kv < near) | (kv < sink_tokens))

        if method == "create_block_mask compiled" and device == "cpu" and length > 1 << 17:
            return Result(method, length, None, None, None, None, note="not run: minutes")

        def build() -> BlockMask:
            return function(mask_mod, None, None, length, length, device=device)

    try:
        start = time.perf_counter()
        built = build()
        runner.synchronise()
        first = time.perf_counter() - start
        peak = None
        if device == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            build()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        repeats = max(3, min(config.repeats, int(2 / max(first, 1e-3))))
        median = statistics.median(runner.seconds_of(build) for _ in range(repeats)) * 1e3
    except torch.OutOfMemoryError as error:
        return Result(method, length, None, None, None, None, note=str(error).split(".")[0])
    lists = sum(t.numel() * t.element_size() for t in index_tensors(built))
    return Result(method, length, median, peak, lists / 2**20, first, lists / config.bandwidth / 1e6)


def index_tensors(built: BlockMask) -> list[Tensor]:
    names = ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices")
    tensors = [getattr(built, prefix + name) for prefix in ("", "full_") for name in names]
    return [tensor for tensor in tensors if tensor is not None]


def line(result: Result) -> str:
    if result.milliseconds is None:
        return f"{result.length:>8}  {result.method:<28} {result.note}"
    return f"{result.length:>8}  {result.method:<28} {result.milliseconds:9.3f} ms"


def table(results: list[Result]) -> Table:
    view = Table(
        title="ms to build · MiB of lists · peak MiB", caption="floor: the lists written once at copy bandwidth"
    )
    view.add_column("tokens", justify="right")
    for method in METHODS:
        view.add_column(method, justify="right")
    view.add_column("floor ms", justify="right")
    for length in dict.fromkeys(r.length for r in results):
        row = {result.method: result for result in results if result.length == length}
        cells = [cell(row[method]) for method in METHODS]
        floor = row["build_block_mask"].floor_milliseconds
        view.add_row(f"{length:,}", *cells, f"{floor:.4f}" if floor is not None else "-")
    return view


def cell(result: Result) -> str:
    if result.milliseconds is None:
        return result.note
    peak = "" if result.peak_mib is None else f" · {result.peak_mib:.1f}"
    return f"{result.milliseconds:.2f} · {result.lists_mib:.2f}{peak}"


def plot(data: dict[str, Any], path: Path) -> None:
    plt = runner.pyplot()
    results = [Result(**result) for result in data["results"]]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, attribute, label in (
        (axes[0], "milliseconds", "ms per build"),
        (axes[1], "lists_mib", "MiB of index lists"),
    ):
        for method in METHODS:
            points = [(r.length, getattr(r, attribute)) for r in results if r.method == method and r.milliseconds]
            if points:
                style = {"linestyle": "--", "marker": "x"} if method == "create_block_mask" else {"marker": "o"}
                axis.plot(*zip(*points, strict=True), label=method, zorder=3 if style["marker"] == "x" else 2, **style)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"{runner.card(data)}, torch {data['versions']['torch']}")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
