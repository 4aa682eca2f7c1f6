"""Sliding-window attention for models trained with full attention, on FlexAttention."""

from . import masks, recipes
from ._version import __version__
from .algebra import Mask
from .attention import attention
from .block_mask import build_block_mask
from .compile_cache import load_compile_cache, save_compile_cache
from .config import SWAAConfig
from .errors import BackendUnavailableError, ConfigError, DoesNotFitError, MaskError, UnsupportedModelError
from .hf import CompiledModel, SWAACache, adapt, compile, prompt, restore
from .plan import AttentionPlan, plan

__all__ = [
    "AttentionPlan",
    "BackendUnavailableError",
    "CompiledModel",
    "ConfigError",
    "DoesNotFitError",
    "Mask",
    "MaskError",
    "SWAACache",
    "SWAAConfig",
    "UnsupportedModelError",
    "__version__",
    "adapt",
    "attention",
    "build_block_mask",
    "compile",
    "load_compile_cache",
    "masks",
    "plan",
    "prompt",
    "recipes",
    "restore",
    "save_compile_cache",
]
