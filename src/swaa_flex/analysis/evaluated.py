"""`evaluated`: a model that is tried out and then as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..hf import NAME
from ..hf.adapt import adapt, restore
from ..hf.config import set_recipe


@contextmanager
def evaluated(model: Any) -> Iterator[None]:
    """Evaluation mode, no gradients, and `model.config.swaa` to be set at will; afterwards all is as before.

    Args:
        model: a causal language model of transformers, under "swaa_flex" or not.

    Raises:
        UnsupportedModelError: if the model's code does not use transformers' attention interface.
    """
    before, windowed = model.config.swaa, model.config._attn_implementation == NAME
    modes = [(module, module.training) for module in model.modules()]
    try:
        if not windowed:
            adapt(model, "full")
        model.eval()
        with torch.no_grad():
            yield
    finally:
        if not windowed:
            restore(model)
        set_recipe(model.config, before)
        for module, training in modes:
            module.training = training
