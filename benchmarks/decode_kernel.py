"""One token's attention over a long cache: FlexAttention's decode kernel, its defaults and our options, against SDPA.

    python benchmarks/decode_kernel.py [--out docs/benchmarks]     (needs a CUDA device)

Prints microseconds and the share of the measured read bandwidth. This is what the options in kernels.py come from.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from decode import read_bandwidth
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import swaa_flex
from swaa_flex.masks import causal

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
CASES = ((1, 131072), (8, 32768), (1, 8192), (1, 2304))
DEFAULTS: dict[str, Any] = {}
OURS = {"BLOCK_N": 64, "num_stages": 3, "num_warps": 4}
OPTIONS = {"flex defaults": DEFAULTS, "flex, ours": OURS, "flex, BLOCK_N 128": OURS | {"BLOCK_N": 128}}


@dataclass(frozen=True)
class Result:
    method: str
    batch: int
    length: int
    microseconds: float
    bandwidth_share: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for decode_kernel_cuda.json")
    arguments = parser.parse_args()
    bandwidth = read_bandwidth("cuda")
    results = []
    for batch, length in CASES:
        query = torch.randn(batch, HEADS, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        key, value = torch.randn(2, batch, KV_HEADS, length, HEAD_DIM, device="cuda", dtype=torch.bfloat16).unbind(0)
        floor = 2 * key.numel() * 2 / bandwidth * 1e6
        for method, call in calls(query, key, value).items():
            micro = timed(call)
            results.append(Result(method, batch, length, micro, floor / micro))
            print(
                f"{batch} x {length:>6}  {method:<18} {micro:8.1f} us  {floor / micro:5.2f} of the bandwidth",
                flush=True,
            )
    report = {
        "benchmark": "decode_kernel",
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/decode_kernel.py",
        "machine": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "swaa_flex": swaa_flex.__version__},
        "read_bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "results": [asdict(result) for result in results],
    }
    if arguments.out:
        (arguments.out / "decode_kernel_cuda.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def calls(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Callable[[], Tensor]]:
    length = key.shape[2]
    position = torch.tensor(length - 1, device="cuda")
    ready = swaa_flex.plan(
        causal(), 1, length, batch=key.shape[0], heads=HEADS, device="cuda", backend="triton", q_offset=position
    )
    block_mask = ready.segments[0].block_mask

    def flex(options: dict[str, Any]) -> Callable[[], Tensor]:
        torch._dynamo.reset()
        compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
        options = {"BACKEND": "TRITON_DECODE"} | options
        return lambda: compiled(query, key, value, block_mask=block_mask, enable_gqa=True, kernel_options=options)

    def sdpa(backend: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

        return call

    return {
        "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
        **{name: flex(options) for name, options in OPTIONS.items()},
    }


def timed(call: Callable[[], Tensor]) -> float:
    """Microseconds, the median of replays of a CUDA graph of five calls."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(5):
            call()
    times = []
    for _ in range(30):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 5 * 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    main()
