"""What each strategy keeps of a real model without training: the strategies one by one, and together.

    python benchmarks/accuracy.py [--quick] [--out docs/benchmarks] [--samples FOLDER]

SmolLM2-135M-Instruct finds needles and reads text, under full attention and in every configuration of the method; the
configurations are those of `recovery.py`. Samples, judges and intervals are those of `swaa-flex eval`. The window of a
recipe is W, of `quality` 2 W; its sinks become 16. With a folder for the samples, an interrupted run goes on.
"""

from __future__ import annotations

import functools
import pickle
import tempfile
import time
import traceback
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
from swaa_flex.evaluation.sample import Sample, Task
from swaa_flex.evaluation.summary import Cell

SINGLE = ("FA decode", "half full", "dense tail")  # and sinks, which the others are combined with


@dataclass(frozen=True)
class Config:
    windows: tuple[int, ...] = (128, 256)
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    tasks: tuple[str, ...] = ("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "ppl")
    samples: int = 200  # of each task and length
    batch_size: int = 100  # one size, as kernels are compiled for each
    seed: int = 0
    compared: tuple[str, ...] = ("naive", *SINGLE, *recovery.NAMES[1:])
    processes: int = 7  # of each device, if they fit
    gib: float = 16  # that each takes of it


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
    report = runner.Report(f"accuracy_{runner.device()}", config, line, given.out, setup={"configurations": swaa})
    begun = time.perf_counter()
    with (
        recovery.model_folder(),
        tempfile.TemporaryDirectory() as made,
        tempfile.TemporaryDirectory() if given.samples is None else nullcontext(given.samples) as answered,
        runner.Pool(config.processes, config.gib) as pool,
    ):
        pool.submit(recovery.unpack).result()
        # What takes longest first. All configurations have the same samples, so they are made once.
        sizes = [(task, length) for length in sorted(config.lengths, reverse=True) for task in config.tasks]
        for making in [pool.submit(make, config, *size, made) for size in sizes]:
            making.result()
        report.console.print(f"samples after {time.perf_counter() - begun:.0f} s", highlight=False)
        measure = functools.partial(pool.submit, measured, config)
        jobs = {
            measure([name], config.tasks, length, made, answered): (name, length)
            for length in sorted(config.lengths, reverse=True)
            for name in configurations(config)
        }
        failed: dict[str, str] = {}
        for number, job in enumerate(as_completed(jobs), 1):
            name, length = jobs[job]
            if error := job.exception():
                traceback.print_exception(error)
                failed[name] = runner.noted(error)
                report.facts["failed"] = failed
                continue
            for cell in job.result():
                report.add(result(cell))
            passed = time.perf_counter() - begun
            report.console.print(f"{number} of {len(jobs)} after {passed:.0f} s: {name}, {length}", highlight=False)
        # Each process has left its answers in the folder; with all of them there, these calls only compare.
        names = [name for name in configurations(config) if name not in failed]
        compared = [measure(names, [task], length, made, answered) for task, length in sizes]
        report.results[:] = ranked([result(cell) for job in compared for cell in job.result()], config)
    report.close(table(report.results), plot)


def configurations(config: Config) -> dict[str, SWAAConfig]:
    """By name and window, full attention first."""
    found = {"full": recovery.configuration("full", None)}
    for window in config.windows:
        found |= {f"{name}, W {window}": recovery.configuration(name, window) for name in config.compared}
    return found


def measured(
    config: Config, names: Sequence[str], tasks: Sequence[str], length: int, made: str, answered: str
) -> list[Cell]:
    model, tokenizer = recovery.pretrained()
    chosen = configurations(config)
    summary = evaluate(
        model,
        tokenizer,
        {name: chosen[name] for name in names},
        [Made(task, made) for name in tasks for task in all_tasks.get(name)],
        [length],
        count=config.samples,
        out=answered,
        seed=config.seed,
        batch_size=config.batch_size,
        progress=False,
    )
    return list(summary.cells)


def make(config: Config, name: str, length: int, folder: str) -> None:
    """Writes the samples of a task, so that no process has to make them again."""
    _, tokenizer = recovery.pretrained()
    [task] = all_tasks.get(name)
    made = task.samples(tokenizer, length, config.samples, config.seed)
    (Path(folder) / f"{name} {length}").write_bytes(pickle.dumps(made))


class Made:
    """A task whose samples are there."""

    def __init__(self, task: Task, folder: str) -> None:
        self.name, self.judge, self.facts = task.name, task.judge, task.facts
        self._folder = folder

    def samples(self, tokenizer: Any, length: int | None, count: int, seed: int) -> list[Sample]:
        return _read(Path(self._folder) / f"{self.name} {length}")[:count]


@functools.cache
def _read(path: Path) -> list[Sample]:
    found: list[Sample] = pickle.loads(path.read_bytes())
    return found


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


def ranked(results: list[Result], config: Config) -> list[Result]:
    """By window, configuration, task and length."""
    order = ["full", *config.compared]
    return sorted(
        results,
        key=lambda r: (r.window or 0, order.index(r.configuration), config.tasks.index(r.task), r.length),
    )


def line(r: Result) -> str:
    p = "" if r.p is None else f"  p {r.p:.3f}"
    where = f"{r.configuration:<30} W {r.window!s:<5} {r.task:<16} {r.length:>5}"
    return f"{where}  {shown(r)} [{r.low:.3f}, {r.high:.3f}]{p}"


def shown(r: Result) -> str:
    return f"{r.value:.3f}" if r.metric == "score" else f"{r.value:.2f}"


def table(results: list[Result]) -> Table:
    """Scores in percent, by length; a star where they differ from those of full attention with p below 0.01."""
    view = Table("configuration", "W")
    lengths = sorted({r.length for r in results})
    tasks = list(dict.fromkeys(r.task for r in results))
    for task in tasks:
        view.add_column(f"{task}, {' '.join(map(str, lengths))}", justify="right")
    view.add_column("needles, mean", justify="right")
    for name, window in dict.fromkeys((r.configuration, r.window) for r in results):
        own = {(r.task, r.length): r for r in results if (r.configuration, r.window) == (name, window)}
        cells = [" ".join(cell(own.get((task, length))) for length in lengths) for task in tasks]
        scores = [r.value for r in own.values() if r.metric == "score"]
        view.add_row(name, str(window or ""), *cells, f"{100 * sum(scores) / len(scores):.1f}" if scores else "")
    return view


def cell(r: Result | None) -> str:
    if r is None:
        return "-"
    star = "*" if r.p is not None and r.p < 0.01 else ""
    return f"{r.value:.2f}{star}" if r.metric == "perplexity" else f"{100 * r.value:.0f}{star}"


def plot(data: dict[str, Any], path: Path) -> None:
    plt = runner.pyplot()
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
                again, color = divmod(number - 1, 10)  # there are ten colors
                style = {
                    "color": "black" if name == "full" else f"C{color}",
                    "marker": "s" if again > 0 else "o",
                    "linestyle": "--" if again > 0 else "-",
                }
                places = [lengths.index(r.length) + aside for r in found]
                axis.errorbar(places, values, errors, markersize=3, linewidth=0.8, label=name, **style)
            axis.set_xticks(range(len(lengths)), [str(length) for length in lengths])
            axis.set_title(f"{task}, W {window}", fontsize=9)
            axis.set(xlabel="tokens", ylabel="perplexity" if task == "ppl" else "share found")
            axis.grid(alpha=0.3)
            if task == "ppl":
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter("{x:.3g}")
                axis.yaxis.set_minor_formatter("{x:.3g}")
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, ncols=4, loc="outside lower center")
    figure.suptitle(
        f"{data['machine']}: SmolLM2-135M-Instruct without training, {data['config']['samples']} samples; bars: 95 %"
    )
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
