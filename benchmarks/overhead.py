"""What masks cost beside the attention itself: prompts of 50 random lengths, against transformers' flex_attention.

    python benchmarks/overhead.py [--quick] [--out docs/benchmarks]

Two layers of a Qwen3-4B shape, eager, so that what is compiled are masks and attention only. Counts graphs that
torch.compile makes, and times each prompt; "plan" is the time to build the masks of one prompt, with both kinds of
layers, and "call" what the host needs for one attention call whose plan is ready. Seconds are not to be compared for
long prompts, where stock attends to everything and one of our layers does not.
"""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import decode
import runner
import torch
from rich.table import Table

import swaa_flex
from swaa_flex import SWAAConfig
from swaa_flex.masks import causal, rows_from, sinks, window

RECIPE = SWAAConfig(2048, 128, (1,), True, 64)


@dataclass(frozen=True)
class Config:
    lengths: tuple[int, ...]
    shape: dict[str, Any]
    longest: int


@dataclass(frozen=True)
class Result:
    method: str
    prompt: int  # which one, from 0
    length: int
    seconds: float
    graphs: int  # compiled so far
    peak_gib: float | None
    plan_ms: float | None = None
    call_ms: float | None = None
    note: str = ""


def main() -> None:
    given = runner.arguments(__doc__).parse_args()
    chosen = random.Random(0)
    longest, count = (2048, 12) if given.quick else (32768, 50)
    shape = (decode.TINY if given.quick else decode.QWEN3_4B) | {"num_hidden_layers": 2}
    config = Config(tuple(chosen.randint(64, longest) for _ in range(count)), shape, longest)
    report = runner.Report(f"overhead_{runner.device()}", config, line, given.out)
    runner.run([Job(config, "swaa_flex"), Job(config, "stock flex_attention")], report)
    report.close(table(report.results), plot)


@dataclass(frozen=True)
class Job:
    config: Config
    method: str

    @property
    def gib(self) -> float:
        return 20

    def prepare(self) -> Callable[[], Iterator[Result]]:
        model = decode.make_model(decode.Config(1, (), 0, self.config.shape, {}, 1.0))
        if self.method == "swaa_flex":
            swaa_flex.adapt(model, RECIPE)
        else:
            model.set_attn_implementation("flex_attention")
        return functools.partial(self.measure, model)

    @torch.no_grad()
    def measure(self, model: Any) -> Iterator[Result]:
        cuda = runner.device() == "cuda"
        graphs = 0
        for number, length in enumerate(self.config.lengths):
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            ids = torch.randint(10, 1000, (1, length), device=model.device)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            runner.synchronise()
            start = time.perf_counter()
            try:
                model(ids, use_cache=False, logits_to_keep=1)
                note = ""
            except Exception as error:  # what stock cannot do is a result too
                note = runner.noted(error)
            runner.synchronise()
            seconds = time.perf_counter() - start
            peak = torch.cuda.max_memory_allocated() / runner.GIB if cuda else None
            graphs += torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
            costs = self.costs(length) if self.method == "swaa_flex" else (None, None)
            yield Result(self.method, number, length, seconds, graphs, peak, *costs, note)

    def costs(self, length: int) -> tuple[float, float | None]:
        """Milliseconds to build the plans of both kinds of layers, and for the host's part of a call on a GPU."""
        heads, kv_heads, head_dim = (
            self.config.shape[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
        )
        device = torch.device(runner.device())
        visible = window(RECIPE.sliding_window) | sinks(RECIPE.sink_tokens)
        near = causal() & (visible | rows_from(max(0, length - RECIPE.dense_tail)))

        def build() -> list[swaa_flex.AttentionPlan]:
            return [
                swaa_flex.plan(
                    mask,
                    length,
                    length,
                    batch=1,
                    heads=heads,
                    device=device,
                    dtype=torch.bfloat16,
                    head_dim=head_dim,
                )
                for mask in (near, causal())
            ]

        plan_ms = statistics.median(runner.seconds_of(build) for _ in range(5)) * 1e3
        if device.type == "cpu":
            return plan_ms, None
        ready = build()[0]
        query, key, value = (
            torch.randn(1, n, length, head_dim, device=device, dtype=torch.bfloat16)
            for n in (heads, kv_heads, kv_heads)
        )
        runner.synchronise()
        start = time.perf_counter()
        swaa_flex.attention(query, key, value, ready)
        call_ms = (time.perf_counter() - start) * 1e3  # it returns before the work is done
        runner.synchronise()
        return plan_ms, call_ms

    def failed(self, note: str) -> Iterator[Result]:
        yield Result(self.method, 0, 0, 0.0, 0, None, note=note)


def line(r: Result) -> str:
    peak = "" if r.peak_gib is None else f" peak {r.peak_gib:.1f} GiB"
    costs = "" if r.plan_ms is None else f" plan {r.plan_ms:.2f} ms"
    costs += "" if r.call_ms is None else f", call {r.call_ms:.2f} ms"
    return f"{r.method:<22} {r.prompt:>3} {r.length:>7} {r.seconds:8.3f} s, graphs {r.graphs}{peak}{costs} {r.note}"


def table(results: list[Result]) -> Table:
    view = Table("method", "prompts", "graphs", "all s", "without the first 10, s", "plan ms", "call ms", "failed")
    for method in dict.fromkeys(r.method for r in results):
        own = [r for r in results if r.method == method]
        late = sum(r.seconds for r in own if r.prompt >= 10)
        plans = [r.plan_ms for r in own if r.plan_ms is not None]
        calls = [r.call_ms for r in own if r.call_ms is not None]
        medians = (f"{statistics.median(x):.2f}" if x else "" for x in (plans, calls))
        total, failed = sum(r.seconds for r in own), sum(bool(r.note) for r in own)
        graphs = max(r.graphs for r in own)
        view.add_row(method, str(len(own)), str(graphs), f"{total:.1f}", f"{late:.2f}", *medians, str(failed))
    return view


def plot(data: dict[str, Any], path: Path) -> None:
    plt = runner.pyplot()
    results = [Result(**r) for r in data["results"]]
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for method in dict.fromkeys(r.method for r in results):
        own = [r for r in results if r.method == method]
        axis.plot([r.prompt + 1 for r in own], [r.seconds for r in own], marker="o", markersize=3, label=method)
    axis.set(xlabel="prompt, each of another length", ylabel="seconds", yscale="log")
    axis.set_title(f"{runner.card(data)}: two layers, eager", fontsize=10)
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
