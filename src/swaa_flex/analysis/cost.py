"""What a configuration costs in time and memory: counted for a machine that is not there, or measured on this one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import LayerKind, SWAAConfig
from ..hf import SWAACache, prompt
from ..hf.cache import CACHE
from ..hf.config import kv_shape
from .evaluated import evaluated


@dataclass(frozen=True)
class Rates:
    """What a machine does.

    Attributes:
        name: Of the machine.
        matmul: Floating point operations per second of matrix products in bfloat16.
        attention: The same of the attention kernels, counting visible pairs only.
        bandwidth: Bytes per second that it reads from memory.
    """

    name: str
    matmul: float
    attention: float
    bandwidth: float


H200 = Rates("NVIDIA H200", matmul=775e12, attention=381e12, bandwidth=4.24e12)
"""As measured: docs/benchmarks, prefill_kernel_h200_cuda.json (triton, 128 k tokens) and decode_cuda_batch1.json."""


@dataclass(frozen=True)
class Cost:
    """Of one sequence.

    Attributes:
        first_token_s: Seconds from the prompt to the first token.
        token_s: Seconds per further token.
        cache_bytes: What the cache holds after the prompt.
    """

    first_token_s: float
    token_s: float
    cache_bytes: int

    def total_s(self, new_tokens: int) -> float:
        """Seconds for the prompt and an answer."""
        return self.first_token_s + self.token_s * max(0, new_tokens - 1)


def visible_pairs(config: SWAAConfig, kind: LayerKind, length: int) -> int:
    """Query-key pairs that a layer of this kind looks at in a prompt.

    >>> visible_pairs(SWAAConfig(2, 1, (), True, dense_tail=1), LayerKind(False, True), 5)
    14
    >>> visible_pairs(SWAAConfig(2, 1, (), True, dense_tail=0), LayerKind(False, True), 5)
    12
    """
    row = torch.arange(1, length + 1)
    if not _slides(config, kind):
        return int(row.sum())
    assert config.sliding_window is not None
    near = row.clamp(max=config.sliding_window)
    seen = near + (row - near).clamp(max=config.sink_tokens)
    dense = row > length - config.dense_tail
    return int(torch.where(dense, row, seen).sum())


def estimate(model: Any, config: SWAAConfig, context: int, rates: Rates = H200) -> Cost:
    """The time that matrix products, attention and reading memory take at a machine's rates, without any overhead.

    Norms, rotary embeddings and launches are not counted, so it is a bound, and ratios between configurations are
    larger than they will be.

    Args:
        model: of transformers, with all its experts counted as used.
        config: what its attention becomes.
        context: tokens of the prompt.
        rates: of the machine.
    """
    text = model.config.get_text_config()
    kv_heads, head_dim = kv_shape(text)
    embedding = model.get_input_embeddings().weight
    weights = sum(weight.numel() for weight in model.parameters() if weight.dim() > 1)
    output = embedding.numel()  # the matrix of the logits: of one row in a prompt
    weights -= embedding.numel() if text.tie_word_embeddings else 2 * embedding.numel()
    kinds = config.resolve(text.num_hidden_layers)
    pairs = sum(visible_pairs(config, kind, context) for kind in kinds)
    operations = 4 * text.num_attention_heads * head_dim * pairs
    per_key = 2 * kv_heads * head_dim * 2
    looked_at = sum(_keys(config, kind, context) for kind in kinds) * per_key
    return Cost(
        first_token_s=2 * weights * context / rates.matmul + operations / rates.attention,
        token_s=((weights + output) * 2 + looked_at) / rates.bandwidth,
        cache_bytes=looked_at,
    )


def measure(model: Any, config: SWAAConfig, context: int, tokens: int = 16) -> Cost:
    """The time that a prompt and some tokens take on the model's device, uncompiled, with a `SWAACache`.

    Args:
        model: of transformers; afterwards it is as before.
        config: what its attention becomes.
        context: tokens of the prompt, which are random.
        tokens: how many are decoded after it.
    """
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, context), device=model.device)
    with evaluated(model):
        model.config.swaa = config
        _run(model, ids, 1)  # compiles kernels
        return _run(model, ids, tokens)


def _run(model: Any, ids: Tensor, tokens: int) -> Cost:
    cache = SWAACache(model.config)
    with prompt(ids.shape[1]):
        begun = _now(model.device)
        token = model(ids, **{CACHE: cache}, logits_to_keep=1).logits[:, -1:].argmax(-1)
        first = _now(model.device)
        for _ in range(tokens):
            token = model(token, **{CACHE: cache}).logits[:, -1:].argmax(-1)
        done = _now(model.device)
    return Cost(first - begun, (done - first) / tokens, cache.memory()["total"])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _slides(config: SWAAConfig, kind: LayerKind) -> bool:
    return config.sliding_window is not None and not kind.full


def _keys(config: SWAAConfig, kind: LayerKind, context: int) -> int:
    """How many keys this kind of layer holds between two tokens, and the next one looks at besides its own."""
    if not _slides(config, kind) or kind.full_attention_decode:
        return context
    assert config.sliding_window is not None
    return min(context, config.sliding_window - 1 + config.sink_tokens)
