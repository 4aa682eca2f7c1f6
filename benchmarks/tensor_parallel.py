"""Prefill on one GPU and on two with transformers' tensor parallelism: seconds to the first token, and equal tokens.

    python benchmarks/tensor_parallel.py [--quick] [--out docs/benchmarks]

A Qwen3 shape of 1.7 B parameters with random weights, recipe of all SWA and of half the layers full. Each number of
processes is one `torchrun`; all of them load the same weights from disk. Tokens are compared in float32 on a short
prompt and four layers, times are taken in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import decode
import runner
import torch
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

import swaa_flex
from swaa_flex import SWAACache

SHAPE = decode.QWEN3_4B | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
}
TINY = decode.TINY | {"num_key_value_heads": 4}
RECIPES = ("1/2 full", "all SWA")


@dataclass(frozen=True)
class Config:
    shape: dict[str, Any]
    lengths: tuple[int, ...]
    processes: tuple[int, ...]
    new_tokens: int = 16


@dataclass(frozen=True)
class Result:
    processes: int
    recipe: str
    length: int
    seconds: float
    tokens_equal: bool  # to those of one process


def main() -> None:
    parser = runner.arguments(__doc__)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    config = Config(TINY, (512,), (1, 2)) if given.quick else Config(SHAPE, (32768, 131072), (1, 2))
    if given.worker:
        worker(config, Path(given.worker))
        return
    report = runner.Report(f"tensor_parallel_{runner.device()}", config, line, given.out)
    with tempfile.TemporaryDirectory() as folder:
        save(config.shape | {"num_hidden_layers": 4}, torch.float32, f"{folder}/exact")
        save(config.shape, torch.bfloat16 if runner.device() == "cuda" else torch.float32, f"{folder}/whole")
        answers: dict[str, Any] = {}
        for processes in config.processes:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            command = [*launcher, __file__, "--worker", folder, *["--quick"] * given.quick]
            subprocess.run(command, check=True)
            measured = json.loads((Path(folder) / f"{processes}.json").read_text())
            answers = answers or measured["tokens"]
            for recipe, length, seconds in measured["times"]:
                same = measured["tokens"][recipe] == answers[recipe]
                report.add(Result(processes, recipe, length, seconds, same))
    report.close(table(report.results))


def save(shape: dict[str, Any], dtype: torch.dtype, folder: str) -> None:
    torch.manual_seed(0)
    with torch.device(runner.device()):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **shape), dtype=dtype)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()


@torch.no_grad()
def worker(config: Config, folder: Path) -> None:
    from transformers.distributed import DistributedConfig

    processes = int(os.environ["WORLD_SIZE"])
    # One process needs no sharding, but the same way of loading.
    sharded = {"distributed_config": DistributedConfig(tp_plan="auto")} if processes > 1 else {}
    tokens, times = {}, []
    for name in ("exact", "whole"):
        model = AutoModelForCausalLM.from_pretrained(
            folder / name, dtype="auto", attn_implementation="swaa_flex", **sharded
        )
        if processes == 1:
            model = model.to(runner.device())
        for recipe in RECIPES:
            swaa_flex.adapt(model, decode.RECIPES[recipe])
            if name == "exact":
                tokens[recipe] = answer(model, config)
            else:
                times += [(recipe, length, seconds(model, length)) for length in config.lengths]
        del model
        torch.cuda.empty_cache()
    if int(os.environ["RANK"]) == 0:
        runner.write(folder / f"{processes}.json", json.dumps({"tokens": tokens, "times": times}))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def answer(model: Any, config: Config) -> list[int]:
    torch.manual_seed(0)
    ids = torch.randint(10, 1000, (1, min(4096, config.lengths[0]))).to(model.device)
    out = model.generate(ids, max_new_tokens=config.new_tokens, do_sample=False, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


def seconds(model: Any, length: int) -> float:
    ids = torch.randint(10, 1000, (1, length), device=model.device)
    times = []
    for _ in range(4):
        runner.synchronise()
        start = time.perf_counter()
        model(ids, past_key_values=SWAACache(model.config), logits_to_keep=1)
        runner.synchronise()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def line(r: Result) -> str:
    return f"{r.processes} processes {r.recipe:<9} {r.length:>7} {r.seconds:8.3f} s, tokens equal: {r.tokens_equal}"


def table(results: list[Result]) -> Table:
    view = Table("recipe", "tokens", "processes", "first token s", "speed-up", "same tokens")
    for r in results:
        one = next(x for x in results if (x.recipe, x.length) == (r.recipe, r.length))
        speed_up = f"{one.seconds / r.seconds:.2f}"
        cells = (r.recipe, f"{r.length:,}", str(r.processes), f"{r.seconds:.3f}", speed_up)
        view.add_row(*cells, "yes" if r.tokens_equal else "no")
    return view


if __name__ == "__main__":
    main()
