"""Scripts that run in several processes: started by a test, and left by the scripts themselves."""

import os
import subprocess
import sys
from pathlib import Path

import torch

PROCESSES = 2


def run_in_processes(name: str, *arguments: object, timeout: float = 240, **environment: str) -> None:
    script = Path(__file__).with_name(name)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    # Without a GPU in sight transformers picks gloo, as NCCL cannot have two processes on one GPU.
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    command = [*launcher, str(script), *map(str, arguments)]
    with subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            process.terminate()  # unlike kill, it lets torchrun end the processes that it has started
    assert process.returncode == 0, output


def leave() -> None:
    """Ends a script whose results are written, without the shutdown of the interpreter.

    In one of some 250 runs a process is aborted there ("terminate called without an active exception", no Python
    frame; gloo, torch 2.11), and torchrun then ends the other one too.
    """
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
