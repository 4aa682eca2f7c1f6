"""Serving with vLLM: the plugin against vLLM's own FlashAttention, Qwen3-4B shape with random weights.

    python benchmarks/serving.py [--quick] [--out docs/benchmarks] [--recipes NAME ...] [--cases 131072x16 ...]
        [--resume]

Prompts of random tokens come at once; each is answered with as many tokens as all others. "tokens per second" counts
those of answers, from the first request to the last token. Each engine has a GPU to itself. Prefix caching is
off for all, as recipes with dense rows need it. An engine takes two to seven minutes: with --resume, a run goes on
after the last result of an interrupted one, or adds other recipes to it. It needs a GPU and the package vllm.

The floor of the first token is the arithmetic of a prompt at the measured matmul rate; of several prompts, which come
one after the other, that of the median. The floor of a token is the weights and the visible keys and values of all
requests that fit into memory together, read once at the measured bandwidth. The ceiling of tokens per second adds up
both, for all requests.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import decode
import runner
import torch
from rich.table import Table
from transformers import AutoConfig

from swaa_flex import SWAAConfig

RECIPES = {
    "full": None,  # vLLM's own FlashAttention
    "full, plugin": SWAAConfig(None),
    "all SWA": SWAAConfig(2048, 128, (), False, 0),
    "1/2 full": SWAAConfig(2048, 128, "1::2", False, 0),
    "FA decode": SWAAConfig(2048, 128, (), True, 0),
}


@dataclass(frozen=True)
class Config:
    contexts: tuple[int, ...] = (32768, 131072)
    concurrent: tuple[int, ...] = (1, 16)
    new_tokens: int = 512
    shape: dict[str, Any] = dataclasses.field(default_factory=lambda: decode.QWEN3_4B)


QUICK = Config((1024, 4096), (1, 4), 16, decode.QWEN3_4B | {"num_hidden_layers": 4})


@dataclass(frozen=True)
class Result:
    recipe: str
    context: int
    concurrent: int
    ttft_s: float | None = None  # median
    ms_per_token: float | None = None  # median, after the first token
    tokens_per_s: float | None = None
    floor_ttft_s: float | None = None
    floor_ms_per_token: float | None = None
    ceiling_tokens_per_s: float | None = None
    together: int | None = None  # requests whose pages fit into memory
    start_s: float | None = None  # of the engine
    note: str = ""


@dataclass(frozen=True)
class Rates:
    """Of the machine."""

    matmul: float  # TFLOP/s
    bandwidth: float  # GB/s


def main() -> None:
    parser = runner.arguments(__doc__, resumes=True)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="only these")
    parser.add_argument("--cases", nargs="+", metavar="TOKENSxREQUESTS", help="only these")
    given = parser.parse_args()
    config = QUICK if given.quick else Config()
    cases = list(itertools.product(config.contexts, config.concurrent))
    if given.cases:
        names = {"x".join(map(str, case)): case for case in cases}
        if unknown := [name for name in given.cases if name not in names]:
            parser.error(f"--cases: there is no {unknown[0]}, expected some of {', '.join(names)}")
        cases = [names[name] for name in given.cases]
    if runner.device() != "cuda" or importlib.util.find_spec("vllm") is None:
        sys.exit("serving.py needs a GPU and the package vllm")
    import vllm

    rates = Rates(runner.matmul_rate(), runner.read_bandwidth())
    torch.cuda.empty_cache()  # the engine needs it
    facts = {"matmul_tflop_s": round(rates.matmul, 1), "read_bandwidth_gb_s": round(rates.bandwidth, 1)}
    setup = {
        "vllm": vllm.__version__,
        "recipes": {name: recipe and recipe.to_dict() for name, recipe in RECIPES.items()},
    }
    resume = Result if given.resume else None
    report = runner.Report(f"serving_{runner.device()}", config, line, given.out, facts, setup, resume)
    for recipe in RECIPES:
        for context in config.contexts:
            one = floors(config, rates, recipe, context, 1, 1)
            print(f"floor of {recipe:<14} {context:>7} x 1: first token {one[0]:.2f} s, {one[1]:.2f} ms per token")
    jobs = []
    for recipe in RECIPES:
        left = tuple(case for case in cases if not report.has([Result(recipe, *case)]))
        if left and recipe in given.recipes:
            jobs.append(Job(config, rates, recipe, left))
    runner.run(jobs, report, processes=1)
    report.results.sort(key=lambda r: (r.context, r.concurrent, list(RECIPES).index(r.recipe)))
    report.close(table(report.results), plot)


# --- what is measured -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One engine, for all cases of a recipe: tokens of each prompt, and requests at once."""

    config: Config
    rates: Rates
    recipe: str
    cases: tuple[tuple[int, int], ...]

    @property
    def gib(self) -> float:
        return runner.capacity_gib()

    def prepare(self) -> Callable[[], Iterator[Result]]:
        os.environ |= {
            "HF_HUB_OFFLINE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
        }
        recipe = RECIPES[self.recipe]
        ours: dict[str, Any] = {"attention_backend": "FLASH_ATTN"}
        if recipe is None:
            hide_the_plugin()
        else:
            ours = {"attention_backend": "CUSTOM", "additional_config": {"swaa": recipe.to_dict()}}
        from vllm import LLM

        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            AutoConfig.for_model("qwen3", **self.config.shape, architectures=["Qwen3ForCausalLM"]).save_pretrained(
                folder
            )
            llm = LLM(
                folder,
                load_format="dummy",
                dtype="bfloat16",
                skip_tokenizer_init=True,
                enable_prefix_caching=False,
                max_model_len=max(self.config.contexts) + self.config.new_tokens,
                max_num_seqs=max(self.config.concurrent),
                **ours,
            )
        served(llm.llm_engine, min(32768, max(self.config.contexts)), 2, 4)  # longer than a window
        return functools.partial(self.measure, llm.llm_engine, time.perf_counter() - begun)

    def measure(self, engine: Any, start: float) -> Iterator[Result]:
        cache = engine.vllm_config.cache_config
        for context, concurrent in self.cases:
            fit = cache.num_gpu_blocks * cache.block_size // (context + self.config.new_tokens)
            together = max(1, min(concurrent, fit))
            measured = served(engine, context, concurrent, self.config.new_tokens)
            bounds = floors(self.config, self.rates, self.recipe, context, concurrent, together)
            yield Result(self.recipe, context, concurrent, *measured, *bounds, together, start)

    def failed(self, note: str) -> Iterator[Result]:
        for case in self.cases:
            yield Result(self.recipe, *case, note=note)


def hide_the_plugin() -> None:
    """From vLLM, in this process: with a logits processor installed, it does not take its newer model runner."""
    found = importlib.metadata.entry_points

    def others(**chosen: Any) -> importlib.metadata.EntryPoints:
        return importlib.metadata.EntryPoints(e for e in found(**chosen) if not e.value.startswith("swaa_flex."))

    importlib.metadata.entry_points = others


def served(engine: Any, context: int, concurrent: int, new_tokens: int) -> tuple[float, float, float]:
    """Seconds to the first token and milliseconds per token, medians of the requests; tokens per second of all."""
    from vllm import SamplingParams

    draw = random.Random(context)
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    prompts = [[draw.randrange(10, 1000) for _ in range(context)] for _ in range(concurrent)]
    begun = time.perf_counter()
    for number, prompt in enumerate(prompts):
        engine.add_request(f"{context} {concurrent} {number} {begun}", {"prompt_token_ids": prompt}, sampling)
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            now = time.perf_counter()
            if output.outputs[0].token_ids:
                first.setdefault(output.request_id, now)
            if output.finished:
                last[output.request_id] = now
    assert len(last) == concurrent, "a request was lost"
    per_token = [(last[name] - first[name]) / (new_tokens - 1) * 1e3 for name in last]
    total = max(last.values()) - begun
    return (
        statistics.median(first.values()) - begun,
        statistics.median(per_token),
        concurrent * new_tokens / total,
    )


# --- the floor ------------------------------------------------------------------------------------------------


def floors(
    config: Config, rates: Rates, recipe: str, context: int, concurrent: int, together: int
) -> tuple[float, float, float]:
    """Seconds to the first token of the median request, milliseconds per token, and tokens per second at most."""
    swaa = RECIPES[recipe] or SWAAConfig(None)
    same = decode.Config(1, config.contexts, 0, config.shape, {}, rates.bandwidth)
    prompt = prompt_tera(config, swaa, context) / rates.matmul
    weights, visible = decode.weight_bytes(same), decode.cache_bytes(same, swaa, context)
    step = (weights + together * visible) / rates.bandwidth / 1e9
    answers = config.new_tokens * (weights * concurrent / together + concurrent * visible) / rates.bandwidth / 1e9
    median = (concurrent + 1) / 2 * prompt
    return median, step * 1e3, concurrent * config.new_tokens / (concurrent * prompt + answers)


def prompt_tera(config: Config, swaa: SWAAConfig, context: int) -> float:
    """TFLOP of a prompt: products with the weights, of which the last are for one row only, and visible pairs."""
    same = decode.Config(1, config.contexts, 0, config.shape, {}, 1)
    head = config.shape["vocab_size"] * config.shape["hidden_size"]
    weights = decode.weight_bytes(same) // runner.itemsize() - head
    width = config.shape["num_attention_heads"] * config.shape["head_dim"]
    pairs = 0
    for kind in swaa.resolve(config.shape["num_hidden_layers"]):
        most = context if kind.full else min(context, (swaa.sliding_window or context) + swaa.sink_tokens)
        pairs += context * most - most * (most - 1) // 2
    return (2 * (weights * context + head) + 4 * width * pairs) / 1e12


# --- what is printed ------------------------------------------------------------------------------------------


def line(r: Result) -> str:
    name = f"{r.recipe:<14} {r.context:>7} x {r.concurrent:<3}"
    if r.ttft_s is None:
        return f"{name} {r.note}"
    first = f"first token {r.ttft_s:6.2f} s (floor {r.floor_ttft_s:.2f})"
    each = f"{r.ms_per_token:6.2f} ms per token (floor {r.floor_ms_per_token:.2f})"
    return f"{name} {first}, {each}, {r.tokens_per_s:6.1f} tokens/s, {r.together} fit (start {r.start_s:.0f} s)"


def table(results: list[Result]) -> Table:
    view = Table("tokens", "requests", "recipe")
    for heading in (
        "fit",
        "first token s",
        "floor",
        "x full",
        "ms per token",
        "floor",
        "x full",
        "tokens/s",
        "at most",
    ):
        view.add_column(heading, justify="right")
    view.add_column("x full", justify="right")
    view.add_column("paper", justify="right")
    for r in results:
        case = (f"{r.context:,}", str(r.concurrent), r.recipe)
        if r.ttft_s is None or r.ms_per_token is None or r.tokens_per_s is None:
            view.add_row(*case, r.note[:30])
            continue
        full = next(
            (x for x in results if (x.recipe, x.context, x.concurrent) == ("full", *same(r))), Result("", 0, 0)
        )
        paper = f"{decode.PAPER[r.recipe]:.2f}" if r.recipe in decode.PAPER and r.context == 131072 else ""
        first = (f"{r.ttft_s:.2f}", f"{r.floor_ttft_s:.2f}", ratio(full.ttft_s, r.ttft_s))
        each = (f"{r.ms_per_token:.2f}", f"{r.floor_ms_per_token:.2f}", ratio(full.ms_per_token, r.ms_per_token))
        rate = (f"{r.tokens_per_s:.1f}", f"{r.ceiling_tokens_per_s:.1f}", ratio(r.tokens_per_s, full.tokens_per_s))
        view.add_row(*case, str(r.together), *first, *each, *rate, paper)
    return view


def ratio(more: float | None, less: float | None) -> str:
    return f"{more / less:.2f}" if more and less else ""


def same(r: Result) -> tuple[int, int]:
    return r.context, r.concurrent


def plot(data: dict[str, Any], path: Path) -> None:
    plt = runner.pyplot()
    results = [Result(**r) for r in data["results"]]
    cases = sorted({same(r) for r in results})
    names = list(dict.fromkeys(r.recipe for r in results))
    shape = {"figsize": (4 * len(cases), 3.2), "layout": "constrained"}
    figure, axes = plt.subplots(1, len(cases), sharey=True, squeeze=False, **shape)
    for axis, case in zip(axes[0], cases, strict=True):
        rates = [next((r.tokens_per_s or 0 for r in results if (same(r), r.recipe) == (case, n)), 0) for n in names]
        axis.barh(names, rates)
        for name in names:
            if not any((same(r), r.recipe) == (case, name) and r.tokens_per_s for r in results):
                axis.text(0, name, " not run", va="center", size=8)
        axis.set(title=f"{case[0]:,} tokens x {case[1]}", xlabel="tokens/s of answers")
        axis.grid(alpha=0.3, axis="x")
    axes[0, 0].invert_yaxis()
    figure.suptitle(
        f"{runner.card(data)}, vLLM {data['vllm']}: Qwen3-4B shape, {data['config']['new_tokens']} tokens out"
    )
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
