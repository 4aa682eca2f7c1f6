"""Numbers of tokens as people write them."""

from __future__ import annotations

import re

from ..errors import ConfigError


def read(option: str, given: str) -> int:
    """The number behind "3000" or "4k".

    Raises:
        ConfigError: if it is none; names the option.
    """
    number = re.fullmatch(r"([1-9][0-9]*)(k?)", given.lower())
    if number is None:
        raise ConfigError(f"{option} {given}: expected a number of tokens such as 3000, or 4k for 4096")
    return int(number[1]) * (1024 if number[2] else 1)


def shown(count: int) -> str:
    """3000, or 4k for 4096."""
    return f"{count // 1024}k" if count % 1024 == 0 else str(count)
