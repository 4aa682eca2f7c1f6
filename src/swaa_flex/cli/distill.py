"""`swaa-flex distill`: a model answers prompts, for its own fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from ..tuning import distill as distillation
from ..tuning.data import read_samples
from . import checkpoint, paths
from .left_out import report


def distill(
    command: typer.Context,
    model: Annotated[str, typer.Argument(help="A folder, a GGUF file, or a name on the Hugging Face Hub.")],
    data: Annotated[Path, typer.Argument(help="The prompts: .jsonl, .json or .parquet.")],
    out: Annotated[Path, typer.Argument(help="The file to write, .jsonl.")],
    n: Annotated[int, typer.Option("--n", help="Answers per prompt.")] = 4,
    temperature: Annotated[float, typer.Option(help="Of the sampling; 0 is greedy.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens per answer at most, thinking included.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Prompts at a time.")] = 8,
    keep: Annotated[int, typer.Option(help="Answers per prompt to keep at most.")] = 1,
    judge: Annotated[
        str,
        typer.Option(metavar="contains|exact|none", help="Which answers are right, by the reference answer."),
    ] = "contains",
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, and what a run with other settings left.")
    ] = False,
) -> None:
    """Let a model write the answers that it is to be fine-tuned on.

    It answers each prompt a few times, with full attention, and the best answers
    of those that are right are written to OUT as chat messages. Rows of the data
    have 'prompt' or chat 'messages', and 'answer', the reference answer.

    A run that was interrupted goes on where it was when it is started again, and
    ends with the same file.

    [bold]Examples[/]

      swaa-flex distill Qwen/Qwen3-4B-Instruct-2507 prompts.parquet train.jsonl
      swaa-flex distill ./model chats.jsonl train.jsonl --judge none --n 1
    """
    paths.read_file("DATA", data)
    paths.write_file("OUT", out)
    paths.reserve(command, out)
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists; name another file, or have it replaced with --overwrite")
    samples, bad = read_samples(data)
    total = len(samples) + len(bad)
    report(f"{len(bad)} of {total} rows of {data} are left out:", bad, lambda line: typer.echo(line, err=True))
    loaded, tokenizer = checkpoint.load(model)
    result = distillation.distill(
        loaded,
        tokenizer,
        samples,
        out,
        n=n,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        keep=keep,
        judge=judge,
        overwrite=overwrite,
    )
    resumed = f", {result.resumed} of them before the interruption" if result.resumed else ""
    typer.echo(
        f"{result.rows} prompts{resumed}: {result.answered} with an answer that ended in {max_new_tokens} tokens"
    )
    if not result.kept:
        result.path.unlink()
        raise ConfigError(
            f"no answer was kept, so {result.path} is gone again; give answers more room (--max-new-tokens), another "
            "--judge, or more tries (--n)"
        )
    typer.echo(f"kept {result.kept} answers, wrote {result.path}")
