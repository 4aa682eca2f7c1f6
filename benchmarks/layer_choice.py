"""Which layers of a real model stay full: odd, even, and those that `swaa_flex.analysis` chooses.

    python benchmarks/layer_choice.py [--quick] [--out docs/benchmarks] [--resume]

SmolLM2-135M-Instruct with a window in all layers but a budget of full ones, full-attention decode and a dense tail.
Layers are chosen on the training part of `retrieval.py`, by retrieval prompts with the answers that full attention
gives, where right, or by text after a prefix; scores and perplexities are those of the held-out part, as in
`recovery.py`. Odd and even layers are each second one, or with a smaller budget each fourth one and so on. A score is
the fraction of greedy answers that contain the key; ± is half of the 95 % interval of the mean.
"""

from __future__ import annotations

import functools
import math
import tempfile
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import recovery
import retrieval
import runner
from rich.table import Table

import swaa_flex
from swaa_flex import SWAAConfig, recipes
from swaa_flex.analysis import AnswerLoss, evaluations, greedy, lazy, sensitivity

CHOSEN_BY = tuple((m, c) for m in ("lazy", "sensitivity", "greedy") for c in ("retrieval", "text"))


@dataclass(frozen=True)
class Config:
    window: int = 128
    sinks: int = 16
    dense_tail: int = 64
    budgets: tuple[int, ...] = (15, 7)
    chosen_by: tuple[tuple[str, str], ...] = CHOSEN_BY  # method, and what it is calibrated on
    calibration_length: int = 1024  # tokens of prompts and prefixes to choose by
    calibration_prompts: int = 8  # of each task; as many texts as in all of them
    calibration_scored: int = 128  # tokens after each prefix
    lengths: tuple[int, ...] = (1024, 2048, 4096)  # of retrieval prompts
    prompts: int = 200  # of each length and task
    new_tokens: int = 20
    prefixes: tuple[int, ...] = (1024, 2048, 4096)  # of the texts
    scored: int = 256  # tokens after them
    texts: int = 24  # of each prefix and kind
    seed: int = 0
    at_once: int = 50  # prompts or texts; one size, as kernels are compiled for each
    processes: int = 7  # of each device, if they fit
    gib: float = 10  # that each takes of it

    @property
    def beyond(self) -> int:
        """Tokens after the last key: more than the dense tail and the window before it."""
        return 2 * self.window + 64

    def with_full(self, layers: tuple[int, ...] = ()) -> SWAAConfig:
        return SWAAConfig(self.window, self.sinks, layers, True, self.dense_tail)


QUICK = Config(
    window=32,
    sinks=4,
    dense_tail=16,
    budgets=(1,),
    chosen_by=(("lazy", "text"), ("sensitivity", "retrieval"), ("greedy", "text")),
    calibration_length=256,
    calibration_prompts=1,
    calibration_scored=16,
    lengths=(256,),
    prompts=2,
    prefixes=(256,),
    scored=16,
    texts=2,
    at_once=4,
    processes=1,
)


@dataclass(frozen=True)
class Result:
    choice: str
    budget: int | None  # full layers, None for all
    layers: tuple[int, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)  # by task and length
    perplexities: dict[str, float] = field(default_factory=dict)  # by kind of text and prefix
    error: float | None = None  # half of the 95 % interval of the mean score
    losses: int | None = None  # that the choice of the largest budget took
    choosing_s: float | None = None  # beside the other processes
    scoring_s: float | None = None
    note: str = ""


def main() -> None:
    given = runner.arguments(__doc__, resumes=True).parse_args()
    config = QUICK if given.quick else Config()
    resume = Result if given.resume else None
    report = runner.Report(f"layer_choice_{runner.device()}", config, line, given.out, resume=resume)
    to_choose = [by for by in reversed(config.chosen_by) if not report.has(named(config, *by))]
    to_score = [result for result in given_layers(config) if not report.has([result])]
    with recovery.model_folder(), runner.Pool(config.processes, config.gib) as pool:
        pool.submit(recovery.unpack).result()
        # What takes longest first; what is chosen is scored at once, so that results come early.
        running: dict[Future[Any], list[Result]] = {}
        running |= {pool.submit(chosen, config, *by): named(config, *by) for by in to_choose}
        running |= {pool.submit(scored, config, result): [result] for result in to_score}
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                what = running.pop(future)
                error = future.exception()
                if error is not None:  # the process itself died
                    for result in what:
                        report.add(replace(result, note=noted(error)), Result(result.choice, result.budget))
                elif isinstance(future.result(), Result):
                    result = future.result()
                    report.add(result, Result(result.choice, result.budget))
                else:
                    running |= {pool.submit(scored, config, choice): [choice] for choice in future.result()}
    report.results[:] = ranked(report.results)
    report.close(table(report.results), plot)


def named(config: Config, method: str, calibration: str) -> list[Result]:
    """What is to be chosen."""
    return [Result(f"{method}, {calibration}", budget) for budget in config.budgets]


def given_layers(config: Config) -> list[Result]:
    """What needs no choice."""
    found = [Result("all", None), Result("none", 0)]
    for budget in config.budgets:
        step = 30 // budget
        for name, first in (("odd", step - 1), ("even", step - 2)):
            found.append(Result(name, budget, tuple(range(first, 30, step))[:budget]))
    return found


# --- choosing -------------------------------------------------------------------------------------------------


def chosen(config: Config, method: str, calibration: str) -> list[Result]:
    """The layers for each budget."""
    wanted = named(config, method, calibration)
    try:
        model, _ = recovery.pretrained()
        pairs = calibration_pairs(config, calibration)
        start = time.perf_counter()
        losses = None
        with tempfile.TemporaryDirectory() as folder:  # the losses of one budget serve the next
            if method == "lazy":
                prompts = [asked for asked, _ in pairs]
                choices = [lazy(model, prompts, config.with_full(), budget) for budget in config.budgets]
            else:
                losses = evaluations(method, 30, max(config.budgets))
                search = sensitivity if method == "sensitivity" else greedy
                loss, path = AnswerLoss(pairs, config.at_once), Path(folder) / "losses.json"
                choices = [
                    search(model, loss, config.with_full(), budget, path=path, progress=False)
                    for budget in config.budgets
                ]
        took = time.perf_counter() - start
        return [
            replace(result, layers=tuple(sorted(choice.order)), losses=losses, choosing_s=took)
            for result, choice in zip(wanted, choices, strict=True)
        ]
    except Exception as error:  # what cannot run is a result
        return [replace(result, note=noted(error)) for result in wanted]


@functools.cache
def calibration_pairs(config: Config, calibration: str) -> list[tuple[list[int], list[int]]]:
    """Prompts and answers of the training part."""
    model, tokenizer = recovery.pretrained()
    length, count = config.calibration_length, config.calibration_prompts
    if calibration == "text":
        scored = config.calibration_scored
        number = count * len(retrieval.TASKS) // len(retrieval.KINDS)
        texts = [
            text
            for kind in retrieval.KINDS
            for text in retrieval.windows(tokenizer, "training", kind, length + scored, number)
        ]
        return [(text[:length], text[length:]) for text in texts]
    pairs = []
    for task in retrieval.TASKS:
        prompts = retrieval.prompts(tokenizer, "training", task, length, config.beyond, 4 * count, config.seed)
        answers = recovery.answered(model, tokenizer, config, prompts)
        right = [(p.input_ids, a) for p, a in zip(prompts, answers, strict=True) if p.key in tokenizer.decode(a)]
        pairs += right[:count]
    return pairs


# --- scoring --------------------------------------------------------------------------------------------------


def scored(config: Config, result: Result) -> Result:
    if result.note:
        return result
    try:
        model, tokenizer = recovery.pretrained()
        start = time.perf_counter()
        swaa_flex.adapt(model, recipes.get("full") if result.budget is None else config.with_full(result.layers))
        try:
            scores = {
                f"{task} {length}": recovery.score(model, tokenizer, config, task, length)
                for task in retrieval.TASKS
                for length in config.lengths
            }
            perplexities = {
                f"{kind} {prefix}": recovery.perplexity(model, tokenizer, config, kind, prefix)
                for kind in retrieval.KINDS
                for prefix in config.prefixes
            }
        finally:
            swaa_flex.restore(model)
        took = time.perf_counter() - start
        error = error_of_mean(scores, config.prompts)
        return replace(result, scores=scores, perplexities=perplexities, error=error, scoring_s=took)
    except Exception as error:  # what cannot run is a result
        return replace(result, note=noted(error))


def error_of_mean(scores: dict[str, float], prompts: int) -> float:
    """Half of the 95 % interval of the mean of scores, each of so many prompts."""
    return 1.96 * math.sqrt(sum(p * (1 - p) / prompts for p in scores.values())) / len(scores)


def noted(error: BaseException) -> str:
    traceback.print_exception(error)
    return runner.noted(error)


# --- what is printed ------------------------------------------------------------------------------------------


def ranked(results: list[Result]) -> list[Result]:
    """All, none, then by budget, the larger first, in the order of the methods."""
    order = ["all", "none", "odd", "even", *(", ".join(by) for by in CHOSEN_BY)]
    return sorted(results, key=lambda r: (bool(r.budget), -(r.budget or 0), order.index(r.choice)))


def line(r: Result) -> str:
    name = f"{r.choice:<24} {'all' if r.budget is None else r.budget:>3} full "
    if r.note:
        return f"{name} {r.note}"
    took = f"chosen in {r.choosing_s:.0f} s, " if r.choosing_s else ""
    return (
        f"{name} retrieval {recovery.score_of(r):.3f}  perplexity {recovery.read(r):7.3f}  "
        f"({took}scored in {r.scoring_s:.0f} s)"
    )


def table(results: list[Result]) -> Table:
    view = Table("full layers", "budget")
    some = next(r for r in results if not r.note)
    for measured, mean in ((some.scores, "retrieval"), (some.perplexities, "perplexity")):
        for what, sizes in recovery.grouped(measured).items():
            view.add_column(f"{what}, {' '.join(sizes)}", justify="right")
        view.add_column(f"{mean}, mean", justify="right")
    view.add_column("losses", justify="right")
    view.add_column("which")
    for r in results:
        cells = [r.choice, "" if r.budget is None else str(r.budget), r.note[:40]]
        if not r.note:
            cells[2:] = [*recovery.joined(r.scores), f"{recovery.score_of(r):.3f} ± {r.error:.3f}"]
            cells += [*recovery.joined(r.perplexities), f"{recovery.read(r):.3f}"]
            cells += [str(r.losses or ""), " ".join(map(str, r.layers))]
        view.add_row(*cells)
    return view


def plot(data: dict[str, Any], path: Path) -> None:
    plt = runner.pyplot()
    results = [r for r in (Result(**r) for r in data["results"]) if not r.note]
    names = list(dict.fromkeys(r.choice for r in results if r.budget))
    budgets = list(dict.fromkeys(r.budget for r in results if r.budget))
    figure, axes = plt.subplots(1, 2, figsize=(12, 1.6 + 0.35 * len(names)), sharey=True, layout="constrained")
    for axis, what, value in (
        (axes[0], "retrieval score, mean", recovery.score_of),
        (axes[1], "perplexity, mean", recovery.read),
    ):
        for r in (r for r in results if not r.budget):
            style = "-" if r.choice == "all" else ":"
            label = "all layers full" if r.choice == "all" else "no layer full"
            axis.axvline(value(r), color="grey", linestyle=style, label=label)
        for number, budget in enumerate(budgets):
            rows = [r for r in results if r.budget == budget]
            places = [names.index(r.choice) + 0.16 * (2 * number - len(budgets) + 1) for r in rows]
            errors = [r.error for r in rows] if axis is axes[0] else None
            axis.errorbar(
                [value(r) for r in rows],
                places,
                xerr=errors,
                fmt="o",
                color=f"C{number}",
                label=f"{budget} of 30 full",
            )
        axis.set_xlabel(what)
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, ncols=4, loc="outside lower center")
    config = data["config"]
    figure.suptitle(
        f"{data['machine']}: SmolLM2-135M-Instruct, window {config['window']}, {config['sinks']} sinks; "
        "which layers stay full"
    )
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
