"""Forward and backward of a model, Qwen3-4B shape with few layers, against full attention in transformers.

    python benchmarks/training.py [--quick] [--out docs/benchmarks]

Random weights, batch 1, gradients of all parameters, no optimiser: LoRA would hide the same attention under less work.
The last 512 tokens are the answer: its rows are decode rows, and for all methods only they have logits and a loss.
"no attention" is a window of one key: what remains is the bound that Amdahl's law sets.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import decode
import runner
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

import swaa_flex
from swaa_flex import SWAAConfig, recipes
from swaa_flex.cli.trial import scaled

STOCK = {"sdpa": "sdpa", "stock flex": "flex_attention", "stock flex, window, no sinks": "flex_attention"}
RECIPES = ("full", "naive", "decode_only", "fast", "balanced")
METHODS = (*STOCK, *(f"swaa_flex, {recipe}" for recipe in RECIPES), "no attention")


@dataclass(frozen=True)
class Config:
    tokens: tuple[int, ...]
    answer: int  # tokens with a label
    window: int  # what a recipe's window of 2048 becomes
    shape: dict[str, Any]


@dataclass(frozen=True)
class Result:
    method: str
    tokens: int
    checkpointing: bool
    milliseconds: float | None = None
    tokens_per_second: float | None = None
    peak_gib: float | None = None
    loss: float | None = None
    note: str = ""


def main() -> None:
    given = runner.arguments(__doc__, resumes=True).parse_args()
    runner.needs_gpu(given.quick)
    if given.quick:
        config = Config((256, 512), 32, 64, decode.TINY)
    else:
        config = Config((8192, 32768), 512, 2048, decode.QWEN3_4B | {"num_hidden_layers": 4})
    swaa = {method: c.to_dict() for method in METHODS if (c := swaa_of(config, method))}
    setup, resume = {"configurations": swaa}, Result if given.resume else None
    report = runner.Report(f"training_{runner.device()}", config, line, given.out, setup=setup, resume=resume)
    methods = [m for m in METHODS if runner.device() == "cuda" or "flex" not in STOCK.get(m, "")]  # no backward on CPU
    runner.run([Job(config, m) for m in methods], report, processes=5, headroom_gib=0 if given.quick else 60)
    report.results.sort(key=lambda r: (r.tokens, r.checkpointing, METHODS.index(r.method)))
    report.close(table(report.results), plot)


# --- what is measured -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One method, for all lengths, with gradient checkpointing and without."""

    config: Config
    method: str

    @property
    def gib(self) -> float:
        return 14

    @property
    def cases(self) -> Iterator[tuple[int, bool]]:
        return itertools.product(self.config.tokens, (False, True))

    def prepare(self) -> Callable[[], Iterator[Result]]:
        model = make_model(self.config, self.method)
        shortest = min(self.config.tokens)
        for tokens in (shortest, shortest + 128):  # kernels for one length, then for all
            step(model, self.config, tokens)
        runner.synchronise()
        return functools.partial(self.measure, model)

    def measure(self, model: PreTrainedModel) -> Iterator[Result]:
        for tokens, checkpointing in self.cases:
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                model.gradient_checkpointing_disable()
            try:
                yield self.one(model, tokens, checkpointing)
            except torch.OutOfMemoryError:
                yield Result(self.method, tokens, checkpointing, note="out of memory")

    def one(self, model: PreTrainedModel, tokens: int, checkpointing: bool) -> Result:
        call = functools.partial(step, model, self.config, tokens)
        cuda = runner.device() == "cuda"
        loss = call().item()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        ms = runner.milliseconds(call, seconds=3)
        peak = torch.cuda.max_memory_allocated() / runner.GIB if cuda else None
        return Result(self.method, tokens, checkpointing, ms, tokens / ms * 1e3, peak, loss)

    def failed(self, note: str) -> Iterator[Result]:
        for tokens, checkpointing in self.cases:
            yield Result(self.method, tokens, checkpointing, note=note)


def make_model(config: Config, method: str) -> PreTrainedModel:
    shape = config.shape
    if method == "stock flex, window, no sinks":
        kinds = ["sliding_attention"] * shape["num_hidden_layers"]
        shape = shape | {"use_sliding_window": True, "sliding_window": config.window, "layer_types": kinds}
    model = decode.make_model(decode.Config(1, config.tokens, 0, shape, {}, 1.0)).train()
    if swaa := swaa_of(config, method):
        return swaa_flex.adapt(model, swaa)
    model.set_attn_implementation(STOCK[method])
    return model


def swaa_of(config: Config, method: str) -> SWAAConfig | None:
    if method in STOCK:
        return None
    if method == "no attention":
        return SWAAConfig(1, 0, (), False, 0)
    return scaled(recipes.get(method.removeprefix("swaa_flex, ")), config.window)


def step(model: PreTrainedModel, config: Config, tokens: int) -> Tensor:
    """The loss of one sample, with the gradients of all parameters computed."""
    ids = torch.randint(config.shape["vocab_size"], (1, tokens), device=model.device, generator=seeded(model.device))
    told = {}
    if model.config._attn_implementation == "swaa_flex":
        told["decode_rows"] = torch.arange(tokens, device=model.device)[None] >= tokens - config.answer
    model.zero_grad()
    logits = model(ids, logits_to_keep=config.answer + 1, use_cache=False, **told).logits[0, :-1]
    loss = F.cross_entropy(logits.float(), ids[0, -config.answer :])
    loss.backward()
    return loss.detach()


def seeded(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


# --- what is printed ------------------------------------------------------------------------------------------


def line(r: Result) -> str:
    name = f"{r.method:<30} {r.tokens:>6} {'checkpointing' if r.checkpointing else '':<13}"
    if r.milliseconds is None:
        return f"{name} {r.note}"
    peak = "" if r.peak_gib is None else f"  peak {r.peak_gib:.1f} GiB"
    return f"{name} {r.milliseconds:9.1f} ms {r.tokens_per_second:9.0f} tokens/s{peak}  loss {r.loss:.4f}"


def table(results: list[Result]) -> Table:
    view = Table("tokens", "gradient checkpointing", "method")
    for heading in ("ms", "tokens/s", "x sdpa", "peak GiB"):
        view.add_column(heading, justify="right")
    for r in results:
        case = (f"{r.tokens:,}", "yes" if r.checkpointing else "", r.method)
        if r.milliseconds is None:
            view.add_row(*case, r.note[:30])
            continue
        peak = "" if r.peak_gib is None else f"{r.peak_gib:.1f}"
        gain = speedup(r, results)
        faster = "" if gain is None else f"{gain:.2f}"
        view.add_row(*case, f"{r.milliseconds:.1f}", f"{r.tokens_per_second:,.0f}", faster, peak)
    return view


def speedup(r: Result, results: list[Result]) -> float | None:
    """Tokens per second relative to sdpa in the same case."""
    case = ("sdpa", r.tokens, r.checkpointing)
    base = next((b for b in results if (b.method, b.tokens, b.checkpointing) == case), None)
    if base is None or base.milliseconds is None or r.milliseconds is None:
        return None
    return base.milliseconds / r.milliseconds


def plot(data: dict[str, Any], path: Path) -> None:
    plt = runner.pyplot()
    results = [Result(**r) for r in data["results"]]
    lengths, methods = sorted({r.tokens for r in results}), list(dict.fromkeys(r.method for r in results))
    figure, axes = plt.subplots(
        1, len(lengths), figsize=(5.5 * len(lengths) + 2, 4.3), sharey=True, layout="constrained"
    )
    for axis, tokens in zip(axes, lengths, strict=True):
        for checkpointing in (False, True):
            found = {r.method: r for r in results if (r.tokens, r.checkpointing) == (tokens, checkpointing)}
            places = [i + 0.2 * (1 if checkpointing else -1) for i in range(len(methods))]
            rates = [found[m].tokens_per_second or 0 for m in methods]
            axis.barh(places, rates, 0.38, label="gradient checkpointing" if checkpointing else "without")
        axis.set(title=f"{tokens:,} tokens", xlabel="tokens/s, forward and backward")
        axis.grid(alpha=0.3, axis="x")
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, ncols=2, loc="outside lower center")
    layers = data["config"]["shape"]["num_hidden_layers"]
    figure.suptitle(f"{runner.card(data)}: Qwen3-4B shape with {layers} layers, batch 1", fontsize=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
