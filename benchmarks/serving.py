"""Serving with vLLM: the plugin against vLLM's own FlashAttention, Qwen3-4B shape with random weights.

    python benchmarks/serving.py [--quick] [--out docs/benchmarks]

Prompts of random tokens come at once; each is answered with as many tokens as all others. "tokens per second" counts
those of answers, from the first request to the last token. One engine at a time has a GPU to itself. Prefix caching is
off for all, as recipes with dense rows need it. It needs a GPU and the package vllm.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import decode
import runner
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
# Throughput relative to full attention, one H100, 128 k in and 512 out (arXiv 2512.10411, table of efficiency).
PAPER = {"all SWA": 8.2, "1/2 full": 1.79, "FA decode": 1.71}


@dataclass(frozen=True)
class Config:
    contexts: tuple[int, ...] = (32768, 131072)
    concurrent: tuple[int, ...] = (1, 16)
    new_tokens: int = 512
    shape: dict[str, Any] = dataclasses.field(default_factory=lambda: decode.QWEN3_4B)


QUICK = Config((1024, 2048), (1, 4), 16, decode.QWEN3_4B | {"num_hidden_layers": 4})


@dataclass(frozen=True)
class Result:
    recipe: str
    context: int
    concurrent: int
    ttft_s: float | None = None  # median
    ms_per_token: float | None = None  # median, after the first token
    tokens_per_s: float | None = None
    start_s: float | None = None  # of the engine
    note: str = ""


def main() -> None:
    given = runner.arguments(__doc__, resumes=True).parse_args()
    if runner.device() != "cuda" or importlib.util.find_spec("vllm") is None:
        print("serving.py needs a GPU and the package vllm")
        return
    import vllm

    config = QUICK if given.quick else Config()
    facts = {
        "vllm": vllm.__version__,
        "recipes": {name: recipe and recipe.to_dict() for name, recipe in RECIPES.items()},
    }
    report = runner.Report(f"serving_{runner.device()}", config, line, given.out, facts, resume=given.resume)
    runner.run([Job(config, recipe) for recipe in RECIPES], report, processes=1)
    report.results.sort(key=lambda r: (r.context, r.concurrent, list(RECIPES).index(r.recipe)))
    report.close(table(report.results), plot)


# --- what is measured -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One engine, for all contexts."""

    config: Config
    recipe: str

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
        from vllm import LLM

        begun = time.perf_counter()
        recipe = RECIPES[self.recipe]
        ours = {"attention_backend": "FLASH_ATTN"}
        if recipe is not None:
            ours = {"attention_backend": "CUSTOM", "additional_config": {"swaa": recipe.to_dict()}}
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
                **ours,
            )
        served(llm.llm_engine, 2048, 2, 4)
        return functools.partial(self.measure, llm.llm_engine, time.perf_counter() - begun)

    def measure(self, engine: Any, start: float) -> Iterator[Result]:
        for context in self.config.contexts:
            for concurrent in self.config.concurrent:
                measured = served(engine, context, concurrent, self.config.new_tokens)
                yield Result(self.recipe, context, concurrent, *measured, start)

    def failed(self, note: str) -> Iterator[Result]:
        for context in self.config.contexts:
            for concurrent in self.config.concurrent:
                yield Result(self.recipe, context, concurrent, note=note)


def served(engine: Any, context: int, concurrent: int, new_tokens: int) -> tuple[float, float, float]:
    """Seconds to the first token and milliseconds per token, medians of the requests; tokens per second of all."""
    from vllm import SamplingParams

    draw = random.Random(context)
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    begun = time.perf_counter()
    for number in range(concurrent):
        prompt = {"prompt_token_ids": [draw.randrange(10, 1000) for _ in range(context)]}
        engine.add_request(f"{context} {concurrent} {number} {begun}", prompt, sampling)
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


# --- what is printed ------------------------------------------------------------------------------------------


def line(r: Result) -> str:
    name = f"{r.recipe:<14} {r.context:>7} x {r.concurrent:<3}"
    if r.ttft_s is None:
        return f"{name} {r.note}"
    return (
        f"{name} first token {r.ttft_s:7.2f} s, {r.ms_per_token:7.2f} ms per token, {r.tokens_per_s:8.1f} tokens/s "
        f"(engine after {r.start_s:.0f} s)"
    )


def table(results: list[Result]) -> Table:
    view = Table("tokens", "requests", "recipe")
    for heading in ("first token s", "x full", "ms per token", "tokens/s", "x full", "paper"):
        view.add_column(heading, justify="right")
    for r in results:
        case = (f"{r.context:,}", str(r.concurrent), r.recipe)
        if r.ttft_s is None or r.ms_per_token is None or r.tokens_per_s is None:
            view.add_row(*case, r.note[:30])
            continue
        full = next((x for x in results if (x.recipe, x.context, x.concurrent) == ("full", *same(r))), None)
        faster = f"{full.ttft_s / r.ttft_s:.2f}" if full and full.ttft_s else ""
        more = f"{r.tokens_per_s / full.tokens_per_s:.2f}" if full and full.tokens_per_s else ""
        paper = f"{PAPER[r.recipe]:.2f}" if r.recipe in PAPER and r.context == 131072 else ""
        view.add_row(*case, f"{r.ttft_s:.2f}", faster, f"{r.ms_per_token:.2f}", f"{r.tokens_per_s:.1f}", more, paper)
    return view


def same(r: Result) -> tuple[int, int]:
    return r.context, r.concurrent


def plot(data: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = [Result(**r) for r in data["results"]]
    cases = sorted({same(r) for r in results})
    names = list(dict.fromkeys(r.recipe for r in results))
    figure, axes = plt.subplots(1, len(cases), figsize=(4 * len(cases), 3.2), sharey=True, layout="constrained")
    for axis, case in zip(axes, cases, strict=True):
        rates = [next((r.tokens_per_s or 0 for r in results if (same(r), r.recipe) == (case, n)), 0) for n in names]
        axis.barh(names, rates)
        axis.set(title=f"{case[0]:,} tokens, {case[1]} requests", xlabel="tokens/s of answers")
        axis.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    figure.suptitle(
        f"{data['machine']}, vLLM {data['vllm']}: Qwen3-4B shape, {data['config']['new_tokens']} tokens out"
    )
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
