"""What light fine-tuning recovers: a real model before and after, in every configuration of the method.

    python benchmarks/recovery.py [--quick] [--out docs/benchmarks] [--resume]

SmolLM2-135M-Instruct answers retrieval prompts and reads text that no training saw; see `retrieval.py`. A score is the
fraction of greedy answers that contain the key. Perplexity is that of tokens after a long prefix, which is a prompt:
they are decode rows. Training is LoRA by `swaa_flex.tuning`, the same examples and steps for all: retrieval prompts
with the answers that the model gives under full attention, where right, and text after a prefix. "ce" learns these
tokens, "kl" the distribution that the model has there under full attention. Full attention is tuned as well, to tell
what training recovers from what it teaches. All is relative to full attention before tuning. The window of a recipe is
W, of `quality` 2 W; its sinks become 16, its dense tail stays.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import random
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import retrieval
import runner
import torch
import torch.nn.functional as F
from rich.table import Table

import swaa_flex
from swaa_flex import SWAAConfig, recipes
from swaa_flex.cli.checkpoint import installed, load
from swaa_flex.tuning import Example, TuningConfig, finetune

SINKS = 16
GOAL = 0.02  # how far the quality recipe may stay from full attention
NAMES = (
    "naive",
    "sinks",
    "sinks, FA decode",
    "sinks, FA decode, half full",
    "sinks, FA decode, dense tail",
    "throughput",
    "fast",
    "balanced",
    "balanced, other half full",
    "quality",
)
TUNED = (("naive", "ce"), ("sinks, FA decode", "ce"), ("balanced", "ce"), ("quality", "ce"), ("quality", "kl"))


@dataclass(frozen=True)
class Config:
    windows: tuple[int, ...] = (128, 256)
    lengths: tuple[int, ...] = (1024, 2048, 4096)  # of retrieval prompts
    prompts: int = 50  # of each length and task
    new_tokens: int = 20
    prefixes: tuple[int, ...] = (1024, 4096)  # of the texts
    scored: int = 256  # tokens after them
    texts: int = 24  # of each prefix and kind
    examples: int = 800  # to train on, half of them retrieval if full attention answers half of twice as many
    steps: int = 100
    batch_size: int = 2
    gradient_accumulation: int = 4
    learning_rate: float = 5e-4
    seed: int = 0
    compared: tuple[str, ...] = NAMES
    tuned: tuple[tuple[str, str], ...] = TUNED
    at_once: int = 50  # prompts or texts; one size, as kernels are compiled for each
    processes: int = 6  # of each device, if they fit
    gib: float = 12  # that each takes of it

    @property
    def beyond(self) -> int:
        """Tokens after the last key: more than the widest window, the question included."""
        return 2 * max(self.windows) + 64


QUICK = Config(
    windows=(64,),
    lengths=(384,),
    prompts=2,
    prefixes=(384,),
    scored=64,
    texts=2,
    examples=8,
    steps=2,
    batch_size=2,
    gradient_accumulation=1,
    compared=("naive", "sinks, FA decode", "balanced", "quality"),
    tuned=(("quality", "ce"), ("quality", "kl")),
    at_once=4,
    processes=1,
)


def configuration(name: str, window: int | None) -> SWAAConfig:
    """The parts of the method one by one, and the recipes of the library."""
    if window is None:
        return recipes.get("full")

    def recipe(name: str, sliding_window: int = window, **fields: Any) -> SWAAConfig:
        found = recipes.get(name, model_type="llama")
        return replace(found, sliding_window=sliding_window, sink_tokens=SINKS, **fields)

    parts = {
        "naive": SWAAConfig(window, 0, (), False, 0),
        "FA decode": SWAAConfig(window, 0, (), True, 0),
        "half full": SWAAConfig(window, 0, recipe("paper").full_attention_layers, False, 0),
        "dense tail": SWAAConfig(window, 0, (), False, 64),
        "sinks": SWAAConfig(window, SINKS, (), False, 0),
        "sinks, FA decode": SWAAConfig(window, SINKS, (), True, 0),
        "sinks, FA decode, half full": recipe("paper"),
        "sinks, FA decode, dense tail": recipe("decode_only"),
        "balanced, other half full": recipe("balanced", full_attention_layers="1::2"),
        "quality": recipe("quality", 2 * window),
    }
    return parts[name] if name in parts else recipe(name)


@dataclass(frozen=True)
class Result:
    configuration: str
    window: int | None
    tuned: str  # "", "ce" or "kl"
    scores: dict[str, float] = field(default_factory=dict)  # by task and length
    perplexities: dict[str, float] = field(default_factory=dict)  # by kind of text and prefix
    retrieval: float | None = None  # mean of the scores, relative to full attention before tuning
    perplexity: float | None = None  # geometric mean, likewise
    tuning_s: float | None = None  # beside the other processes
    scoring_s: float | None = None
    note: str = ""


def main() -> None:
    given = runner.arguments(__doc__, resumes=True).parse_args()
    config = QUICK if given.quick else Config()
    swaa = {f"{n}, W {w}": configuration(n, w).to_dict() for w in config.windows for n in config.compared}
    setup, resume = {"configurations": swaa}, Result if given.resume else None
    report = runner.Report(f"recovery_{runner.device()}", config, line, given.out, setup=setup, resume=resume)
    plain = [job for job in untuned(config) if not report.has([job.named])]
    to_tune = [job for job in to_be_tuned(config) if not report.has([job.named])]
    with model_folder(), runner.Pool(config.processes, config.gib) as pool:
        pool.submit(unpack).result()
        making = pool.submit(training_examples, config)
        # The other processes need not wait for the examples. Then what takes longest comes first.
        running = {pool.submit(work, job): job for job in plain[: pool.size - 1]}
        examples, facts = making.result()
        report.facts["examples"] = facts
        report.console.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)
        to_tune = [replace(job, examples=examples) for job in to_tune]
        running |= {pool.submit(work, job): job for job in [*to_tune, *plain[pool.size - 1 :]]}
        for done in as_completed(running):
            report.add(outcome(done, running[done]), running[done].named)
    report.results[:] = ranked(relative(report.results), config)
    report.close(table(report.results), plot)


def untuned(config: Config) -> list[Job]:
    """Full attention first, by which the others are measured."""
    windowed = [Job(config, name, window) for window in config.windows for name in config.compared]
    return [Job(config, "full", None), *windowed]


def to_be_tuned(config: Config) -> list[Job]:
    """KL first, which takes longest: it asks a teacher as well."""
    of_windows = [Job(config, name, window, how) for name, how in reversed(config.tuned) for window in config.windows]
    return [*of_windows, Job(config, "full", None, "ce")]


def outcome(done: Future[Result], job: Job) -> Result:
    error = done.exception()
    return done.result() if error is None else failed(job, error)  # the process itself died


# --- one configuration ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    config: Config
    configuration: str
    window: int | None
    tuned: str = ""
    examples: Sequence[Example] = ()

    @property
    def named(self) -> Result:
        return Result(self.configuration, self.window, self.tuned)


def work(job: Job) -> Result:
    try:
        config, start = job.config, time.perf_counter()
        base, tokenizer = pretrained()
        model: Any = copy.deepcopy(base)
        swaa_flex.adapt(model, configuration(job.configuration, job.window))
        if job.tuned:
            model = tuned(model, tokenizer, job)
        elapsed = time.perf_counter() - start
        scores = {
            f"{task} {length}": score(model, tokenizer, config, task, length)
            for task in retrieval.TASKS
            for length in config.lengths
        }
        perplexities = {
            f"{kind} {prefix}": perplexity(model, tokenizer, config, kind, prefix)
            for kind in retrieval.KINDS
            for prefix in config.prefixes
        }
        scoring = time.perf_counter() - start - elapsed
        return replace(
            job.named,
            scores=scores,
            perplexities=perplexities,
            tuning_s=elapsed if job.tuned else None,
            scoring_s=scoring,
        )
    except Exception as error:  # what cannot run is a result
        traceback.print_exc()
        return failed(job, error)


def failed(job: Job, error: BaseException) -> Result:
    return replace(job.named, note=runner.noted(error))


MODEL = "SWAA_FLEX_BENCHMARK_MODEL"


@contextmanager
def model_folder() -> Iterator[None]:
    """A folder where `unpack` puts the model: a temporary one, if no environment variable names one to keep."""
    if MODEL in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ[MODEL] = f"{folder}/model"
        try:
            yield
        finally:
            del os.environ[MODEL]


def unpack() -> None:
    """Reads the GGUF file once for all processes, as that takes half a minute."""
    folder = Path(os.environ[MODEL])
    if folder.exists():
        return
    model, tokenizer = load(installed())
    part = folder.with_name(f"{folder.name}.part")
    for saved in (model.to(torch.bfloat16 if runner.device() == "cuda" else torch.float32), tokenizer):
        saved.save_pretrained(part)
    part.rename(folder)


@functools.cache
def pretrained() -> tuple[Any, Any]:
    model, tokenizer = load(os.environ[MODEL])
    tokenizer.padding_side = "left"
    return model, tokenizer


def tuned(model: Any, tokenizer: Any, job: Job) -> Any:
    config = job.config
    settings = TuningConfig(
        objective=job.tuned,
        learning_rate=config.learning_rate,
        max_steps=config.steps,
        batch_size=config.batch_size,
        gradient_accumulation=config.gradient_accumulation,
        seed=config.seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        model = finetune(model, job.examples, folder, config=settings, pad_token_id=tokenizer.pad_token_id, quiet=True)
    return model.eval()


def score(model: Any, tokenizer: Any, config: Config, task: str, length: int) -> float:
    """The fraction of right answers."""
    prompts = retrieval.prompts(tokenizer, "held out", task, length, config.beyond, config.prompts, config.seed)
    answers = answered(model, tokenizer, config, prompts)
    right = sum(p.key in tokenizer.decode(a) for p, a in zip(prompts, answers, strict=True))
    return right / len(prompts)


@torch.no_grad()
def answered(model: Any, tokenizer: Any, config: Config, prompts: Sequence[retrieval.Prompt]) -> list[list[int]]:
    """Greedy answers, each up to the token that ends it."""
    answers = []
    for first in range(0, len(prompts), config.at_once):
        ids = [p.input_ids for p in prompts[first : first + config.at_once]]
        batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(model.device)
        with swaa_flex.prompt([len(i) for i in ids]):
            out = model.generate(
                **batch, max_new_tokens=config.new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        for row in out[:, batch.input_ids.shape[1] :].tolist():
            answers.append(row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row)
    return answers


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, config: Config, kind: str, prefix: int) -> float:
    texts = retrieval.windows(tokenizer, "held out", kind, prefix + config.scored, config.texts)
    losses = []
    for batch in torch.tensor(texts, device=model.device).split(config.at_once):
        with swaa_flex.prompt(prefix):
            logits = model(batch, logits_to_keep=config.scored + 1, use_cache=False).logits[:, :-1]
        losses.append(F.cross_entropy(logits.float().flatten(0, 1), batch[:, prefix:].flatten(), reduction="none"))
    return float(torch.cat(losses).mean().exp())


# --- what is trained on ---------------------------------------------------------------------------------------


def training_examples(config: Config) -> tuple[list[Example], dict[str, Any]]:
    """Retrieval prompts that full attention answers right, with its answers, and text after a prefix."""
    model, tokenizer = pretrained()
    cells = [(task, length) for task in retrieval.TASKS for length in config.lengths]
    examples, right = [], {}
    wanted = math.ceil(config.examples / 2 / len(cells))
    for task, length in cells:
        prompts = retrieval.prompts(tokenizer, "training", task, length, config.beyond, 2 * wanted, config.seed)
        answers = answered(model, tokenizer, config, prompts)
        kept = [(p, a) for p, a in zip(prompts, answers, strict=True) if p.key in tokenizer.decode(a)]
        examples += [example(p.input_ids, a) for p, a in kept[:wanted]]
        right[f"{task} {length}"] = f"{len(kept)} of {len(prompts)}"
    parts = [(kind, prefix) for kind in retrieval.KINDS for prefix in config.prefixes]
    for index, (kind, prefix) in enumerate(parts):
        count = math.ceil((config.examples - len(examples)) / (len(parts) - index))
        for ids in retrieval.windows(tokenizer, "training", kind, prefix + config.scored, count):
            examples.append(example(ids[:prefix], ids[prefix:]))
    random.Random(config.seed).shuffle(examples)
    facts = {"answered right by full attention": right, "examples": len(examples)}
    facts["tokens"] = sum(len(e.input_ids) for e in examples)
    facts["tokens to learn"] = sum(sum(e.decode_rows) for e in examples)
    return examples, facts


def example(prompt: list[int], answer: list[int]) -> Example:
    return Example([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))


# --- what is printed ------------------------------------------------------------------------------------------


def relative(results: list[Result]) -> list[Result]:
    """With the ratios to full attention before tuning, where that could be measured."""
    full = next(r for r in results if (r.configuration, r.tuned) == ("full", ""))
    if full.note:
        return results
    return [
        r if r.note else replace(r, retrieval=divided(score_of(r), score_of(full)), perplexity=read(r) / read(full))
        for r in results
    ]


def divided(value: float, by: float) -> float | None:
    return value / by if by else None


def score_of(r: Result) -> float:
    return sum(r.scores.values()) / len(r.scores)


def read(r: Result) -> float:
    """Perplexity over all texts."""
    return math.exp(sum(map(math.log, r.perplexities.values())) / len(r.perplexities))


def ranked(results: list[Result], config: Config) -> list[Result]:
    order = ["full", *config.compared]
    return sorted(results, key=lambda r: (r.window or 0, order.index(r.configuration), r.tuned))


def line(r: Result) -> str:
    name = f"{r.configuration:<30} W {r.window!s:<5} {'tuned, ' + r.tuned if r.tuned else '':<10}"
    if r.note:
        return f"{name} {r.note}"
    took = f"tuned in {r.tuning_s:.0f} s, " if r.tuning_s else ""
    return f"{name} retrieval {score_of(r):.3f}  perplexity {read(r):7.3f}  ({took}scored in {r.scoring_s:.0f} s)"


def table(results: list[Result]) -> Table:
    view = Table("configuration", "W", "tuned")
    full = results[0]
    for measured, ratio in ((full.scores, "retrieval / full"), (full.perplexities, "perplexity / full")):
        for what, sizes in grouped(measured).items():
            view.add_column(f"{what}, {' '.join(sizes)}", justify="right")
        view.add_column(ratio, justify="right")
    view.add_column("within 2 %")
    for r in results:
        cells = [r.configuration, str(r.window or ""), r.tuned, r.note[:40]]
        if not r.note:
            cells[3:] = [*joined(r.scores), shown(r.retrieval), *joined(r.perplexities), shown(r.perplexity)]
            cells.append("yes" if is_near(r) else "")
        view.add_row(*cells)
    return view


def grouped(measured: dict[str, float]) -> dict[str, dict[str, float]]:
    """By what is measured, then by length."""
    groups: dict[str, dict[str, float]] = {}
    for name, value in measured.items():
        what, _, size = name.rpartition(" ")
        groups.setdefault(what, {})[size] = value
    return groups


def joined(measured: dict[str, float]) -> list[str]:
    """The values of each group in one cell."""
    return [" ".join(f"{value:.2f}" for value in group.values()) for group in grouped(measured).values()]


def shown(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"


def is_near(r: Result) -> bool:
    """Whether it reaches the goal: both within 2 % of full attention before tuning, or better."""
    if r.retrieval is None or r.perplexity is None:
        return False
    return r.retrieval >= 1 - GOAL and r.perplexity <= 1 + GOAL


def plot(data: dict[str, Any], path: Path) -> None:
    plt = runner.pyplot()
    results = [r for r in (Result(**r) for r in data["results"]) if r.retrieval is not None]
    rows = list(dict.fromkeys((r.configuration, r.window) for r in results))
    styles = {
        "": ("o", "white", "before tuning"),
        "ce": ("o", "C0", "tuned, cross-entropy"),
        "kl": ("D", "C1", "tuned, KL"),
    }
    figure, axes = plt.subplots(1, 2, figsize=(12, 1.2 + 0.27 * len(rows)), sharey=True, layout="constrained")
    for axis, name in zip(axes, ("retrieval", "perplexity"), strict=True):
        axis.axvspan(1 - GOAL, 1 + GOAL, color="grey", alpha=0.25, linewidth=0)
        for how, (marker, colour, label) in styles.items():
            chosen = [r for r in results if r.tuned == how]
            places = [rows.index((r.configuration, r.window)) for r in chosen]
            values = [getattr(r, name) for r in chosen]
            axis.scatter(values, places, marker=marker, color=colour, edgecolor="C0", label=label, zorder=3)
        axis.set_xlabel(f"{name} relative to full attention")
        axis.grid(alpha=0.3)
    axes[1].set_xscale("log")
    axes[1].xaxis.set_major_formatter("{x:.3g}")
    axes[1].xaxis.set_minor_formatter("{x:.3g}")
    axes[0].set_yticks(range(len(rows)), [f"{name}, W {window}" if window else name for name, window in rows])
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, ncols=3, loc="outside lower center")
    figure.suptitle(f"{data['machine']}: SmolLM2-135M-Instruct, {data['config']['steps']} steps; grey: within 2 %")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
