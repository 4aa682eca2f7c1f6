"""`Mask` and its algebra: composition, equality, structure."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import intervals
from .errors import MaskError
from .intervals import EVERYTHING, Bounds, Rows

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


LARGEST = (1 << 30) - 1
"""Positions are int32, and so is the difference of two of them."""

Span = tuple[int, int] | None
"""First and past-the-last index of query rows or keys, None if unknown."""


class Mask:
    """A FlexAttention `mask_mod` that composes with `&`, `|` and `~` and knows its geometry.

    Masks are immutable. Two masks are equal if they have the same structure and the same values; tensors and
    user functions compare by identity. The functions of `swaa_flex.masks` make them.
    """

    _precedence: ClassVar[int] = 3
    _looks_at_heads: ClassVar[bool] = False
    _per_sequence: ClassVar[tuple[str, ...]] = ()  # fields that may also be tensors with one entry per sequence

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """Whether query row `q_idx` of batch entry `b` and query head `h` sees key `kv_idx`.

        Takes integer tensors that broadcast together (scalars inside FlexAttention) and returns a bool tensor
        that broadcasts to their common shape.
        """
        raise NotImplementedError

    def bounds(self, rows: Rows) -> Bounds:
        """The keys that some row of the block may see, and keys that every row of it sees."""
        raise NotImplementedError

    def __and__(self, other: Mask) -> Mask:
        return And(_flat(And, self) + _flat(And, other)) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        return Or(_flat(Or, self) + _flat(Or, other)) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        return negated(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    @property
    def batch_size(self) -> int | None:
        """Number of sequences that the tensors in the mask are for, or None if it is the same for all."""
        return self._common("batch_size")

    @property
    def num_heads(self) -> int | None:
        """Number of query heads that the mask distinguishes, or None if it is the same for all."""
        return self._common("num_heads")

    @property
    def looks_at_heads(self) -> bool:
        """Whether its answer may depend on the head."""
        parts = (mask for value in self._values() for mask in _masks_in(value))
        return self._looks_at_heads or any(part.looks_at_heads for part in parts)

    @property
    def structure(self) -> tuple[Any, ...]:
        """What kind of mask this is, without its values: masks of one structure share compiled code."""
        return (type(self).__name__, *(_structure(value) for value in self._values()))

    def check_indices(self, rows: Span, keys: Span) -> None:
        """Refuses query rows and keys that a table in the mask has no entry for, or that lie beyond `LARGEST`.

        What is not known on the host is not refused: the mask shows nothing to rows outside of a table and never shows
        keys outside of one, and its bounds agree.
        """
        for value in self._values():
            for mask in _masks_in(value):
                mask.check_indices(rows, keys)

    def for_rows(self, first: int, last: int) -> Mask:
        """An equal mask for query rows `first` to `last` (inclusive), simpler where that is known.

        >>> from swaa_flex.masks import causal, rows_from, window
        >>> (causal() & (window(8) | rows_from(100))).for_rows(100, 120)
        causal
        >>> (causal() & (window(8) | rows_from(100))).for_rows(0, 99)
        causal & window(8)
        """
        return self

    def row_breaks(self) -> tuple[int, ...]:
        """Query rows at which `for_rows` changes its answer, in any order."""
        return ()

    def with_lengths(self, entries: int) -> Mask:
        """An equal mask that reads the length of its own tables from a tensor `[entries]`: see `per_sequence`."""
        return self

    def _values(self) -> tuple[Any, ...]:
        # A default, because torch 2.11's dynamo hashes masks that it is still putting together.
        return tuple(getattr(self, f.name, None) for f in fields(self) if f.compare)  # type: ignore[arg-type]

    def _identity(self) -> tuple[Any, ...]:
        return (type(self), *(_identity(value) for value in self._values()))

    def _common(self, attribute: str, own: int | None = None) -> int | None:
        parts = (mask for value in self._values() for mask in _masks_in(value))
        sizes = {own, *(getattr(mask, attribute) for mask in parts)} - {None}
        if len(sizes) > 1:
            raise MaskError(
                f"the parts of {self!r} hold tensors for different numbers ({attribute} "
                f"{sorted(sizes)}); build them all for the same batch and heads"
            )
        return sizes.pop() if sizes else None


@dataclass(frozen=True, eq=False, repr=False)
class Everything(Mask):
    """Every row sees every key."""

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx >= kv_idx

    def bounds(self, rows: Rows) -> Bounds:
        return Bounds(EVERYTHING, EVERYTHING)

    def __repr__(self) -> str:
        return "everything"


@dataclass(frozen=True, eq=False, repr=False)
class And(Mask):
    """What all of the masks allow."""

    masks: tuple[Mask, ...]
    _precedence: ClassVar[int] = 2

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        result = self.masks[0](b, h, q_idx, kv_idx)
        for mask in self.masks[1:]:
            result = result & mask(b, h, q_idx, kv_idx)
        return result

    def bounds(self, rows: Rows) -> Bounds:
        result = self.masks[0].bounds(rows)
        for mask in self.masks[1:]:
            result = intervals.intersection(result, mask.bounds(rows))
        return result

    def for_rows(self, first: int, last: int) -> Mask:
        masks = [mask.for_rows(first, last) for mask in self.masks]
        if any(_is_nothing(mask) for mask in masks):
            return negated(Everything())
        return _combine(And, [mask for mask in masks if not isinstance(mask, Everything)], Everything())

    def row_breaks(self) -> tuple[int, ...]:
        return tuple(row for mask in self.masks for row in mask.row_breaks())

    def __repr__(self) -> str:
        return " & ".join(_parenthesised(mask, self._precedence) for mask in self.masks)


@dataclass(frozen=True, eq=False, repr=False)
class Or(Mask):
    """What any of the masks allows."""

    masks: tuple[Mask, ...]
    _precedence: ClassVar[int] = 1

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        result = self.masks[0](b, h, q_idx, kv_idx)
        for mask in self.masks[1:]:
            result = result | mask(b, h, q_idx, kv_idx)
        return result

    def bounds(self, rows: Rows) -> Bounds:
        result = self.masks[0].bounds(rows)
        for mask in self.masks[1:]:
            result = intervals.union(result, mask.bounds(rows))
        return result

    def for_rows(self, first: int, last: int) -> Mask:
        masks = [mask.for_rows(first, last) for mask in self.masks]
        if any(isinstance(mask, Everything) for mask in masks):
            return Everything()
        return _combine(Or, [mask for mask in masks if not _is_nothing(mask)], negated(Everything()))

    def row_breaks(self) -> tuple[int, ...]:
        return tuple(row for mask in self.masks for row in mask.row_breaks())

    def __repr__(self) -> str:
        return " | ".join(_parenthesised(mask, self._precedence) for mask in self.masks)


@dataclass(frozen=True, eq=False, repr=False)
class Not(Mask):
    """What the mask does not allow."""

    mask: Mask

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ~self.mask(b, h, q_idx, kv_idx)

    def bounds(self, rows: Rows) -> Bounds:
        return intervals.complement(self.mask.bounds(rows))

    def for_rows(self, first: int, last: int) -> Mask:
        return negated(self.mask.for_rows(first, last))

    def row_breaks(self) -> tuple[int, ...]:
        return self.mask.row_breaks()

    def __repr__(self) -> str:
        return f"~{_parenthesised(self.mask, self._precedence)}"


def shifted(mask: Mask, name: str, span: Span, by: int | Tensor) -> Span:
    """The indices at which `mask` evaluates the mask in it, if it adds `by`."""
    known = known_range(by)
    return (
        None if span is None or known is None else within_reach(mask, name, (span[0] + known[0], span[1] + known[1]))
    )


def within_reach(mask: Mask, name: str, span: tuple[int, int]) -> Span:
    """Indices that a mask evaluates the mask in it at."""
    first, stop = span
    if max(-first, stop - 1) > LARGEST:
        raise MaskError(
            f"{mask!r} is used at {name} {first} to {stop - 1}, offsets included: expected at most {LARGEST} either "
            "way"
        )
    return span


def known_range(value: int | Tensor) -> tuple[int, int] | None:
    """Smallest and largest number, if the host knows them without waiting for a device."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, Tensor) and value.device.type == "cpu" and value.numel():
        return int(value.amin()), int(value.amax())
    return None


def check_table(mask: Mask, name: str, length: int, span: Span) -> None:
    """Refuses indices after the last entry of a table of a mask; before the first there is nothing to see."""
    if span is not None and span[1] > length:
        raise MaskError(
            f"{mask!r} holds a table for {length} {name}, but it is used with {span[1]}, offsets included; give the "
            "table an entry for each of them"
        )


def negated(mask: Mask) -> Mask:
    """`~mask`, spelled so that torch.compile can trace it (2.11 to 2.13 do not know `~` of an object)."""
    return mask.mask if isinstance(mask, Not) else Not(mask)


def on_device(mask: Mask, device: torch.device) -> Mask:
    """The same mask with its tensors on a device, if some are on the CPU: copies of them, or the mask itself."""
    if device.type == "cpu" or all(not _on_cpu(part) for part in _parts(mask)):
        return mask
    moved: Mask = _mapped(mask, lambda value: value.to(device, non_blocking=True) if _on_cpu(value) else value)
    return moved


def _on_cpu(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu"


def with_tensors(mask: Mask, device: torch.device) -> Mask:
    """The same mask with its integers as 0-d tensors: one compiled function for all values."""
    changed: Mask = _mapped(
        mask, lambda value: torch.tensor(value, device=device) if isinstance(value, int) else value
    )
    return changed


def with_tensors_in_memory(mask: Mask) -> Mask:
    """The same mask in a compiled graph, its tensors computed before the attention kernel that looks into them.

    Inductor inlines what can be inlined, and its kernels cannot be generated then (on a CPU "No choices to select", on
    CUDA if the tensor is padded or has no layout yet; torch 2.11 to 2.14). A view with the strides that a tensor has
    changes nothing, but asks for it in memory.
    """
    changed: Mask = _mapped(mask, _in_memory)
    return changed


def versions(mask: Mask) -> tuple[int, ...]:
    """How often each tensor has changed in place that the mask reads at every call."""
    tensors = [
        getattr(part, field.name)
        for part in _all_masks(mask)
        for field in fields(part)  # type: ignore[arg-type]
        if field.name != "source"
    ]
    return tuple(x._version for x in tensors if isinstance(x, Tensor) and not x.is_inference())


def _all_masks(value: Any) -> list[Mask]:
    if isinstance(value, tuple):
        return [mask for item in value for mask in _all_masks(item)]
    return [value, *_all_masks(value._values())] if isinstance(value, Mask) else []


def only_integers(value: Any) -> bool:
    """Whether a mask holds neither tensors nor functions, which may hold some."""
    return all(isinstance(part, int) for part in _parts(value))


def has_tensor(value: Any) -> bool:
    """Whether a mask holds a tensor. Functions may too, but are asked for pairs only, not for bounds."""
    return any(isinstance(part, Tensor) for part in _parts(value))


def has_single_number(value: Any) -> bool:
    """Whether a mask holds a tensor of one number, such as an offset that changes in place."""
    return any(isinstance(part, Tensor) and part.numel() == 1 for part in _parts(value))


def _parts(value: Any) -> list[Any]:
    """What a mask and the masks in it hold."""
    if isinstance(value, Mask):
        return [part for field in fields(value) for part in _parts(getattr(value, field.name))]  # type: ignore[arg-type]
    if isinstance(value, tuple):
        return [part for item in value for part in _parts(item)]
    return [value]


def per_sequence(mask: Mask, batch: int, device: torch.device) -> Mask:
    """The same mask with what may vary between calls as tensors `[batch]`; to be evaluated only.

    FLASH inlines integers, so that each value would be compiled, cannot use sizes that vary, and cannot read tensors
    of one number (torch 2.11): for a batch of 1 they get a second entry.
    """
    entries = max(batch, 2)
    mask = mask.with_lengths(entries)
    changes: dict[str, Any] = {}
    for field in fields(mask):  # type: ignore[arg-type]
        value = getattr(mask, field.name)
        if field.name in mask._per_sequence and isinstance(value, Tensor):
            if value.numel() == 1:
                changes[field.name] = value.reshape(1).to(torch.int32).expand(entries).contiguous()
        elif field.name in mask._per_sequence:
            if value != 0:
                changes[field.name] = torch.full((entries,), value, dtype=torch.int32, device=device)
        elif isinstance(value, Mask):
            changes[field.name] = per_sequence(value, batch, device)
        elif isinstance(value, tuple) and any(isinstance(part, Mask) for part in value):
            changes[field.name] = tuple(per_sequence(part, batch, device) for part in value)
    return replace(mask, **changes) if changes else mask  # type: ignore[type-var]


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same mask with `change` applied to its values, and to those of the masks in it."""
    if isinstance(value, Mask):
        changes = {f.name: _mapped(getattr(value, f.name), change) for f in fields(value) if f.init}  # type: ignore[arg-type]
        return replace(value, **changes)  # type: ignore[type-var]
    if isinstance(value, tuple):
        return tuple(_mapped(part, change) for part in value)
    return change(value)


def _in_memory(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.contiguous()
    return value.as_strided(value.shape, value.stride())


def _flat(kind: type[And] | type[Or], mask: Mask) -> tuple[Mask, ...]:
    return mask.masks if isinstance(mask, kind) else (mask,)


def _combine(kind: type[And] | type[Or], masks: list[Mask], neutral: Mask) -> Mask:
    flat = tuple(part for mask in masks for part in _flat(kind, mask))
    return neutral if not flat else flat[0] if len(flat) == 1 else kind(flat)


def _is_nothing(mask: Mask) -> bool:
    return isinstance(mask, Not) and isinstance(mask.mask, Everything)


def _parenthesised(mask: Mask, outer: int) -> str:
    return f"({mask!r})" if mask._precedence < outer else repr(mask)


def _masks_in(value: object) -> list[Mask]:
    if isinstance(value, Mask):
        return [value]
    return [part for part in value if isinstance(part, Mask)] if isinstance(value, tuple) else []


def _identity(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_identity(part) for part in value)
    return ("id", id(value)) if isinstance(value, Tensor) else value


def _structure(value: Any) -> Any:
    if isinstance(value, Mask):
        return value.structure
    if isinstance(value, tuple):
        return tuple(_structure(part) for part in value)
    if isinstance(value, Tensor):
        return (f"tensor{value.dim()}", value.dtype, value.numel() == 1)
    return type(value) if isinstance(value, int) else getattr(value, "__code__", value)


def inlined(value: Any) -> Any:
    """What FLASH compiles into its kernel for a mask: the structure, integers and functions, not what tensors hold."""
    if isinstance(value, Mask):
        return (type(value).__name__, *(inlined(part) for part in value._values()))
    if isinstance(value, tuple):
        return tuple(inlined(part) for part in value)
    return _structure(value) if isinstance(value, Tensor) else value


def numbers_in_functions(mask: Mask) -> tuple[int | float, ...]:
    """The numbers that the functions in a mask read: closures, defaults and globals, not those of what they call."""
    numbers: list[int | float] = []
    held: list[Any] = [part for part in _parts(mask) if isinstance(part, types.FunctionType)]
    seen: set[int] = set()
    while held:
        value: Any = held.pop()
        if isinstance(value, (int, float)):
            numbers.append(value)
        elif isinstance(value, (tuple, list)):
            held.extend(value)
        elif isinstance(value, types.FunctionType) and id(value) not in seen:
            seen.add(id(value))
            names = inspect.getclosurevars(value)
            held += [number for number in names.globals.values() if isinstance(number, (int, float))]
            held += [*names.nonlocals.values(), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    return tuple(numbers)


def checked(user: str, mask: object) -> Mask:
    """A mask that somebody gave to `user`."""
    if not isinstance(mask, Mask):
        raise MaskError(
            f"{user}: expected a Mask, not {type(mask).__name__}; call what makes one, as in causal(), or wrap a "
            "mask_mod with swaa_flex.masks.from_mask_mod"
        )
    return mask


def is_whole(value: object) -> bool:
    """Whether it is an integer: of Python, of numpy, or of a graph that is being traced."""
    return isinstance(value, (int, torch.SymInt)) or hasattr(value, "__index__")


def holds_integers(value: object, *dims: int) -> bool:
    """Whether it is a tensor of integers, with one of these numbers of dimensions if any are given."""
    if not isinstance(value, Tensor) or value.dtype == torch.bool or (dims and value.dim() not in dims):
        return False
    return not value.is_floating_point() and not value.is_complex()


def describe(value: object) -> str:
    """What was given instead of a tensor, or its dtype and shape, for messages."""
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"


def brief(value: int | Tensor) -> str:
    """A value inside the repr of a mask."""
    return f"<{describe(value)}>" if isinstance(value, Tensor) else str(value)
