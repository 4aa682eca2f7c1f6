"""The class that an adapted model gets: its forwards read labels, and find out whether what they were told arrived."""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..tracing import is_tracing
from .cache import SWAACache
from .labels import cache_in, told_by_labels
from .receipt import Receipt


def give_adapted_class(model: PreTrainedModel, virtual_tokens: int = 0) -> None:
    """Makes the forwards of a causal language model those of `adapted_class`.

    The class is changed, not the instance: a method of the class runs on the copy, the replica (DataParallel) or the
    unpickled model that it is called on, and peft, which calls `forward` past the hooks, finds it too. Models other
    than causal language models, whose labels are something else, stay as they are.

    Args:
        model: of transformers.
        virtual_tokens: how many peft puts before each text, in its embeddings or in a cache.
    """
    plain = type(model)
    takes = inspect.signature(plain.forward).parameters.keys()
    if {"labels", "logits_to_keep"} <= takes and not hasattr(plain, "_swaa_plain_class"):
        model.__class__ = adapted_class(plain)  # type: ignore[arg-type]  # mypy takes the hash of a class for a method
        _rebind(model, plain, type(model))
    vars(model)["_swaa_virtual_tokens"] = virtual_tokens


def give_plain_class_back(model: PreTrainedModel) -> None:
    """Undoes `give_adapted_class`, unless somebody has derived another class from it (fully_shard) since then."""
    for name in ("_swaa_virtual_tokens", "_swaa_idle"):
        vars(model).pop(name, None)
    adapted = type(model)
    plain = vars(adapted).get("_swaa_plain_class")
    if plain is not None:
        model.__class__ = plain
        _rebind(model, adapted, plain)


def _rebind(model: PreTrainedModel, before: type, after: type) -> None:
    """Where hooks of accelerate have put themselves around a forward, they keep the method (accelerate 1.x)."""
    kept = vars(model).get("_old_forward")
    if getattr(kept, "__func__", None) is before.forward:  # type: ignore[attr-defined]
        vars(model)["_old_forward"] = types.MethodType(after.forward, model)  # type: ignore[attr-defined]


@functools.cache
def adapted_class(plain: Any) -> Any:
    """A class derived from that of a causal language model, with the same name."""

    class Adapted(plain):  # type: ignore[misc]
        _swaa_plain_class = plain

        @functools.wraps(plain.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if self.config._attn_implementation != "swaa_flex":
                _warn_of_idle_recipe(self)
                return super().forward(*args, **kwargs)
            given = dict(zip(names, args, strict=False)) | kwargs
            if given.get("labels") is not None:
                given = told_by_labels(given, getattr(self, "_swaa_virtual_tokens", 0))
            return _checked(super().forward, self.config, given)

        def __reduce_ex__(self, protocol: Any) -> Any:
            _, _, *state = super().__reduce_ex__(protocol)
            return _new, (plain,), *state

    names = tuple(inspect.signature(plain.forward).parameters)[1:]
    Adapted.__name__, Adapted.__qualname__, Adapted.__module__ = plain.__name__, plain.__qualname__, plain.__module__
    return Adapted


def _warn_of_idle_recipe(model: PreTrainedModel) -> None:
    """Warns once per model, at a forward under one of transformers' own implementations, set after the recipe."""
    implementation = model.config._attn_implementation
    is_stock = str(implementation).startswith(("eager", "sdpa", "flash_attention", "flex_attention"))
    if model.config.swaa is None or not is_stock or is_tracing() or "_swaa_idle" in vars(model):
        return
    vars(model)["_swaa_idle"] = True
    warnings.warn(
        f"attn_implementation={implementation!r} was set after the recipe, which is idle now: "
        f"swaa={model.config.swaa.parsed.to_dict()}. model.set_attn_implementation('swaa_flex') puts it to use again, "
        "and swaa_flex.restore(model) removes it",
        stacklevel=4,
    )


def _new(plain: Any) -> Any:
    """An empty instance for pickle and copy, which cannot name the derived class."""
    cls = adapted_class(plain)
    return cls.__new__(cls)


def _checked(forward: Callable[..., Any], config: PreTrainedConfig, given: dict[str, Any]) -> Any:
    """Calls the forward of a model; a graph for which prompt lengths do not arrive is refused while it is traced.

    Outside of graphs attention finds out by itself (`callers.refuse_lost_lengths`).

    Args:
        forward: that of the model's own class.
        config: of the model.
        given: its arguments by name.
    """
    is_told = given.get("prompt_lengths") is not None or given.get("decode_rows") is not None
    if not is_told or not is_tracing():
        return _called(forward, given)
    receipt = given.get("swaa_receipt") or Receipt()
    out = forward(**given | {"swaa_receipt": receipt})
    receipt.check(config)
    return out


def _called(forward: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Calls a forward; a cache whose forward is interrupted learns of it."""
    cache = cache_in(given)
    if is_tracing() or not isinstance(cache, SWAACache):
        return forward(**given)
    before = cache.updates
    try:
        return forward(**given)
    except BaseException:
        if cache.updates != before:
            cache.abandon_forward()
        raise
