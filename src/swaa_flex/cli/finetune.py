"""`swaa-flex finetune` and `merge`: a LoRA adapter for a recipe, and a plain model of both."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import CONFIG_NAME, AutoConfig

from .. import recipes
from ..config import SWAAConfig
from ..errors import ConfigError
from ..hf.adapt import adapt
from ..hf.config import swaa_of
from ..tuning import adapters, train
from ..tuning.data import Example, encode, encode_each, fit, read_samples, unreadable
from . import checkpoint, paths
from .left_out import report

DEFAULT = train.TuningConfig()


def finetune(
    command: typer.Context,
    model: Annotated[str, typer.Argument(help="A folder, a GGUF file, or a name on the Hugging Face Hub.")],
    data: Annotated[Path, typer.Argument(help="What to learn: .jsonl, .json or .parquet, of `swaa-flex distill`.")],
    out: Annotated[Path, typer.Argument(help="A folder for checkpoints and the adapter.")],
    recipe: Annotated[
        str, typer.Option(help="The recipe to train for: a name, or a .json file with the fields of a SWAAConfig.")
    ] = recipes.DEFAULT,
    held_out: Annotated[
        Path | None, typer.Option(help="Data whose loss is printed, under the recipe and under full attention.")
    ] = None,
    objective: Annotated[
        str, typer.Option(metavar="ce|kl", help="Match the answers, or what full attention says of them.")
    ] = DEFAULT.objective,
    rank: Annotated[int, typer.Option(help="Of the LoRA matrices.")] = DEFAULT.rank,
    scale: Annotated[float, typer.Option(help="LoRA's alpha / rank.")] = DEFAULT.scale,
    targets: Annotated[str, typer.Option(help="Linear layers that get an adapter.")] = ",".join(
        DEFAULT.target_modules
    ),
    dropout: Annotated[float, typer.Option(help="On the input of the adapters.")] = DEFAULT.dropout,
    learning_rate: Annotated[float, typer.Option("--lr", help="The largest learning rate.")] = DEFAULT.learning_rate,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which it rises.")] = DEFAULT.warmup_ratio,
    schedule: Annotated[
        str, typer.Option(metavar="cosine|linear|constant", help="How it falls after.")
    ] = DEFAULT.schedule,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = DEFAULT.epochs,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, in place of epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples per process and forward.")] = DEFAULT.batch_size,
    accumulation: Annotated[int, typer.Option(help="Forwards per step.")] = DEFAULT.gradient_accumulation,
    max_length: Annotated[int, typer.Option(help="Tokens per sample; longer ones are left out.")] = 32768,
    packing: Annotated[bool, typer.Option("--packing", help="The samples of a batch in one row.")] = False,
    checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for activations, more time.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of weights, order and dropout.")] = DEFAULT.seed,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.")] = DEFAULT.save_steps,
) -> None:
    """Train a LoRA adapter that makes up for a recipe's missing attention.

    Prompts slide and answers attend to everything, as in generation. The defaults
    are those of the SWAA paper. The adapter is written to OUT/adapter, with the
    recipe beside it; 'swaa-flex merge' makes a plain model of it.

    A run that was interrupted goes on from its last checkpoint when it is started
    again.

    For several processes, swaa_flex.tuning.LAUNCH is a folder with configurations
    of accelerate.

    [bold]Examples[/]

      swaa-flex finetune Qwen/Qwen3-4B-Instruct-2507 train.jsonl run --recipe quality
      accelerate launch --config_file fsdp.yaml -m swaa_flex finetune MODEL train.jsonl run
    """
    config = train.TuningConfig(
        objective=objective,
        rank=rank,
        scale=scale,
        target_modules=tuple(name.strip() for name in targets.split(",") if name.strip()),
        dropout=dropout,
        learning_rate=learning_rate,
        warmup_ratio=warmup,
        schedule=schedule,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        gradient_accumulation=accumulation,
        packing=packing,
        gradient_checkpointing=checkpointing,
        seed=seed,
        save_steps=save_steps,
    )
    chosen = _recipe(recipe)
    paths.read_file("DATA", data)
    paths.read_file("--held-out", held_out)
    paths.write_folder("OUT", out)
    adapters.peft()  # says what to install if it is missing
    paths.reserve(command, out / train.RUN)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    loaded, tokenizer = checkpoint.load(model)
    examples = _examples(data, tokenizer, loaded.config, max_length)
    others = _examples(held_out, tokenizer, loaded.config, max_length) if held_out else []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    train.finetune(adapt(loaded, chosen), examples, out, held_out=others, config=config, pad_token_id=pad or 0)
    _say(f"{len(examples)} samples, wrote {out / adapters.ADAPTER}")


def merge(
    command: typer.Context,
    model: Annotated[str, typer.Argument(help="The base model: a folder, a GGUF file, or a name on the Hub.")],
    adapter: Annotated[Path, typer.Argument(help="The folder of the adapter.")],
    out: Annotated[Path, typer.Argument(help="The folder to write, new or empty.")],
    recipe: Annotated[
        str | None,
        typer.Option(help="A name or a .json file, instead of the recipe that the adapter brings, if it brings one."),
    ] = None,
) -> None:
    """Fold an adapter into its base model: a plain model, with the recipe in its config.

    AutoModelForCausalLM.from_pretrained(OUT) loads it, in a program that imports
    swaa_flex.
    """
    if Path(model).exists() and out.resolve() == Path(model).resolve():
        raise ConfigError(f"OUT {out} is the base model itself; expected another folder to write")
    paths.read_adapter("ADAPTER", adapter)
    paths.write_folder("OUT", out)
    chosen = None if recipe is None else _recipe(recipe)
    paths.reserve(command, out / CONFIG_NAME)
    paths.empty_folder("OUT", out)
    loaded, tokenizer = checkpoint.load(model)
    tuned = adapters.load_adapter(loaded, adapter, chosen)
    dtype = None if model.endswith(".gguf") else AutoConfig.from_pretrained(model).dtype
    with _whole_or_not_at_all(out):
        merged = adapters.merge(tuned, out, dtype)
        tokenizer.save_pretrained(out)
    typer.echo(f"wrote {out}, with the recipe {swaa_of(merged.config)}")


@contextlib.contextmanager
def _whole_or_not_at_all(folder: Path) -> Iterator[None]:
    """Empties a folder, which was empty, if it cannot be written or the command is interrupted."""
    try:
        yield
    except BaseException:
        for path in paths.contents(folder):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _recipe(name: str) -> str | SWAAConfig | dict[str, Any]:
    if not name.endswith(".json"):
        recipes.get(name)
        return name
    try:
        fields = json.loads(Path(name).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--recipe {name}: expected a JSON file with the fields of a SWAAConfig ({error})"
        ) from error
    if not isinstance(fields, dict):
        raise ConfigError(f"--recipe {name}: expected a JSON object with the fields of a SWAAConfig")
    return fields


def _examples(data: Path, tokenizer: Any, of_model: Any, max_length: int) -> list[Example]:
    samples, left_out = read_samples(data)
    examples: list[Example] = []
    for sample in samples:
        messages = sample.messages
        if messages[-1]["role"] != "assistant" and sample.answer is not None:
            messages = (*messages, {"role": "assistant", "content": sample.answer})
        try:
            encoded = _encoded(tokenizer, messages)
        except ConfigError as error:
            left_out.append(f"row {sample.row}: {error}")
            continue
        problem = next(filter(None, (unreadable(of_model, example.input_ids) for example in encoded)), None)
        if problem is not None:
            left_out.append(f"row {sample.row}: {problem}")
            continue
        fitting, too_long = fit(encoded, max_length)
        examples += fitting
        left_out += [f"row {sample.row}: {line.partition(': ')[2]}" for line in too_long]
    report(f"{len(left_out)} rows of {data} are left out:", left_out, _say)
    if not examples:
        raise ConfigError(
            f"{data}: no row is left; expected chat messages that end with an answer, or prompt and answer"
        )
    return examples


def _encoded(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[Example]:
    """One example per conversation, or one per answer if the template shows earlier answers in another form."""
    try:
        return [encode(tokenizer, messages)]
    except ConfigError:
        return encode_each(tokenizer, messages)


def _say(text: str) -> None:
    """Prints in the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        typer.echo(text, err=True)
