"""Draws the pictures of the documentation into docs/img: `python docs/make_pictures.py` (needs matplotlib)."""

from pathlib import Path

import torch

from swaa_flex import Mask, SWAAConfig, recipes, viz
from swaa_flex.masks import causal, from_mask_mod, left_padded, packed, rows_from, sinks, window

IMAGES = Path(__file__).parent / "img"


def sliding_layer(config: SWAAConfig, prompt_length: int) -> Mask:
    """What a sliding-window layer of a configuration sees when the prompt length is known."""
    assert config.sliding_window is not None
    near = window(config.sliding_window) | sinks(config.sink_tokens)
    dense = rows_from(prompt_length - config.dense_tail)
    if not config.full_attention_decode:
        dense = dense & ~rows_from(prompt_length)
    return causal() & (near | dense)


def draw_recipe(name: str) -> None:
    """Three windows of prompt, then one window of generated tokens."""
    config = recipes.get(name)
    assert config.sliding_window is not None
    prompt_length, length = 3 * config.sliding_window, 4 * config.sliding_window
    title = f"recipe {name!r}: prompt rows to {prompt_length - 1}, then decode rows"
    save(f"recipe_{name}", sliding_layer(config, prompt_length), length, title)


def save(name: str, mask: Mask, length: int, title: str | None = None) -> None:
    figure = viz.draw(mask, length, length, title=title)
    path = IMAGES / f"{name}.png"
    figure.savefig(path, dpi=100)
    print(f"{path.name:28} {path.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    for name in ("naive", "paper", "throughput", "decode_only", "balanced", "quality"):
        draw_recipe(name)

    near = causal() & (window(256) | sinks(32))
    save("window_sinks", near, 2048)
    every_third = from_mask_mod(lambda b, h, q, kv: (q + kv) % 3 == 0)
    save("custom", near & every_third, 2048, "causal & (window(256) | sinks(32)) & a function of your own")
    document_ids = torch.arange(3).repeat_interleave(torch.tensor([900, 300, 848]))
    save("packed", packed(near, document_ids=document_ids), 2048, "three documents in one row")
    attention_mask = torch.arange(2048)[None] >= 500
    save("left_padded", left_padded(near, attention_mask), 2048, "500 pads on the left")


if __name__ == "__main__":
    main()
