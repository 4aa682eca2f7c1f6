"""What tests share: the oracles, and a backend that counts."""

import math
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from swaa_flex import Mask

threading.stack_size(1 << 28)  # torch 2.11 traces deeply, and overflows the stack of a thread
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers fill the cores; threads of tiny operations would only wait for each other


def visible_pairs(mask: Mask, q_len: int, kv_len: int, batch: int = 1, heads: int = 1, q_offset: int = 0) -> Tensor:
    """The mask evaluated pair by pair, bool `[batch, heads, q_len, kv_len]`."""
    b = torch.arange(batch)[:, None, None, None]
    h = torch.arange(heads)[:, None, None]
    q = torch.arange(q_len)[:, None] + q_offset
    kv = torch.arange(kv_len)
    return mask(b, h, q, kv).expand(batch, heads, q_len, kv_len)


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention in float64 over all pairs; rows that see nothing give zero. Returns output and lse."""
    group = query.shape[1] // key.shape[1]
    query, key, value = (x.double() for x in (query, key, value))
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -math.inf)
    if sink_logits is not None:
        sinks = sink_logits.double().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.clamp(min=-1e300)[..., None]).exp()
    return weights[..., : value.shape[2]] @ value, lse


def counting_backend(graphs: list[Any], then: str = "eager") -> Callable[..., Any]:
    """A backend of torch.compile that collects the graphs it is given and passes them on."""

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(then)(graph, inputs)

    return backend


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
