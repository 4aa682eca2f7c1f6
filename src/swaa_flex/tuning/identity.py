"""What a run depends on, as short texts that can be compared when it is started again."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def identity(model: Any) -> dict[str, str]:
    """A model's configuration without its recipe and its path, and some numbers of each of its weights."""
    config = model.config.to_dict()
    for name in ("swaa", "_name_or_path", "transformers_version"):
        config.pop(name, None)
    probe = [
        parameter.detach().flatten()[:: max(1, parameter.numel() // 32)].double().tolist()
        for parameter in model.parameters()
        if parameter.device.type != "meta"
    ]
    return {"model": hashed(config), "weights": hashed(probe)}


def hashed(value: Any) -> str:
    """16 hexadecimal digits for a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
