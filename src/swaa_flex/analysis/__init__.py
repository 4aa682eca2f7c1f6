"""Which layers keep full attention: by what they look at, or by what their window costs."""

from .choice import LayerChoice
from .lazy import lazy, mass_outside
from .search import AnswerLoss, evaluations, greedy, sensitivity

__all__ = ["AnswerLoss", "LayerChoice", "evaluations", "greedy", "lazy", "mass_outside", "sensitivity"]
