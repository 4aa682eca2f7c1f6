"""Texts to hide needles in, and to read."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

from ..errors import ConfigError

NOISE = (
    "The tide comes in and the tide goes out.",
    "Snow fell on the hills during the night.",
    "A train passes the village once an hour.",
    "The baker opens the shop before sunrise.",
    "Leaves turn yellow when the days get short.",
)


def read(path: str | Path | None = None) -> str:
    """A text: of a file, or without one the help texts that come with Python.

    Raises:
        ConfigError: if the file is not there, is no UTF-8 text, or is empty.
    """
    if path is None:
        return "\n\n".join(topics[name].strip() for name in sorted(topics))
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"text={str(path)!r}: expected a text file in UTF-8 ({error})") from error
    if not text.strip():
        raise ConfigError(f"text={str(path)!r}: the file is empty; expected a text")
    return text
