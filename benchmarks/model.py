"""A whole model, Qwen3-4B shape: time to first token, time per token and memory, against stock transformers.

    python benchmarks/model.py [--quick] [--long] [--out docs/benchmarks]

Weights are random: speed does not depend on them. "free" is a window of one key, so nearly no attention: what remains
is about the bound that Amdahl's law sets. The floor of a first token is that of "free", and the attention of each
layer as fast as it is alone. `--long` adds half a million tokens, and a million on a smaller model.
"""

from __future__ import annotations

import dataclasses
import functools
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
from runner import GIB
from transformers import DynamicCache, PreTrainedModel, StaticCache

import swaa_flex
from swaa_flex import SWAACache, SWAAConfig
from swaa_flex.masks import causal, sinks, window

NEW = 512  # tokens of an answer
RECIPES = decode.RECIPES | {
    "FA decode": SWAAConfig(2048, 128, (), True, 0),
    "free": SWAAConfig(1, 0, (), False, 0),
}
METHODS = (
    *("sdpa eager", "flex eager", "swaa_flex eager", "swaa_flex compiled", "swaa_flex compiled, short chunks"),
    *("attention of one layer", "swaa_flex compiled, batch", "sdpa compiled", "swaa_flex compiled, 0.6B"),
)
SMALL = decode.QWEN3_4B | {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
}


@dataclass(frozen=True)
class Config:
    contexts: tuple[int, ...]
    shape: dict[str, Any]
    chunk: int
    steps: int = 12


@dataclass(frozen=True)
class Result:
    method: str
    recipe: str
    context: int
    batch: int
    ttft_s: float | None = None
    ms_per_token: float | None = None
    peak_gib: float | None = None
    total_s: float | None = None  # reckoned: prompts one after the other, then the other 511 tokens together
    warmup_s: float | None = None
    floor_s: float | None = None  # of ttft_s
    note: str = ""


def main() -> None:
    parser = runner.arguments(__doc__, resumes=True)
    parser.add_argument("--long", action="store_true", help="half a million tokens and a million too")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="only these")
    parser.add_argument("--recipes", nargs="+", choices=("", *RECIPES), help="only these")
    given = parser.parse_args()
    runner.needs_gpu(given.quick)
    if given.quick:
        config = Config((512, 2048), decode.TINY, 512, 3)
    else:
        config = Config((32768, 131072), decode.QWEN3_4B, 8192)
    setup = {"recipes": {name: recipe.to_dict() for name, recipe in RECIPES.items()}}
    resume = Result if given.resume else None
    report = runner.Report(f"model_{runner.device()}", config, line, given.out, setup=setup, resume=resume)
    main: list[Job | Batch | Kernel] = [Job(config, method, "full") for method in ("sdpa eager", "flex eager")]
    main += [Job(config, "swaa_flex eager", recipe) for recipe in ("full", "1/2 full", "1/4 full", "all SWA")]
    main += [Job(config, "swaa_flex compiled", recipe) for recipe in RECIPES]
    short = dataclasses.replace(config, chunk=config.chunk // 4)
    main += [Job(short, "swaa_flex compiled, short chunks", "all SWA"), Kernel(config)]
    batches: list[Job | Batch | Kernel] = [Batch(config, r) for r in RECIPES if r not in ("1/4 full", "free")]
    others: list[Job | Batch | Kernel] = []
    for context in config.contexts:  # compiled for one length of prompt and cache
        others.append(Job(dataclasses.replace(config, contexts=(context,)), "sdpa compiled", "full"))
    if given.long:
        longest = max(config.contexts)
        longer = dataclasses.replace(config, contexts=(4 * longest,))
        others += [Job(longer, "swaa_flex compiled", recipe) for recipe in ("1/4 full", "all SWA")]
        shape = config.shape if given.quick else SMALL
        million = dataclasses.replace(config, contexts=(8 * longest,), shape=shape)
        others.append(Job(million, "swaa_flex compiled, 0.6B", "all SWA"))
    # What jobs take only while they are measured: a whole prompt at once, stock's mask of 32 GiB.
    for jobs, headroom in ((main, 28), (batches, 8), (others, 40)):
        chosen = [
            job
            for job in sorted(jobs, key=lambda job: -job.gib)
            if job.method in given.methods and (not given.recipes or job.recipe in given.recipes)
        ]
        runner.run(chosen, report, processes=10, headroom_gib=0 if given.quick else headroom)
    report.results[:] = with_totals(report.results, config.shape["num_hidden_layers"])
    report.close(table(report.results), plot)


def with_totals(results: list[Result], layers: int) -> list[Result]:
    """Batches were only decoded: their prompts take the time of one prompt each."""
    prompts = {(r.recipe, r.context): r.ttft_s for r in results if r.method == "swaa_flex compiled"}
    alone = {(r.recipe, r.context): r.ttft_s for r in results if r.method == Kernel.method}
    done = []
    for r in results:
        parts = [prompts.get(("free", r.context)), *(alone.get((name, r.context)) for name in ("full", "all SWA"))]
        if r.method.startswith("swaa_flex") and r.batch == 1 and r.recipe != "free" and None not in parts:
            full = sum(kind.full for kind in RECIPES[r.recipe].resolve(layers))
            free, one_full, one_window = parts
            r = dataclasses.replace(r, floor_s=free + full * one_full + (layers - full) * one_window)
        first = r.ttft_s if r.ttft_s is not None else prompts.get((r.recipe, r.context))
        if first is not None and r.ms_per_token is not None:
            r = dataclasses.replace(r, total_s=r.batch * first + (NEW - 1) * r.ms_per_token / 1e3)
        done.append(r)
    return sorted(done, key=lambda r: (r.context, r.batch, r.method, list(RECIPES).index(r.recipe)))


# --- what is measured -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One method and recipe, for all contexts, batch 1."""

    config: Config
    method: str
    recipe: str

    @functools.cached_property
    def gib(self) -> float:
        if self.method.endswith("eager"):  # its cache comes and goes with a request
            return decode.weight_bytes(decoding(self.config)) / GIB + 2
        return held_gib(self.config, self.recipe, max(self.config.contexts), 1)

    @torch.no_grad()
    def prepare(self) -> Callable[[], Iterator[Result]]:
        start = time.perf_counter()
        model = make_model(self.config, self.method, self.recipe)
        request = self.request(model)
        # Kernels for one length, then for all.
        for length in self.config.contexts if self.method == "sdpa compiled" else (1024, 1152):
            request(length)[1]()
        runner.synchronise()
        return functools.partial(self.measure, request, time.perf_counter() - start)

    @torch.no_grad()
    def measure(self, request: Request, warmup: float) -> Iterator[Result]:
        for context in self.config.contexts:
            try:
                yield self.one(request, context, warmup)
            except torch.OutOfMemoryError:
                yield Result(self.method, self.recipe, context, 1, note="out of memory")

    def one(self, request: Request, context: int, warmup: float) -> Result:
        if runner.device() == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        times: list[float] = []
        request(context)  # the first one finds no memory cached
        step = None
        while len(times) < 2 or (sum(times) < 8 and len(times) < 3):
            del step  # it holds the cache of the request before
            runner.synchronise()
            start = time.perf_counter()
            seconds, step = request(context)
            runner.synchronise()
            times.append(seconds or time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() / GIB if runner.device() == "cuda" else None
        ms = decode.timed(step, decoding(self.config))
        ttft = statistics.median(times)
        return Result(self.method, self.recipe, context, 1, ttft, ms, peak, warmup_s=warmup)

    def request(self, model: PreTrainedModel) -> Request:
        if self.method.startswith("swaa_flex compiled"):
            return compiled_request(model, self.config)
        if self.method == "sdpa compiled":
            return stock_compiled_request(model)
        return eager_request(model, ours=self.method.startswith("swaa_flex"))

    def failed(self, note: str) -> Iterator[Result]:
        for context in self.config.contexts:
            yield Result(self.method, self.recipe, context, 1, note=note)


Request = Callable[[int], tuple[float, Callable[[], Any]]]
"""Takes the length of a prompt, computes it, and returns its seconds (0: not timed) and what appends a token."""


@dataclass(frozen=True)
class Batch:
    """As many caches as fit with room to spare, at most 64, decoded together over caches of random contents."""

    config: Config
    recipe: str
    method: str = "swaa_flex compiled, batch"

    @property
    def context(self) -> int:
        return max(self.config.contexts)

    @functools.cached_property
    def batch(self) -> int:
        one = decoding(self.config)
        room = (runner.capacity_gib() - 12) * GIB - decode.weight_bytes(one)
        per_sequence = decode.cache_bytes(one, RECIPES[self.recipe], self.context)
        return 2 if runner.device() == "cpu" else max(1, min(64, int(room / per_sequence)))

    @functools.cached_property
    def gib(self) -> float:
        return held_gib(self.config, self.recipe, self.context, self.batch)

    @torch.no_grad()
    def prepare(self) -> Callable[[], Iterator[Result]]:
        model = make_model(self.config, "swaa_flex compiled", self.recipe)
        compiled = swaa_flex.compile(model, max_length=self.context + 128, batch_size=self.batch, prefill_chunk=128)
        compiled.warmup(quiet=True)
        runner.synchronise()
        return functools.partial(self.measure, compiled)

    @torch.no_grad()
    def measure(self, compiled: swaa_flex.hf.CompiledModel) -> Iterator[Result]:
        compiled.prefill([[7]] * self.batch)  # a request, which then claims to be longer
        for layer in compiled.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(self.context)
        tokens = torch.zeros(self.batch, dtype=torch.long, device=runner.device())
        ms = decode.timed(lambda: compiled.decode_step(tokens), decoding(self.config, self.batch))
        peak = torch.cuda.max_memory_allocated() / GIB if runner.device() == "cuda" else None
        yield Result(self.method, self.recipe, self.context, self.batch, None, ms, peak)

    def failed(self, note: str) -> Iterator[Result]:
        yield Result(self.method, self.recipe, self.context, self.batch, note=note)


@dataclass(frozen=True)
class Kernel:
    """Attention of one layer alone, full and with a window: what the model's prompts are held against."""

    config: Config
    method: str = "attention of one layer"
    recipe: str = ""

    @property
    def gib(self) -> float:
        return 8

    def prepare(self) -> Callable[[], Iterator[Result]]:
        self.milliseconds("full", 1024)
        self.milliseconds("all SWA", 8192)
        return self.measure

    def measure(self) -> Iterator[Result]:
        for context in self.config.contexts:
            for recipe in ("full", "all SWA"):
                yield Result(self.method, recipe, context, 1, self.milliseconds(recipe, context) / 1e3)

    @torch.no_grad()
    def milliseconds(self, recipe: str, context: int) -> float:
        shape, dtype = self.config.shape, torch.bfloat16 if runner.device() == "cuda" else torch.float32
        query, key, value = (
            torch.randn(
                1, shape[f"num_{heads}_heads"], context, shape["head_dim"], device=runner.device(), dtype=dtype
            )
            for heads in ("attention", "key_value", "key_value")
        )
        near = RECIPES["all SWA"]
        mask = causal() if recipe == "full" else causal() & (window(near.sliding_window) | sinks(near.sink_tokens))
        plan = swaa_flex.plan(
            mask, context, context, batch=1, device=query.device, dtype=dtype, head_dim=shape["head_dim"]
        )
        return runner.milliseconds(lambda: swaa_flex.attention(query, key, value, plan), seconds=1)

    def failed(self, note: str) -> Iterator[Result]:
        for context in self.config.contexts:
            for recipe in ("full", "all SWA"):
                yield Result(self.method, recipe, context, 1, note=note)


def make_model(config: Config, method: str, recipe: str) -> PreTrainedModel:
    model = decode.make_model(decoding(config))
    if method.startswith("swaa_flex"):
        return swaa_flex.adapt(model, RECIPES[recipe])
    model.set_attn_implementation("sdpa" if method.startswith("sdpa") else "flex_attention")
    return model


def prompt(model: PreTrainedModel, length: int) -> torch.Tensor:
    return torch.randint(10, 1000, (1, length), device=model.device)


def compiled_request(model: PreTrainedModel, config: Config) -> Request:
    compiled = swaa_flex.compile(model, max_length=max(config.contexts) + NEW, prefill_chunk=config.chunk)
    compiled.warmup(all=True, quiet=True)

    def request(length: int) -> tuple[float, Callable[[], Any]]:
        tokens = compiled.prefill(prompt(model, length)).argmax(-1)
        return 0, lambda: compiled.decode_step(tokens)

    return request


def eager_request(model: PreTrainedModel, ours: bool) -> Request:
    def request(length: int) -> tuple[float, Callable[[], Any]]:
        ids = prompt(model, length)
        cache = SWAACache(model.config) if ours else DynamicCache(config=model.config)
        token = model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        return 0, lambda: model(token, past_key_values=cache).logits

    return request


def stock_compiled_request(model: PreTrainedModel) -> Request:
    cuda = model.device.type == "cuda"

    def request(length: int) -> tuple[float, Callable[[], Any]]:
        cache = StaticCache(config=model.config, max_cache_len=length + 128)
        heads, head_dim = model.config.num_key_value_heads, model.config.head_dim
        cache.early_initialization(1, heads, head_dim, dtype=model.dtype, device=model.device)
        forward = compiled_forward(model)
        ids = prompt(model, length)
        positions = torch.arange(length, device=model.device)[None]
        runner.synchronise()
        start = time.perf_counter()
        token = forward(ids, position_ids=positions, past_key_values=cache, logits_to_keep=1).logits.argmax(-1).clone()
        runner.synchronise()
        seconds = time.perf_counter() - start
        at = torch.full((1, 1), length, device=model.device)

        def step() -> Any:
            if cuda:
                torch.compiler.cudagraph_mark_step_begin()
            return forward(token, position_ids=at, past_key_values=cache).logits

        return seconds, step

    return request


@functools.cache
def compiled_forward(model: PreTrainedModel) -> Callable[..., Any]:
    mode = "reduce-overhead" if model.device.type == "cuda" else None
    return torch.compile(model.forward, mode=mode, fullgraph=True, dynamic=False)


def decoding(config: Config, batch: int = 1) -> decode.Config:
    """The same model for the functions of decode.py."""
    return decode.Config(batch, config.contexts, config.steps, config.shape, {}, 1.0)


def held_gib(config: Config, recipe: str, context: int, batch: int) -> float:
    """Device memory between requests: weights, cache, and what CUDA takes."""
    same = decoding(config, batch)
    return (decode.weight_bytes(same) + decode.cache_bytes(same, RECIPES[recipe], context)) / GIB + 3


# --- what is printed ------------------------------------------------------------------------------------------


def line(r: Result) -> str:
    name = f"{r.method:<34} {r.recipe:<9} {r.context:>8} batch {r.batch:<3}"
    if r.note:
        return f"{name} {r.note}"
    first = "" if r.ttft_s is None else f"first token {r.ttft_s:7.3f} s"
    peak = "" if r.peak_gib is None else f"peak {r.peak_gib:6.1f} GiB"
    rest = "" if r.ms_per_token is None else f"{r.ms_per_token:8.2f} ms/token {peak} (warm-up {r.warmup_s or 0:.0f} s)"
    return f"{name} {first} {rest}"


def table(results: list[Result]) -> Table:
    view = Table("tokens", "batch", "method", "recipe")
    for name in ("first token s", "x floor", "x stock", "ms per token", "peak GiB", f"with {NEW} tokens s"):
        view.add_column(name, justify="right")
    for name in ("x our full", "x stock, batch 1", "paper"):
        view.add_column(name, justify="right")
    for r in results:
        cells = (f"{r.context:,}", str(r.batch), r.method, r.recipe)
        if r.note:
            view.add_row(*cells, r.note)
            continue
        first = (shown(r.ttft_s, 3), shown(over(r.ttft_s, r.floor_s), 2), shown(sooner(r, results), 2))
        values = (*first, shown(r.ms_per_token, 2), shown(r.peak_gib, 1), shown(r.total_s, 2))
        paper = shown(decode.PAPER.get(r.recipe) if r.context == 131072 and r.method != Kernel.method else None, 2)
        view.add_row(*cells, *values, shown(ratio(r, results), 2), shown(to_stock(r, results), 2), paper)
    return view


def shown(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def over(value: float | None, floor: float | None) -> float | None:
    return None if value is None or floor is None else value / floor


def sooner(r: Result, results: list[Result]) -> float | None:
    """How many times sooner the first token comes than in transformers with eager sdpa."""
    stock = next((x.ttft_s for x in results if (x.method, x.context) == ("sdpa eager", r.context)), None)
    return None if r.method == Kernel.method else over(stock, r.ttft_s)


def ratio(r: Result, results: list[Result]) -> float | None:
    """Sequences per second, relative to the same deployment with full attention."""
    same = (x for x in results if (x.method, x.context, x.recipe) == (r.method, r.context, "full"))
    return throughput_ratio(r, next(same, None))


def to_stock(r: Result, results: list[Result]) -> float | None:
    """Sequences per second, relative to transformers with eager sdpa at batch 1."""
    stock = (x for x in results if (x.method, x.context) == ("sdpa eager", r.context))
    return throughput_ratio(r, next(stock, None))


def throughput_ratio(r: Result, other: Result | None) -> float | None:
    if other is None or other.total_s is None or r.total_s is None:
        return None
    return (r.batch / r.total_s) / (other.batch / other.total_s)


def plot(data: dict[str, Any], path: Path) -> None:
    plt = runner.pyplot()
    results = [Result(**r) for r in data["results"]]
    contexts = data["config"]["contexts"]
    chosen = [r for r in results if r.context == max(contexts) and r.batch == 1 and r.total_s is not None]
    labels = [f"{r.method}, {r.recipe}" for r in chosen]
    figure, axis = plt.subplots(figsize=(10, 0.35 * len(chosen) + 1.5), layout="constrained")
    first = [r.ttft_s or 0 for r in chosen]
    rest = [(r.total_s or 0) - (r.ttft_s or 0) for r in chosen]
    axis.barh(labels, first, label="first token")
    axis.barh(labels, rest, left=first, label=f"{NEW} tokens")
    title = f"{runner.card(data)}: {max(contexts):,} tokens in, {NEW} out (reckoned), batch 1"
    axis.set(xlabel="seconds", title=title)
    axis.invert_yaxis()
    axis.grid(alpha=0.3, axis="x")
    axis.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
