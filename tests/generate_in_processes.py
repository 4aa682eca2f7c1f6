"""What one process and the processes of torchrun compute alike; started by tests/test_distributed.py."""

import os
import sys
from pathlib import Path

import torch
from processes import leave
from tiny_models import batch
from transformers import AutoModelForCausalLM

from swaa_flex import SWAACache, SWAAConfig

RECIPES = {
    "releases": SWAAConfig(
        sliding_window=16, sink_tokens=3, full_attention_layers=(), full_attention_decode=False, dense_tail=5
    ),
    "keeps": SWAAConfig(
        sliding_window=16, sink_tokens=3, full_attention_layers=(1, 3), full_attention_decode=True, dense_tail=5
    ),
}
CACHES = {
    "DynamicCache": lambda config: None,
    "SWAACache": SWAACache,
    "SWAACache of fixed size": lambda config: SWAACache(config, max_length=128),
}


def answers(path: Path, **loading) -> dict[tuple[str, str], dict]:
    """Tokens, logits and key-value heads of every recipe with every cache, for the model saved at `path`."""
    torch.manual_seed(0)
    inputs = batch()
    found = {}
    for recipe, config in RECIPES.items():
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="swaa_flex", swaa=config, **loading)
        for cache, make in CACHES.items():
            out = model.generate(
                **{name: tensor.to(model.device) for name, tensor in inputs.items()},
                past_key_values=make(model.config),
                max_new_tokens=20,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                disable_compile=True,  # what a GPU would do for the cache of fixed size
            )
            found[recipe, cache] = {
                "tokens": out.sequences.cpu(),
                "logits": torch.stack(out.logits).cpu(),
                "kv_heads": [layer.keys.shape[1] for layer in out.past_key_values.layers],
            }
    return found


if __name__ == "__main__":
    from transformers.distributed import DistributedConfig

    model, results = map(Path, sys.argv[1:])
    sharded = answers(model, distributed_config=DistributedConfig(tp_plan="auto"))
    torch.save(sharded, results / f"{os.environ['RANK']}.pt")
    leave()
