"""What a recipe lets rows see, against an oracle that walks over pairs and knows the definitions, not the library."""

import itertools

import pytest
import torch
from conftest import visible_pairs

from swaa_flex import MaskError, SWAAConfig
from swaa_flex.analysis.cost import visible_pairs as counted_pairs
from swaa_flex.cli.show import recipe_mask
from swaa_flex.config import LayerKind
from swaa_flex.layer_mask import QueryRows, document_starts, layer_mask
from swaa_flex.vllm.rows import Rule, cut

WINDOW, SINKS = 5, 2


def oracle(position, document, dense, q_columns):
    """Pairs by hand, bool `[batch, q_len, columns]`.

    Args:
        position: of each column, `[batch][columns]`, None for pads.
        document: of each column, `[batch][columns]`.
        dense: whether the row in a column is dense, `[batch][columns]`.
        q_columns: columns of the query rows.
    """
    batch, columns = len(position), len(position[0])
    seen = torch.zeros(batch, len(q_columns), columns, dtype=torch.bool)
    for b, (row, q), k in itertools.product(range(batch), enumerate(q_columns), range(columns)):
        p, r = position[b][q], position[b][k]
        if p is None or r is None or document[b][q] != document[b][k] or r > p:
            continue
        seen[b, row, k] = p - r < WINDOW or r < SINKS or dense[b][q]
    return seen


def dense_rows(position, prompt, tail, decode_is_full):
    return [
        [p is not None and ((n - tail <= p < n) or (decode_is_full and p >= n)) for p in row]
        for row, n in zip(position, prompt, strict=True)
    ]


def config(tail):
    return SWAAConfig(sliding_window=WINDOW, sink_tokens=SINKS, full_attention_layers=(), dense_tail=tail)


def kind(decode_is_full):
    return LayerKind(full=False, full_attention_decode=decode_is_full)


def pairs(mask, rows, columns):
    return visible_pairs(mask, rows.q_len, columns, batch=rows.batch, q_offset=int(rows.q_offset))[:, 0]


@pytest.mark.parametrize("decode_is_full", [True, False])
@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize("pads", [(0, 0), (4, 0)])
@pytest.mark.parametrize(("q_offset", "q_len"), [(0, 30), (17, 9), (21, 1), (25, 1)])
def test_prompt_lengths_and_pads(decode_is_full, tail, pads, q_offset, q_len):
    columns, prompt = q_offset + q_len, (20, 16)
    position = [[c - left if c >= left else None for c in range(columns)] for left in pads]
    rows = QueryRows(
        q_len=q_len,
        q_offset=q_offset,
        batch=2,
        prompt_lengths=torch.tensor(prompt),
        first=torch.tensor(pads) if any(pads) else None,
    )
    expected = oracle(
        position, [[0] * columns] * 2, dense_rows(position, prompt, tail, decode_is_full), range(q_offset, columns)
    )
    assert torch.equal(pairs(layer_mask(config(tail), kind(decode_is_full), rows), rows, columns), expected)


@pytest.mark.parametrize("tail", [0, 3])
def test_rows_of_which_nothing_is_known(tail):
    """The last rows of a prompt, up to the pads on its right, are dense; a row alone is a decode row."""
    stops = (24, 20)
    position = [[c if c < stop else None for c in range(24)] for stop in stops]
    rows = QueryRows(q_len=24, batch=2, first=torch.zeros(2, dtype=torch.long), stop=torch.tensor(stops))
    expected = oracle(position, [[0] * 24] * 2, dense_rows(position, stops, tail, True), range(24))
    found = pairs(layer_mask(config(tail), kind(True), rows), rows, 24)
    for real, ours, theirs in zip(stops, found, expected, strict=True):  # what rows of pads see does not matter
        assert torch.equal(ours[:real], theirs[:real])
    for decode_is_full in (True, False):
        alone = QueryRows(q_len=1, q_offset=23)
        expected = oracle([list(range(24))], [[0] * 24], [[decode_is_full] * 24], [23])
        assert torch.equal(pairs(layer_mask(config(tail), kind(decode_is_full), alone), alone, 24), expected)


@pytest.mark.parametrize("decode_is_full", [True, False])
@pytest.mark.parametrize("flagged", [True, False])
def test_packed_documents_and_several_answers(decode_is_full, flagged):
    lengths, tail = (11, 8, 1), 3
    document = [d for d, n in enumerate(lengths) for _ in range(n)]
    position = [p for n in lengths for p in range(n)]
    answer = [flagged and d != 2 and 6 <= p < 8 for d, p in zip(document, position, strict=True)]
    dense = []
    for c, is_answer in enumerate(answer):
        ahead = range(c + 1, c + 1 + tail)
        ends = any(n == len(answer) or document[n] != document[c] or answer[n] for n in ahead if n <= len(answer))
        dense.append(decode_is_full if is_answer else ends)
    # After an answer the prompt goes on: its rows are in the tail of the next end only.
    rows = QueryRows(
        q_len=len(answer),
        decode_rows=torch.tensor([answer]) if flagged else None,
        document_ids=torch.tensor([document]),
    )
    mask = layer_mask(config(tail), kind(decode_is_full), rows)
    assert torch.equal(pairs(mask, rows, len(answer)), oracle([position], [document], [dense], range(len(answer))))


def test_a_full_layer_and_a_recipe_without_a_window_are_causal():
    causal = torch.ones(1, 9, 9, dtype=torch.bool).tril()
    rows = QueryRows(q_len=9, prompt_lengths=4)
    assert torch.equal(pairs(layer_mask(config(3), LayerKind(True, True), rows), rows, 9), causal)
    assert torch.equal(pairs(layer_mask(SWAAConfig(sliding_window=None), kind(False), rows), rows, 9), causal)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (QueryRows(q_len=4, decode_rows=torch.ones(1, 3, dtype=torch.bool)), r"decode_rows: expected \[1, 4\]"),
        (QueryRows(q_len=4, batch=2, prompt_lengths=torch.tensor([1, 2, 3])), "got 3 for a batch of 2"),
        (QueryRows(q_len=4, batch=2, prompt_lengths=torch.empty(0, dtype=torch.long)), "got 0 for a batch of 2"),
        (QueryRows(q_len=4, prompt_lengths=2, document_ids=torch.zeros(1, 4, dtype=torch.long)), "pass decode_rows"),
    ],
)
def test_what_does_not_fit_the_rows_is_refused(rows, message):
    with pytest.raises(MaskError, match=message):
        layer_mask(config(3), kind(True), rows)


def test_documents_start_where_positions_do_not_go_up_by_one():
    found = document_starts(torch.tensor([[0, 1, 2, 0, 1, 7, 8]]))
    assert found.tolist() == [[True, False, False, True, False, True, False]]


@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize("length", [1, 4, 30])
def test_pictures_and_costs_see_the_same(tail, length):
    rows = QueryRows(q_len=length, prompt_lengths=length)
    expected = pairs(layer_mask(config(tail), kind(True), rows), rows, length)
    assert torch.equal(visible_pairs(recipe_mask(config(tail), length), length, length)[:, 0], expected)
    assert counted_pairs(config(tail), kind(True), length) == int(expected.sum())


@pytest.mark.parametrize("decode_is_full", [True, False])
@pytest.mark.parametrize("tail", [0, 3])
def test_a_step_of_vllm_sees_the_same(decode_is_full, tail):
    """Each row of its stretches sees all keys, or window and sinks."""
    rule = Rule(window=WINDOW, sinks=SINKS, dense_tail=tail, dense_decode=decode_is_full)
    prompts, lengths, new = (20, 9, 12), (20, 14, 30), (13, 1, 30)
    start = torch.tensor([0, *new]).cumsum(0).int()
    stretches = cut(
        rule,
        start,
        torch.tensor(lengths, dtype=torch.int32),
        torch.tensor(prompts, dtype=torch.int32),
        torch.zeros(3, 4, dtype=torch.int32),
        rows=int(start[-1]),
        max_rows=max(new),
        max_keys=max(lengths),
    )
    at = 0
    for prompt, length, count in zip(prompts, lengths, new, strict=True):
        rows = QueryRows(q_len=count, q_offset=length - count, prompt_lengths=prompt)
        seen = pairs(layer_mask(config(tail), kind(decode_is_full), rows), rows, length)[0].sum(-1)
        for row, keys in enumerate(seen.tolist()):
            position = length - count + row
            everything = position + 1
            near = min(everything, WINDOW + SINKS)
            assert keys == (everything if stretches.is_full[at] else near), (prompt, position)
            at += 1
