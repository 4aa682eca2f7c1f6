"""Time per token while decoding: swaa_flex against what transformers offers, at a Qwen3-4B shape.

    python benchmarks/decode.py [--quick] [--batch 1] [--out docs/benchmarks]

Weights and cache contents are random: speed does not depend on them. On a CPU, where it takes minutes, swaa_flex does
not compile, so that `--quick` there compares nothing. The floor is the bytes of the weights and of the
keys and values that the recipe lets a token see, read once at the measured bandwidth. Writes JSON and a plot.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runner
import torch
from rich.table import Table
from runner import GIB
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

import swaa_flex
from swaa_flex import SWAAConfig

QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 1 << 20,
    "tie_word_embeddings": True,
}
TINY = (
    QWEN3_4B
    | {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
)
RECIPES = {
    "full": SWAAConfig(sliding_window=None),
    "1/2 full": SWAAConfig(2048, 128, "1::2", False, 0),
    "1/4 full": SWAAConfig(2048, 128, "1::4", False, 0),
    "all SWA": SWAAConfig(2048, 128, (), False, 0),
}
# Throughput relative to full attention, one H100, vLLM, 128 k in and 512 out (arXiv 2512.10411, table of efficiency).
PAPER = {"all SWA": 8.2, "1/2 full": 1.79, "FA decode": 1.71}
STOCK = ("sdpa eager", "sdpa compiled", "flex compiled")


@dataclass(frozen=True)
class Config:
    batch: int
    contexts: tuple[int, ...]
    steps: int
    shape: dict[str, Any]
    options: dict[str, Any]
    bandwidth: float  # GB/s


@dataclass(frozen=True)
class Result:
    method: str
    recipe: str
    batch: int
    context: int
    ms_per_token: float | None
    floor_ms: float
    cache_gib: float | None = None
    warmup_s: float | None = None
    note: str = ""


def main() -> None:
    parser = runner.arguments(__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tune", action="store_true", help="let inductor search for faster kernels: minutes")
    parser.add_argument("--methods", nargs="+", choices=("swaa_flex", *STOCK), default=("swaa_flex", *STOCK))
    given = parser.parse_args()
    runner.needs_gpu(given.quick)
    device, bandwidth = runner.device(), runner.read_bandwidth()
    config = Config(
        batch=given.batch,
        contexts=(512, 2048) if given.quick else (8192, 32768, 131072),
        steps=4 if given.quick else 32,
        shape=TINY if given.quick else QWEN3_4B,
        options={"coordinate_descent_tuning": True} if given.tune else {},
        bandwidth=bandwidth,
    )
    facts = {"read_bandwidth_gb_s": round(bandwidth, 1)}
    setup = {"recipes": {name: recipe.to_dict() for name, recipe in RECIPES.items()}}
    report = runner.Report(f"decode_{device}_batch{given.batch}", config, line, given.out, facts, setup)
    jobs = [Ours(config, recipe) for recipe in RECIPES if "swaa_flex" in given.methods]
    for method in (method for method in STOCK if method in given.methods):
        jobs += [Stock(config, method, context) for context in config.contexts]
    runner.run(sorted(jobs, key=lambda job: -job.gib), report, headroom_gib=0 if given.quick else 15)
    report.results.sort(key=rank)
    report.close(table(report.results), plot)


# --- what is measured -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ours:
    """One compiled model, for the longest context that fits; shorter ones run in the same cache."""

    config: Config
    recipe: str

    @functools.cached_property
    def contexts(self) -> tuple[int, ...]:
        return tuple(c for c in self.config.contexts if fits(self.config, self.recipe, c))

    @functools.cached_property
    def gib(self) -> float:
        return held_gib(self.config, self.recipe, self.contexts[-1])

    @torch.no_grad()
    def prepare(self) -> Callable[[], Iterator[Result]]:
        config = self.config
        model = swaa_flex.adapt(make_model(config), RECIPES[self.recipe])
        start = time.perf_counter()
        compiled = swaa_flex.compile(
            model,
            max_length=self.contexts[-1] + 128,
            batch_size=config.batch,
            prefill_chunk=128,
            options=config.options,
        )
        compiled.warmup(quiet=True)
        runner.synchronise()
        return functools.partial(self.measure, compiled, time.perf_counter() - start)

    @torch.no_grad()
    def measure(self, compiled: swaa_flex.hf.CompiledModel, warmup: float) -> Iterator[Result]:
        config = self.config
        memory = compiled.cache.memory()["total"] / GIB
        for layer in compiled.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        tokens = torch.zeros(config.batch, dtype=torch.long, device=runner.device())
        for context in config.contexts:
            floor = floor_ms(config, self.recipe, context)
            if context not in self.contexts:
                yield Result("swaa_flex", self.recipe, config.batch, context, None, floor, note="does not fit")
                continue
            compiled.prefill([[7]] * config.batch)  # a request, which then claims to be longer
            for layer in compiled.cache.layers:
                layer.cumulative_length.fill_(context)
            ms = timed(lambda: compiled.decode_step(tokens), config)
            yield Result("swaa_flex", self.recipe, config.batch, context, ms, floor, memory, warmup)

    def failed(self, note: str) -> Iterator[Result]:
        for context in self.config.contexts:
            floor = floor_ms(self.config, self.recipe, context)
            yield Result("swaa_flex", self.recipe, self.config.batch, context, None, floor, note=note)


@dataclass(frozen=True)
class Stock:
    """Full attention as transformers runs it. Compiled, it needs a static cache that is as long as the context."""

    config: Config
    method: str
    context: int

    @property
    def gib(self) -> float:
        return held_gib(self.config, "full", self.context) if fits(self.config, "full", self.context) else 0

    @torch.no_grad()
    def prepare(self) -> Callable[[], Iterator[Result]]:
        if not fits(self.config, "full", self.context):
            return lambda: self.failed("does not fit")
        implementation, how = self.method.split()
        model = make_model(self.config)
        model.set_attn_implementation("sdpa" if implementation == "sdpa" else "flex_attention")
        start = time.perf_counter()
        step = (eager_step if how == "eager" else compiled_step)(model, self.config, self.context)
        step()
        runner.synchronise()
        return functools.partial(self.measure, step, time.perf_counter() - start)

    @torch.no_grad()
    def measure(self, step: Callable[[], Any], warmup: float) -> Iterator[Result]:
        floor = floor_ms(self.config, "full", self.context)
        ms = timed(step, self.config)
        yield Result(self.method, "full", self.config.batch, self.context, ms, floor, None, warmup)

    def failed(self, note: str) -> Iterator[Result]:
        floor = floor_ms(self.config, "full", self.context)
        yield Result(self.method, "full", self.config.batch, self.context, None, floor, note=note)


def make_model(config: Config) -> PreTrainedModel:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if runner.device() == "cuda" else torch.float32
    with torch.device(runner.device()):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("qwen3", **config.shape), dtype=dtype, attn_implementation="sdpa"
        )
    return model.eval()


def eager_step(model: PreTrainedModel, config: Config, context: int) -> Callable[[], Any]:
    cache = DynamicCache(config=model.config)
    for index in range(model.config.num_hidden_layers):
        keys = torch.randn(kv_shape(config, context), dtype=model.dtype, device=model.device)
        cache.update(keys, keys.clone(), index)
    tokens = torch.zeros(config.batch, 1, dtype=torch.long, device=model.device)
    return lambda: model(tokens, past_key_values=cache).logits


def compiled_step(model: PreTrainedModel, config: Config, context: int) -> Callable[[], Any]:
    cache = StaticCache(config=model.config, max_cache_len=context + 128)
    shape = config.batch, config.shape["num_key_value_heads"], config.shape["head_dim"]
    cache.early_initialization(*shape, dtype=model.dtype, device=model.device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(context)
    cuda = model.device.type == "cuda"
    # The mask of transformers' flex_attention does not compile into one graph (torch 2.13).
    whole = model.config._attn_implementation == "sdpa"
    forward = torch.compile(model.forward, mode="reduce-overhead" if cuda else None, fullgraph=whole)
    tokens = torch.zeros(config.batch, 1, dtype=torch.long, device=model.device)
    position = torch.full((config.batch, 1), context, device=model.device)

    def step() -> Any:
        if cuda:
            torch.compiler.cudagraph_mark_step_begin()
        return forward(tokens, position_ids=position, past_key_values=cache).logits

    step()
    step()
    return step


def timed(step: Callable[[], Any], config: Config) -> float:
    """Milliseconds per step, the median of several runs of steps that follow each other without waiting."""
    for _ in range(3):
        step()
    per_run = max(1, config.steps // 4)
    times = []
    for _ in range(4):
        runner.synchronise()
        start = time.perf_counter()
        for _ in range(per_run):
            step()
        runner.synchronise()
        times.append((time.perf_counter() - start) / per_run * 1e3)
    return statistics.median(times)


# --- the floor ------------------------------------------------------------------------------------------------


def floor_ms(config: Config, recipe: str, context: int) -> float:
    """Weights, and keys and values that a new token sees, at the bandwidth."""
    return (weight_bytes(config) + cache_bytes(config, RECIPES[recipe], context)) / config.bandwidth / 1e6


def weight_bytes(config: Config) -> int:
    # With tied embeddings the one matrix is read whole as the output layer, and one row of it as the input.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **config.shape))
    return sum(p.numel() for p in model.parameters()) * runner.itemsize()


def cache_bytes(config: Config, swaa: SWAAConfig, context: int) -> int:
    """Of the keys and values that a new token sees."""
    tokens = 0
    for kind in swaa.resolve(config.shape["num_hidden_layers"]):
        near = context if swaa.sliding_window is None else min(context, swaa.sliding_window + swaa.sink_tokens)
        tokens += context if kind.full_attention_decode else near
    batch, heads, _, head_dim = kv_shape(config, 1)
    return 2 * batch * heads * head_dim * tokens * runner.itemsize()


def held_gib(config: Config, recipe: str, context: int) -> float:
    """Device memory of one process: weights, cache, and what CUDA and a step take."""
    return (weight_bytes(config) + cache_bytes(config, RECIPES[recipe], context)) / GIB + 3


def fits(config: Config, recipe: str, context: int) -> bool:
    return held_gib(config, recipe, context) < runner.capacity_gib()


def kv_shape(config: Config, tokens: int) -> tuple[int, int, int, int]:
    return config.batch, config.shape["num_key_value_heads"], tokens, config.shape["head_dim"]


# --- what is printed ------------------------------------------------------------------------------------------


def rank(result: Result) -> tuple[int, int, int]:
    methods, recipes = ("swaa_flex", *STOCK), tuple(RECIPES)
    return methods.index(result.method), recipes.index(result.recipe), result.context


def line(result: Result) -> str:
    name = f"{result.context:>7}  {result.method:<14} {result.recipe:<9}"
    if result.ms_per_token is None:
        return f"{name} {result.note}"
    ratio = result.ms_per_token / result.floor_ms
    return f"{name} {result.ms_per_token:8.2f} ms  {ratio:5.2f} x floor  (warm-up {result.warmup_s:.0f} s)"


def table(results: list[Result]) -> Table:
    view = Table("method", "recipe", title=f"ms per token (ratio to the floor), batch {results[0].batch}")
    contexts = sorted({r.context for r in results})
    for context in contexts:
        view.add_column(f"{context:,} tokens", justify="right")
    view.add_column("cache GiB", justify="right")
    for method, recipe in dict.fromkeys((r.method, r.recipe) for r in results):
        found = {r.context: r for r in results if (r.method, r.recipe) == (method, recipe)}
        memory = next((r.cache_gib for r in found.values() if r.cache_gib), None)
        cells = (cell(found.get(context)) for context in contexts)
        view.add_row(method, recipe, *cells, "" if memory is None else f"{memory:.1f}")
    return view


def cell(result: Result | None) -> str:
    if result is None or result.ms_per_token is None:
        return "-" if result is None else result.note[:24]
    return f"{result.ms_per_token:.2f} ({result.ms_per_token / result.floor_ms:.2f})"


def plot(data: dict[str, Any], path: Path) -> None:
    plt = runner.pyplot()
    results = [Result(**result) for result in data["results"]]
    figure, axis = plt.subplots(figsize=(9, 4.6), layout="constrained")
    for method, recipe in dict.fromkeys((r.method, r.recipe) for r in results):
        points = [(r.context, r.ms_per_token) for r in results if (r.method, r.recipe) == (method, recipe)]
        points = [p for p in points if p[1] is not None]
        if points:
            ours = method == "swaa_flex"
            label = f"swaa_flex, {recipe}" if ours else f"{method} (full)"
            (drawn,) = axis.plot(*zip(*points, strict=True), marker="o", label=label, linestyle="-" if ours else "--")
            if ours:
                floors = [(r.context, r.floor_ms) for r in results if (r.method, r.recipe) == (method, recipe)]
                axis.plot(*zip(*floors, strict=True), linestyle=":", color=drawn.get_color(), alpha=0.7)
    axis.set(xlabel="tokens of context", ylabel="ms per token", yscale="log")
    axis.set_xscale("log", base=2)
    axis.yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:.3g}")
    axis.yaxis.set_minor_formatter(plt.NullFormatter())
    axis.grid(alpha=0.3, which="both")
    figure.legend(fontsize=8, loc="outside right")
    axis.set_title(f"{runner.card(data)}, batch {data['config']['batch']}; dotted: bandwidth floor", fontsize=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
