"""What the benchmarks share: an interrupted run goes on, and nothing that was measured is lost."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import runner


@dataclass(frozen=True)
class Config:
    size: int = 3


@dataclass(frozen=True)
class Result:
    method: str
    length: int
    chosen: tuple[int, ...] = ()
    seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Job:
    """A method, for two lengths; how long it takes says the test."""

    method: str
    seconds: float
    fails_at: int | None = None
    gib = 1

    def prepare(self):
        return self.measure

    def measure(self):
        for length in (1, 2):
            if length == self.fails_at:
                raise ValueError("too long\nand more")
            yield Result(self.method, length, (4, 5), self.seconds)

    def failed(self, note):
        for length in (1, 2):
            yield Result(self.method, length, note=note)


class Backwards(Job):
    def measure(self):
        return reversed(list(super().measure()))


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Makes a report in the folder, as the script `benchmarks/some.py` does with these arguments."""

    def start(*arguments, config=Config(), setup=None, out=tmp_path):
        monkeypatch.setattr(sys, "argv", ["some.py", *arguments])
        resume = Result if "--resume" in arguments else None
        return runner.Report("some", config, str, out, setup=setup or {}, resume=resume)

    return start


def rows(report):
    return {(r.method, r.length): r.seconds or r.note for r in report.results}


def saved(report):
    return [Result(**{**r, "chosen": tuple(r["chosen"])}) for r in json.loads(report.path.read_text())["results"]]


@pytest.mark.slow
def test_a_resumed_run_measures_what_is_missing_and_keeps_the_rest(start):
    runner.run([Job("one", 1.0), Job("two", 2.0, fails_at=2), Job("gone", 3.0, fails_at=1)], first := start())
    failure = "ValueError: too long"
    assert rows(first) == {
        ("one", 1): 1.0,
        ("one", 2): 1.0,
        ("two", 1): 2.0,
        ("two", 2): failure,
        ("gone", 1): failure,
        ("gone", 2): failure,
    }
    # Another choice of jobs: "one" is not asked for, and "two" fails where it had been measured.
    runner.run([Job("two", 9.0, fails_at=1)], again := start("--resume"))
    assert rows(again) == {("one", 1): 1.0, ("one", 2): 1.0, ("two", 1): 2.0, ("two", 2): failure}
    runner.run([Job("one", 8.0), Job("two", 9.0)], last := start("--resume"))
    assert rows(last) == {("one", 1): 1.0, ("one", 2): 1.0, ("two", 1): 9.0, ("two", 2): 9.0}
    assert saved(last) == last.results and len(last.results) == 4
    assert last.has([Result("two", 2)]) and not last.has([Result("two", 3)])


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"config": Config(4)}, "config"), ({"setup": {"recipes": {"a": 2}}}, "recipes"), ({}, "versions")],
)
def test_a_run_under_other_conditions_is_not_resumed(start, changed, named, monkeypatch):
    report = start(setup={"recipes": {"a": 1}})
    report.add(Result("one", 1, seconds=1.0))
    if named == "versions":
        monkeypatch.setattr(runner, "versions", lambda: {"torch": "0"})
    with pytest.raises(SystemExit, match=rf"some.json: --resume cannot go on with another {named}"):
        start("--resume", **({"setup": {"recipes": {"a": 1}}} | changed))
    assert len(saved(report)) == 1


def test_the_file_of_another_command_is_not_replaced(start, tmp_path):
    report = start("--methods", "of mine", "--out", str(tmp_path))
    report.add(Result("one", 1, seconds=1.0))
    assert json.loads(report.path.read_text())["command"] == "python benchmarks/some.py --methods 'of mine'"
    with pytest.raises(SystemExit, match=r"some.json is of another command .*--methods 'of mine'"):
        start()
    start("--methods", "of mine").add(Result("two", 1, seconds=1.0))
    assert [r.method for r in saved(report)] == ["two"]


def test_results_may_come_in_another_order_than_their_names(start):
    report = start()
    runner.run([Backwards("one", 1.0)], report)
    assert rows(report) == {("one", 2): 1.0, ("one", 1): 1.0}


def test_resume_asks_for_the_folder(start):
    with pytest.raises(SystemExit, match="--resume needs --out"):
        start("--resume", out=None)


def test_a_missing_matplotlib_does_not_cost_the_results(start, capsys):
    report = start()
    report.add(Result("one", 1, seconds=1.0))

    def plot(data, path):
        raise ModuleNotFoundError("No module named 'matplotlib'")

    report.close(Table("method"), plot)
    said = capsys.readouterr().out.splitlines()
    assert any("no plot (No module named 'matplotlib')" in line for line in said)
    assert json.loads(said[-1])["results"] == json.loads(json.dumps([replace(report.results[0]).__dict__]))


def test_one_case_of_serving_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    import serving

    data = json.loads((Path(__file__).parents[1] / "docs/benchmarks/serving_cuda.json").read_text())
    one = [r for r in data["results"] if (r["context"], r["concurrent"]) == (131072, 16)]
    serving.plot(data | {"results": one}, tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 0
