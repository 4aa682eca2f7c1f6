"""Projections of one input as one matrix product, in compiled models.

The product of one token and a small matrix is far from the bandwidth of a GPU, above all for keys and values with
grouped queries. The first projection of a group to be called computes the product with the weights of the whole group,
and the others take their parts of it. Nothing else changes: the parameters become views of the group's weights, and
outside of compiled models each projection computes its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .surroundings import surroundings

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of children that most model families of transformers apply to the same input."""


@dataclass(eq=False)
class _Group:
    weight: Tensor  # [sum of out_features, in_features]
    bias: Tensor | None
    size: int  # projections
    shared: list[Any] = field(default_factory=list)  # input, product, and how many have taken their part of it


def fuse_projections(model: nn.Module) -> None:
    """Lays the weights of each group side by side in memory, in place; those that lie so already stay there."""
    for projections in _groups(model):
        if _is_intact(projections):
            continue
        for linear in projections:
            if linear is not None and _group_of(linear):
                del linear.forward
        kinds = {_kind(linear) for linear in projections}
        if len(kinds) == 1 and None not in kinds:
            _fuse(projections)  # type: ignore[arg-type]


def projections_are_intact(model: nn.Module) -> bool:
    """Whether what was fused is still computed as one: no layer of a group has got other weights, or a hook."""
    return all(
        _is_intact(projections)
        for projections in _groups(model)
        if any(linear is not None and _group_of(linear) for linear in projections)
    )


def _groups(model: nn.Module) -> Iterator[list[nn.Module | None]]:
    for module in model.modules():
        for names in GROUPS:
            projections = [getattr(module, name, None) for name in names]
            if isinstance(projections[0], nn.Module):
                yield projections


def _group_of(linear: nn.Module) -> _Group | None:
    own = vars(linear).get("forward")
    return own.args[1] if isinstance(own, functools.partial) and own.func is _forward else None


def _is_intact(projections: Sequence[nn.Module | None]) -> bool:
    """Whether the parameters are the views of their group's weights that `_fuse` made."""
    groups = {id(group): group for linear in projections if linear is not None and (group := _group_of(linear))}
    if len(groups) != 1:
        return False
    (group,) = groups.values()
    first = 0
    for linear in projections:
        if not isinstance(linear, nn.Linear) or _group_of(linear) is not group or _is_hooked(linear):
            return False
        if linear.weight.data_ptr() != group.weight[first:].data_ptr():
            return False
        if group.bias is not None and linear.bias.data_ptr() != group.bias[first:].data_ptr():
            return False
        first += linear.out_features
    return True


def _kind(linear: nn.Module | None) -> tuple[object, ...] | None:
    """What must be equal to be computed together; None for quantised, sharded, hooked or wrapped layers."""
    if type(linear) is not nn.Linear or type(linear.weight.data) is not Tensor:
        return None
    if "forward" in vars(linear) or _is_hooked(linear):
        return None
    return linear.in_features, linear.weight.dtype, linear.weight.device, linear.bias is None


def _is_hooked(linear: nn.Module) -> bool:
    return bool(linear._forward_hooks or linear._forward_pre_hooks)


@torch.no_grad()
def _fuse(projections: Sequence[nn.Linear]) -> None:
    weight = torch.cat([linear.weight.data for linear in projections])
    biases = [linear.bias.data for linear in projections if linear.bias is not None]
    group = _Group(weight, torch.cat(biases) if biases else None, len(projections))
    first = 0
    for linear in projections:
        stop = first + linear.out_features
        linear.weight.data = weight[first:stop]
        if group.bias is not None:
            linear.bias.data = group.bias[first:stop]
        linear.forward = functools.partial(_forward, linear, group, first, stop)  # type: ignore[method-assign]
        first = stop


def _forward(linear: nn.Linear, group: _Group, first: int, stop: int, x: Tensor) -> Tensor:
    if not surroundings.shares_projections or torch.is_grad_enabled():
        return F.linear(x, linear.weight, linear.bias)
    shared = group.shared
    if len(shared) == 0 or shared[0] is not x:
        shared[:] = [x, F.linear(x, group.weight, group.bias), 0]
    part: Tensor = shared[1][..., first:stop]
    shared[2] += 1
    if shared[2] == group.size:
        shared.clear()
    return part
