"""Lists and tasks as people write them on the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..evaluation import tasks as all_tasks
from ..evaluation.sample import Task
from . import left_out, paths

_OPTIONS = {"niah": ("text", "style"), "vt": ("text", "style"), "ppl": ("text",), "qa": ("style", "judge")}


def names(given: str) -> list[str]:
    """What stands between commas, each once."""
    return list(dict.fromkeys(part.strip() for part in given.split(",") if part.strip()))


def tasks(given: str, options: Mapping[str, Any]) -> list[Task]:
    """Tasks, each with those of the options that it has.

    Args:
        given: names with commas between them.
        options: by name; None where the user has said nothing.

    Raises:
        ConfigError: if there is no such task, or none of them has the judge that was asked for.
    """
    found: list[Task] = []
    kinds = {name: re.split("[_:]", name)[0] for name in names(given)}
    for name, kind in kinds.items():
        if kind in ("qa", "choice") and ":" in name:
            paths.read_file("--tasks", Path(name.partition(":")[2]))
        has = [option for option in _OPTIONS.get(kind, ()) if options.get(option) is not None]
        found += all_tasks.get(name, **{option: options[option] for option in has})
    if options.get("judge") is not None and "qa" not in kinds.values():
        raise ConfigError(f"--judge {options['judge']}: it is for answers to qa:FILE, and --tasks has none")
    for task in found:
        rows = getattr(task, "left_out", ())
        left_out.report(f"{len(rows)} rows of {task.name} are left out:", rows, left_out.say)
    return found
