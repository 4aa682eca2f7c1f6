"""Layers by what their window costs: the loss on calibration text, measured with one set of full layers or another."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..config import SWAAConfig
from ..errors import ConfigError, did_you_mean
from ..evaluation.sample import Sample
from ..evaluation.scoring import continuation_log_probs
from ..files import held, write_atomically
from ..tuning.identity import hashed, identity
from .choice import LayerChoice, layers_of
from .evaluated import evaluated

Loss = Callable[[Any], float]
"""Says how bad a model is as it is now: finite, the smaller the better. Its `fingerprint` attribute, or else its name,
tells it from others in the file of an interrupted search."""

METHODS = ("sensitivity", "greedy")


@dataclass(frozen=True)
class AnswerLoss:
    """Cross-entropy of answers to long prompts, in nats per token.

    The answers are decode rows, as in generation: of text, the tokens after a long prefix; of retrieval prompts, the
    right answers.

    Attributes:
        pairs: Token ids of prompts and their answers.
        batch_size: Pairs in one forward. More are faster on a GPU, and take more of its memory.

    Raises:
        ConfigError: If there is no pair, one has no prompt or no answer, or the batch size is not positive.

    Examples:
        >>> AnswerLoss.of_texts([[5, 6, 7, 8]], scored=1).pairs
        [([5, 6, 7], [8])]
    """

    pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    batch_size: int = 1

    def __post_init__(self) -> None:
        """Check that there is something to score."""
        if not self.pairs or not all(len(asked) and len(answer) for asked, answer in self.pairs):
            raise ConfigError("pairs: expected at least one pair of a prompt and an answer, neither of them empty")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size}: expected at least 1")

    @classmethod
    def of_texts(cls, texts: Sequence[Sequence[int]], scored: int) -> AnswerLoss:
        """Scores the last `scored` tokens of each text, given those before."""
        return cls([(text[:-scored], text[-scored:]) for text in texts])

    @property
    def fingerprint(self) -> str:
        """Tells these pairs from others."""
        return hashed([[list(part) for part in pair] for pair in self.pairs])

    def __call__(self, model: Any) -> float:
        """The mean over all tokens of all answers."""
        samples = [Sample("", tuple(asked), continuations=(tuple(answer),)) for asked, answer in self.pairs]
        total = 0.0
        for first in range(0, len(samples), self.batch_size):
            rows = continuation_log_probs(model, samples[first : first + self.batch_size])
            total -= sum(row.sum().item() for row in rows)
        return total / sum(len(answer) for _, answer in self.pairs)


def sensitivity(
    model: Any,
    loss: Loss,
    config: SWAAConfig,
    budget: int,
    *,
    path: str | Path | None = None,
    progress: bool = True,
) -> LayerChoice:
    """Keeps the layers full whose window alone, with all others full, raises the loss most.

    Args:
        model: a causal language model of transformers; afterwards it is as before.
        loss: what is to stay low, such as an `AnswerLoss`.
        config: what the other layers get; its own full layers do not count.
        budget: how many layers stay full.
        path: a JSON file for the losses, each written at once; the same call after an interruption goes on from there,
            and so does a search with another method or budget. One search at a time writes it.
        progress: show a progress bar, if stderr is a terminal.

    Returns:
        The choice; scores are the rises of the loss.

    Raises:
        ConfigError: if the budget is out of range, the configuration has no window, a loss is not finite, or `path`
            belongs to another model, loss, configuration or device, or another search is writing it.
        UnsupportedModelError: if the model's code does not use transformers' attention interface.
    """
    layers = layers_of(model, config, budget)
    total = evaluations("sensitivity", layers, budget)
    with evaluated(model), _Losses(model, loss, config, path).shown(total, progress) as loss_with:
        full = loss_with(range(layers))
        scores = [loss_with(set(range(layers)) - {layer}) - full for layer in range(layers)]
    return LayerChoice.of_largest("sensitivity", "rise of the loss if only it slides", scores, config, budget)


def greedy(
    model: Any,
    loss: Loss,
    config: SWAAConfig,
    budget: int,
    *,
    path: str | Path | None = None,
    progress: bool = True,
) -> LayerChoice:
    """Starts with all layers sliding, and each time makes the layer full that lowers the loss most.

    It sees what layers do together, which `sensitivity` does not, and takes about `budget` times as long. The first
    layers of a larger budget are those of a smaller one.

    Args:
        model: a causal language model of transformers; afterwards it is as before.
        loss: what is to become low, such as an `AnswerLoss`.
        config: what the other layers get; its own full layers do not count.
        budget: how many layers become full.
        path: as for `sensitivity`.
        progress: show a progress bar, if stderr is a terminal.

    Returns:
        The choice; scores are by how much a layer lowered the loss when it became full, or, if it stayed sliding,
        would have lowered it in place of the last one.

    Raises:
        ConfigError: as `sensitivity`.
        UnsupportedModelError: if the model's code does not use transformers' attention interface.
    """
    layers = layers_of(model, config, budget)
    total = evaluations("greedy", layers, budget)
    scores = [0.0] * layers
    order: list[int] = []
    with evaluated(model), _Losses(model, loss, config, path).shown(total, progress) as loss_with:
        now = loss_with(order)
        while len(order) < budget:
            found = {layer: loss_with([*order, layer]) for layer in range(layers) if layer not in order}
            for layer, lowered in found.items():
                scores[layer] = now - lowered
            best = min(found, key=found.__getitem__)
            order.append(best)
            now = found[best]
    return LayerChoice.of_order("greedy", "fall of the loss when it becomes full", scores, config, order)


def evaluations(method: str, layers: int, budget: int) -> int:
    """How many times a search computes the loss.

    Args:
        method: "sensitivity" or "greedy".
        layers: of the model.
        budget: how many of them stay full.

    Raises:
        ConfigError: if there is no such method.

    Examples:
        >>> evaluations("sensitivity", 30, 15), evaluations("greedy", 30, 15)
        (31, 346)
    """
    if method not in METHODS:
        raise ConfigError(f"method={method!r}: expected {' or '.join(METHODS)}{did_you_mean(method, METHODS)}")
    return 1 + (layers if method == "sensitivity" else sum(layers - chosen for chosen in range(budget)))


class _Losses:
    """The loss by set of full layers, measured once each, and kept in a file if there is one."""

    def __init__(self, model: Any, loss: Loss, config: SWAAConfig, path: str | Path | None) -> None:
        self.model, self.loss, self.config = model, loss, config
        self.path = None if path is None else Path(path)
        self.settings = {
            "config": replace(config, full_attention_layers=()).to_dict(),
            "loss": getattr(loss, "fingerprint", None) or getattr(loss, "__qualname__", type(loss).__qualname__),
            "device": model.device.type,
            **identity(model),
        }
        self.known: dict[str, float] = {}

    @contextmanager
    def shown(self, total: int, progress: bool) -> Iterator[Callable[[Collection[int]], float]]:
        """The loss with a set of full layers as a function, under a progress bar for `total` calls.

        As long as the search lasts, the file is its own.
        """
        with nullcontext() if self.path is None else held(self.path):
            if self.path is not None and self.path.exists():
                self.known = self._read(self.path)
            with self._bar(total, progress) as loss_with:
                yield loss_with

    @contextmanager
    def _bar(self, total: int, progress: bool) -> Iterator[Callable[[Collection[int]], float]]:
        console = Console(stderr=True)
        columns = TextColumn("losses"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console, disable=not (progress and console.is_terminal)) as bar:
            task = bar.add_task("", total=total)

            def loss_with(full: Collection[int]) -> float:
                found = self._with(sorted(full))
                bar.advance(task)
                return found

            yield loss_with

    def _with(self, full: list[int]) -> float:
        name = ",".join(map(str, full))
        if name not in self.known:
            self.model.config.swaa = replace(self.config, full_attention_layers=full)
            found = float(self.loss(self.model))
            if not math.isfinite(found):
                raise ConfigError(
                    f"the loss is {found} with full layers {full}: expected a finite number; check the calibration "
                    "data, and load the model in bfloat16 or float32"
                )
            self.known[name] = found
            if self.path is not None:
                file = {"settings": self.settings, "loss by full layers": self.known}
                write_atomically(self.path, json.dumps(file, indent=1) + "\n")
        return self.known[name]

    def _read(self, path: Path) -> dict[str, float]:
        try:
            file = json.loads(path.read_bytes())
            settings, known = dict(file["settings"]), dict(file["loss by full layers"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: expected the losses of an interrupted search; name another file") from error
        differ = [name for name in self.settings if settings.get(name) != self.settings[name]]
        if differ:
            raise ConfigError(
                f"{path} holds the losses of another search, which differs in {', '.join(differ)}; delete it or name "
                "another file"
            )
        return known
