"""Hypothesis strategies: random compositions of masks."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from swaa_flex import Mask
from swaa_flex import masks as M

HEADS = 2
BATCH = 2


def third_diagonals(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (q_idx + kv_idx + h) % 3 != b


def contiguous_ids(length: int, cuts: list[int]) -> Tensor:
    ids = torch.zeros(length, dtype=torch.long)
    for cut in cuts:
        ids[cut % length :] += 1
    return ids


@st.composite
def compositions(draw: st.DrawFn, length: int, depth: int = 3) -> Mask:
    """A mask over at most `length` rows and keys, for batch 2 and 2 heads."""
    sizes = st.integers(1, length + 5)
    cuts = st.lists(st.integers(0, length - 1), max_size=4)

    def padding() -> Tensor:
        mask = torch.zeros(BATCH, length, dtype=torch.long)
        for row in mask:
            first = draw(st.integers(0, length - 1))
            row[first : draw(st.integers(first + 1, length))] = 1
        return mask

    kinds = ["causal", "window", "sinks", "rows_from", "rows_per_sequence", "rows_where", "documents", "function"]
    if depth > 0:
        kinds += [
            "and",
            "and",
            "or",
            "or",
            "not",
            "heads",
            "offset",
            "packed",
            "left_padded",
            "kv_positions",
            "sinks_and_tail",
        ]
    kind = draw(st.sampled_from(kinds))
    part = compositions(length, depth - 1)
    shorter = st.integers(1, length).flatmap(lambda own: compositions(own, depth - 1))  # rows may leave its tables
    match kind:
        case "causal":
            return M.causal()
        case "window":
            return M.window(draw(sizes))
        case "sinks":
            return M.sinks(draw(sizes))
        case "rows_from":
            return M.rows_from(draw(sizes))
        case "rows_per_sequence":
            return M.rows_from(torch.tensor(draw(st.lists(sizes, min_size=BATCH, max_size=BATCH))))
        case "rows_where":
            return M.rows_where(contiguous_ids(length, draw(cuts)) % 2 == 1)
        case "documents":
            return M.documents(torch.stack([contiguous_ids(length, draw(cuts)) for _ in range(BATCH)]))
        case "function":
            return M.from_mask_mod(third_diagonals)
        case "and":
            return draw(part) & draw(part)
        case "or":
            return draw(part) | draw(part)
        case "not":
            return ~draw(part)
        case "heads":
            return M.heads([True, False], draw(part), draw(part))
        case "offset":
            q, kv = draw(st.integers(-length, length)), draw(st.integers(-length, length))
            long_enough = compositions(length + max(q, kv, 0), depth - 1)
            as_tensors = draw(st.booleans())
            return M.offset(draw(long_enough), q=torch.tensor(q) if as_tensors else q, kv=kv)
        case "packed":
            return M.packed(draw(shorter), document_ids=contiguous_ids(length, draw(cuts)))
        case "left_padded":
            return M.left_padded(draw(shorter), padding())
        case "sinks_and_tail":
            start, first = draw(sizes), draw(st.lists(st.integers(0, length), min_size=BATCH, max_size=BATCH))
            return M.sinks_and_tail(
                draw(compositions(2 * length + 6, depth - 1)),  # it is asked for columns beyond the keys there are
                draw(st.integers(0, 20)),
                start=draw(st.sampled_from([start, torch.tensor(start), torch.tensor([start, first[0]])])),
                first=torch.tensor(first) if draw(st.booleans()) else first[0],
            )
        case _:
            order = torch.randperm(length) - draw(st.integers(0, 3))
            return M.kv_positions(draw(part), order.clamp(min=-1) + draw(st.integers(0, length)))
