"""The transformers integration: `attn_implementation="swaa_flex"`. Importing it registers the name."""

from transformers import AttentionInterface, AttentionMaskInterface

from . import config as config
from .adapt import adapt, restore
from .attention import attention_forward
from .cache import SWAACache
from .compiled import CompiledModel, compile
from .mask import make_forward_mask
from .prompt import prompt

NAME = "swaa_flex"

AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, make_forward_mask)

__all__ = ["NAME", "CompiledModel", "SWAACache", "adapt", "compile", "prompt", "restore"]
