"""What stands in for vLLM: its configuration, its pages and its kernels; and what it serves."""

import itertools
from types import SimpleNamespace

import torch
from tiny_models import tiny

from swaa_flex import SWAAConfig

HEADS, KV_HEADS, HEAD_DIM, PAGE = 4, 2, 8, 16
RECIPES = {
    "all SWA": SWAAConfig(64, 4, (), False, 0),
    "1/2 full": SWAAConfig(64, 4, "1::2", False, 0),
    "FA decode": SWAAConfig(64, 4, (), True, 0),
    "dense tail": SWAAConfig(64, 4, (), True, 16),
    "dense tail, no FA decode": SWAAConfig(64, 4, "1::2", False, 16),
}


def served_model():
    """One that minds a key more or less, and minds rounding less."""
    shape = {"vocab_size": 1000, "hidden_size": 256, "head_dim": 64, "max_position_embeddings": 2048}
    model = tiny("llama", **shape)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(0.5)
        layer.self_attn.k_proj.weight.data.mul_(0.5)
    return model


def paged_attention(query, cache, start, keys, block_table, causal, window, scale=1.0):
    """Attention over pages `[2, pages, page, kv_heads, head_dim]`, aligned as FlashAttention aligns it."""
    out, lse = torch.full_like(query, torch.nan), torch.full((HEADS, len(query)), torch.nan)
    for number, (begin, end) in enumerate(itertools.pairwise(start)):
        rows, count = int(end - begin), int(keys[number])
        table = block_table[number]
        key, value = (part[table].flatten(0, 1)[:count].repeat_interleave(2, 1) for part in cache)
        scores = torch.einsum("qhd,khd->hqk", query[begin:end], key) * scale
        ahead = torch.arange(count) - (torch.arange(rows)[:, None] + count - rows)
        if causal:
            scores = scores.masked_fill(ahead > 0, -torch.inf)
        if window is not None:
            scores = scores.masked_fill(ahead <= -window, -torch.inf)
        lse[:, begin:end] = scores.logsumexp(-1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1).nan_to_num(), value)
    return out, lse


def varlen(q, k, v, *, cu_seqlens_q, seqused_k, block_table, causal, window_size, softmax_scale, out=None, **rest):
    """FlashAttention over pages `[pages, page, kv_heads, head_dim]`."""
    window = None if window_size is None or window_size[0] < 0 else window_size[0] + 1
    found, lse = paged_attention(
        q, torch.stack([k, v]), cu_seqlens_q, seqused_k, block_table, causal, window, softmax_scale
    )
    if out is not None:
        out.copy_(found)
    return (found, lse) if rest.get("return_softmax_lse") else found


class Server:
    """Requests whose keys and values lie in pages, in an order of their own."""

    def __init__(self, prompts, total, seed=0):
        torch.manual_seed(seed)
        self.prompts = torch.tensor(prompts)
        self.query = [torch.randn(total, HEADS, HEAD_DIM) for _ in prompts]
        pages = -(-total // PAGE)
        order = torch.randperm(pages * len(prompts) + 1)[1:].view(len(prompts), pages)
        self.block_table = order.int()
        self.cache = torch.randn(2, pages * len(prompts) + 1, PAGE, KV_HEADS, HEAD_DIM)
        slots = order[:, :, None] * PAGE + torch.arange(PAGE)
        flat = self.cache.view(2, -1, KV_HEADS, HEAD_DIM)
        self.keys, self.values = (flat[i][slots.flatten(1)][:, :total] for i in (0, 1))

    def kernel(self, query):
        def run(keys, stretches, max_keys, *, causal, window):
            assert stretches.start.diff().max() <= stretches.max_rows and keys.max() <= max_keys
            return paged_attention(query, self.cache, stretches.start, keys, stretches.block_table, causal, window)

        return run

    def expected(self, rule, request, computed, length):
        """Dense attention of rows under the mask of the recipe."""
        config = SWAAConfig(rule.window, rule.sinks, (), rule.dense_decode, rule.dense_tail)
        mask = config.mask_for(0, 1, prompt_length=int(self.prompts[request]))
        rows, keys = torch.arange(computed, length)[:, None], torch.arange(length)
        visible = mask(torch.tensor(0), torch.tensor(0), rows, keys)
        key, value = (x[request, :length].repeat_interleave(2, 1) for x in (self.keys, self.values))
        scores = torch.einsum("qhd,khd->hqk", self.query[request][computed:length], key)
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), value)


def merge(out, first, first_lse, second, second_lse):
    weights = torch.stack([first_lse, second_lse]).softmax(0).mT[..., None]
    out.copy_(first * weights[0] + second * weights[1])


def vllm_config(swaa=None, saved=None, layers=4, **changed):
    text = SimpleNamespace(num_hidden_layers=layers, model_type="qwen3", **({"swaa": saved} if saved else {}))
    fields = {"prefix_caching": False, "transfer": None, "speculative": None, "embeds": False, "runner": "generate"}
    fields |= {"context_parallel": 1, "halves": False, "backend": "CUSTOM", "fast_prefill": False} | changed
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=text, hf_text_config=text, enable_prompt_embeds=fields["embeds"], runner_type=fields["runner"]
        ),
        additional_config=fields.get("additional", {} if swaa is None else {"swaa": swaa}),
        attention_config=SimpleNamespace(backend=fields["backend"] and SimpleNamespace(name=fields["backend"])),
        cache_config=SimpleNamespace(
            enable_prefix_caching=fields["prefix_caching"], kv_sharing_fast_prefill=fields["fast_prefill"]
        ),
        kv_transfer_config=fields["transfer"],
        speculative_config=fields["speculative"],
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=fields["context_parallel"], use_ubatching=fields["halves"]
        ),
    )


def speculative(backend=None):
    return SimpleNamespace(attention_backend=backend and SimpleNamespace(name=backend))
