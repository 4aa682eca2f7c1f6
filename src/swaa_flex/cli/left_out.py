"""What the commands say of rows that they cannot use."""

from __future__ import annotations

from collections.abc import Callable, Sequence

SHOWN = 5


def report(heading: str, rows: Sequence[str], say: Callable[[str], None]) -> None:
    """Names the first rows that are left out, under a heading, and counts the others; nothing if there are none."""
    if not rows:
        return
    say(heading)
    for row in rows[:SHOWN]:
        say(f"  {row}")
    if len(rows) > SHOWN:
        say(f"  and {len(rows) - SHOWN} more")
