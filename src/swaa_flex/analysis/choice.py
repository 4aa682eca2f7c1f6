"""`LayerChoice`: what the methods return, as a configuration, JSON and a bar chart."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..config import SWAAConfig
from ..errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LayerChoice:
    """The layers that a method keeps full.

    Attributes:
        method: "lazy", "sensitivity" or "greedy".
        measure: What the scores are, with their unit.
        scores: One per layer, the larger the more the layer needs full attention.
        order: The layers that stay full, in the order in which they were chosen.
        config: The configuration with these layers as `full_attention_layers`.
    """

    method: str
    measure: str
    scores: tuple[float, ...]
    order: tuple[int, ...]
    config: SWAAConfig

    @classmethod
    def of_largest(
        cls, method: str, measure: str, scores: Sequence[float], config: SWAAConfig, budget: int
    ) -> LayerChoice:
        """Keeps the layers with the largest scores full, of equal ones the earlier.

        Args:
            method: as the attribute.
            measure: as the attribute.
            scores: one per layer.
            config: all but the full layers.
            budget: how many layers stay full.
        """
        order = sorted(range(len(scores)), key=lambda layer: -scores[layer])[:budget]
        return cls.of_order(method, measure, scores, config, order)

    @classmethod
    def of_order(
        cls, method: str, measure: str, scores: Sequence[float], config: SWAAConfig, order: Sequence[int]
    ) -> LayerChoice:
        """Keeps the layers in `order` full; other arguments as `of_largest`."""
        chosen = replace(config, full_attention_layers=sorted(order))
        return cls(method, measure, tuple(scores), tuple(order), chosen)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "method": self.method,
            "measure": self.measure,
            "scores": list(self.scores),
            "order": list(self.order),
            "config": self.config.to_dict(),
        }

    def to_json(self) -> str:
        """A JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    def draw(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draws the score of each layer as a bar, full layers blue (`pip install 'swaa-flex[plot]'`).

        Args:
            path: where to save the figure, as a PNG unless its suffix names another format that matplotlib writes.

        Returns:
            The figure. It belongs to no window and no pyplot state, so there is nothing to close.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ImportError("LayerChoice.draw needs matplotlib: pip install 'swaa-flex[plot]'") from error
        figure = Figure(figsize=(max(5.0, 0.28 * len(self.scores)), 3.2), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        sliding = [layer for layer in range(len(self.scores)) if layer not in self.order]
        for layers, colour, label in ((self.order, "#2f6db5", "full"), (sliding, "#c3cad1", "sliding window")):
            axes.bar(layers, [self.scores[layer] for layer in layers], color=colour, label=label)
        axes.set_xticks(range(len(self.scores)))
        axes.tick_params(labelsize=7)
        axes.margins(x=0.01)
        axes.set_xlabel("layer", size=8)
        axes.set_ylabel(self.measure, size=8)
        axes.set_title(f"{self.method}: {len(self.order)} of {len(self.scores)} layers stay full", size=10)
        axes.legend(fontsize=8)
        if path is not None:
            figure.savefig(path)
        return figure


def layers_of(model: Any, config: SWAAConfig, budget: int) -> int:
    """The number of layers of a model, of which `budget` are to stay full.

    Raises:
        ConfigError: if nothing is left to choose, or the configuration has no window.
    """
    layers: int = model.config.get_text_config().num_hidden_layers
    if isinstance(budget, bool) or not isinstance(budget, int) or not 0 < budget < layers:
        raise ConfigError(
            f"budget={budget!r}: expected a number of full layers from 1 to {layers - 1}, as the model has {layers}"
        )
    if config.sliding_window is None:
        raise ConfigError(
            "sliding_window=None: every layer of this configuration is full, so there is none to choose; "
            "give the window that the other layers get"
        )
    return layers
