"""The results of single samples on disk: a JSON line each, in files that no two measurements share."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..files import write_atomically
from ..tuning.identity import hashed

if TYPE_CHECKING:
    from .sample import Sample


def key(sample: Sample) -> str:
    """A fingerprint of all that a sample is."""
    return hashed(vars(sample))


class Results:
    """The finished samples of one configuration, task and length.

    The name of the file ends with the fingerprint of all that a result depends on besides the sample, which a `.json`
    beside it spells out. Each process appends to a file of its own. Nothing is ever removed from it: a line that is
    no JSON, as a killed run leaves one, counts for nothing, and its sample is computed again.

    Args:
        folder: where the files are.
        facts: what the results depend on, as JSON; `task` and `length` are part of the name.
        process: number of this process.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], process: int = 0) -> None:
        of_task = re.sub(r"\W+", "-", f"{facts['task']} {facts['length'] or ''}").strip("-")
        self.folder = folder
        self.name = f"{of_task}-{hashed(facts)}"
        self.path = folder / (f"{self.name}.{process}.jsonl" if process else f"{self.name}.jsonl")
        if process == 0:
            write_atomically(folder / f"{self.name}.json", json.dumps(facts, indent=2) + "\n")

    def read(self) -> dict[str, dict[str, Any]]:
        """The results of all processes, by the key of the sample."""
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob(f"{self.name}*.jsonl")):
            for number, line in enumerate(path.read_bytes().splitlines(), 1):
                try:
                    result = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                try:
                    found.setdefault(result["key"], result)
                except (KeyError, TypeError) as error:
                    raise ConfigError(
                        f"{path}, line {number}: expected a result as JSON; delete the line, and its sample is "
                        "computed again"
                    ) from error
        return found

    def append(self, samples: Sequence[Sample], results: Sequence[Mapping[str, Any]]) -> None:
        """Adds results, which are on disk afterwards."""
        lines = [
            json.dumps({"id": sample.id, "key": key(sample), **result}) + "\n"
            for sample, result in zip(samples, results, strict=True)
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    lines.insert(0, "\n")  # ends the line that a killed run has begun
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())
