"""Projections of one input as one matrix product, in compiled models.

The product of one token and a small matrix is far from the bandwidth of a GPU, above all for keys and values with
grouped queries. The first projection of a group computes the product with the weights of the whole group, and the
others take their parts of it. Nothing else changes: the parameters become views of the group's weights, and outside of
compiled models each projection computes its own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of children that most model families of transformers apply to the same input."""

_in_compiled_model = [False]  # a list: torch.compile guards on its contents


class _Group(NamedTuple):
    weight: Tensor  # [sum of out_features, in_features]
    bias: Tensor | None
    shared: list[Tensor]  # input and product, from the first projection until the last has taken its part


def fuse_projections(model: nn.Module) -> None:
    """Lays the weights of each group side by side in memory, in place, for `as_one`."""
    for module in model.modules():
        for names in GROUPS:
            projections = [getattr(module, name, None) for name in names]
            if _fits_together(projections):
                _fuse(projections)  # type: ignore[arg-type]


@contextlib.contextmanager
def as_one() -> Iterator[None]:
    """Within, the groups of models that `fuse_projections` prepared are computed as one."""
    _in_compiled_model[0] = True
    try:
        yield
    finally:
        _in_compiled_model[0] = False


def _fits_together(projections: Sequence[nn.Module | None]) -> bool:
    kinds = {_kind(projection) for projection in projections}
    return len(kinds) == 1 and None not in kinds


def _kind(linear: nn.Module | None) -> tuple[object, ...] | None:
    """What must be equal to be computed together; None for quantised, sharded, hooked or wrapped layers."""
    if type(linear) is not nn.Linear or type(linear.weight.data) is not Tensor:
        return None
    own_forward = vars(linear).get("forward")
    if own_forward is not None and getattr(own_forward, "func", None) is not _forward:
        return None
    if linear._forward_hooks or linear._forward_pre_hooks:
        return None
    return linear.in_features, linear.weight.dtype, linear.weight.device, linear.bias is None


@torch.no_grad()
def _fuse(projections: Sequence[nn.Linear]) -> None:
    weight = torch.cat([linear.weight.data for linear in projections])
    biases = [linear.bias.data for linear in projections if linear.bias is not None]
    group = _Group(weight, torch.cat(biases) if biases else None, [])
    first = 0
    for linear in projections:
        stop = first + linear.out_features
        linear.weight.data = weight[first:stop]
        if group.bias is not None:
            linear.bias.data = group.bias[first:stop]
        linear.forward = functools.partial(_forward, linear, group, first, stop)  # type: ignore[method-assign]
        first = stop


def _forward(linear: nn.Linear, group: _Group, first: int, stop: int, x: Tensor) -> Tensor:
    if not _in_compiled_model[0] or torch.is_grad_enabled():
        return F.linear(x, linear.weight, linear.bias)
    if first == 0:
        group.shared[:] = [x, F.linear(x, group.weight, group.bias)]
    if len(group.shared) == 0 or group.shared[0] is not x:
        return F.linear(x, linear.weight, linear.bias)
    part = group.shared[1][..., first:stop]
    if stop == group.weight.shape[0]:
        group.shared.clear()
    return part
