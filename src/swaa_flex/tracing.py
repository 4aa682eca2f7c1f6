"""Whether a graph is being traced: one question, asked everywhere in the same way."""

from __future__ import annotations

import torch

is_tracing = torch.compiler.is_compiling
"""Whether this code is being traced into a graph, by torch.compile or torch.export.

Torch's own function, not one around it: where torch.compile gives up on a function it compiles what that calls, and
ours would say yes there. While one thread compiles it says yes to all threads (torch 2.13 to 2.15; docs/limits.md).
"""
