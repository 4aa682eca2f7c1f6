"""What the benchmarks share: ceilings of the machine, methods prepared side by side and timed in turn, a report.

Compilation takes minutes where measuring takes seconds. So each `Job` is a process that prepares while others do, and
measures when it is told to, alone. What is compared is measured in one run.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import queue
import re
import shlex
import statistics
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.table import Table

import swaa_flex

GIB = 1 << 30
PLACES = ("--out", "--samples")  # arguments


class Job(Protocol):
    """What one process does. Frozen, so that it can be sent there."""

    @property
    def gib(self) -> float:
        """Device memory that it holds from `prepare` until it ends."""

    def prepare(self) -> Callable[[], Iterable[Any]]:
        """Loads, builds and compiles; returns what measures, and yields frozen dataclasses."""

    def failed(self, note: str) -> Iterable[Any]:
        """The results of a job that could not run."""


def run(jobs: Sequence[Job], report: Report, *, processes: int = 12, headroom_gib: float = 0) -> None:
    """Runs jobs in waves of what fits into the memory of a device, less what a job takes only while it measures.

    Each GPU takes the next wave when it has done one; jobs on one GPU measure in turn. A job is not run if the report
    has all of its results from an interrupted run.
    """
    gib = capacity_gib() - headroom_gib
    waiting, waves = [job for job in jobs if not report.has(job.failed(""))], []
    if not waiting:
        return
    while waiting:
        wave: list[Job] = []
        for job in list(waiting):
            if not wave or (sum(j.gib for j in wave) + job.gib <= gib and len(wave) < processes):
                wave.append(job)
                waiting.remove(job)
        waves.append(wave)
    gpus = _gpus()
    largest = max(len(wave) for wave in waves)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // len(gpus) // largest)))
    left = iter(waves)
    lock = threading.Lock()

    def work(gpu: str) -> None:
        while True:
            with lock:
                wave = next(left, None)
            if wave is None:
                return
            _run_wave(wave, report, gpu)

    threads = [threading.Thread(target=work, args=(gpu,)) for gpu in gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Pool:
    """So many processes for each device, where speed does not matter: they share it, and what they compile.

    Calls begin in the order of `submit`, each in the next process that is free, on whatever device. There are fewer
    processes if each takes so much memory that they would not fit.
    """

    def __init__(self, processes: int, gib: float) -> None:
        gpus = _gpus()
        processes = max(1, min(processes, int(capacity_gib() / gib)))
        self.size = processes * len(gpus)
        self._compute_threads = max(1, (os.cpu_count() or 1) // self.size)
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(self._compute_threads))
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
        self._free: queue.SimpleQueue[tuple[str, ProcessPoolExecutor]] = queue.SimpleQueue()
        for gpu in gpus * processes:
            self._free.put((gpu, self._process()))
        self._threads = ThreadPoolExecutor(self.size)

    def submit(self, call: Callable[..., Any], *args: Any) -> Future[Any]:
        return self._threads.submit(self._run, call, *args)

    def __enter__(self) -> Pool:
        for _ in range(self.size):  # imports take as long as many a job
            self.submit(device)
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for _ in range(self.size):
            self._free.get()[1].shutdown()

    def _run(self, call: Callable[..., Any], *args: Any) -> Any:
        gpu, process = self._free.get()
        try:
            with _only(gpu):  # this starts the process, if it is new
                future = process.submit(_releasing, call, *args)
            return future.result()
        except BrokenProcessPool:  # it died, of too little memory perhaps; the next call gets another one
            process = self._process()
            raise
        finally:
            self._free.put((gpu, process))

    def _process(self) -> ProcessPoolExecutor:
        spawn = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, spawn, torch.set_num_threads, (self._compute_threads,))


def _releasing(call: Callable[..., Any], *args: Any) -> Any:
    """Leaves no memory of the device cached, which the processes beside this one may need."""
    try:
        return call(*args)
    finally:
        if device() == "cuda":
            torch.cuda.empty_cache()


def _run_wave(wave: list[Job], report: Report, gpu: str) -> None:
    running = [(job, *_started(job, gpu)) for job in wave]
    notes = {id(job): _received(pipe)[1] for job, _, pipe in running}
    for job, process, pipe in running:
        note, names = notes[id(job)], list(job.failed(""))
        if not note:
            pipe.send("measure")
            kind, value = _received(pipe)
            while kind == "result":
                name = next((name for name in names if named(name, value)), None)
                report.add(value, name)
                if name is not None:
                    names.remove(name)
                kind, value = _received(pipe)
            note = value
        if note:
            for name in names:
                report.add(dataclasses.replace(name, note=note), name)
        process.join()


def _started(job: Job, gpu: str) -> tuple[BaseProcess, Connection]:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_work, args=(job, theirs))
    with _only(gpu):
        process.start()
    theirs.close()
    return process, ours


def _gpus() -> list[str]:
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return gpus if gpus != [""] else [str(i) for i in range(torch.cuda.device_count())] or ["cpu"]


@contextmanager
def _only(gpu: str) -> Iterator[None]:
    """Processes that are started inside see one GPU: CUDA reads the variable when transformers is imported."""
    with _starting:
        visible = os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if gpu != "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        try:
            yield
        finally:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
            if visible is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = visible


_starting = threading.Lock()


def _received(pipe: Connection) -> tuple[str, Any]:
    try:
        kind, value = pipe.recv()
        return str(kind), value
    except EOFError:
        return "failed", "the process died"


def _work(job: Job, pipe: Connection) -> None:
    try:
        measure = job.prepare()
        pipe.send(("ready", ""))
        pipe.recv()
        _heat()
        for result in measure():
            pipe.send(("result", result))
        pipe.send(("done", ""))
    except BaseException as error:  # what a method cannot do is a result too
        print(traceback.format_exc()[-4000:], file=sys.stderr)  # of inductor's there are thousands of lines
        pipe.send(("failed", noted(error)))


def noted(error: BaseException) -> str:
    """The note of a result that could not be measured."""
    reason = (str(error).strip() or "no reason given").splitlines()[0]
    return f"{type(error).__name__}: {reason}"[:160]


def named(name: Any, result: Any) -> bool:
    """Whether a result has what is set in another one."""
    set_in_name = {n: v for n, v in asdict(name).items() if n != "note" and v not in (None, {}, (), [])}
    return set_in_name.items() <= asdict(result).items()


def _heat() -> None:
    """A second of matrix products: a GPU that has been idle runs faster for a while, and would favour the first."""
    if device() == "cuda":
        factor = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        start = time.perf_counter()
        while time.perf_counter() - start < 1:
            for _ in range(20):
                factor @ factor
            synchronise()


@dataclass
class Report:
    """Results as they come: printed, and written at once if there is a folder, so that nothing is lost."""

    name: str
    config: Any  # a frozen dataclass
    line: Callable[[Any], str]
    out: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # of the machine, or of this run
    setup: dict[str, Any] = field(default_factory=dict)  # what results depend on besides the config
    resume: type | None = None  # of the results of an interrupted run on such a machine, to go on with its file
    results: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.console = Console(width=140)
        self._lock = threading.Lock()
        if self.resume and not self.out:
            sys.exit("--resume needs --out, the folder with the file of the interrupted run")
        if self.path and self.path.exists():
            self._go_on(json.loads(self.path.read_text()), self.path)
        facts = (self.facts | self.setup).items()
        facts = ", ".join(f"{name} {value}" for name, value in facts if not isinstance(value, dict))
        self.console.print(f"{describe()}; {facts}" if facts else describe())

    def _go_on(self, found: dict[str, Any], path: Path) -> None:
        own = json.loads(json.dumps(self.data()))
        if not self.resume:
            if _plain(found["command"]) != _plain(own["command"]):
                sys.exit(f"{path} is of another command ({found['command']}); move it, or name another --out")
            return
        found["machine"], own["machine"] = card(found), card(own)  # whatever the number of GPUs
        names = ("machine", "versions", "config", *self.setup)
        for name in names:
            if own[name] != found.get(name):
                sys.exit(
                    f"{path}: --resume cannot go on with another {name}, {str(found.get(name))[:300]}; "
                    f"this is {str(own[name])[:300]}"
                )
        measured = [result for result in found["results"] if not result["note"]]
        self.results += [self.resume(**{n: _frozen(v) for n, v in result.items()}) for result in measured]
        self.console.print(f"{len(self.results)} results of the run of {found['date']} are kept")

    def add(self, result: Any, name: Any = None) -> None:
        """Adds a result, instead of those that have what is set in `name`; a failure takes no result's place."""
        with self._lock:
            self.console.print(self.line(result), highlight=False)
            same = [] if name is None else self._named(name)
            if same and result.note:
                return
            self.results[:] = [other for other in self.results if other not in same] + [result]
            self.save()

    def has(self, names: Iterable[Any]) -> bool:
        """Whether there are results of an interrupted run that have what is set in each of these."""
        return all([self._named(name) for name in names])

    def _named(self, name: Any) -> list[Any]:
        return [result for result in self.results if named(name, result)]

    def save(self) -> None:
        if self.path:
            write(self.path, json.dumps(self.data(), indent=1) + "\n")

    @property
    def path(self) -> Path | None:
        return self.out and self.out / f"{self.name}.json"

    def data(self) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *_arguments()]),
            "machine": describe(),
            "versions": versions(),
            **self.facts,
            **self.setup,
            "config": asdict(self.config),
            "results": [asdict(result) for result in self.results],
        }

    def close(self, table: Table, plot: Callable[[dict[str, Any], Path], None] | None = None) -> None:
        """Prints the table and one line of JSON; draws the plot beside the data."""
        self.save()
        self.console.print(table)
        data = self.data()
        if self.path and plot:
            try:
                plot(data, self.path.with_suffix(".png"))
            except ModuleNotFoundError as error:
                self.console.print(f"no plot ({error}): pip install matplotlib, then python benchmarks/report.py")
        print(json.dumps(data))


def card(data: dict[str, Any]) -> str:
    """The machine of a report without the number of its GPUs, of which each result took one."""
    return re.sub(r"^\d+ x ", "", data["machine"])


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def versions() -> dict[str, str]:
    import transformers

    found = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "swaa_flex": swaa_flex.__version__,
    }
    with suppress(importlib.metadata.PackageNotFoundError):
        found["flash-attn-4"] = importlib.metadata.version("flash-attn-4")
    return found


def _plain(command: str) -> list[str]:
    """The words of a command but for --resume, which does not change what is measured."""
    return [word for word in shlex.split(command) if word != "--resume"]


def _arguments() -> Iterator[str]:
    """The command line without the places of files, which say nothing of the measurement."""
    arguments = iter(sys.argv[1:])
    for argument in arguments:
        if argument in PLACES:
            next(arguments)
        elif argument.partition("=")[0] not in PLACES:
            yield argument


def arguments(text: str | None, *, resumes: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, on any machine")
    parser.add_argument("--out", type=Path, help="folder for JSON and plot")
    if resumes:
        parser.add_argument("--resume", action="store_true", help="go on with the file of an interrupted run in --out")
    return parser


def write(path: Path, text: str) -> None:
    """All of the file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(text)
    beside.replace(path)


def needs_gpu(quick: bool) -> None:
    if device() == "cpu" and not quick:
        sys.exit("at full size this needs a GPU; --quick has small sizes for any machine")


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def own(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function with a code object of its own: torch.compile counts and remembers per code object."""
    copy = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    copy.__kwdefaults__, copy.__defaults__ = function.__kwdefaults__, function.__defaults__
    return copy


# --- the machine ----------------------------------------------------------------------------------------------


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def describe() -> str:
    if device() == "cuda":
        count = torch.cuda.device_count()
        return f"{count} x " * (count > 1) + torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"


def capacity_gib() -> float:
    """Device memory to plan with: a tenth is left to what is not counted."""
    return torch.cuda.mem_get_info()[1] / GIB * 0.9 if device() == "cuda" else 1e9


def synchronise() -> None:
    if device() == "cuda":
        torch.cuda.synchronize()


def milliseconds(call: Callable[[], Any], repeats: int = 10, seconds: float = 2) -> float:
    """The median time of a call, of as many repeats as `seconds` allow, at least three.

    On a GPU calls are queued, so that what the host does meanwhile hides behind them, where it takes less time.
    """
    call()
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    repeats = max(3, min(repeats, int(seconds / (time.perf_counter() - start))))
    if device() == "cpu":
        return statistics.median(seconds_of(call) for _ in range(repeats)) * 1e3
    call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    synchronise()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def seconds_of(call: Callable[[], Any]) -> float:
    """Of one call, its work on the device included."""
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - start


def read_bandwidth() -> float:
    """GB/s of a large reduction."""
    source = torch.zeros((1 << 31 if device() == "cuda" else 1 << 27) // 4, dtype=torch.int32, device=device())
    return source.numel() * 4 / _median(source.max) / 1e9


def copy_bandwidth() -> float:
    """GB/s of a large copy, bytes read plus bytes written."""
    source = torch.zeros((1 << 31 if device() == "cuda" else 1 << 27) // 4, dtype=torch.int32, device=device())
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _median(lambda: target.copy_(source)) / 1e9


def matmul_rate() -> float:
    """TFLOP/s of a large matrix product: bfloat16 on a GPU, float32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device() == "cuda" else (1024, torch.float32)
    left, right = torch.randn(2, size, size, device=device(), dtype=dtype).unbind(0)
    return 2 * size**3 / _median(lambda: left @ right, repeats=20) / 1e12


def itemsize() -> int:
    """Bytes of a number: bfloat16 on a GPU, float32 on a CPU."""
    return 2 if device() == "cuda" else 4


def _median(call: Callable[[], Any], repeats: int = 8) -> float:
    """Seconds on a GPU that is as hot as jobs find it."""
    _heat()
    call()
    return statistics.median(seconds_of(call) for _ in range(repeats))
