"""`evaluate`: one model, several configurations, the same samples for all of them.

The result of every sample is on disk as soon as its batch is done (`results.py`), so a run that was interrupted goes
on where it was, and a run with more samples, tasks or configurations computes what is new.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from accelerate import PartialState
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import GenerationConfig

from .. import recipes
from .._version import __version__
from ..config import SWAAConfig
from ..errors import ConfigError, DoesNotFitError, listed
from ..files import held, write_atomically
from ..hf import NAME
from ..hf.adapt import adapt, restore
from ..hf.config import set_recipe
from ..tuning.data import unreadable
from ..tuning.identity import identity
from . import scoring
from .questions import Choices, Questions
from .results import Results, key
from .summary import Cell, Summary, cells

if TYPE_CHECKING:
    from .sample import Sample, Task

SUMMARY = "summary.json"
LONGEST_WAIT = timedelta(days=7)  # of a process that is done, for the others


def evaluate(
    model: Any,
    tokenizer: Any,
    configs: Mapping[str, str | SWAAConfig | Mapping[str, Any]],
    tasks: Sequence[Task],
    lengths: Sequence[int | None],
    *,
    count: int,
    out: str | Path,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> Summary:
    """Measures what configurations cost a model: scores and perplexities, and how they differ from full attention.

    Answers are greedy. Where a prompt ends is known to the masks, so answers and scored continuations are decode rows.
    Results of samples go to `OUT/samples`, in files that are named by what they depend on: model, configuration, task,
    length, seed, device and versions. Finished samples are not computed again. `OUT/summary.json` is the summary. With
    `accelerate launch` each process takes its share of the batches. One run at a time writes to `out`.

    Samples that the model cannot be given are named on stderr and left out: those that the chat template refuses, with
    a token that the model does not have, or longer than learned positions reach.

    Args:
        model: a causal language model of transformers; its attention, mode and generation config are put back.
        tokenizer: of the model.
        configs: what to compare, by name: recipes, `SWAAConfig`s or their fields as a dict. The others are compared
            with the first one that has full attention in every layer.
        tasks: what to ask, see `swaa_flex.evaluation.tasks`.
        lengths: of the prompts in tokens (of prompt and continuation where text is scored); answers come on top.
            Questions from a file have lengths of their own, and the largest of these is the limit; None for no limit.
        count: samples of each task and length; a task that has fewer gives all.
        out: the folder of the results.
        seed: of the samples.
        batch_size: samples at a time. A batch that does not fit into the GPU's memory is halved.
        progress: show a progress bar, if stderr is a terminal.

    Returns:
        The summary, in every process.

    Raises:
        ConfigError: if there is nothing to do, a configuration does not fit the model, the model goes too short for
            prompts of a length and their answers, or another run is writing to `out`.
        DoesNotFitError: if a single sample does not fit into the GPU's memory.
    """
    out = Path(out)
    chosen = _checked(model, configs, tasks, lengths, count, batch_size)
    rows = _rows(tasks, lengths)
    said = {(task.name, line) for task in tasks for line in getattr(task, "left_out", ())}
    for task, length in rows:
        # What cannot be asked at all is refused before anything is computed. Of generated samples, one shows that of
        # all; those of a file have lengths of their own.
        _samples(model, task, tokenizer, length, count if isinstance(task, Questions | Choices) else 1, seed)
    state = PartialState(cpu=model.device.type == "cpu", timeout=LONGEST_WAIT)
    stops = scoring.stop_tokens(model, tokenizer)
    measured: list[_Measured] = []
    turns = itertools.count()
    shown = progress and state.is_main_process
    with held(out / SUMMARY):
        depends_on = _facts(model) | {"stop_tokens": stops, "seed": seed}
        with _as_measured(model, stops), _bar(len(rows) * len(set(chosen.values())) * count, shown) as bar:
            memory = _Memory(bar.console)
            for task, length in rows:
                samples, left_out = _samples(model, task, tokenizer, length, count, seed)
                new_lines = [line for line in left_out if (task.name, line) not in said]
                said |= {(task.name, line) for line in new_lines}
                if new_lines and state.is_main_process:
                    heading = f"{len(new_lines)} samples of {task.name} are left out:"
                    bar.console.print(listed(heading, new_lines), markup=False, highlight=False, soft_wrap=True)
                keys = {sample.id: key(sample) for sample in samples}
                compute = partial(scoring.results, model, tokenizer, task)
                facts = {"task": task.name, "length": length, "facts": task.facts(), **depends_on}
                stores = {  # by configuration, so that one with two names is measured once
                    config: Results(out / "samples", {**facts, "swaa": config.to_dict()}, state.process_index)
                    for config in chosen.values()
                }
                for config, store in stores.items():
                    bar.update(ONLY, description=f"{_name(config, chosen)}, {task.name} {length or ''}")
                    model.config.swaa = config
                    finished = store.read()
                    for batch in _batches(samples, batch_size):
                        if next(turns) % state.num_processes == state.process_index:
                            new = [sample for sample in batch if keys[sample.id] not in finished]
                            for part in memory.parts(new, compute):
                                store.append(*part)
                        bar.advance(ONLY, len(batch))
                measured.append(_Measured(task.name, length, list(keys.values()), stores))
        state.wait_for_everyone()
        summary = _summary(model, seed, chosen, measured)
        if state.is_main_process:
            write_atomically(out / SUMMARY, json.dumps(summary.to_dict(), indent=2) + "\n")
    return summary


ONLY = TaskID(0)  # the progress bar's


class _Measured(NamedTuple):
    """What has been measured of a task: which samples, and where their results are."""

    task: str
    length: int | None
    keys: list[str]
    stores: dict[SWAAConfig, Results]


def _summary(model: Any, seed: int, chosen: Mapping[str, SWAAConfig], measured: Sequence[_Measured]) -> Summary:
    layers = model.config.get_text_config().num_hidden_layers
    full = (name for name, config in chosen.items() if all(kind.full for kind in config.resolve(layers)))
    baseline = next(full, None)
    found: list[Cell] = []
    for task, length, keys, stores in measured:
        stored = {config: store.read() for config, store in stores.items()}
        results = {name: [stored[config][key] for key in keys] for name, config in chosen.items()}
        found += cells(task, length, results, baseline)
    return Summary(
        model=Path(model.config._name_or_path).name or model.config.model_type,
        seed=seed,
        configs={name: config.to_dict() for name, config in chosen.items()},
        baseline=baseline,
        cells=tuple(found),
    )


# --- what is run ---------------------------------------------------------------------------------------------


def _checked(
    model: Any,
    configs: Mapping[str, str | SWAAConfig | Mapping[str, Any]],
    tasks: Sequence[Task],
    lengths: Sequence[int | None],
    count: int,
    batch_size: int,
) -> dict[str, SWAAConfig]:
    """The configurations by name."""
    for what, given in (("configs", configs), ("tasks", tasks), ("lengths", lengths)):
        if not given:
            raise ConfigError(f"{what}: there are none; expected at least one")
    for what, number in (("count", count), ("batch_size", batch_size)):
        if number < 1:
            raise ConfigError(f"{what}={number}: expected at least 1")
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"task {name} is there {names.count(name)} times; expected tasks of different names")
    text = model.config.get_text_config()
    longest = positions(model)
    for length in lengths:
        if length is not None and not 1 <= length <= longest:
            raise ConfigError(f"length {length}: expected 1 to {longest} tokens, which is as long as the model goes")
        if lengths.count(length) > 1:
            raise ConfigError(f"length {length} is there {lengths.count(length)} times; expected different lengths")
    chosen = {name: recipes.coerce(config, text.model_type) for name, config in configs.items()}
    for config in chosen.values():
        config.resolve(text.num_hidden_layers)
    return chosen


def _rows(tasks: Sequence[Task], lengths: Sequence[int | None]) -> list[tuple[Task, int | None]]:
    """Tasks and lengths to measure."""
    limit = None if None in lengths else max(length for length in lengths if length is not None)
    return [
        (task, length) for task in tasks for length in ([limit] if isinstance(task, Questions | Choices) else lengths)
    ]


def _facts(model: Any) -> dict[str, Any]:
    """What the results of a model depend on besides configuration and samples."""
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
    return {
        **identity(model),
        "dtype": str(model.dtype),
        "device": device,
        "decoding": "greedy",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "swaa_flex": __version__,
    }


def positions(model: Any) -> float:
    """How many tokens a model takes, prompt and answer together."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def _samples(
    model: Any, task: Task, tokenizer: Any, length: int | None, count: int, seed: int
) -> tuple[list[Sample], list[str]]:
    """The samples of a task that the model can be given, and a line for each row of a file that is left out.

    Raises:
        ConfigError: if a generated sample cannot be used, or no row of a file can.
    """
    samples = task.samples(tokenizer, length, count, seed)
    left_out = list(getattr(task, "left_out", ()))
    readable = []
    for sample in samples:
        problem = _problem(model, sample)
        if not problem:
            readable.append(sample)
        elif isinstance(task, Questions | Choices):
            left_out.append(f"sample {sample.id}: {problem}")
        else:
            raise ConfigError(f"task {task.name}, sample {sample.id}: {problem}")
    if not readable:
        reason = f"none of its {len(samples)} samples can be used, {left_out[-1]}" if samples else "it has no samples"
        raise ConfigError(f"task {task.name}: {reason}; expected at least one")
    return readable, left_out


def _problem(model: Any, sample: Sample) -> str | None:
    """Why a model cannot answer a sample; None or empty if it can."""
    if not sample.prompt:
        return "its prompt is empty; expected at least one token"
    most = positions(model)
    if tokens(sample) > most:
        answer = tokens(sample) - len(sample.prompt)
        return (
            f"{len(sample.prompt)} tokens of prompt and {answer} for the answer, and the model goes no further than "
            f"{most}; expected lengths of at most {most - answer}"
        )
    texts = [sample.prompt, *(sample.prompt + continuation for continuation in sample.continuations)]
    problems = (unreadable(model.config, text, sample.new_tokens) for text in texts)
    return next(filter(None, problems), None)


def _batches(samples: Sequence[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """The longest first. The same in every run, so that a sample always has the same neighbours."""
    ordered = sorted(samples, key=tokens, reverse=True)
    for first in range(0, len(ordered), batch_size):
        yield ordered[first : first + batch_size]


def tokens(sample: Sample) -> int:
    """How many tokens a sample takes, prompt and answer together."""
    return len(sample.prompt) + max(map(len, sample.continuations), default=sample.new_tokens)


def _name(config: SWAAConfig, chosen: Mapping[str, SWAAConfig]) -> str:
    return next(name for name, other in chosen.items() if other == config)


class _Memory:
    """Runs batches in parts that fit into the GPU's memory; what did not fit once is not tried again."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._most: float = math.inf  # tokens at a time, pads included

    def parts(
        self, batch: Sequence[Sample], compute: Callable[[Sequence[Sample]], list[dict[str, Any]]]
    ) -> Iterator[tuple[Sequence[Sample], list[dict[str, Any]]]]:
        """The samples that were run together, and their results."""
        longest = max(map(tokens, batch), default=0)
        while batch:
            part = batch[: max(1, int(min(len(batch), self._most // longest)))]
            try:
                results = compute(part)
            except torch.OutOfMemoryError as error:
                if len(part) == 1:
                    raise DoesNotFitError(
                        f"a sample of {longest} tokens does not fit into the memory of the GPU; take shorter lengths, "
                        "or a smaller dtype"
                    ) from error
                results = None
            if results is None:  # out of the except clause, where the error would keep its tensors alive
                size = len(part) // 2
                self._most = size * longest
                self._console.print(f"out of memory with {len(part)} samples of {longest} tokens, on with {size}")
                torch.cuda.empty_cache()
                continue
            yield part, results
            batch = batch[len(part) :]


# --- around it -----------------------------------------------------------------------------------------------


@contextmanager
def _as_measured(model: Any, stops: list[int]) -> Iterator[None]:
    """Under swaa_flex, in evaluation mode, greedy; afterwards, and after an error, all as before."""
    generation, modes = model.generation_config, [(module, module.training) for module in model.modules()]
    windowed, swaa = model.config._attn_implementation == NAME, model.config.swaa
    try:
        # Swapped, not passed: transformers fills in what a passed one leaves open from the model's own.
        model.generation_config = GenerationConfig(do_sample=False, eos_token_id=stops, pad_token_id=stops[0])
        model.eval()
        if not windowed:
            adapt(model, "full")
        yield
    finally:
        model.generation_config = generation
        for module, training in modes:
            module.training = training
        if not windowed:
            restore(model)
        set_recipe(model.config, swaa)


@contextmanager
def _bar(samples: int, shown: bool) -> Iterator[Progress]:
    console = Console(stderr=True)
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TimeElapsedColumn(), TimeRemainingColumn()),
    )
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as bar:
        bar.add_task("", total=samples)
        yield bar
