"""What each strategy keeps of a real model without training: the strategies one by one, and together.

    python benchmarks/accuracy.py [--quick] [--out docs/benchmarks] [--samples FOLDER]

SmolLM2-135M-Instruct finds needles and reads text, under full attention and in every configuration of the method; the
configurations are those of `recovery.py`. Samples, judges and intervals are those of `swaa-flex eval`. The window of a
recipe is W, of `quality` 2 W; its sinks become 16. With a folder for the samples, an interrupted run goes on.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import recovery
import runner
from rich.table import Table

from swaa_flex import SWAAConfig
from swaa_flex.evaluation import tasks as all_tasks
from swaa_flex.evaluation.runner import evaluate
from swaa_flex.evaluation.summary import Cell, Summary


@dataclass(frozen=True)
class Config:
    windows: tuple[int, ...] = (128, 256)
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    tasks: tuple[str, ...] = ("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "ppl")
    samples: int = 200  # of each task and length
    batch_size: int = 100
    seed: int = 0
    compared: tuple[str, ...] = recovery.NAMES
    processes: int = 5  # of each device


QUICK = Config((64,), (384,), ("niah_single", "ppl"), 4, 4, 0, ("naive", "balanced"), 1)


@dataclass(frozen=True)
class Result:
    configuration: str
    window: int | None
    task: str
    length: int
    metric: str
    samples: int
    value: float
    low: float  # of the 95 % interval
    high: float
    difference: float | None  # from full attention, on the same samples
    p: float | None


def main() -> None:
    parser = runner.arguments(__doc__)
    parser.add_argument("--samples", help="folder that keeps what was answered")
    given = parser.parse_args()
    config = QUICK if given.quick else Config()
    swaa = {name: c.to_dict() for name, c in configurations(config).items()}
    report = runner.Report(f"accuracy_{runner.device()}", config, line, given.out, {"configurations": swaa})
    begun = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() if given.samples is None else nullcontext(given.samples) as folder,
        runner.Pool(config.processes) as pool,
    ):
        # Each process leaves its samples in the folder; with all of them there, the last call only reads.
        jobs = [pool.submit(measured, config, [name], folder) for name in configurations(config)]
        for number, job in enumerate(as_completed(jobs), 1):
            job.result()
            report.console.print(f"{number} of {len(jobs)} after {time.perf_counter() - begun:.0f} s", highlight=False)
        summary = pool.submit(measured, config, list(configurations(config)), folder).result()
    for cell in summary.cells:
        report.add(result(cell))
    report.close(table(report.results), plot)


def configurations(config: Config) -> dict[str, SWAAConfig]:
    """By name and window, full attention first."""
    found = {"full": recovery.configuration("full", None)}
    for window in config.windows:
        found |= {f"{name}, W {window}": recovery.configuration(name, window) for name in config.compared}
    return found


def measured(config: Config, names: Sequence[str], folder: str) -> Summary:
    model, tokenizer = pretrained()
    tasks = [task for name in config.tasks for task in all_tasks.get(name)]
    chosen = configurations(config)
    return evaluate(
        model,
        tokenizer,
        {name: chosen[name] for name in names},
        tasks,
        config.lengths,
        count=config.samples,
        out=folder,
        seed=config.seed,
        batch_size=config.batch_size,
        progress=False,
    )


@functools.cache
def pretrained() -> tuple[Any, Any]:
    return recovery.pretrained()


def result(cell: Cell) -> Result:
    name, _, window = cell.config.partition(", W ")
    against = cell.against_full
    return Result(
        name,
        int(window) if window else None,
        cell.task,
        cell.length or 0,
        cell.metric,
        cell.samples,
        cell.value,
        cell.interval.low,
        cell.interval.high,
        against and against.difference,
        against and against.p,
    )


# --- what is printed ------------------------------------------------------------------------------------------


def line(r: Result) -> str:
    p = "" if r.p is None else f"  p {r.p:.3f}"
    where = f"{r.configuration:<30} W {r.window!s:<5} {r.task:<16} {r.length:>5}"
    return f"{where}  {shown(r)} [{r.low:.3f}, {r.high:.3f}]{p}"


def shown(r: Result) -> str:
    return f"{r.value:.3f}" if r.metric == "score" else f"{r.value:.2f}"


def table(results: list[Result]) -> Table:
    """Scores in percent; a star where they differ from those of full attention with p below 0.01."""
    view = Table("configuration", "W")
    columns = list(dict.fromkeys((r.task, r.length) for r in results))
    for task, length in columns:
        view.add_column(f"{task} {length}", justify="right")
    view.add_column("needles", justify="right")
    for name, window in dict.fromkeys((r.configuration, r.window) for r in results):
        own = {(r.task, r.length): r for r in results if (r.configuration, r.window) == (name, window)}
        scores = [r.value for r in own.values() if r.metric == "score"]
        cells = [cell(own[column]) for column in columns]
        view.add_row(name, str(window or ""), *cells, f"{100 * sum(scores) / len(scores):.1f}")
    return view


def cell(r: Result) -> str:
    star = "*" if r.p is not None and r.p < 0.01 else ""
    if r.metric == "perplexity":
        return f"{r.value:.2f}{star}"
    return f"{100 * r.value:.1f}{star} ({100 * r.low:.0f}-{100 * r.high:.0f})"


def plot(data: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = [Result(**r) for r in data["results"]]
    windows = data["config"]["windows"]
    tasks = list(dict.fromkeys(r.task for r in results))
    lengths = data["config"]["lengths"]
    figure, axes = plt.subplots(
        len(windows),
        len(tasks),
        figsize=(3.4 * len(tasks), 3.2 * len(windows) + 0.8),
        squeeze=False,
        layout="constrained",
    )
    for row, window in zip(axes, windows, strict=True):
        for axis, task in zip(row, tasks, strict=True):
            names = list(dict.fromkeys(r.configuration for r in results))
            for number, name in enumerate(names):
                found = [
                    r for r in results if (r.configuration, r.task) == (name, task) and r.window in (None, window)
                ]
                values = [r.value for r in found]
                errors = [[r.value - r.low for r in found], [r.high - r.value for r in found]]
                aside = 0.5 * ((number + 0.5) / len(names) - 0.5)
                style = {"color": "black"} if name == "full" else {"color": f"C{(number - 1) % 10}"}
                places = [lengths.index(r.length) + aside for r in found]
                axis.errorbar(places, values, errors, marker="o", markersize=3, linewidth=0.8, label=name, **style)
            axis.set_xticks(range(len(lengths)), [str(length) for length in lengths])
            axis.set_title(f"{task}, W {window}", fontsize=9)
            axis.grid(alpha=0.3)
            if task == "ppl":
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter("{x:.3g}")
                axis.yaxis.set_minor_formatter("{x:.3g}")
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, ncols=4, loc="outside lower center")
    figure.suptitle(f"SmolLM2-135M-Instruct without training, {data['config']['samples']} samples; bars: 95 %")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
