"""Time per token while decoding: swaa_flex against what transformers offers, at a Qwen3-4B shape.

    python benchmarks/decode.py [--quick] [--batch 1] [--out docs/benchmarks]

Weights and cache contents are random: speed does not depend on them. The floor is the bytes of the weights and of the
keys and values that the recipe lets a token see, read once at the measured bandwidth. Writes JSON and a plot.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
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
STOCK = ("sdpa eager", "sdpa compiled", "flex compiled")


@dataclass(frozen=True)
class Config:
    batch: int
    contexts: tuple[int, ...]
    steps: int
    shape: dict[str, Any]
    device: str
    options: dict[str, Any]


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and short contexts")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--methods", default="swaa_flex,sdpa eager,sdpa compiled,flex compiled")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start nothing new after that many seconds"
    )
    parser.add_argument("--out", type=Path, help="folder for decode_<device>_batch<n>.json and .png")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = Config(
        batch=arguments.batch,
        contexts=(512, 2048) if arguments.quick else (8192, 32768, 131072),
        steps=4 if arguments.quick else 32,
        shape=TINY if arguments.quick else QWEN3_4B,
        device=device,
        # Inductor's tuning of pointwise and reduction kernels, which also does batch 1's matrix-vector products.
        options={"coordinate_descent_tuning": True} if device == "cuda" and arguments.batch == 1 else {},
    )
    bandwidth = read_bandwidth(device)
    console = Console(width=120)
    console.print(f"{describe(device)}; read bandwidth {bandwidth / 1e9:.0f} GB/s")
    results: list[Result] = []
    data: dict[str, Any] = {
        "benchmark": "decode",
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/decode.py --batch {config.batch}" + " --quick" * arguments.quick,
        "machine": describe(device),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "swaa_flex": swaa_flex.__version__,
        },
        "read_bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "config": asdict(config),
        "recipes": {name: recipe.to_dict() for name, recipe in RECIPES.items()},
    }
    path = arguments.out and arguments.out / f"decode_{device}_batch{config.batch}.json"

    def report(result: Result) -> None:
        results.append(result)
        console.print(line(result))
        if path:  # at once: nothing is lost if a later method fails
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(data | {"results": [asdict(r) for r in results]}, indent=1) + "\n")

    begun = time.perf_counter()
    model = make_model(config)
    methods = arguments.methods.split(",")
    runs = [(run_ours, recipe) for recipe in RECIPES if "swaa_flex" in methods]
    runs += [(run_stock, method) for method in STOCK if method in methods]
    for run, name in runs:
        if time.perf_counter() - begun < arguments.seconds:
            run(model, name, config, bandwidth, report)
        else:
            console.print(f"not run, out of time: {name}")
    console.print(table(results, config))
    if path:
        plot(results, data, path.with_suffix(".png"))
    brief = [(r.method, r.recipe, r.context, r.ms_per_token, round(r.floor_ms, 3)) for r in results]
    print(json.dumps({key: data[key] for key in ("benchmark", "machine", "versions")} | {"results": brief}))


# --- what is measured -----------------------------------------------------------------------------------------


def make_model(config: Config) -> PreTrainedModel:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if config.device == "cuda" else torch.float32
    with torch.device(config.device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("qwen3", **config.shape), dtype=dtype, attn_implementation="sdpa"
        )
    return model.eval()


@torch.no_grad()
def run_ours(
    model: PreTrainedModel, recipe: str, config: Config, bandwidth: float, report: Callable[[Result], None]
) -> None:
    """One compiled model per recipe, for the longest context that fits; shorter ones run in the same cache."""
    swaa_flex.adapt(model, RECIPES[recipe])
    contexts = [c for c in config.contexts if fits(model, recipe, config, c)]
    for context in config.contexts:
        if context not in contexts:
            floor = floor_ms(model, recipe, config, context, bandwidth)
            report(Result("swaa_flex", recipe, config.batch, context, None, floor, note="does not fit"))
    torch._dynamo.reset()
    start = time.perf_counter()
    compiled = swaa_flex.compile(
        model, max_length=contexts[-1] + 128, batch_size=config.batch, prefill_chunk=128, options=config.options
    )
    compiled._initialise()
    compiled._warm_decode()
    synchronise(config.device)
    warmup = time.perf_counter() - start
    memory = compiled.cache.memory()["total"] / 2**30
    for layer in compiled.cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    for context in contexts:
        for layer in compiled.cache.layers:
            layer.cumulative_length.fill_(context)
        compiled.rows, compiled.room = config.batch, config.steps + 8
        tokens = torch.zeros(config.batch, dtype=torch.long, device=config.device)
        ms = timed(lambda tokens=tokens: compiled.decode_step(tokens), config)
        floor = floor_ms(model, recipe, config, context, bandwidth)
        report(Result("swaa_flex", recipe, config.batch, context, ms, floor, memory, warmup))
    swaa_flex.restore(model)
    free()


@torch.no_grad()
def run_stock(
    model: PreTrainedModel, method: str, config: Config, bandwidth: float, report: Callable[[Result], None]
) -> None:
    implementation, how = method.split()
    model.set_attn_implementation("sdpa" if implementation == "sdpa" else "flex_attention")
    for context in config.contexts:
        floor = floor_ms(model, "full", config, context, bandwidth)
        if not fits(model, "full", config, context):
            report(Result(method, "full", config.batch, context, None, floor, note="does not fit"))
            continue
        torch._dynamo.reset()
        start = time.perf_counter()
        try:
            step = eager_step(model, config, context) if how == "eager" else compiled_step(model, config, context)
            step()
            synchronise(config.device)
            warmup = time.perf_counter() - start
            report(Result(method, "full", config.batch, context, timed(step, config), floor, None, warmup))
        except Exception as error:  # what stock cannot do is a result too
            note = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            report(Result(method, "full", config.batch, context, None, floor, note=note))
        step = None
        free()
    model.set_attn_implementation("sdpa")


def eager_step(model: PreTrainedModel, config: Config, context: int) -> Callable[[], Any]:
    cache = DynamicCache(config=model.config)
    for index in range(model.config.num_hidden_layers):
        keys = torch.randn(kv_shape(config, context), dtype=model.dtype, device=config.device)
        cache.update(keys, keys.clone(), index)
    tokens = torch.zeros(config.batch, 1, dtype=torch.long, device=config.device)
    return lambda: model(tokens, past_key_values=cache).logits


def compiled_step(model: PreTrainedModel, config: Config, context: int) -> Callable[[], Any]:
    cache = StaticCache(config=model.config, max_cache_len=context + 128)
    shape = config.batch, config.shape["num_key_value_heads"], config.shape["head_dim"]
    cache.early_initialization(*shape, dtype=model.dtype, device=model.device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(context)
    mode = "reduce-overhead" if config.device == "cuda" else None
    forward = torch.compile(model.forward, mode=mode, fullgraph=True)
    tokens = torch.zeros(config.batch, 1, dtype=torch.long, device=config.device)
    position = torch.full((config.batch, 1), context, device=config.device)

    def step() -> Any:
        if config.device == "cuda":
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
        synchronise(config.device)
        start = time.perf_counter()
        for _ in range(per_run):
            step()
        synchronise(config.device)
        times.append((time.perf_counter() - start) / per_run * 1e3)
    return statistics.median(times)


# --- the floor ------------------------------------------------------------------------------------------------


def floor_ms(model: PreTrainedModel, recipe: str, config: Config, context: int, bandwidth: float) -> float:
    """Weights, and keys and values that a new token sees, at the bandwidth."""
    # With tied embeddings the one matrix is read whole as the output layer, and one row of it as the input.
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return (weights + cache_bytes(model, recipe, config, context)) / bandwidth * 1e3


def cache_bytes(model: PreTrainedModel, recipe: str, config: Config, context: int) -> int:
    swaa = RECIPES[recipe]
    tokens = 0
    for kind in swaa.resolve(config.shape["num_hidden_layers"]):
        near = context if swaa.sliding_window is None else min(context, swaa.sliding_window + swaa.sink_tokens)
        tokens += context if kind.full_attention_decode else near
    batch, heads, _, head_dim = kv_shape(config, 1)
    return 2 * batch * heads * head_dim * tokens * model.dtype.itemsize


def fits(model: PreTrainedModel, recipe: str, config: Config, context: int) -> bool:
    if config.device == "cpu":
        return True
    return cache_bytes(model, recipe, config, context) < torch.cuda.mem_get_info()[0] * 0.85


def kv_shape(config: Config, tokens: int) -> tuple[int, int, int, int]:
    return config.batch, config.shape["num_key_value_heads"], tokens, config.shape["head_dim"]


def read_bandwidth(device: str) -> float:
    """Bytes per second of a large reduction."""
    source = torch.zeros((1 << 31 if device == "cuda" else 1 << 27) // 4, dtype=torch.int32, device=device)
    times = []
    for _ in range(8):
        synchronise(device)
        start = time.perf_counter()
        source.max()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return source.numel() * 4 / min(times)


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def free() -> None:
    gc.collect()
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- what is printed ------------------------------------------------------------------------------------------


def describe(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"


def line(result: Result) -> str:
    name = f"{result.context:>7}  {result.method:<14} {result.recipe:<9}"
    if result.ms_per_token is None:
        return f"{name} {result.note}"
    ratio = result.ms_per_token / result.floor_ms
    return f"{name} {result.ms_per_token:8.2f} ms  {ratio:5.2f} x floor  (warm-up {result.warmup_s:.0f} s)"


def table(results: list[Result], config: Config) -> Table:
    view = Table(title=f"ms per token (ratio to the floor), batch {config.batch}")
    view.add_column("method")
    view.add_column("recipe")
    for context in config.contexts:
        view.add_column(f"{context} tokens", justify="right")
    rows = dict.fromkeys((r.method, r.recipe) for r in results)
    for method, recipe in rows:
        found = {r.context: r for r in results if (r.method, r.recipe) == (method, recipe)}
        view.add_row(method, recipe, *(cell(found.get(context)) for context in config.contexts))
    return view


def cell(result: Result | None) -> str:
    if result is None or result.ms_per_token is None:
        return "-" if result is None else result.note[:24]
    return f"{result.ms_per_token:.2f} ({result.ms_per_token / result.floor_ms:.2f})"


def plot(results: list[Result], data: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
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
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    axis.set_title(f"{data['machine']}, batch {data['config']['batch']}; dotted: bandwidth floor", fontsize=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
