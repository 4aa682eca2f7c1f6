"""Seconds from a fresh process to the first token: cold, and with the compile cache of an earlier process.

    python benchmarks/startup.py [--quick] [--out docs/benchmarks]

Two processes, each with an empty folder for torch.compile: the first saves its compile cache, the second loads it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--out", type=Path, help="folder for startup_<device>.json")
    parser.add_argument("--process", choices=["cold", "warm"], help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process:
        first_token(arguments.process, arguments.cache, TINY if arguments.quick else SHAPE)
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for process in ("cold", "warm"):
            command = [sys.executable, __file__, "--process", process, "--cache", f"{folder}/cache"]
            environment = os.environ | {
                "TORCHINDUCTOR_CACHE_DIR": f"{folder}/{process}",
                "TRITON_CACHE_DIR": f"{folder}/{process}/triton",
            }
            done = subprocess.run(
                [*command, *["--quick"] * arguments.quick],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            results[process] = json.loads(done.stdout.splitlines()[-1])
            print(process, results[process], flush=True)
    import torch
    import transformers

    import swaa_flex

    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = {
        "benchmark": "startup",
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/startup.py" + " --quick" * arguments.quick,
        "machine": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "swaa_flex": swaa_flex.__version__,
        },
        "model": TINY if arguments.quick else SHAPE,
        "results": results,
    }
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"startup_{device}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


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
