import numpy
import pytest
import torch
from conftest import visible_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import BATCH, HEADS, compositions
from torch.nn.attention.flex_attention import create_mask

import swaa_flex
from swaa_flex import MaskError
from swaa_flex.algebra import has_single_number, inlined, only_integers, per_sequence
from swaa_flex.block_mask import layout, row_block_bounds
from swaa_flex.masks import (
    causal,
    documents,
    everything,
    from_mask_mod,
    heads,
    in_sequences,
    kv_positions,
    left_padded,
    offset,
    packed,
    rows_from,
    rows_where,
    sinks,
    sinks_and_tail,
    window,
)


def picture(mask, q_len, kv_len, **kwargs):
    """One string per row of the first sequence and head, '#' for visible."""
    return ["".join("#" if x else "." for x in row) for row in visible_pairs(mask, q_len, kv_len, **kwargs)[0, 0]]


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 40))
def test_a_mask_with_offsets_per_sequence_sees_the_same(data, length):
    mask = data.draw(compositions(length))
    moved = offset(mask, q=data.draw(st.sampled_from([0, 7, torch.tensor(7)])), kv=data.draw(st.integers(-3, 3)))
    shape = {"q_len": length, "kv_len": length, "batch": BATCH, "heads": HEADS}
    changed = per_sequence(moved, BATCH, torch.device("cpu"))
    assert torch.equal(visible_pairs(changed, **shape), visible_pairs(moved, **shape))
    assert "tensor0" not in str(changed.structure)


FIRST = torch.tensor([2])


@pytest.mark.parametrize(
    "padded",
    [left_padded(causal(), torch.tensor([[0, 0, 1, 1, 1]])), in_sequences(causal(), FIRST, FIRST + 3)],
    ids=["attention mask", "first column"],
)
def test_one_sequence_gets_tensors_of_two_entries(padded):
    mask = offset(padded, q=torch.tensor(0))
    assert has_single_number(mask)
    changed = per_sequence(mask, 1, torch.device("cpu"))
    assert not has_single_number(changed)
    assert torch.equal(visible_pairs(changed, 5, 5), visible_pairs(mask, 5, 5))


TABLES = {
    "documents": lambda n: documents(torch.arange(n) // 7),
    "documents, batch": lambda n: documents(torch.arange(2 * n).view(2, n) // 7),
    "packed": lambda n: packed(causal(), document_ids=torch.arange(n) // 7),
    "rows_where": lambda n: rows_where(torch.arange(n) % 3 == 0),
    "kv_positions": lambda n: kv_positions(causal(), torch.arange(n).flip(0)),
}


@pytest.mark.parametrize("make", TABLES.values(), ids=TABLES)
def test_flash_is_not_asked_for_the_length_of_a_table(make):
    """It has no code for sizes that vary (torch 2.11)."""
    used = []

    def keep(graph, _):
        sizes = [
            n for n in graph.graph.nodes if n.op == "placeholder" and isinstance(n.meta["example_value"], torch.SymInt)
        ]
        used.append([user for n in sizes for user in n.users] + [n for n in graph.graph.nodes if n.target == "size"])
        return graph.forward

    index = torch.arange(5)
    for mask in (make(31), per_sequence(make(31), 1, torch.device("cpu"))):
        torch._dynamo.reset()
        torch.compile(lambda q, mask=mask: mask(q * 0, q * 0, q, q + 1), backend=keep, dynamic=True)(index)
    plain, readable = used
    assert plain
    assert not readable


def test_masks_of_integers_alone_are_told_from_others():
    plain = offset(causal() & (window(4) | sinks(2) | rows_from(7)), q=3)
    assert only_integers(plain)
    assert not only_integers(plain & from_mask_mod(lambda b, h, q, kv: q > kv))
    assert not only_integers(offset(plain, q=torch.tensor(3)))
    assert not only_integers(packed(plain, document_ids=torch.zeros(9, dtype=torch.long)))


def test_what_varies_between_calls_is_not_compiled_into_flash():
    def kind(size, q, start):
        mask = sinks_and_tail(offset(causal() & window(size), q=q), 4, start=start)
        return inlined(per_sequence(mask, 2, torch.device("cpu")))

    assert kind(9, 5, 7) == kind(9, torch.tensor(6), 8) == kind(9, 7, torch.tensor([1, 2], dtype=torch.int32))
    assert kind(9, 5, 7) != kind(10, 5, 7)
    mine, yours = (from_mask_mod(lambda b, h, q, kv, n=n: q % n == 0) for n in (2, 3))
    assert inlined(mine) != inlined(yours)


def test_window_counts_the_own_key_and_sinks_stay_visible():
    assert picture(causal() & (window(2) | sinks(1)), 5, 5) == ["#....", "##...", "###..", "#.##.", "#..##"]


def test_rows_from_opens_rows_at_and_after_the_start():
    assert picture(causal() & (window(1) | rows_from(2)), 4, 4) == ["#...", ".#..", "###.", "####"]


def test_rows_from_takes_one_start_per_sequence():
    pairs = visible_pairs(rows_from(torch.tensor([1, 3])), 4, 2, batch=2)
    assert pairs[:, 0, :, 0].tolist() == [[False, True, True, True], [False, False, False, True]]


def test_rows_where_opens_flagged_rows():
    assert picture(rows_where(torch.tensor([True, False, True])), 3, 2) == ["##", "..", "##"]


def test_documents_see_themselves_in_both_directions():
    assert picture(documents(torch.tensor([7, 7, 3])), 3, 3) == ["##.", "##.", "..#"]


def test_heads_choose_between_two_masks():
    pairs = visible_pairs(heads([True, False], causal(), everything()), 3, 3, heads=2)
    assert pairs[0, 0].sum() == 6
    assert pairs[0, 1].sum() == 9


def test_complement():
    assert picture(~causal(), 3, 3) == [".##", "..#", "..."]
    assert ~~causal() == causal()


def test_offset_moves_queries_and_keys():
    assert picture(offset(causal() & window(2), q=3, kv=1), 2, 4) == [".##.", "..##"]
    assert offset(causal()) == causal()


def test_offset_reads_a_tensor_at_call_time():
    position = torch.tensor(0)
    mask = offset(causal(), q=position)
    assert picture(mask, 1, 3) == ["#.."]
    position.add_(2)
    assert picture(mask, 1, 3) == ["###"]


def test_kv_positions_look_through_slots_and_skip_empty_ones():
    slots = torch.tensor([4, -1, 2, 3])
    assert picture(offset(kv_positions(causal() & window(2), slots), q=3), 2, 4) == ["..##", "#..#"]


def test_packed_restarts_positions_in_each_document():
    mask = packed(causal() & (window(1) | sinks(1)), document_ids=torch.tensor([5, 5, 5, 9, 9, 9]))
    expected = ["#.....", "##....", "#.#...", "...#..", "...##.", "...#.#"]
    assert picture(mask, 6, 6) == expected
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert picture(packed(causal() & (window(1) | sinks(1)), position_ids=positions), 6, 6) == expected


def test_left_padding_does_not_count_and_pads_are_never_sinks():
    attention_mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    pairs = visible_pairs(left_padded(causal() & (window(1) | sinks(1)), attention_mask), 6, 6, batch=2)
    rows = [["".join("#" if x else "." for x in row) for row in sequence[0]] for sequence in pairs]
    assert rows[0] == ["......", "......", "..#...", "..##..", "..#.#.", "..#..#"]
    assert rows[1] == ["#.....", "##....", "#.#...", "#..#..", "#...#.", "#....."]


def test_a_mask_is_a_mask_mod_for_stock_flex_attention():
    mask = causal() & (window(3) | sinks(1)) & from_mask_mod(lambda b, h, q, kv: (q + kv) % 2 == h)
    stock = create_mask(mask, 1, 2, 9, 9, device="cpu")
    assert torch.equal(stock, visible_pairs(mask, 9, 9, heads=2))


def test_repr_reads_as_it_is_written():
    assert repr(causal() & (window(2048) | sinks(128))) == "causal & (window(2048) | sinks(128))"
    assert repr(causal() | window(2) & ~(sinks(1) | window(3))) == "causal | window(2) & ~(sinks(1) | window(3))"
    assert repr(offset(window(4), q=2)) == "offset(window(4), q=2)"
    assert repr(rows_from(torch.tensor([1, 2]))) == "rows_from(<int64 of shape [2]>)"


def test_equality_is_structure_and_values():
    assert causal() & (window(4) | sinks(1)) == causal() & (window(4) | sinks(1))
    assert hash(causal() & window(4)) == hash(causal() & window(4))
    assert (causal() & window(4)) & sinks(1) == causal() & (window(4) & sinks(1))
    assert causal() & window(4) != causal() & window(5)
    assert causal() & window(4) != causal() | window(4)
    assert window(4) != sinks(4)
    starts = torch.tensor([1, 2])
    assert rows_from(starts) == rows_from(starts)
    assert rows_from(starts) != rows_from(starts.clone())


def test_structure_ignores_values():
    assert (causal() & window(4)).structure == (causal() & window(5)).structure
    assert rows_from(4).structure != rows_from(torch.tensor([4, 4])).structure


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: window(0), r"window\(0\): expected an integer of at least 1"),
        (lambda: window(2.5), "window takes an integer, not 2.5"),
        (lambda: window(True), "window takes an integer, not True"),
        (lambda: sinks(-1), r"sinks\(-1\): expected an integer of at least 0"),
        (lambda: rows_from(torch.zeros(2, 2, dtype=torch.long)), r"rows_from .* int64 of shape \[2, 2\]"),
        (lambda: rows_from(torch.tensor([0.5])), "rows_from .* float32"),
        (lambda: rows_where(torch.tensor([1, 0])), "rows_where takes a bool tensor"),
        (lambda: heads(torch.tensor([1, 0]), causal(), causal()), "heads takes bool flags"),
        (lambda: documents(torch.tensor([[0, 1, 0]])), "document 0 of sequence 0 is not contiguous"),
        (lambda: packed(causal()), "exactly one of them"),
        (lambda: left_padded(causal(), torch.tensor([[1, 1], [1, 1]])[:, :, None]), "attention mask"),
        (lambda: left_padded(causal(), torch.tensor([[1, 1, 1], [1, 0, 1]])), "between real tokens in sequence 1"),
        (lambda: offset(causal(), q=torch.tensor([1, 2])), "0-d integer tensor for q"),
        (lambda: kv_positions(causal(), torch.tensor([0.5])), "kv_positions takes integers"),
        (lambda: from_mask_mod(3), "from_mask_mod takes a function"),
        (lambda: window(1 << 40), "at most"),
        (lambda: rows_from(-1 << 40), r"rows_from\(-1099511627776\): expected an integer of at least -1073741823"),
        (lambda: offset(causal(), q=1 << 31), r"offset\(2147483648\): expected an integer of at most 1073741823"),
        (lambda: offset(causal(), q=1 << 70), "expected an integer of at most 1073741823"),
        (lambda: offset(causal(), kv=numpy.int64(-1 << 32)), "expected an integer of at least -1073741823"),
        (lambda: sinks_and_tail(causal(), 4, start=1 << 31), "sinks_and_tail: start.2147483648.: expected"),
        (lambda: sinks_and_tail(causal(), 4, start=4.5), "sinks_and_tail: start takes an integer, not 4.5"),
        (lambda: documents([0, 0, 1]), r"documents takes integers .*not \[0, 0, 1\]"),
        (lambda: rows_where([True]), r"rows_where takes a bool tensor .*not \[True\]"),
        (lambda: rows_from(torch.tensor([True])), "rows_from takes .*not bool"),
        (lambda: kv_positions(causal(), [1, 2]), "kv_positions takes integers"),
        (lambda: packed(causal(), position_ids=torch.tensor([0.0, 1.0])), "packed takes integers .*float32"),
        (lambda: left_padded(causal(), [0, 1]), "attention mask"),
        (lambda: heads(None, causal(), causal()), "heads takes bool flags .*not None"),
        (lambda: heads([True], causal, causal()), "heads: expected a Mask, not function"),
        (lambda: offset(window, q=3), "offset: expected a Mask"),
        (lambda: offset(causal(), q=1.5), "integer tensor for q, not 1.5"),
        (lambda: packed(None, document_ids=torch.tensor([0])), "packed: expected a Mask, not NoneType"),
        (lambda: swaa_flex.build_block_mask(causal, 4, 4), "mask: expected a Mask"),
        (lambda: swaa_flex.plan(None, 4, 4), "mask: expected a Mask, not NoneType"),
        (lambda: swaa_flex.build_block_mask(causal(), 4.0, 4), "q_len=4.0, kv_len=4: expected"),
        (lambda: swaa_flex.build_block_mask(causal(), 1 << 32, 4), "expected at most 1073741823 rows"),
        (lambda: swaa_flex.build_block_mask(causal(), 4, 4, block_size=-128), "block_size=-128: expected at least 1"),
        (lambda: swaa_flex.build_block_mask(causal(), 4, 4, block_size=(128,)), r"block_size=\(128,\)"),
    ],
)
def test_bad_input_names_the_value_and_what_was_expected(make, message):
    with pytest.raises(MaskError, match=message):
        make()


FLAGS, IDS, ONES = torch.arange(8) % 3 == 0, torch.arange(8) // 3, torch.ones(8, dtype=torch.long)
COPIED = {
    "rows_where": (rows_where, FLAGS, ~FLAGS),
    "documents": (documents, IDS, 0 * IDS),
    "documents of a single batch": (documents, IDS[None], 0 * IDS[None]),
    "packed": (lambda ids: packed(causal() & sinks(1), document_ids=ids), IDS, 0 * IDS),
    "packed positions": (lambda ids: packed(causal() & sinks(1), position_ids=ids), IDS, 0 * IDS),
    "left_padded": (lambda ones: left_padded(causal() & sinks(1), ones), ONES, torch.arange(8) // 3),
}
READ = {
    "kv_positions": (lambda slots: kv_positions(causal(), slots), IDS, IDS.flip(0)),
    "rows_from": (rows_from, torch.tensor([2]), torch.tensor([5])),
    "heads": (lambda flags: heads(flags, causal(), sinks(1)), torch.tensor([True]), torch.tensor([False])),
    "offset": (lambda by: offset(causal(), q=by), torch.tensor(2), torch.tensor(5)),
    "sinks_and_tail": (lambda by: sinks_and_tail(causal(), 2, start=by), torch.tensor(3), torch.tensor(0)),
}


@pytest.mark.parametrize("name", [*COPIED, *READ])
def test_a_tensor_that_changes_is_seen_as_it_was_or_as_it_is(name):
    """By pairs and blocks alike: tables are copied, numbers and slots read at each call."""
    make, before, after = (COPIED | READ)[name]
    tensor = before.clone()
    mask = make(tensor)
    tensor.copy_(after)
    expected = make(before.clone() if name in COPIED else after.clone())
    assert (picture(make(before), 8, 8) == picture(make(after), 8, 8)) is False
    assert picture(mask, 8, 8) == picture(expected, 8, 8)
    assert torch.equal(listed(mask, 8, 8), listed(expected, 8, 8))


def test_numbers_of_numpy_are_numbers():
    three, flags = numpy.int64(3), numpy.array([True, False])
    assert offset(causal(), q=three) == offset(causal(), q=3)
    block_mask = swaa_flex.build_block_mask(causal(), numpy.int64(8), 8, q_offset=three, block_size=[4, 4])
    assert block_mask.shape[-2:] == (8, 8)
    assert heads(flags, causal(), everything()).num_heads == 2


LONG = torch.arange(8) // 4  # two documents


@pytest.mark.parametrize(
    ("mask", "rows", "keys"),
    [
        (documents(LONG), 8, 8),
        (causal() & rows_where(LONG.bool()), 8, None),
        (causal() | ~rows_where(LONG.bool()[None]), 8, None),
        (kv_positions(causal(), LONG), None, 8),
        (kv_positions(rows_where(LONG.bool()), LONG[:3]), 8, 3),
        (packed(causal(), document_ids=LONG), 8, 8),
        (heads([True], documents(LONG), causal()), 8, 8),
        (offset(documents(LONG), q=2, kv=-1), 6, 9),
        (offset(documents(LONG), q=torch.tensor(2)), 6, 8),
        (offset(documents(LONG) & causal(), q=torch.tensor(-2), kv=torch.tensor(1)), 10, 7),
        (offset(causal() & offset(documents(LONG), q=3), q=2), 3, 8),
        (left_padded(causal(), torch.ones(2, 8)), None, None),
        (left_padded(documents(LONG), torch.ones(8)), None, None),
        (sinks_and_tail(rows_where(LONG.bool()), 2, start=4), 8, None),
        (sinks_and_tail(documents(LONG), 2, start=4), 8, 6),
        (sinks_and_tail(documents(LONG), 2, start=torch.tensor([4, 3]), first=torch.tensor([0, 1])), 8, 6),
        (sinks_and_tail(documents(LONG), 4, start=6, first=5), 8, 6),
        (sinks_and_tail(documents(LONG), 4, start=20, first=5), 8, 3),
        (causal() & window(4), None, None),
    ],
)
def test_tables_are_for_as_many_rows_and_keys_as_they_have_entries(mask, rows, keys):
    batch, number = mask.batch_size, mask.num_heads
    most_rows, most_keys = rows or 20, keys or 20
    for make in (swaa_flex.build_block_mask, swaa_flex.plan):
        make(mask, most_rows, most_keys, batch=batch, heads=number)
        if rows:
            with pytest.raises(MaskError, match="holds a table for 8 query rows, but it is used with 9, offsets incl"):
                make(mask, rows + 1, most_keys, batch=batch, heads=number)
            with pytest.raises(MaskError, match="holds a table for 8 query rows, but it is used with 9"):
                make(mask, rows, most_keys, batch=batch, heads=number, q_offset=1)
        if keys:
            with pytest.raises(MaskError, match=r"holds a table for [38] keys, but it is used with \d+, offsets incl"):
                make(mask, most_rows, keys + 1, batch=batch, heads=number)


FIRST_FLAG = torch.arange(64) == 0
BEYOND = {
    "rows before": (offset(rows_where(FIRST_FLAG), q=-4), {4: range(8)}),
    "rows after": (offset(rows_where(~FIRST_FLAG[:3]), q=torch.tensor(-1)), {2: range(8), 3: range(8)}),
    "document rows after": (offset(documents(torch.arange(6) // 3), q=torch.tensor(4)), {0: [3, 4, 5], 1: [3, 4, 5]}),
    "document keys after": (
        offset(documents(torch.arange(6) // 3), kv=torch.tensor(4)),
        {3: [0, 1], 4: [0, 1], 5: [0, 1]},
    ),
    "packed rows after": (
        offset(packed(causal(), document_ids=LONG), q=torch.tensor(6)),
        {0: [4, 5, 6], 1: [4, 5, 6, 7]},
    ),
    "positions after": (
        kv_positions(documents(LONG[:5]), torch.arange(2, 10)),
        {row: [0, 1] for row in range(4)} | {4: [2]},
    ),
    "slots after": (
        offset(kv_positions(window(99), torch.arange(3)), kv=torch.tensor(1)),
        {row: [0, 1] for row in range(8)},
    ),
    "padded rows after": (left_padded(rows_where(FIRST_FLAG[:2]), torch.ones(8)), {0: range(8)}),
    "packed short rows": (packed(rows_where(FIRST_FLAG[:2]), document_ids=LONG), {0: range(4), 4: range(4, 8)}),
    "slots before": (
        offset(sinks_and_tail(causal(), 4, start=2), kv=-6),
        {0: [6]} | {row: [6, 7] for row in range(1, 8)},
    ),
}


@pytest.mark.parametrize(("mask", "expected"), BEYOND.values(), ids=BEYOND)
def test_beyond_a_table_nothing_is_seen_by_pairs_and_by_blocks(mask, expected):
    pairs = visible_pairs(mask, 8, 8)[0, 0]
    assert {row: keys.nonzero().flatten().tolist() for row, keys in enumerate(pairs) if keys.any()} == {
        row: list(keys) for row, keys in expected.items()
    }
    assert not (pairs & ~listed(mask, 8, 8)).any()


def listed(mask, q_len, kv_len):
    """Pairs in block lists that are made unchecked, as in a compiled graph or with numbers on a GPU."""
    bounds = row_block_bounds(mask, q_len, kv_len, 1, "cpu")
    return layout(mask, bounds, q_len, kv_len, device="cpu", block_size=1).to_dense()[0, 0].bool()


FAR = (1 << 30) - 1


@pytest.mark.parametrize(
    "mask",
    [
        offset(causal(), q=FAR),
        offset(causal(), q=torch.tensor(1 << 31)),
        offset(causal(), kv=torch.tensor(-1 << 31)),
        offset(offset(causal(), q=FAR // 2), q=FAR // 2 + 2),
        offset(causal() | offset(window(9), kv=-FAR), kv=-3),
        heads([True], sinks_and_tail(causal(), 0, start=torch.tensor(FAR)), causal()),
    ],
)
def test_positions_beyond_the_limit_are_refused(mask):
    for make in (swaa_flex.build_block_mask, swaa_flex.plan):
        with pytest.raises(MaskError, match="offsets included: expected at most 1073741823 either way"):
            make(mask, 5, 5, heads=1)


@pytest.mark.parametrize("far", [FAR - 4, -FAR])
@pytest.mark.parametrize("on_host", [True, False])
def test_positions_up_to_the_limit_are_right(far, on_host):
    by = far if on_host else torch.tensor(far)
    some = heads([True], causal() & window(2), everything()) | rows_from(torch.tensor(9))
    for mask, expected in (
        (offset(causal() & window(2), q=by, kv=by), [1, 2, 2, 2, 2]),
        (offset(some, q=by, kv=by), [1, 2, 2, 2, 2] if far < 0 else [5] * 5),
        (offset(rows_from(0) & ~heads([True], causal(), window(3)), q=3, kv=by), [0] * 5 if far < 0 else [5] * 5),
    ):
        pairs = visible_pairs(mask, 5, 5)[0, 0]
        assert pairs.sum(-1).tolist() == expected
        assert torch.equal(listed(mask, 5, 5), pairs)
        if on_host:
            swaa_flex.build_block_mask(mask, 5, 5, heads=1)


TWO, THREE = (rows_from(torch.arange(n)) for n in (2, 3))


@pytest.mark.parametrize(
    "mask",
    [
        TWO | THREE,
        kv_positions(THREE, torch.zeros(2, 8, dtype=torch.long)),
        packed(TWO, document_ids=torch.zeros(3, 8, dtype=torch.long)),
        left_padded(THREE, torch.ones(2, 8)),
        sinks_and_tail(THREE, 2, start=torch.tensor([4, 5])),
    ],
)
def test_masks_of_different_batches_do_not_combine(mask):
    with pytest.raises(MaskError, match=r"batch_size \[2, 3\]"):
        swaa_flex.build_block_mask(mask, 8, 8, batch=2)


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [(0, 99, "causal & window(8)"), (100, 120, "causal"), (90, 110, "causal & (window(8) | rows_from(100))")],
)
def test_for_rows_simplifies_what_is_known(first, last, expected):
    assert repr((causal() & (window(8) | rows_from(100))).for_rows(first, last)) == expected


def test_for_rows_keeps_the_mask_the_same_on_those_rows():
    mask = causal() & (~rows_from(5) & window(2) | rows_from(5) & ~rows_from(8) | sinks(1))
    for first, last in ((0, 4), (5, 7), (8, 11), (3, 9)):
        whole = visible_pairs(mask, 12, 12)[..., first : last + 1, :]
        part = visible_pairs(mask.for_rows(first, last), last - first + 1, 12, q_offset=first)
        assert torch.equal(whole, part)
