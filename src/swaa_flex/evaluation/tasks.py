"""The tasks of an evaluation, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

from ..errors import ConfigError, did_you_mean
from .judges import find
from .needles import Needles, VariableTracking
from .perplexity import Perplexity
from .questions import Choices, Questions
from .sample import Judge, Sample, Task

__all__ = ["Judge", "Sample", "Task", "get", "names"]


def get(name: str, **options: Any) -> list[Task]:
    """The tasks of a name.

    - "niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery": needles in a haystack (`Needles`); "niah"
      is all four.
    - "vt": variable tracking (`VariableTracking`).
    - "ppl": perplexity of a text after a long prefix (`Perplexity`).
    - "qa:FILE": questions to be answered freely (`Questions`).
    - "choice:FILE": questions with choices (`Choices`).

    Args:
        name: one of these.
        options: attributes of the task, such as `text="book.txt"` for a haystack or a perplexity, `style="cot"` for
            reasoning before an answer, `judge="token_f1"` (or a function) for the answers to a file.

    Raises:
        ConfigError: if there is no such task, or it does not have such an option.

    Examples:
        >>> [task.name for task in get("niah", noise=True)]
        ['niah_single', 'niah_multikey', 'niah_multivalue', 'niah_multiquery']
    """
    kind, _, file = name.partition(":")
    if kind in _OF_FILES and file:
        return [_made(_OF_FILES[kind], options | {"path": file}, name)]
    if name == "niah":
        return [_made(_TASKS[task], options, task) for task in _TASKS if task.startswith("niah_")]
    if name not in _TASKS:
        raise ConfigError(f"unknown task {name!r}: expected one of {', '.join(names())}{did_you_mean(name, names())}")
    return [_made(_TASKS[name], options, name)]


def names() -> tuple[str, ...]:
    """What `get` knows, FILE in place of a file's name."""
    return ("niah", *_TASKS, *(f"{kind}:FILE" for kind in _OF_FILES))


_TASKS: dict[str, Callable[..., Task]] = {
    "niah_single": partial(Needles, name="niah_single"),
    "niah_multikey": partial(Needles, name="niah_multikey", keys=4),
    "niah_multivalue": partial(Needles, name="niah_multivalue", values=4),
    "niah_multiquery": partial(Needles, name="niah_multiquery", keys=4, asked=4),
    "vt": partial(VariableTracking, name="vt"),
    "ppl": Perplexity,
}
_OF_FILES: dict[str, Callable[..., Task]] = {"qa": Questions, "choice": Choices}


def _made(task: Callable[..., Task], options: dict[str, Any], name: str) -> Task:
    of_class: Any = task.func if isinstance(task, partial) else task
    known = [attribute.name for attribute in fields(of_class) if attribute.init and attribute.name != "name"]
    for option in options:
        if option not in known:
            raise ConfigError(
                f"{name}: unknown option {option!r}, expected one of {', '.join(known)}{did_you_mean(option, known)}"
            )
    if "judge" in options:
        options = options | {"judge": find(options["judge"])}
    return task(**options)
