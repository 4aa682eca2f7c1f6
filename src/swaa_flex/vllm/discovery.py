"""The entry point of the logits processor, which only a supported vLLM is to find.

vLLM looks for entry points in `vllm.logits_processors` by itself, and every version would find one that is installed
with the package. While there is one, vLLM 0.24 to 0.30 run their older model runner and refuse models that only the
newer one runs; vLLM 0.31 and later do not start with a class of the interface of 0.23. So the entry point comes from a
provider of metadata, which `importlib.metadata` asks beside the installed packages.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from typing import Any

METADATA = {
    "METADATA": "Metadata-Version: 2.1\nName: swaa-flex-vllm\nVersion: 0\n",
    "entry_points.txt": "[vllm.logits_processors]\nswaa_flex_prompts = swaa_flex.vllm.prompts:PromptLengths\n",
}


def offer_logits_processor() -> None:
    """Lets this process find the entry point. May be called again."""
    if FINDER not in sys.meta_path:
        sys.meta_path.append(FINDER)


class EntryPointOnly(Distribution):
    """A package that consists of its metadata."""

    def read_text(self, filename: str) -> str | None:
        """The metadata file of this name, if there is one."""
        return METADATA.get(filename)

    def locate_file(self, path: Any) -> Path:
        """Where a file of the package would be; it has none."""
        return Path(path)


class Finder(DistributionFinder):
    """Finds that package, and no modules."""

    def find_spec(self, *args: Any) -> None:
        """Leaves every import to the other finders."""

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterable[Distribution]:
        """The package, where all are asked for or this one is."""
        found = EntryPointOnly()
        return [found] if context is None or context.name in (None, found.name) else []


FINDER = Finder()
