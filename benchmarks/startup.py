"""Seconds from a fresh process to the first token: cold, and with the compile cache of an earlier process.

    python benchmarks/startup.py [--quick] [--out docs/benchmarks]

Two processes, each with an empty folder for torch.compile: the first saves its compile cache, the second loads it.
Kernels of flash-attn-4, where that is installed, are in a folder of their own that the second process finds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import runner
from rich.table import Table

SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 1 << 17,
}
TINY = SHAPE | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}


@dataclass(frozen=True)
class Config:
    shape: dict[str, Any]


@dataclass(frozen=True)
class Result:
    process: str
    model_s: float  # making one with random weights
    first_token_s: float  # from then on, imports not counted


def main() -> None:
    parser = runner.arguments(__doc__)
    parser.add_argument("--process", choices=["cold", "warm"], help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    given = parser.parse_args()
    shape = TINY if given.quick else SHAPE
    if given.process:
        first_token(given.process, given.cache, shape)
        return
    report = runner.Report(f"startup_{runner.device()}", Config(shape), line, given.out)
    with tempfile.TemporaryDirectory() as folder:
        for process in ("cold", "warm"):
            command = [sys.executable, __file__, "--process", process, "--cache", f"{folder}/cache"]
            environment = os.environ | {
                "TORCHINDUCTOR_CACHE_DIR": f"{folder}/{process}",
                "TRITON_CACHE_DIR": f"{folder}/{process}/triton",
                "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",
                "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": f"{folder}/flash",
            }
            quick = ["--quick"] * given.quick
            done = subprocess.run([*command, *quick], env=environment, stdout=subprocess.PIPE, text=True, check=True)
            report.add(Result(process, **json.loads(done.stdout.splitlines()[-1])))
    report.close(table(report.results))


def line(r: Result) -> str:
    return f"{r.process}: model after {r.model_s:.1f} s, first token {r.first_token_s:.1f} s later"


def table(results: list[Result]) -> Table:
    view = Table("process", "model s", "first token s")
    for r in results:
        view.add_row(r.process, f"{r.model_s:.1f}", f"{r.first_token_s:.1f}")
    return view


def first_token(process: str, cache: str, shape: dict[str, int]) -> None:
    begun = time.perf_counter()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import swaa_flex

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("qwen3", **shape),
            dtype=torch.bfloat16 if device == "cuda" else torch.float32,
            attn_implementation="swaa_flex",
        )
    loaded = time.perf_counter()
    if process == "warm":
        swaa_flex.load_compile_cache(cache)
    compiled = swaa_flex.compile(model, max_length=8192, prefill_chunk=1024, backend="inductor")
    compiled.prefill([[7] * 3000]).argmax(-1).tolist()
    token = time.perf_counter()
    if process == "cold":
        swaa_flex.save_compile_cache(cache)
    print(json.dumps({"model_s": round(loaded - begun, 1), "first_token_s": round(token - loaded, 1)}))


if __name__ == "__main__":
    main()
