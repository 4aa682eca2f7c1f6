import io
import re
import sys

import pytest
import torch
from conftest import visible_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from strategies import BATCH, HEADS, compositions
from torch.nn.attention.flex_attention import create_block_mask

from swaa_flex import MaskError, build_block_mask, viz
from swaa_flex.masks import (
    causal,
    documents,
    everything,
    from_mask_mod,
    heads,
    offset,
    packed,
    rows_from,
    sinks,
    window,
)

BLUE, ORANGE, PALE, GREY = (47, 109, 181), (240, 160, 48), (252, 232, 200), (239, 242, 245)


def printed(renderable, width=80, encoding="utf-8", **kwargs):
    """What a console without colours prints."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=file, width=width, **{"color_system": None, **kwargs}).print(renderable)
    file.flush()
    return file.buffer.getvalue().decode(encoding)


def words(figure):
    return "\n".join(text.get_text() for text in figure.texts)


def counts(text):
    """The numbers of full, partial and skipped blocks in a legend."""
    return [
        int(re.search(rf"{label} +([\d,]+) \(", text)[1].replace(",", "")) for label in ("full", "partial", "skipped")
    ]


def picture(text):
    """The characters inside the frame."""
    return [line.split("│")[1] for line in text.splitlines() if line.count("│") == 2]


def classes(mask, q_len, kv_len, block_size):
    """Per pair what its block is according to create_block_mask: 0 skipped, 1 partial, 2 full."""
    stock = create_block_mask(mask, 1, 1, q_len, kv_len, device="cpu", BLOCK_SIZE=block_size)
    full = create_block_mask(mask, 1, 1, q_len, kv_len, device="cpu", BLOCK_SIZE=block_size)
    full.kv_num_blocks, full.kv_indices = full.full_kv_num_blocks, full.full_kv_indices
    full.full_kv_num_blocks = full.full_kv_indices = None
    per_block = (stock.to_dense() + full.to_dense())[0, 0]
    return per_block.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)[:q_len, :kv_len]


SWA = causal() & (window(64) | sinks(8))
LENGTHS = [(1, 1, 4), (97, 97, 16), (128, 128, 32), (130, 257, 16), (256, 256, 16), (300, 130, 128)]


@pytest.mark.parametrize(("q_len", "kv_len", "block_size"), LENGTHS)
def test_counts_are_those_of_create_block_mask_and_of_the_pairs(q_len, kv_len, block_size):
    stock = create_block_mask(SWA, None, None, q_len, kv_len, device="cpu", BLOCK_SIZE=block_size)
    partial, full = int(stock.kv_num_blocks.sum()), int(stock.full_kv_num_blocks.sum())
    all_blocks = -(-q_len // block_size) * -(-kv_len // block_size)
    share = visible_pairs(SWA, q_len, kv_len).double().mean().item()
    in_terminal = printed(viz.terminal(SWA, q_len, kv_len, block_size=block_size))
    in_figure = words(viz.draw(SWA, q_len, kv_len, block_size=block_size))
    for text in (in_terminal, in_figure):
        assert counts(text) == [full, partial, all_blocks - partial - full]
        assert f"visible pairs: {share:.1%} of {q_len * kv_len:,}" in text
        assert f"blocks of {block_size} × {block_size}" in text


@settings(max_examples=30, deadline=None)
@given(st.data(), st.integers(1, 150), st.integers(1, 150), st.sampled_from([8, 32]))
def test_counts_of_random_masks_are_those_of_the_block_mask_and_of_the_pairs(data, q_len, kv_len, block_size):
    mask = data.draw(compositions(max(q_len, kv_len), depth=1))
    b, h = data.draw(st.integers(0, BATCH - 1)), data.draw(st.integers(0, HEADS - 1))
    built = build_block_mask(mask, q_len, kv_len, batch=BATCH, heads=HEADS, block_size=block_size)
    visible = visible_pairs(mask, q_len, kv_len, BATCH, HEADS)[b, h].double().mean().item()
    text = printed(viz.terminal(mask, q_len, kv_len, block_size=block_size, b=b, h=h))
    full, partial, skipped = counts(text)
    lists = (built.full_kv_num_blocks, built.kv_num_blocks)
    assert [full, partial] == [int(n[min(b, len(n) - 1), min(h, n.shape[1] - 1)].sum()) for n in lists]
    assert full + partial + skipped == -(-q_len // block_size) * -(-kv_len // block_size)
    shown = re.search(r"visible pairs: ([<>]?)([\d.]+)%", text)
    if not shown[1]:
        assert abs(float(shown[2]) / 100 - visible) <= 0.00051


@pytest.mark.parametrize(("q_len", "kv_len", "block_size"), LENGTHS)
def test_every_pixel_of_the_figure_is_its_pair_in_the_colour_of_its_block(q_len, kv_len, block_size):
    pixels = viz.draw(SWA, q_len, kv_len, block_size=block_size).axes[0].images[0].get_array()
    kind = classes(SWA, q_len, kv_len, block_size)
    visible = visible_pairs(SWA, q_len, kv_len)[0, 0]
    expected = torch.tensor([GREY, GREY, PALE, ORANGE, BLUE, BLUE])[kind * 2 + visible]
    assert pixels.tolist() == expected.tolist()


def test_characters_show_class_and_pairs():
    text = printed(viz.terminal(causal() & window(8), 16, 16, block_size=4), width=16 + len("row 0") + 3)
    expected = [  # two rows to a line; a tie between visible and hidden counts as visible
        "▓▓░░············",
        "▓▓▓▓············",
        "████▓▓░░········",
        "████▓▓▓▓········",
        "░▓▓▓████▓▓░░····",
        "░░░▓████▓▓▓▓····",
        "····░▓▓▓████▓▓░░",
        "····░░░▓████▓▓▓▓",
    ]
    assert picture(text) == expected


def test_a_mask_without_visible_pairs_is_all_skipped():
    text = printed(viz.terminal(~everything(), 64, 64))
    assert counts(text) == [0, 0, 256]
    assert "visible pairs: 0.0% of 4,096" in text
    assert set("".join(picture(text))) == {"·"}


@pytest.mark.parametrize(("share", "shown"), [(1 / 40_000, "<0.1%"), (1 - 1 / 40_000, ">99.9%"), (0.5, "50.0%")])
def test_a_tiny_share_is_not_rounded_to_none_or_all(share, shown):
    one = from_mask_mod(lambda b, h, q, kv: (q == 3) & (kv == 5))
    half = from_mask_mod(lambda b, h, q, kv: (q + kv) % 2 == 0)
    mask = half if share == 0.5 else one if share < 0.5 else ~one
    assert f"visible pairs: {shown} of 40,000" in printed(viz.terminal(mask, 200, 200))


@pytest.mark.parametrize(
    ("q_len", "kv_len", "block_size"),
    [(1, 1, 4), (97, 97, 4), (256, 256, 16), (300, 300, 16), (1, 1000, 32), (2047, 5, 64), (2048, 2048, 128)],
)
def test_block_size_suits_the_longer_side_and_the_picture_says_so(q_len, kv_len, block_size):
    text = printed(viz.terminal(causal(), q_len, kv_len))
    note = "" if block_size == 128 else " to suit the length (kernels use 128)"
    assert text.splitlines()[2] == f"blocks of {block_size} × {block_size}{note}"


def test_a_given_block_size_needs_no_note():
    assert "to suit" not in printed(viz.terminal(causal(), 256, 256, block_size=16))


def test_title_is_the_mask_unless_given():
    assert printed(viz.terminal(SWA, 64, 64)).startswith("causal & (window(64) | sinks(8))\n")
    assert printed(viz.terminal(SWA, 64, 64, title="[b]mine[/b]")).startswith("[b]mine[/b]\n")
    assert viz.draw(SWA, 64, 64).texts[0].get_text() == "causal & (window(64) | sinks(8))"
    assert viz.draw(SWA, 64, 64, title="mine").texts[0].get_text() == "mine"


def test_a_long_title_does_not_leave_the_figure():
    mask = causal()
    for number in range(100, 160):
        mask = mask | window(number)
    figure = viz.draw(mask, 64, 64)
    figure.canvas.draw()
    for text in figure.texts:
        extent = text.get_window_extent()
        assert extent.x1 <= figure.bbox.x1 and extent.y1 <= figure.bbox.y1
    assert figure.texts[0].get_text().endswith(" …")


# --- sequences and heads -----------------------------------------------------------------------------------


def test_b_selects_the_sequence():
    mask = causal() & documents(torch.tensor([[0] * 64, [0] * 32 + [1] * 32]))
    assert counts(printed(viz.terminal(mask, 64, 64, block_size=32))) == [1, 2, 1]
    assert counts(printed(viz.terminal(mask, 64, 64, block_size=32, b=1))) == [0, 2, 2]
    assert counts(words(viz.draw(mask, 64, 64, block_size=32, b=1))) == [0, 2, 2]


def test_h_selects_the_head():
    mask = heads([True, False], everything(), causal())
    assert counts(printed(viz.terminal(mask, 64, 64, block_size=32))) == [4, 0, 0]
    assert counts(printed(viz.terminal(mask, 64, 64, block_size=32, h=1))) == [1, 2, 1]


def test_a_mask_mod_is_evaluated_for_the_sequence_and_head():
    mask = from_mask_mod(lambda b, h, q, kv: (b == 3) & (h == 5) & (q >= kv))
    assert "visible pairs: 0.0%" in printed(viz.terminal(mask, 64, 64))
    assert "visible pairs: 50.8%" in printed(viz.terminal(mask, 64, 64, b=3, h=5))


PER_SEQUENCE = causal() & rows_from(torch.tensor([3, 5]))
PER_HEAD = heads([True, False], causal(), everything())


@pytest.mark.parametrize("function", [viz.draw, viz.terminal])
@pytest.mark.parametrize(
    ("mask", "kwargs", "message"),
    [
        (
            PER_SEQUENCE,
            {"b": 2},
            r"b=2: expected an index from 0 to 1, what causal & rows_from\(.*\) holds tensors for",
        ),
        (PER_HEAD, {"h": 2}, "h=2: expected an index from 0 to 1"),
        (causal(), {"b": -1}, "b=-1: expected an index from 0$"),
        (causal(), {"block_size": 0}, "block_size=0: expected at least 1"),
        (causal(), {"q_len": 0}, "q_len=0, kv_len=64: expected at least one"),
        (causal(), {"q_len": 10**9, "kv_len": 10**9}, "so many blocks do not fit into memory"),
        (causal(), {"q_len": 10**5, "kv_len": 10**5, "block_size": 1}, "so many blocks do not fit into memory"),
        (causal(), {"q_len": 10**22}, "expected at most 1073741823 rows"),
        (
            lambda b, h, q, kv: q >= kv,
            {},
            "mask: expected a Mask, not function; call what makes one, .* wrap a mask_mod with .*from_mask_mod",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(function, mask, kwargs, message):
    with pytest.raises(MaskError, match=message):
        function(mask, **{"q_len": 64, "kv_len": 64, **kwargs})


@pytest.mark.parametrize("block_size", [64, 10**9])
def test_a_block_may_be_larger_than_the_mask(block_size):
    picture = viz.terminal(causal(), 64, 64, block_size=block_size)
    assert picture.survey.visible == pytest.approx(65 / 128)


# --- long sequences ----------------------------------------------------------------------------------------


def test_long_sequences_are_sampled_in_bounded_memory():
    sizes = []

    def every_third(b, h, q, kv):
        sizes.append(torch.broadcast_shapes(q.shape, kv.shape).numel())
        return (q + kv) % 3 == 0

    mask = causal() & from_mask_mod(every_third)
    picture = viz.terminal(mask, 131_072, 131_072)
    text = printed(picture)
    assert counts(text) == [0, 1024 * 1025 // 2, 1024 * 1023 // 2]
    assert "visible pairs: ≈ 16.7% of 17,179,869,184" in text
    assert max(sizes) <= 1 << 23


def test_the_count_is_exact_where_few_blocks_are_partial():
    length, w, k = 65_536, 2048, 128
    text = printed(viz.terminal(causal() & (window(w) | sinks(k)), length, length))
    visible = sum(min(row + 1, w) + min(max(row + 1 - w, 0), k) for row in range(length))
    assert f"visible pairs: {visible / length**2:.1%} of" in text
    assert "≈" not in text


def test_nothing_is_too_thin_to_be_seen():
    length = 65_536
    mask = causal() & (window(1024) | sinks(4) | rows_from(length - 1))
    lines = picture(printed(viz.terminal(mask, length, length)))
    assert all(line[0] in "█▓░" for line in lines)
    assert "·" not in lines[-1] and "·" in lines[-2]
    pixels = torch.from_numpy(viz.draw(mask, length, length).axes[0].images[0].get_array().data)
    grey = (pixels == torch.tensor(GREY, dtype=torch.uint8)).all(-1)
    assert not grey[:, 0].any() and not grey[-1].any() and grey[-2].any()


def test_the_first_and_the_last_keys_are_seen_even_if_a_pixel_is_many_blocks():
    length = 2**20
    mask = causal() & (window(1024) | sinks(4)) | ~sinks(length - 1)
    lines = picture(printed(viz.terminal(mask, length, length)))
    assert all(line[0] != "·" and line[-1] != "·" for line in lines)
    assert lines[-1].count("·") > len(lines[-1]) - 10


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 4096), (16, 4096), (4096, 16), (1, 1), (70, 73)])
def test_flat_and_tall_masks_have_a_picture(q_len, kv_len):
    mask = offset(SWA, q=max(0, kv_len - q_len))
    lines = picture(printed(viz.terminal(mask, q_len, kv_len)))
    assert len(lines) >= min(8, q_len) and len(lines[0]) >= 16
    width, height = viz.draw(mask, q_len, kv_len).axes[0].get_window_extent().size
    assert width == pytest.approx(1200) and 150 <= height <= 1201


# --- the terminal ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [30, 40, 79, 80, 200])
@pytest.mark.parametrize("length", [8, 97, 1000, 20_000])
def test_the_picture_fits_the_terminal(width, length):
    lines = picture(printed(viz.terminal(SWA, length, length), width=width))
    assert len({len(line) for line in lines}) == 1
    assert len("row 0") + 3 + len(lines[0]) <= width
    assert 8 <= len(lines[0]) <= 72
    assert len(lines) in (len(lines[0]) // 2, len(lines[0]) // 2 + 1)


def test_corner_labels_are_the_first_and_last_row_and_key():
    lines = printed(viz.terminal(SWA, 100, 300)).splitlines()
    assert lines[4].split() == ["key", "0", "299"]
    assert [line.split("│")[0].strip() for line in lines if "│" in line if line.split("│")[0].strip()] == [
        "row 0",
        "99",
    ]


def test_colours_are_half_blocks_and_true_to_the_legend():
    console = Console(
        file=io.StringIO(), width=80, force_terminal=True, color_system="truecolor", no_color=False, record=True
    )
    console.print(viz.terminal(causal() & window(8), 16, 16, block_size=4))
    text = console.file.getvalue()
    for colour in ("59;130;216", "240;160;48", "142;114;80"):  # full, visible, hidden
        assert colour in text
    assert not set("░▓·") & set(console.export_text())


@pytest.mark.parametrize(
    "kwargs",
    [
        {"force_terminal": True, "color_system": "truecolor", "no_color": True},
        {"force_terminal": True, "color_system": "standard", "no_color": False},
        {"color_system": None},
    ],
)
def test_without_enough_colours_classes_differ_by_character(kwargs):
    text = printed(viz.terminal(SWA, 256, 256), **kwargs)
    assert set("█▓░·") <= set(text)
    assert not set("▀▄") & set(text)


def test_no_color_leaves_no_colours():
    text = printed(viz.terminal(SWA, 256, 256), force_terminal=True, color_system="truecolor", no_color=True)
    assert not re.search(r"\x1b\[[\d;]*(3|4)[0-9;]*m", text)


def test_an_encoding_without_block_characters_gets_ascii():
    text = printed(viz.terminal(SWA, 256, 256), encoding="ascii")
    assert {"#", "+", "-", "."} <= set(text)
    assert "blocks of 16 x 16" in text


# --- the figure --------------------------------------------------------------------------------------------


def test_path_gets_a_png(tmp_path):
    path = tmp_path / "mask.png"
    figure = viz.draw(SWA, 97, 97, path=path)
    written = path.read_bytes()
    assert written.startswith(b"\x89PNG\r\n\x1a\n")
    size = int.from_bytes(written[16:20]), int.from_bytes(written[20:24])
    assert size == tuple(figure.bbox.size.round().astype(int))


def test_a_packed_mask_can_be_drawn(tmp_path):
    mask = packed(SWA, document_ids=torch.tensor([0] * 100 + [1] * 60 + [2] * 40))
    viz.draw(mask, 200, 200, path=tmp_path / "packed.png")
    share = visible_pairs(mask, 200, 200).double().mean().item()
    assert f"visible pairs: {share:.1%}" in printed(viz.terminal(mask, 200, 200))


def test_ticks_are_block_borders_and_the_end():
    axes = viz.draw(SWA, 20_000, 20_000).axes[0]
    assert axes.get_xticks().tolist() == [0, 4096, 8192, 12288, 16384, 20000]
    assert axes.get_yticks().tolist() == [0, 4096, 8192, 12288, 16384, 20000]
    assert viz.draw(SWA, 97, 97).axes[0].get_xticks().tolist() == [0, 16, 32, 48, 64, 80, 96]


def test_without_matplotlib_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'swaa-flex\[plot\]'"):
        viz.draw(causal(), 8, 8)
