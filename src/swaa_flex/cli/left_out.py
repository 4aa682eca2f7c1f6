"""What the commands say of rows that they cannot use."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import typer

from ..errors import listed


def say(text: str) -> None:
    """On stderr, in the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        typer.echo(text, err=True)


def report(heading: str, rows: Sequence[str], say: Callable[[str], None]) -> None:
    """Names the first rows that are left out, under a heading, and counts the others; nothing if there are none."""
    if rows:
        say(listed(heading, rows))
