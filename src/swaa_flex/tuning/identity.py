"""What a run depends on, as short texts that can be compared when it is started again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor

CHUNK = 1 << 22  # bytes that a thread hashes at a time


def identity(model: Any) -> dict[str, str]:
    """A fingerprint of a model's configuration, without its recipe and its path, and one of all bytes of its weights.

    The weights are its parameters and the buffers that a checkpoint has. All cores take part in hashing them.
    """
    config = model.config.to_dict()
    for name in ("swaa", "_name_or_path", "transformers_version"):
        config.pop(name, None)
    return {"model": hashed(config), "weights": hashed(list(_weights(model)))}


def tokenizer_identity(tokenizer: Any) -> str:
    """A fingerprint of what a tokenizer makes of texts and chats, and texts of tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # tokenizers that are Python code have none
    if backend is None:
        whole = tokenizer.get_vocab()
    else:
        of_last_call = {"padding": None, "truncation": None}
        whole = json.loads(backend.to_str()) | of_last_call
    return hashed([whole, tokenizer.special_tokens_map, tokenizer.chat_template])


def hashed(value: Any) -> str:
    """16 hexadecimal digits for a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _weights(model: Any) -> Iterator[tuple[str, list[int], list[str]]]:
    """Type, shape and hashes of each weight, in the order of the modules."""
    with ThreadPoolExecutor() as pool:
        for module in model.modules():
            own: dict[str, Any] = {}
            with align_module_device(module):  # fetches what accelerate keeps on the disk or on another device
                module._save_to_state_dict(own, "", keep_vars=False)
                for tensor in own.values():
                    if isinstance(tensor, Tensor):  # other things are settings
                        yield str(tensor.dtype), list(tensor.shape), list(pool.map(_hash, _chunks(tensor)))


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of a tensor, and of those that it is made of, as quantized and sharded ones are."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _chunks(getattr(tensor, name))
    elif tensor.device.type != "meta":
        yield from tensor.detach().flatten().view(torch.uint8).split(CHUNK)


def _hash(part: Tensor) -> str:
    return hashlib.sha256(part.cpu().numpy().data).hexdigest()
