"""What surrounds a forward and cannot be handed to it: the only state that belongs to no model, cache or call.

A forward hands on what it knows: its mask holds the cache and what was said of prompts, and its keywords reach
attention. Left over is what has to cross code that takes no argument of ours. It is one object per thread.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from .prompt_attention import PromptChunk


class PromptInfo(NamedTuple):
    """What is known about prompt and decode rows; None where it is not."""

    lengths: int | Tensor | None = None
    decode_rows: Tensor | None = None
    dense_tail: int | None = None

    @property
    def says_where(self) -> bool:
        """Whether it says where prompts end."""
        return self.lengths is not None or self.decode_rows is not None


NOTHING_KNOWN = PromptInfo()


class Surroundings(threading.local):
    """What surrounds the forwards of this thread.

    Every thread has its own, so threads cannot find what others have written. It is no context variable, which
    torch.compile cannot trace (torch 2.15). Fields are set when the thread first looks at them, in `__init__`: a class
    attribute in their place would be compiled into graphs without a guard.

    Attributes:
        prompt: what the `prompt(...)` says that surrounds the code. `prompt` writes it and puts back what was there
            when its block is left, by an exception too. The mask of a forward reads it once, when it is made.
        chunk: the chunk of prompts that a `PromptModel` runs. `PromptChunk` writes it around the model, and the opaque
            operator in each layer's graph reads it: operators take tensors and numbers only.
        prompt_ends: for each layer, where its last prompt of unknown length ended. The mask of a prompt writes it and
            reads it to warn of prompts in pieces. It changes no result, and goes after a warning, or with the layer.
    """

    def __init__(self) -> None:
        self.prompt = NOTHING_KNOWN
        self.chunk: PromptChunk | None = None
        self.prompt_ends: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


surroundings = Surroundings()
