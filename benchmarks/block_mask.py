"""Building a block mask: `build_block_mask` against FlexAttention's `create_block_mask`, eager and compiled.

    python benchmarks/block_mask.py [--quick] [--out docs/benchmarks]

Prints the floor first: the bytes of the lists, written once at the measured copy bandwidth. Writes JSON and a plot.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import swaa_flex
from swaa_flex.masks import causal, sinks, window

METHODS = ("build_block_mask", "create_block_mask", "create_block_mask compiled")


@dataclass(frozen=True)
class Config:
    lengths: tuple[int, ...]
    sliding_window: int = 2048
    sink_tokens: int = 128
    device: str = "cpu"
    repeats: int = 20
    memory_limit: int = 8 << 30  # bytes; a dense mask larger than this is not tried


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small lengths, few repeats")
    parser.add_argument("--out", type=Path, help="folder for block_mask_<device>.json and .png")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    limit = int(torch.cuda.mem_get_info()[0] * 0.8) if device == "cuda" else 4 << 30
    last = 13 if arguments.quick else 20
    config = Config(tuple(1 << n for n in range(10, last + 1)), device=device, memory_limit=limit)
    bandwidth = copy_bandwidth(device)
    console = Console(width=120)
    console.print(f"{describe(device)}; copy bandwidth {bandwidth / 1e9:.0f} GB/s; floor: list bytes / bandwidth")
    results = []
    for length in config.lengths:
        for method in METHODS:
            results.append(measure(method, length, config, bandwidth))
            console.print(line(results[-1]))
    console.print(table(results, config))
    report = {
        "benchmark": "block_mask",
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/block_mask.py" + " --quick" * arguments.quick,
        "machine": describe(device),
        "versions": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "swaa_flex": swaa_flex.__version__,
        },
        "copy_bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "config": asdict(config),
        "results": [asdict(result) for result in results],
    }
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"block_mask_{device}.json").write_text(json.dumps(report, indent=1) + "\n")
        plot(results, report, arguments.out / f"block_mask_{device}.png")
    print(json.dumps({key: report[key] for key in ("benchmark", "machine", "versions")} | summary(results)))


def measure(method: str, length: int, config: Config, bandwidth: float) -> Result:
    mask = causal() & (window(config.sliding_window) | sinks(config.sink_tokens))
    if method == "build_block_mask":

        def build() -> BlockMask:
            return swaa_flex.build_block_mask(mask, length, length, device=config.device)

    else:
        # Eager it materialises a bool and an int8 per pair, and sums them in int64 over blocks.
        needed = length**2 * 10
        if method == "create_block_mask" and needed > config.memory_limit:
            return Result(method, length, None, None, None, None, note=f"needs about {needed >> 30} GiB")
        function = create_block_mask if method == "create_block_mask" else compiled_create_block_mask()
        if method == "create_block_mask compiled" and config.device == "cpu" and length > 1 << 17:
            return Result(method, length, None, None, None, None, note="not run: minutes")

        def build() -> BlockMask:
            return function(mask, None, None, length, length, device=config.device)

    try:
        start = time.perf_counter()
        built = build()
        synchronise(config.device)
        first = time.perf_counter() - start
        peak = None
        if config.device == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            build()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        repeats = max(3, min(config.repeats, int(2 / max(first, 1e-3))))
        median = statistics.median(timed(build, config.device) for _ in range(repeats)) * 1e3
    except torch.OutOfMemoryError as error:
        return Result(method, length, None, None, None, None, note=str(error).split(".")[0])
    lists = sum(t.numel() * t.element_size() for t in index_tensors(built))
    return Result(method, length, median, peak, lists / 2**20, first, lists / bandwidth * 1e3)


_compiled = []


def compiled_create_block_mask() -> Callable[..., BlockMask]:
    if not _compiled:
        _compiled.append(torch.compile(create_block_mask))
    return _compiled[0]


def index_tensors(built: BlockMask) -> list[torch.Tensor]:
    names = ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices")
    tensors = [getattr(built, prefix + name) for prefix in ("", "full_") for name in names]
    return [tensor for tensor in tensors if tensor is not None]


def timed(build: Callable[[], BlockMask], device: str) -> float:
    synchronise(device)
    start = time.perf_counter()
    build()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.empty((1 << 31 if device == "cuda" else 1 << 28) // 4)
    source = source.to(device)
    target = torch.empty_like(source)
    times = []
    for _ in range(8):
        synchronise(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronise(device)
        times.append(time.perf_counter() - start)
    return 2 * source.numel() * 4 / min(times)


def describe(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"


def line(result: Result) -> str:
    if result.milliseconds is None:
        return f"{result.length:>8}  {result.method:<28} {result.note}"
    return f"{result.length:>8}  {result.method:<28} {result.milliseconds:9.3f} ms"


def table(results: list[Result], config: Config) -> Table:
    mask = f"causal & (window({config.sliding_window}) | sinks({config.sink_tokens}))"
    title = f"{mask}: ms to build · MiB of lists · peak MiB"
    view = Table(title=title, caption="floor: the lists written once at copy bandwidth; first calls are in the JSON")
    view.add_column("tokens", justify="right")
    for method in METHODS:
        view.add_column(method, justify="right")
    view.add_column("floor ms", justify="right")
    for length in config.lengths:
        row = {result.method: result for result in results if result.length == length}
        cells = [cell(row[method]) for method in METHODS]
        floor = row["build_block_mask"].floor_milliseconds
        view.add_row(f"{length}", *cells, f"{floor:.4f}" if floor is not None else "-")
    return view


def cell(result: Result) -> str:
    if result.milliseconds is None:
        return result.note
    peak = "" if result.peak_mib is None else f" · {result.peak_mib:.1f}"
    return f"{result.milliseconds:.2f} · {result.lists_mib:.2f}{peak}"


def summary(results: list[Result]) -> dict[str, dict[int, float | None]]:
    return {m: {r.length: r.milliseconds for r in results if r.method == m} for m in METHODS}


def plot(results: list[Result], report: dict[str, object], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, attribute, label in (
        (axes[0], "milliseconds", "ms per build"),
        (axes[1], "lists_mib", "MiB of index lists"),
    ):
        for method in METHODS:
            points = [(r.length, getattr(r, attribute)) for r in results if r.method == method and r.milliseconds]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=method)
        if attribute == "milliseconds":
            points = [(r.length, r.floor_milliseconds) for r in results if r.method == METHODS[0]]
            axis.plot(*zip(*points, strict=True), linestyle=":", color="grey", label="floor")
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"{report['machine']}, torch {torch.__version__}")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
