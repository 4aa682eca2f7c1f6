"""A `BlockMask` whose lists are only as wide as the longest of them."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from .algebra import Mask, on_device
from .errors import MaskError

_LISTS = tuple(
    f"{prefix}{side}_{kind}" for prefix in ("", "full_") for side in ("kv", "q") for kind in ("num_blocks", "indices")
)


class CompactBlockMask(BlockMask):
    """What `build_block_mask` returns: `kv_indices` is as wide as the longest list, not as the number of kv blocks.

    FlexAttention reads of a list as many entries as there are, so it runs on these lists as they are. Those methods of
    a `BlockMask` that take the width for the number of kv blocks are replaced here. Other code that does, such as
    `BlockMask.from_kv_blocks`, needs the lists of `with_full_lists`. Given compact ones, that fails with an IndexError
    where rows list blocks beyond their width. Where none does, as with fewer rows than keys, it works, but makes
    query-side lists for too few kv blocks, which the backward pass must not be given.
    """

    def with_full_lists(self) -> BlockMask:
        """The same with lists as wide as there are kv blocks: row blocks x kv blocks of int32 per sequence and head.

        Examples:
            >>> from swaa_flex import build_block_mask
            >>> from swaa_flex.masks import causal, window
            >>> block_mask = build_block_mask(causal() & window(256), 4096, 4096)
            >>> tuple(block_mask.kv_indices.shape), tuple(block_mask.with_full_lists().kv_indices.shape)
            ((1, 1, 32, 4), (1, 1, 32, 32))
        """
        lists = _lists(self)
        for name in ("kv_indices", "full_kv_indices"):
            if lists[name] is not None:
                lists[name] = F.pad(lists[name], (0, self._kv_blocks - lists[name].shape[-1]))
        return BlockMask(self.seq_lengths, **lists, BLOCK_SIZE=self.BLOCK_SIZE, mask_mod=self.mask_mod)

    def to_dense(self) -> Tensor:
        """The blocks that are listed as ones, int32 `[batch, heads, row_blocks, kv_blocks]`."""
        dense = self._listed(self.kv_num_blocks, self.kv_indices)
        if self.full_kv_num_blocks is None or self.full_kv_indices is None:
            return dense
        return dense | self._listed(self.full_kv_num_blocks, self.full_kv_indices)

    def to(self, device: torch.device | str) -> CompactBlockMask:
        """The same on another device, the tensors of its mask included."""
        moved = _compact(super().to(device))
        if isinstance(self.mask_mod, Mask):
            moved.mask_mod = on_device(self.mask_mod, torch.device(device))
        return moved

    def __getitem__(self, index: Any) -> BlockMask:  # type: ignore[override]
        if self.q_indices is not None:  # which are worked out again, from the width of the others
            return self.with_full_lists()[index]
        return _compact(super().__getitem__(index))

    @classmethod
    def from_kv_blocks(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: compact lists do not tell how many kv blocks there are."""
        raise MaskError(
            "compact lists do not tell how many kv blocks there are; give BlockMask.from_kv_blocks the lists of "
            "block_mask.with_full_lists()"
        )

    def _adjust(self, new_q_len: int, new_kv_len: int) -> NoReturn:
        raise MaskError(
            f"lists for {self.seq_lengths} rows and keys cannot be cut to {(new_q_len, new_kv_len)}; build them for "
            "these lengths with build_block_mask"
        )

    @property
    def _kv_blocks(self) -> int:
        return -(-self.seq_lengths[1] // self.BLOCK_SIZE[1])

    def _listed(self, count: Tensor, indices: Tensor) -> Tensor:
        is_entry = torch.arange(indices.shape[-1], device=indices.device) < count[..., None]
        dense = indices.new_zeros(*indices.shape[:-1], self._kv_blocks + 1)  # the last column is for no entry
        return dense.scatter(-1, torch.where(is_entry, indices, self._kv_blocks).long(), 1)[..., :-1]


def _compact(block_mask: BlockMask) -> CompactBlockMask:
    return CompactBlockMask(
        block_mask.seq_lengths,
        **_lists(block_mask),
        BLOCK_SIZE=block_mask.BLOCK_SIZE,
        mask_mod=block_mask.mask_mod,
    )


def _lists(block_mask: BlockMask) -> dict[str, Any]:
    return {name: getattr(block_mask, name) for name in _LISTS}
