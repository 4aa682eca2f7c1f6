"""Which configuration to take: candidates, what they keep and what they cost, and the fastest that keeps enough."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ..config import SWAAConfig
from ..errors import ConfigError
from ..evaluation.summary import Cell, Summary
from .cost import Cost

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FULL = SWAAConfig(sliding_window=None)


@dataclass(frozen=True)
class Quality:
    """What a configuration keeps of full attention: 1 is all of it.

    Attributes:
        ratio: Mean over the tasks of score / score of full attention, or of its perplexity / perplexity. Each is at
            most 1: what one task gains does not pay for what another loses.
        low: The same with the lower ends of the 95 % intervals of the scores, taking those of full attention as known.
            0 where there is one sample only, which tells nothing.
        by_task: The ratio of each task, which may be above 1.
    """

    ratio: float
    low: float
    by_task: dict[str, float]


@dataclass(frozen=True)
class Option:
    """A configuration with what it keeps and costs.

    Attributes:
        name: In words.
        config: For the context that was asked for.
        thinks: Whether the prompt lets the model think before it answers.
        quality: Against full attention, without thinking where the model can do without.
        cost: Of one sequence.
        total_s: Seconds for prompt, thoughts and answer.
    """

    name: str
    config: SWAAConfig
    thinks: bool
    quality: Quality
    cost: Cost
    total_s: float

    @property
    def label(self) -> str:
        """The name, and whether it thinks."""
        return f"{self.name}, thinking" if self.thinks else self.name


@dataclass(frozen=True)
class Recommendation:
    """The options, and the one to take.

    Attributes:
        chosen: The fastest that keeps enough.
        options: All, from fast to slow.
        front: Those than which none is both faster and better.
        budget: The quality to keep, relative to full attention.
        context: Tokens of the prompts that are meant.
        length: Tokens of the prompts that quality was measured on.
        timed: How times were found.
    """

    chosen: Option
    options: tuple[Option, ...]
    front: tuple[Option, ...]
    budget: float
    context: int
    length: int
    timed: str

    def measured(self, option: Option) -> SWAAConfig:
        """The configuration that the quality of an option was measured with, which is that for shorter prompts."""
        return shrunk(option.config, self.context, self.length)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""

        def plain(option: Option) -> dict[str, Any]:
            configs = {"config": option.config.to_dict(), "measured": self.measured(option).to_dict()}
            return asdict(option) | configs | {"on_front": option in self.front}

        return {
            "context": self.context,
            "length": self.length,
            "budget": self.budget,
            "timed": self.timed,
            "chosen": plain(self.chosen),
            "options": [plain(option) for option in self.options],
        }

    def draw(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draws quality over time, the front as a line and the chosen option marked (`pip install 'swaa-flex[plot]'`).

        Args:
            path: where to save the figure, as a PNG unless its suffix names another format that matplotlib writes.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ImportError("Recommendation.draw needs matplotlib: pip install 'swaa-flex[plot]'") from error
        figure = Figure(figsize=(8, 5), dpi=130, layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(self.budget, color="grey", linewidth=0.8, linestyle="--", label=f"budget {self.budget:g}")
        axes.plot([o.total_s for o in self.front], [o.quality.ratio for o in self.front], color="#2f6db5", linewidth=1)
        for option in self.options:
            colour = "#2f6db5" if option in self.front else "#9aa4ae"
            axes.errorbar(
                option.total_s,
                option.quality.ratio,
                [[max(0.0, option.quality.ratio - option.quality.low)], [0.0]],
                marker="D" if option.thinks else "o",
                color=colour,
                capsize=2,
                linewidth=0.8,
            )
        for seconds, group in itertools.groupby(enumerate(self.options, 1), lambda item: f"{item[1].total_s:.3g}"):
            numbers, options = zip(*group, strict=True)  # options that take the same time share a label
            place = float(seconds), max(option.quality.ratio for option in options)
            axes.annotate(", ".join(map(str, numbers)), place, (5, 4), textcoords="offset points", size=8)
        chosen = self.chosen
        axes.scatter(
            chosen.total_s,
            chosen.quality.ratio,
            160,
            facecolor="none",
            edgecolor="#d1495b",
            label=chosen.label,
            zorder=3,
        )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:.3g}")
        axes.xaxis.set_minor_formatter("{x:.3g}")
        axes.tick_params(labelsize=7)
        axes.set_xlabel(f"seconds for {self.context} tokens and the answer ({self.timed})", size=8)
        axes.set_ylabel(f"quality relative to full attention, at {self.length} tokens", size=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        if path is not None:
            figure.savefig(path)
        return figure


def candidates(
    base: SWAAConfig,
    windows: Sequence[int],
    layer_sets: Mapping[str, list[int] | str],
    *,
    context: int = 1,
    length: int = 1,
) -> dict[str, SWAAConfig]:
    """What to try: full attention; every layer sliding, without and with full-attention decode; and the layer sets.

    Names say which window runs where quality is measured on shorter prompts.

    Args:
        base: what they have in common: sinks and dense tail.
        windows: in tokens.
        layer_sets: layers that stay full, by what to call them; with full-attention decode.
        context: tokens of the prompts that are meant.
        length: tokens of the prompts that quality is measured on (`shrunk`).
    """
    found = {"full attention": FULL}
    for window in windows:
        near = replace(base, sliding_window=window, full_attention_layers=())
        runs = shrunk(near, context, length).sliding_window
        name = f"window {_tokens(window)}" if runs == window else f"window {_tokens(window)} (run as {runs})"
        found[f"{name}, no FA decode"] = replace(near, full_attention_decode=False)
        found[name] = replace(near, full_attention_decode=True)
        for layers_name, layers in layer_sets.items():
            some = replace(near, full_attention_layers=layers, full_attention_decode=True)
            found[f"{name}, {layers_name} full"] = some
    return found


def shrunk(config: SWAAConfig, context: int, length: int) -> SWAAConfig:
    """The configuration for shorter prompts: a window that is the same share of the prompt.

    Sinks are at most as large a share, but at least four: how many tokens a model needs there does not depend on the
    length. Nor does how many tokens a question at the end of a prompt takes, so the dense tail stays as it is.
    """
    if config.sliding_window is None or length >= context:
        return config
    sinks = round(config.sink_tokens * length / context)
    return replace(
        config,
        sliding_window=max(1, round(config.sliding_window * length / context)),
        sink_tokens=min(config.sink_tokens, max(4, sinks)),
    )


def qualities(summary: Summary, full: Mapping[tuple[str, int | None], Cell]) -> dict[str, Quality]:
    """What each configuration of a summary keeps.

    Args:
        summary: of an evaluation.
        full: the cells of full attention, by task and length, without those that it fails altogether.
    """
    found = {}
    for name in summary.configs:
        cells = [cell for cell in summary.cells if cell.config == name and (cell.task, cell.length) in full]
        ratios = {cell.task: _ratio(cell, cell.value, full) for cell in cells}
        low = [
            _ratio(cell, cell.interval.low if cell.metric == "score" else cell.interval.high, full)
            if cell.samples > 1
            else 0.0
            for cell in cells
        ]
        found[name] = Quality(_mean_of_at_most_1(ratios.values()), _mean_of_at_most_1(low), ratios)
    return found


def able(summary: Summary, name: str) -> dict[tuple[str, int | None], Cell]:
    """The cells of a configuration on tasks that it can do at all, by task and length.

    Raises:
        ConfigError: if there is none: nothing can be said about what another configuration keeps.
    """
    own = [cell for cell in summary.cells if cell.config == name]
    found = {(cell.task, cell.length): cell for cell in own if cell.metric == "perplexity" or cell.value > 0}
    if not found:
        raise ConfigError(
            f"full attention has no answer right in {', '.join(cell.task for cell in own)}; "
            "take shorter prompts, easier tasks or more samples"
        )
    return found


def choose(options: Iterable[Option], budget: float, *, context: int, length: int, timed: str) -> Recommendation:
    """The fastest option that keeps at least `budget` of the quality; other arguments as of `Recommendation`.

    Full attention keeps all of it, so there is always one.
    """
    ranked = tuple(sorted(options, key=lambda option: (option.total_s, -option.quality.ratio)))
    front: list[Option] = []
    for option in ranked:
        if not front or option.quality.ratio > front[-1].quality.ratio:
            front.append(option)
    chosen = next(option for option in ranked if option.quality.ratio >= budget)
    return Recommendation(chosen, ranked, tuple(front), budget, context, length, timed)


def _ratio(cell: Cell, value: float, full: Mapping[tuple[str, int | None], Cell]) -> float:
    of_full = full[cell.task, cell.length].value
    return value / of_full if cell.metric == "score" else of_full / value


def _mean_of_at_most_1(ratios: Collection[float]) -> float:
    return sum(min(1.0, ratio) for ratio in ratios) / len(ratios)


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count % 1024 == 0 else str(count)
