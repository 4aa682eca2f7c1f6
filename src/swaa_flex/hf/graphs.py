"""CUDA graphs over one memory pool: what a compiled model replays instead of launching kernels one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class Graphs:
    """Captures functions of a device; on a CPU a function stays what it is.

    Graphs run one after another, so they share the memory in which they compute: what one returns is overwritten by
    the next one that runs.

    Args:
        device: where they run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None

    def capture(self, run: Callable[[], Result]) -> Callable[[], Result]:
        """A function that does again what `run` does now, with tensors at the same addresses.

        Args:
            run: without arguments. It runs at once, so that what it needs is compiled, and again to be recorded.
        """
        if self.device.type != "cuda":
            run()
            return run
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on to use the device.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            result = run()
        self._pool = graph.pool()

        def replay() -> Result:
            graph.replay()
            return result

        return replay
