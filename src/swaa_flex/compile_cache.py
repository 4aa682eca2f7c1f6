"""`save_compile_cache` and `load_compile_cache`: what torch.compile has made, for the next process."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from ._version import __version__
from .errors import ConfigError
from .files import write_atomically

_MAGIC = b"swaa_flex compile cache\n"


def save_compile_cache(path: str | os.PathLike[str]) -> None:
    """Writes everything that torch.compile has compiled in this process to one file.

    Args:
        path: the file; it appears whole or not at all.

    Raises:
        ConfigError: if nothing has been compiled yet.
    """
    artifacts = torch.compiler.save_cache_artifacts()
    if artifacts is None:
        raise ConfigError("nothing has been compiled in this process: call warmup() or a compiled function first")
    write_atomically(Path(path), _MAGIC + json.dumps(_machine()).encode() + b"\n" + artifacts[0])


def load_compile_cache(path: str | os.PathLike[str]) -> None:
    """Reads what `save_compile_cache` wrote, so that this process need not compile it again.

    Such a file holds code that will run: load only files that you wrote yourself.

    Args:
        path: the file.

    Raises:
        ConfigError: if the file is no such cache, or was made with other versions or on another GPU; says which.
    """
    data = Path(path).read_bytes()
    if not data.startswith(_MAGIC):
        raise ConfigError(f"{path}: expected a file that swaa_flex.save_compile_cache wrote")
    header, _, artifacts = data[len(_MAGIC) :].partition(b"\n")
    try:
        made = json.loads(header)
    except (ValueError, RecursionError):
        made = None
    if not isinstance(made, dict):
        raise ConfigError(f"{path}: its header is damaged; compile again and save it anew")
    here = _machine()
    differs = [f"{name}: {made.get(name)} there, {here[name]} here" for name in here if made.get(name) != here[name]]
    if differs:
        raise ConfigError(f"{path}: made for another machine ({', '.join(differs)}); compile here and save again")
    if torch.compiler.load_cache_artifacts(artifacts) is None:
        raise ConfigError(f"{path}: its contents are damaged; compile again and save it anew")


def _machine() -> dict[str, str]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"torch": torch.__version__, "swaa_flex": __version__, "gpu": gpu}
