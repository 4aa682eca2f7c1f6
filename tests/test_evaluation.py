"""Evaluation: what is measured, what is kept on disk, what the numbers come to."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import jsonl
from tiny_models import words_model
from tiny_tokenizers import byte_tokenizer, words_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import swaa_flex
from swaa_flex import ConfigError, SWAAConfig
from swaa_flex.errors import DoesNotFitError
from swaa_flex.evaluation import scoring, statistics, summary
from swaa_flex.evaluation.needles import Needles
from swaa_flex.evaluation.perplexity import Perplexity
from swaa_flex.evaluation.results import Results
from swaa_flex.evaluation.runner import evaluate
from swaa_flex.evaluation.tasks import Sample, get

torch.set_num_threads(1)
SLIDING = SWAAConfig(4, 1, (1,), True, 2)
NARROW = SWAAConfig(3, 0, (), False, 0)
CONFIGS = {"full": "full", "sliding": SLIDING, "narrow": NARROW}


@dataclass(frozen=True)
class RandomTask:
    """Prompts of random words; `kind` is "answers", "text" or "choice"."""

    kind: str = "answers"
    judge = staticmethod(lambda answer, sample: float(sample.answers[0] in answer.split()))

    @property
    def name(self):
        return self.kind

    def facts(self):
        return {"kind": self.kind}

    def samples(self, tokenizer, length, count, seed):
        return [self.sample(random.Random(f"{self.kind} {length} {seed} {number}"), number) for number in range(count)]

    def sample(self, chance, number):
        def words(low, high):
            return tuple(chance.randrange(6, 12) for _ in range(chance.randrange(low, high)))

        prompt = words(8, 16)
        if self.kind == "text":
            return Sample(str(number), prompt, continuations=(words(5, 9),))
        if self.kind == "choice":
            return Sample(str(number), prompt, continuations=tuple(words(1, 5) for _ in range(3)), right=number % 3)
        return Sample(str(number), prompt, (chance.choice(["red", "green", "blue"]),), new_tokens=4 + number % 3)


def decided_model():
    """With weights so large that what a row sees changes what it says."""
    model = words_model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5)
    return model


@pytest.fixture
def model():
    return decided_model()


@pytest.fixture(scope="module")
def tokenizer():
    return words_tokenizer()


def run(model, tokenizer, out, tasks=(RandomTask(),), configs=CONFIGS, count=7, **options):
    options = {"batch_size": 3, **options}
    return evaluate(model, tokenizer, configs, tasks, [16], count=count, out=out, progress=False, **options)


def lines(out):
    return [json.loads(line) for path in sorted(out.rglob("*.jsonl")) for line in path.read_text().splitlines()]


def watched(monkeypatch):
    """The samples that are run, in order: task, window and id."""
    ran = []
    compute = scoring.results

    def counting(model, tokenizer, task, samples):
        ran.extend(f"{task.name} {model.config.swaa['sliding_window']} {sample.id}" for sample in samples)
        return compute(model, tokenizer, task, samples)

    monkeypatch.setattr(scoring, "results", counting)
    return ran


# --- what is measured ----------------------------------------------------------------------------------------


def alone(model, sample, config):
    """The log-probability of each token after a prompt, a forward per row, in float64."""
    model = swaa_flex.adapt(model.double(), config)
    rows = []
    for continuation in sample.continuations:
        ids = torch.tensor([sample.prompt + continuation])
        with torch.no_grad():
            logits = model(ids, prompt_lengths=len(sample.prompt), use_cache=False).logits[0]
        places = torch.arange(len(sample.prompt), ids.shape[1])
        rows.append(logits.log_softmax(-1)[places - 1, ids[0, places]])
    return rows


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", ["text", "choice"])
def test_continuations_are_scored_as_decode_rows_whatever_the_batch(kind, config, model, tokenizer, tmp_path):
    task = RandomTask(kind)
    run(model, tokenizer, tmp_path, [task], {"this": config})
    found = {line["id"]: line for line in lines(tmp_path)}
    for sample in task.samples(tokenizer, 16, 7, 0):
        expected = alone(model, sample, config)
        line = found[sample.id]
        if kind == "text":
            assert line["tokens"] == len(sample.continuations[0])
            assert line["logprob"] == pytest.approx(float(expected[0].sum()), abs=1e-4)
        else:
            assert [tokens for _, tokens in line["logprobs"]] == [len(row) for row in expected]
            sums = [total for total, _ in line["logprobs"]]
            assert sums == pytest.approx([float(row.sum()) for row in expected], abs=1e-4)
            best = max(range(3), key=lambda choice: float(expected[choice].mean()))
            assert (line["choice"], line["score"]) == (best, float(best == sample.right))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_answers_are_those_of_each_prompt_alone(config, model, tokenizer, tmp_path):
    run(model, tokenizer, tmp_path, configs={"this": config})
    found = {line["id"]: line for line in lines(tmp_path)}
    swaa_flex.adapt(model, config)
    for sample in RandomTask().samples(tokenizer, 16, 7, 0):
        ids = torch.tensor([sample.prompt])
        with swaa_flex.prompt(len(sample.prompt)):
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=sample.new_tokens, do_sample=False
            )
        answer = tokenizer.decode(out[0, ids.shape[1] :]).partition("<end>")[0].strip()
        assert found[sample.id]["answer"] == answer
        assert found[sample.id]["score"] == float(sample.answers[0] in answer.split())


def test_answers_differ_between_configurations(model, tokenizer, tmp_path):
    run(model, tokenizer, tmp_path)
    by_sample = {}
    for line in lines(tmp_path):
        by_sample.setdefault(line["id"], []).append(line["answer"])
    assert all(len(answers) == 3 for answers in by_sample.values())
    assert any(len(set(answers)) == 3 for answers in by_sample.values())


def test_an_answer_ends_at_its_stop_token_and_at_its_own_limit(model, tokenizer, monkeypatch):
    samples = [Sample("a", (6, 7), new_tokens=4), Sample("b", (6, 7, 8), new_tokens=2)]
    written = torch.tensor([[6, 5, 3, 8], [7, 8, 9, 10]])  # 3 is <end>
    monkeypatch.setattr(LlamaForCausalLM, "generate", lambda self, input_ids, **_: torch.cat([input_ids, written], 1))
    assert scoring.answers(model, tokenizer, samples) == ["red </think>", "green blue"]


def test_perplexity_is_kept_by_position(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "BUCKET", 4)
    cell = run(model, tokenizer, tmp_path, [RandomTask("text")]).cells[1]
    of_cell = [line for line in lines(tmp_path) if line["tokens"]]
    for line in of_cell:
        begins = sorted(map(int, line["positions"]))
        assert all(begin % 4 == 0 for begin in begins) and begins == list(range(begins[0], begins[-1] + 1, 4))
        assert sum(tokens for _, tokens in line["positions"].values()) == line["tokens"]
        assert sum(total for total, _ in line["positions"].values()) == pytest.approx(line["logprob"])
    assert cell.metric == "perplexity" and set(cell.positions) <= {8, 12, 16, 20} and len(cell.positions) == 4
    assert min(cell.positions.values()) < cell.value < max(cell.positions.values())


def test_the_model_is_as_before(model, tokenizer, tmp_path):
    generation = model.generation_config
    model.train()
    model.model.layers[0].eval()
    run(model, tokenizer, tmp_path, count=1)
    assert model.config._attn_implementation == "sdpa" and model.config.swaa is None
    assert model.generation_config is generation
    assert model.training and not model.model.layers[0].training
    swaa_flex.adapt(model, SLIDING)
    run(model, tokenizer, tmp_path / "again", count=1)
    assert model.config._attn_implementation == "swaa_flex" and model.config.swaa == SLIDING.to_dict()


def test_questions_from_a_file_have_their_own_lengths_up_to_the_largest(model, tokenizer, tmp_path):
    row = {"prompt": "red green blue", "answer": "blue"}
    long = {"prompt": "red " * 30, "answer": "red"}
    jsonl(tmp_path / "rows.jsonl", row, long, row)
    tasks = [*get(f"qa:{tmp_path / 'rows.jsonl'}", new_tokens=2), RandomTask("text")]
    found = evaluate(
        model, tokenizer, {"full": "full"}, tasks, [16, 20], count=5, out=tmp_path / "out", progress=False
    )
    assert [(c.task, c.length, c.samples) for c in found.cells] == [
        ("qa:rows", 20, 2),
        ("text", 16, 5),
        ("text", 20, 5),
    ]
    (cell,) = evaluate(model, tokenizer, {"full": "full"}, tasks[:1], [None], count=5, out=tmp_path / "out").cells
    assert (cell.length, cell.samples) == (None, 3)


# --- what is kept --------------------------------------------------------------------------------------------


def test_finished_samples_are_not_run_again(model, tokenizer, tmp_path, monkeypatch):
    ran = watched(monkeypatch)
    tasks = [RandomTask(), RandomTask("text"), RandomTask("choice")]
    first = run(model, tokenizer, tmp_path, tasks)
    written = (tmp_path / "summary.json").read_bytes()
    assert len(ran) == 3 * 3 * 7 == len(lines(tmp_path))
    ran.clear()
    assert run(model, tokenizer, tmp_path, tasks) == first
    assert (tmp_path / "summary.json").read_bytes() == written and ran == []
    run(model, tokenizer, tmp_path, tasks[:1], count=9)
    assert sorted(ran) == sorted(f"answers {window} {id}" for window in (None, 4, 3) for id in (7, 8))


@pytest.mark.parametrize(
    "change",
    ["seed", "config", "weights", "facts", "dtype"],
)
def test_results_of_something_else_are_not_taken(change, model, tokenizer, tmp_path, monkeypatch):
    configs = {"sliding": SLIDING}
    run(model, tokenizer, tmp_path, configs=configs)
    ran = watched(monkeypatch)
    options = {}
    if change == "seed":
        options["seed"] = 1
    elif change == "config":
        configs = {"sliding": SWAAConfig(4, 1, (1,), True, 3)}
    elif change == "weights":
        model.lm_head.weight.data[0, 0] += 1
    elif change == "facts":
        monkeypatch.setattr(RandomTask, "facts", lambda self: {"kind": "another"})
    else:
        model = model.bfloat16()
    run(model, tokenizer, tmp_path, configs=configs, **options)
    assert len(ran) == 7
    assert len(list(tmp_path.rglob("*.jsonl"))) == 2


def test_a_sample_that_reads_otherwise_is_run_again(model, tokenizer, tmp_path, monkeypatch):
    run(model, tokenizer, tmp_path, configs={"sliding": SLIDING})
    ran = watched(monkeypatch)
    samples = RandomTask.samples
    monkeypatch.setattr(
        RandomTask, "samples", lambda self, *a: [Sample("0", (6, 6), ("red",), 3), *samples(self, *a)[1:]]
    )
    run(model, tokenizer, tmp_path, configs={"sliding": SLIDING})
    assert ran == ["answers 4 0"]


def test_one_configuration_with_two_names_is_run_once(model, tokenizer, tmp_path, monkeypatch):
    ran = watched(monkeypatch)
    found = run(model, tokenizer, tmp_path, configs={"a": SLIDING, "b": SLIDING.to_dict()})
    assert len(ran) == 7 and [cell.config for cell in found.cells] == ["a", "b"]


@pytest.mark.parametrize("cut", [2, 20, "whole line"])
def test_a_line_that_was_cut_off_is_run_again(cut, model, tokenizer, tmp_path, monkeypatch):
    first = run(model, tokenizer, tmp_path, configs={"sliding": SLIDING})
    (path,) = tmp_path.rglob("*.jsonl")
    before = path.read_bytes()
    last = before.splitlines(keepends=True)[-1]
    path.write_bytes(before[: -len(last) if cut == "whole line" else -cut])
    ran = watched(monkeypatch)
    assert run(model, tokenizer, tmp_path, configs={"sliding": SLIDING}) == first
    assert ran == [f"answers 4 {json.loads(last)['id']}"]
    torn = b"" if cut == "whole line" else last[:-cut] + b"\n"
    assert path.read_bytes() == before.removesuffix(last) + torn + last
    assert run(model, tokenizer, tmp_path, configs={"sliding": SLIDING}) == first and len(ran) == 1


def test_the_folder_says_what_each_file_depends_on(model, tokenizer, tmp_path):
    run(model, tokenizer, tmp_path, configs={"sliding": SLIDING})
    (path,) = tmp_path.rglob("*.jsonl")
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["swaa"] == SLIDING.to_dict()
    assert (facts["task"], facts["length"], facts["seed"]) == ("answers", 16, 0)
    assert path.name.startswith("answers-16-")


TASKS = (RandomTask(), RandomTask("text"))
PROGRAM = """
import sys, time
import test_evaluation as tests
from swaa_flex.evaluation import scoring

compute = scoring.results

def slow(*batch):
    time.sleep(float(sys.argv[2]))
    return compute(*batch)

scoring.results = slow
tests.run(tests.decided_model(), tests.words_tokenizer(), tests.Path(sys.argv[1]), tests.TASKS, count=8)
"""
PYTHONPATH = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
ENVIRONMENT = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}


def test_a_run_that_was_killed_ends_with_the_same_summary_and_runs_no_sample_twice(
    model, tokenizer, tmp_path, monkeypatch
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(killed), "0.3"], env=ENVIRONMENT)
    ran = watched(monkeypatch)
    run(model, tokenizer, whole, TASKS, count=8)
    of_whole = ran.copy()
    ran.clear()
    while len(lines(killed)) < 10:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = lines(killed)
    assert 10 <= len(finished) < 48 and not (killed / "summary.json").exists()
    run(model, tokenizer, killed, TASKS, count=8)
    assert ran == of_whole[len(finished) :]
    assert len({line["key"] for line in finished}) < len(lines(killed)) == 48
    assert (killed / "summary.json").read_bytes() == (whole / "summary.json").read_bytes()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_several_processes_share_the_samples(model, tokenizer, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(tmp_path / "program.py"), str(tmp_path / "shared"), "0"]
    environment = {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shared = [len(path.read_text().splitlines()) for path in sorted(tmp_path.rglob("*.jsonl"))]
    assert len(shared) == 2 * 6 and sum(shared) == 48  # a file of each process; no sample in both
    run(model, tokenizer, tmp_path / "alone", TASKS, count=8)
    assert (tmp_path / "shared" / "summary.json").read_bytes() == (tmp_path / "alone" / "summary.json").read_bytes()


# --- memory --------------------------------------------------------------------------------------------------


def test_a_batch_that_does_not_fit_is_halved(model, tokenizer, tmp_path, monkeypatch, capsys):
    expected = run(model, tokenizer, tmp_path / "enough", count=8)
    compute, sizes = scoring.results, []

    def little_memory(model, tokenizer, task, samples):
        sizes.append(len(samples))
        if len(samples) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(model, tokenizer, task, samples)

    monkeypatch.setattr(scoring, "results", little_memory)
    found = run(model, tokenizer, tmp_path / "little", count=8, batch_size=8)
    assert found == expected
    assert sizes[:3] == [8, 4, 2] and sizes.count(8) == 1  # and it is not tried again
    assert "out of memory with 8 samples of 20 tokens, on with 4" in capsys.readouterr().err


def test_a_sample_that_does_not_fit_is_named(model, tokenizer, tmp_path, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(scoring, "results", no_memory)
    with pytest.raises(DoesNotFitError, match="a sample of 20 tokens does not fit"):
        run(model, tokenizer, tmp_path)


# --- what it comes to ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "samples", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), and R's prop.test(..., correct = FALSE)
    [
        (8, 10, 0.4902, 0.9433),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (29, 29, 0.883, 1),
    ],
)
def test_wilson(right, samples, low, high):
    assert statistics.wilson(right, samples) == pytest.approx((low, high), abs=6e-5)


def test_the_interval_of_a_share_holds_it_in_spite_of_rounding():
    for samples in range(1, 60):
        for right in (0, samples):
            low, high = statistics.wilson(right, samples)
            assert low <= right / samples <= high


@pytest.mark.parametrize(
    ("gained", "lost", "p"), [(1, 8, 0.0391), (8, 1, 0.0391), (0, 0, 1), (5, 5, 1), (0, 6, 0.03125)]
)
def test_mcnemar(gained, lost, p):
    assert statistics.mcnemar(gained, lost) == pytest.approx(p, abs=5e-5)


def test_paired_shares():
    # By hand: (21/102 - 11/102) -+ 1.96 sqrt((32/102 - (10/102)^2) / 102)
    assert statistics.paired_shares(20, 10, 100) == pytest.approx((-0.00894, 0.20502), abs=5e-5)


def test_bootstrap_of_a_mean_is_as_wide_as_theory_has_it():
    values = torch.randn(400, 1, generator=torch.Generator().manual_seed(0))
    low, high = statistics.bootstrap(values, lambda means: means[:, 0])
    error = float(values.std()) / 20
    assert low == pytest.approx(float(values.mean()) - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(float(values.mean()) + 1.96 * error, abs=0.2 * error)
    assert statistics.bootstrap(values, lambda means: means[:, 0]) == (low, high)


def test_permutation_p_values():
    assert statistics.sign_flips(torch.tensor([1.0, 1.0, 1.0, -1.0])) == 10 / 16  # sums of 2 or more: 5 of 16, twice
    assert statistics.sign_flips(torch.zeros(30)) == 1
    assert statistics.sign_flips(torch.ones(30)) == pytest.approx(1 / 2001)
    shifted = torch.randn(100, generator=torch.Generator().manual_seed(0)) + 0.2
    t = float(shifted.mean() / shifted.std() * 10)
    assert statistics.sign_flips(shifted) == pytest.approx(math.erfc(t / math.sqrt(2)), abs=0.02)


def verdicts(*scores):
    return [{"score": score} for score in scores]


def test_configurations_are_compared_with_full_attention_sample_by_sample():
    full, other = summary.cells("t", 16, {"full": verdicts(*[1] * 9, 0), "other": verdicts(*[0] * 8, 1, 1)}, "full")
    assert (full.value, full.samples, full.metric, full.against_full) == (0.9, 10, "score", None)
    assert full.interval == statistics.wilson(9, 10)
    assert other.against_full.difference == pytest.approx(-0.7)
    assert other.against_full.p == pytest.approx(0.0391, abs=5e-5)
    assert other.against_full.interval == statistics.paired_shares(1, 8, 10)
    (without,) = summary.cells("t", 16, {"other": verdicts(1)}, None)
    assert without.against_full is None


def test_bootstrap_of_few_samples_holds_the_truth_nearly_as_often_as_it_says():
    values = torch.randn(200, 6, 1, generator=torch.Generator().manual_seed(0))
    intervals = [statistics.bootstrap(v, lambda means: means[:, 0]) for v in values]
    assert sum(low <= 0 <= high for low, high in intervals) >= 185  # plain percentiles: 177 of these 200
    assert statistics.bootstrap(values[0][:1], lambda means: means[:, 0]) == (values[0][0], values[0][0])


def test_fractions_have_bootstrap_intervals_and_permutation_tests():
    _, other = summary.cells("t", 16, {"full": verdicts(*[1] * 5), "other": verdicts(*[0.5] * 5)}, "full")
    assert other.interval == (0.5, 0.5)
    assert other.against_full == summary.Comparison(-0.5, (-0.5, -0.5), 0.0625)


def test_perplexity_is_of_all_tokens():
    def read(*pairs):
        return [{"logprob": -nats, "tokens": tokens, "positions": {"128": [-nats, tokens]}} for nats, tokens in pairs]

    full, other = summary.cells("t", 16, {"full": read((2, 2), (4, 4)), "other": read((4, 2), (8, 4))}, "full")
    assert (full.value, full.metric) == (pytest.approx(math.e), "perplexity")
    assert other.value == pytest.approx(math.e**2) and other.positions == {128: pytest.approx(math.e**2)}
    assert other.against_full.difference == pytest.approx(math.e**2 - math.e)
    assert other.interval == pytest.approx((math.e**2, math.e**2))
    assert other.against_full.p == 0.5  # of two samples


# --- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"configs": {}}, "configs: there are none"),
        ({"tasks": ()}, "tasks: there are none"),
        ({"tasks": (RandomTask(), RandomTask())}, "task answers is there 2 times"),
        ({"count": 0}, "count=0: expected at least 1"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"configs": {"a": SWAAConfig(full_attention_layers=(7,))}}, "layer 7 of 2 does not exist"),
        ({"configs": {"a": "qality"}}, "did you mean 'quality'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(options, problem, model, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=problem):
        run(model, tokenizer, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_lengths_beyond_the_model_are_refused(model, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="length 4096: expected 1 to 2048 tokens"):
        evaluate(model, tokenizer, CONFIGS, [RandomTask()], [16, 4096], count=1, out=tmp_path)


@pytest.mark.parametrize(
    ("task", "length", "most"),
    [("niah_single", 1000, 992), ("niah_multivalue", 1000, 944), ("niah_single", 992, None)],
)
def test_prompts_leave_room_for_their_answers(task, length, most, tmp_path, monkeypatch):
    """As learned positions need: there are 1024."""
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=300, n_positions=1024, eos_token_id=256)
    model, ran = GPT2LMHeadModel(config).eval(), []
    monkeypatch.setattr(scoring, "results", lambda *batch: ran.append(batch) or [{"score": 0.0}] * len(batch[-1]))

    def measure():
        tasks = [Needles(name="short", new_tokens=1), *get(task)]
        return evaluate(model, byte_tokenizer(None), {"full": "full"}, tasks, [length], count=1, out=tmp_path)

    if most is not None:
        with pytest.raises(ConfigError, match=rf"task {task}, sample 0: .* further than 1024; .* at most {most}$"):
            measure()
        assert ran == []
    else:
        measure()
        assert len(ran) == 2


def test_questions_from_a_file_leave_room_for_their_answers(model, tokenizer, tmp_path, monkeypatch, capsys):
    rows = [{"prompt": " ".join(["red"] * words), "answer": "blue"} for words in (3, 2000)]
    jsonl(tmp_path / "rows.jsonl", *rows)
    ran = watched(monkeypatch)
    task = get(f"qa:{tmp_path / 'rows.jsonl'}")
    summary = evaluate(model, tokenizer, {"full": "full"}, task, [None], count=2, out=tmp_path)
    assert summary.cells[0].samples == 1
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"sample 1: 2003 tokens of prompt and 64 .* 2048; expected .* at most 1984", said)
    ran.clear()
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[1]))
    with pytest.raises(ConfigError, match=r"none of its 1 samples .*sample 0: 2003 tokens of prompt and 64"):
        evaluate(model, tokenizer, CONFIGS, get(f"qa:{tmp_path / 'rows.jsonl'}"), [None], count=2, out=tmp_path)
    assert ran == []


def test_what_a_task_refuses_is_refused_before_anything_is_run(model, tokenizer, tmp_path, monkeypatch):
    def samples(self, tokenizer, length, count, seed):
        if self.kind == "text":
            raise ConfigError("length 16: too short")
        return [self.sample(random.Random(0), 0)]

    monkeypatch.setattr(RandomTask, "samples", samples)
    ran = watched(monkeypatch)
    with pytest.raises(ConfigError, match="too short"):
        run(model, tokenizer, tmp_path, [RandomTask(), RandomTask("text")])
    assert ran == []


def test_samples_that_the_model_cannot_be_given_are_named_and_left_out(tokenizer, tmp_path, capsys):
    tokenizer = words_tokenizer()
    tokenizer.chat_template = (
        "{% if 'blue' in messages[0]['content'] %}{{ raise_exception('no blue') }}{% endif %}"
        + tokenizer.chat_template
    )
    tokenizer.add_tokens(["seven"])  # which the model has no embedding for
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=12, eos_token_id=3, bos_token_id=None, **size)).eval()
    prompts = ["red", "blue", "seven", "red " * 11, "green"]
    jsonl(tmp_path / "rows.jsonl", *({"prompt": prompt, "answer": "red"} for prompt in prompts))
    (task,) = get(f"qa:{tmp_path / 'rows.jsonl'}", new_tokens=4)

    def measured(name):
        return evaluate(
            model, tokenizer, {"full": "full"}, [task], [None], count=5, out=tmp_path / name, progress=False
        )

    assert measured("a").cells[0].samples == 2
    heading, *said = capsys.readouterr().err.splitlines()
    assert heading == "3 samples of qa:rows are left out:"
    assert [line.partition(": ")[0].strip() for line in sorted(said)] == ["row 1", "sample 2", "sample 3"]
    assert "no blue" in said[0] and "token ids from" in "".join(said) and "no further than 16" in "".join(said)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "seven", "answer": "red"}))
    (task,) = get(f"qa:{tmp_path / 'rows.jsonl'}", new_tokens=4)
    with pytest.raises(ConfigError, match="task qa:rows: none of its 1 samples can be used, sample 0: token ids"):
        measured("b")


def test_a_second_run_in_the_same_folder_is_refused(model, tokenizer, tmp_path, monkeypatch):
    compute, refused = scoring.results, []

    def meanwhile(*batch):
        with pytest.raises(ConfigError, match=r"summary\.json: another run is writing it"):
            run(model, tokenizer, tmp_path, configs={"full": "full"})
        refused.append(batch)
        return compute(*batch)

    monkeypatch.setattr(scoring, "results", meanwhile)
    run(model, tokenizer, tmp_path, configs={"sliding": SLIDING})
    assert len(refused) == 3 and len(lines(tmp_path)) == 7


def test_no_result_is_lost_to_another_that_is_opened_or_written_meanwhile(tmp_path):
    program = (
        "import sys\nfrom pathlib import Path\nfrom swaa_flex.evaluation.results import Results\n"
        "from swaa_flex.evaluation.tasks import Sample\nprint(flush=True)\nnumber = 0\n"
        "while True:\n    store = Results(Path(sys.argv[1]), {'task': 't', 'length': 1})\n"
        "    store.append([Sample(f'other {number % 9}', (number % 9,))], [{'score': 0}])\n    number += 1\n"
    )
    store = Results(tmp_path, {"task": "t", "length": 1})
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        for number in range(400):
            store.append([Sample(f"s{number}", (number,))], [{"score": 1, "answer": "x" * 9000}])
        other.kill()
    assert sum(result["score"] for result in store.read().values()) == 400


def test_a_task_without_samples_is_refused(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(RandomTask, "samples", lambda *_: [])
    with pytest.raises(ConfigError, match="it has no samples"):
        run(model, tokenizer, tmp_path)


# --- what is damaged, too much or said in another way --------------------------------------------------------


def test_a_damaged_result_is_named(tmp_path):
    store = Results(tmp_path, {"task": "t", "length": 1})
    store.path.write_text('{"key": "a", "score": 1}\n{"score": 1}\n')
    with pytest.raises(ConfigError, match=r"\.jsonl, line 2: expected a result as JSON; delete the line"):
        store.read()


def test_needles_of_more_words_than_there_are_are_refused():
    with pytest.raises(ConfigError, match="keys=100 and values=100 as words: 10100 words, and there are"):
        Needles(name="n", words=True, keys=100, values=100)


def test_pads_do_not_move_learned_positions():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=64, initializer_range=0.5)
    model = GPT2LMHeadModel(config).eval()
    samples = [Sample(str(n), tuple(range(5, 5 + n)), continuations=((7, 8, 9),)) for n in (3, 20)]
    together = scoring.continuation_log_probs(model, samples)
    alone = [scoring.continuation_log_probs(model, [sample])[0] for sample in samples]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_full_layers_in_any_notation_are_what_others_are_compared_with(tmp_path):
    configs = {"mine": SWAAConfig(8), "all": SWAAConfig(8, full_attention_layers="0::1")}
    summary = evaluate(
        words_model(), words_tokenizer(), configs, [Perplexity(scored=16)], [64], count=2, out=tmp_path, progress=False
    )
    assert summary.baseline == "all"
