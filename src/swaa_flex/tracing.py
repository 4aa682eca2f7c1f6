"""Whether a graph is being traced: one question, asked everywhere in the same way."""

from __future__ import annotations

import torch


def is_tracing() -> bool:
    """Whether this code is being traced into a graph, by torch.compile or torch.export.

    `torch.compiler.is_compiling` says yes to all threads of a process while one of them compiles (torch 2.13 to 2.15),
    so that a forward of another thread would be taken for one that is traced.
    """
    return torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()
