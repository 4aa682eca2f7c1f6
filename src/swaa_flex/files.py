"""Files that are there as a whole or not at all, and folders that are files."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import ConfigError


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that a reader, or a run that was killed, finds the old or the new one whole.

    Args:
        path: the file; its folder is made.
        text: what it is to hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    part.write_text(text)
    os.replace(part, path)


def refuse_file(folder: str | Path, called: str = "") -> None:
    """Refuses to write where a file lies, of which transformers only logs.

    Args:
        folder: where to write.
        called: what the message begins with, the path itself if that is not said.

    Raises:
        ConfigError: if it is a file.
    """
    if Path(folder).exists() and not Path(folder).is_dir():
        raise ConfigError(f"{called or folder} is a file; expected a folder, existing or new")
