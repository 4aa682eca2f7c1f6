import copy
import datetime
import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import invoke
from tiny_models import words_model
from tiny_tokenizers import TEMPLATE, WORDS, words_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)
from transformers.utils import chat_template_utils

import swaa_flex
from swaa_flex import ConfigError
from swaa_flex.tuning import distill as module
from swaa_flex.tuning.data import Sample, encode, read_samples
from swaa_flex.tuning.distill import distill

SETTINGS = {"n": 3, "max_new_tokens": 12, "batch_size": 2, "seed": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    words_model().save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def model():
    return words_model()


@pytest.fixture(scope="module")
def tokenizer():
    return words_tokenizer()


def questions(count=7):
    return [
        Sample(
            ({"role": "user", "content": " ".join(WORDS[: i % 5 + 1])},),
            answer=WORDS[i % 6],
            question=f"{i}?",
            row=2 * i,
        )
        for i in range(count)
    ]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def scripted(monkeypatch, tokenizer, *answers):
    """Makes models answer what is written here, an answer after the other."""
    left = list(answers)

    def generate(self, input_ids, attention_mask):
        config = self.generation_config
        ids = input_ids.repeat_interleave(config.num_return_sequences, 0)
        texts = [tokenizer(left.pop(0), add_special_tokens=False).input_ids for _ in ids]
        texts = [text + [0] * (config.max_new_tokens - len(text)) for text in texts]
        return torch.cat([ids, torch.tensor(texts)], 1)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)


def test_right_answers_are_written_as_chats_in_order(model, tokenizer, tmp_path):
    samples = questions()
    out = tmp_path / "out.jsonl"
    result = distill(model, tokenizer, samples, out, **SETTINGS)
    written = rows(out)
    assert 0 < len(written) == result.kept <= result.answered <= result.rows == 7
    assert (result.path, result.resumed) == (out, 0)
    assert [row["row"] for row in written] == sorted({row["row"] for row in written})
    for row in written:
        sample = samples[row["row"] // 2]
        assert list(row) == ["messages", "answer", "question", "row", "score"]
        assert row["messages"][:-1] == list(sample.messages)
        assert row["messages"][-1]["role"] == "assistant"
        assert sample.answer in row["messages"][-1]["content"].split("</think>")[-1].split()
        assert (row["answer"], row["question"], row["score"]) == (sample.answer, sample.question, 1.0)
        assert sum(encode(tokenizer, row["messages"]).decode_rows) <= SETTINGS["max_new_tokens"]
    again, bad = read_samples(out)
    assert bad == []
    assert [(sample.answer, sample.prompt) for sample in again] == [
        (row["answer"], tuple(row["messages"][:-1])) for row in written
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_answers_are_drawn_from_the_whole_distribution_of_the_model(model, tokenizer, tmp_path):
    # Prompts alone decide: what the model's own generation config says about sampling does not count.
    for name in ("a", "b"):
        distill(model, tokenizer, questions(), tmp_path / f"{name}.jsonl", **SETTINGS, judge="none", keep=3)
        model.generation_config.update(do_sample=False, top_k=1, temperature=0.1, repetition_penalty=5.0)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert model.generation_config.top_k == 1
    answers = {row["messages"][-1]["content"] for row in rows(tmp_path / "a.jsonl")}
    assert len(answers) > 7  # of 7 prompts


def test_the_same_prompt_gets_other_answers_in_another_batch(model, tokenizer, tmp_path):
    out = tmp_path / "out.jsonl"
    distill(model, tokenizer, questions(1) * 4, out, n=2, keep=2, max_new_tokens=12, batch_size=1, judge="none")
    assert len({row["messages"][-1]["content"] for row in rows(out)}) > 4


def test_each_answer_is_that_of_its_own_prompt_with_full_attention(model, tokenizer, tmp_path):
    samples = questions()
    distill(model, tokenizer, samples, tmp_path / "out.jsonl", n=1, temperature=0, max_new_tokens=9, judge="none")
    for sample, row in zip(samples, rows(tmp_path / "out.jsonl"), strict=True):
        ids = tokenizer.apply_chat_template(
            list(sample.messages), add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        alone = model.generate(ids, max_new_tokens=9, do_sample=False, attention_mask=torch.ones_like(ids))
        content = tokenizer.decode(alone[0, ids.shape[1] :].tolist()).removesuffix("<end>").strip()
        assert row["messages"][-1]["content"].strip() == content


def test_an_adapted_model_answers_with_full_attention_and_is_as_before(model, tokenizer, tmp_path):
    stock = distill(model, tokenizer, questions(), tmp_path / "a.jsonl", **SETTINGS, judge="none")
    window = {"sliding_window": 1, "sink_tokens": 0, "full_attention_layers": [], "full_attention_decode": False}
    swaa_flex.adapt(model, window | {"dense_tail": 0, "backend": "chunked"})
    model.train()
    model.lm_head.eval()
    before = dict(model.config.swaa)
    random = torch.get_rng_state()
    generation = model.generation_config
    result = distill(model, tokenizer, questions(), tmp_path / "b.jsonl", **SETTINGS, judge="none")
    assert result.kept == stock.kept == 7
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()

    def judge(sample, answer):
        assert model.config.swaa["sliding_window"] is None
        assert model.config.swaa["backend"] == "chunked"
        assert (model.generation_config.top_k, model.generation_config.top_p) == (0, 1)
        assert not model.training
        raise KeyError("of the judge")

    with pytest.raises(KeyError, match="of the judge"):
        distill(model, tokenizer, questions(), tmp_path / "c.jsonl", **SETTINGS, judge=judge)
    assert model.config.swaa == before
    assert model.generation_config is generation
    assert model.training
    assert not model.lm_head.training
    assert torch.equal(torch.get_rng_state(), random)


def test_progress_is_shown_on_a_terminal_only(model, tokenizer, tmp_path, monkeypatch, capsys):
    def said(name, **options):
        distill(model, tokenizer, questions(2), tmp_path / f"{name}.jsonl", **SETTINGS, **options)
        return capsys.readouterr()

    assert said("pipe") == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    shown = said("terminal")
    assert shown.out == ""
    assert "2/2" in re.sub(r"\x1b\[[\d;?]*\w", "", shown.err)
    assert said("not wanted", progress=False).err == ""


# --- judging -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("judge", "reference", "answer", "right"),
    [
        ("contains", "Paris", "It is **paris**, of course.", True),
        ("contains", "34", "3*4 is 12", False),
        ("contains", "def f", "it is *`def f`*: ...", True),
        ("contains", "Paris.", "Paris", True),
        ("contains", "New  York", "in new\nyork", True),
        ("contains", "it\u2019s", "It's so", True),
        ("contains", "Paris", "comparison", False),
        ("contains", "5", "15 or 51", False),
        ("contains", "5", "5.2 or 1,5", False),
        ("contains", "5", "It is 5.", True),
        ("contains", "5", "-5, or \u22125", False),
        ("contains", "5", "5/7 or 1:5", False),
        ("contains", "1", "at 1:30", False),
        ("contains", "caf", "café", False),
        ("contains", "C", "C++ and C#", False),
        ("contains", "C", "in C, not C++", True),
        ("contains", "Paris", "首都是Paris市", True),
        ("contains", "C++", "in C", False),
        ("contains", "北京", "首都是北京市", True),
        ("contains", "Paris", "<think>Paris?</think>Rome", False),
        ("contains", "Paris", "<think>Rome?</think>\n\nParis", True),
        ("contains", "Paris", "<think>Paris, Paris", False),
        ("contains", "<think>Hm</think>Paris", "Paris", True),
        ("contains", "<think>Paris?</think>Rome", "Paris", False),
        ("contains", "สมชาย", "คำตอบคือสมชายครับ", True),
        ("contains", "42", "<|channel|>analysis<|message|>Maybe 42? Let me", False),
        ("contains", "...", "anything", False),
        ("exact", "Paris", "paris.", True),
        ("exact", "Paris", "<think>Rome?</think>Paris", True),
        ("exact", "Paris", "In Paris", False),
        ("exact", "...", "!", False),
        ("none", "Paris", "Rome", True),
    ],
)
def test_answers_are_judged_by_what_they_say(judge, reference, answer, right):
    sample = Sample(({"role": "user", "content": "?"},), reference, None, 0)
    assert module._JUDGES[judge](sample, answer) == right


def test_the_best_answers_are_kept_once_and_earlier_ones_first(model, tokenizer, tmp_path, monkeypatch):
    scripted(
        monkeypatch, tokenizer, "one<end>", "red red<end>", "red red<end>", "<end>", "blue red<end>", "red one one"
    )
    out = tmp_path / "out.jsonl"
    scores = {"one": 0, "red red": 0.5, "blue red": 2}
    result = distill(
        model,
        tokenizer,
        questions(1),
        out,
        n=6,
        keep=3,
        max_new_tokens=3,
        judge=lambda sample, answer: scores[answer],  # no KeyError: never asked about an empty or cut-off answer
    )
    assert [(row["messages"][-1]["content"], row["score"]) for row in rows(out)] == [("blue red", 2), ("red red", 0.5)]
    assert (result.answered, result.kept) == (1, 2)


def test_a_cut_off_answer_is_kept_only_unjudged_and_only_if_there_is_no_other(model, tokenizer, tmp_path, monkeypatch):
    answers = ["red red red", "one<end>", "red red red", "two two two"]
    for judge, kept in {"contains": [], "none": [("one", 1.0), ("red red red", 0.0)]}.items():
        scripted(monkeypatch, tokenizer, *answers)
        out = tmp_path / f"{judge}.jsonl"
        samples = [Sample(({"role": "user", "content": "red"},), "red", None, row) for row in range(2)]
        result = distill(model, tokenizer, samples, out, n=2, max_new_tokens=3, judge=judge)
        assert [(row["messages"][-1]["content"], row["score"]) for row in rows(out)] == kept
        assert (result.rows, result.answered, result.kept) == (2, 1, len(kept))


def test_thinking_that_the_prompt_opens_is_part_of_the_answer(model, tokenizer, tmp_path, monkeypatch):
    scripted(monkeypatch, tokenizer, "red </think> one<end>", "one </think> red<end>")
    out = tmp_path / "out.jsonl"
    distill(model, tokenizer, questions(1), out, n=2, template={"think": True})
    (row,) = rows(out)
    assert row["messages"][-1]["content"] == "<think>one </think> red"
    written = encode(tokenizer, row["messages"], think=True)
    expected = tokenizer("<user>red<end><assistant><think>one </think> red<end>", add_special_tokens=False).input_ids
    assert written.input_ids == expected


def test_reasoning_that_the_chat_template_knows_the_marks_of_is_not_judged(model, tokenizer, tmp_path, monkeypatch):
    knows = copy.deepcopy(tokenizer)
    knows.chat_template = TEMPLATE.replace(
        "m['content']", "('blue' + m['thinking'] + 'green' if m['thinking'] else '') + m['content']"
    )
    scripted(monkeypatch, knows, "blue red green one<end>", "blue red<end>", "blue one green red<end>", "one<end>")
    out = tmp_path / "out.jsonl"
    distill(model, knows, questions(1), out, n=4, keep=4)
    assert [row["messages"][-1]["content"] for row in rows(out)] == ["blue one green red"]


# --- interruptions -------------------------------------------------------------------------------------------

CHILD = """
import sys, time
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from swaa_flex.tuning.data import read_samples
from swaa_flex.tuning.distill import distill

folder, data, out, threads, calls = *sys.argv[1:4], *map(int, sys.argv[4:])
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
generate = model.generate

def hanging(**inputs):
    global calls
    if calls == 0:
        time.sleep(600)
    calls -= 1
    return generate(**inputs)

model.generate = hanging
distill(model, AutoTokenizer.from_pretrained(folder), read_samples(data)[0], out, **{settings})
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_file(folder, tmp_path):
    data, whole, out = (tmp_path / name for name in ("data.jsonl", "whole.jsonl", "out.jsonl"))
    data.write_text("".join(f'{{"prompt": "{s.messages[0]["content"]}", "answer": "red"}}\n' for s in questions(9)))
    samples, _ = read_samples(data)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    distill(model, tokenizer, samples, whole, **SETTINGS)

    code = CHILD.replace("{settings}", repr(SETTINGS))
    command = [sys.executable, "-c", code, folder, data, out, str(torch.get_num_threads()), "3"]
    partial = tmp_path / "out.jsonl.partial"
    with subprocess.Popen([str(word) for word in command]) as child:
        try:
            deadline = time.monotonic() + 240
            while not (partial.exists() and partial.read_bytes().count(b"\n") == 4):
                assert child.poll() is None, "it ended before it could be killed"
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert not out.exists()
    result = distill(model, tokenizer, samples, out, **SETTINGS)
    assert result.resumed == 6
    assert out.read_bytes() == whole.read_bytes()
    assert len(rows(out)) > 3
    assert not partial.exists()


@pytest.fixture(scope="module")
def left_over(tokenizer, tmp_path_factory):
    """What a run leaves that is interrupted at the third of four batches, and what it would have written."""
    folder = tmp_path_factory.mktemp("interrupted")
    distill(words_model(), tokenizer, questions(), folder / "whole.jsonl", **SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        answers, calls = module._answers, []

        def failing(*args):
            calls.append(args)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return answers(*args)

        patch.setattr(module, "_answers", failing)
        with pytest.raises(KeyboardInterrupt):
            distill(words_model(), tokenizer, questions(), folder / "out.jsonl", **SETTINGS)
    return (folder / "out.jsonl.partial").read_bytes(), (folder / "whole.jsonl").read_bytes()


@pytest.fixture
def interrupted(left_over, tmp_path):
    """The file such a run was to write, and its contents; the partial file is there."""
    (tmp_path / "out.jsonl.partial").write_bytes(left_over[0])
    return tmp_path / "out.jsonl", left_over[1]


def test_a_torn_line_is_dropped(model, tokenizer, interrupted):
    out, whole = interrupted
    partial = out.with_name("out.jsonl.partial")
    left = partial.read_bytes()
    header, first, second, nothing = left.split(b"\n")
    assert (nothing, json.loads(second)["batch"]) == (b"", 1)
    ends = [len(header) + 1, len(header) + len(first) + 2, len(left)]
    for length in (0, 1, len(header), *ends, ends[0] + 1, ends[1] - 1, ends[2] - 1):
        partial.write_bytes(left[:length])
        result = distill(model, tokenizer, questions(), out, **SETTINGS)
        assert result.resumed == 2 * sum(end <= length for end in ends[1:])
        assert out.read_bytes() == whole
        out.unlink()


def test_a_run_may_be_interrupted_again(model, tokenizer, interrupted, monkeypatch):
    out, whole = interrupted
    partial = out.with_name("out.jsonl.partial")
    left = partial.read_bytes()
    partial.write_bytes(left[:-1])

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_answers", interrupt)
        with pytest.raises(KeyboardInterrupt):
            distill(model, tokenizer, questions(), out, **SETTINGS)
    assert partial.read_bytes().count(b"\n") == 2
    assert partial.read_bytes().endswith(b"}\n")
    assert distill(model, tokenizer, questions(), out, **SETTINGS).resumed == 2
    assert out.read_bytes() == whole


def test_a_run_that_was_interrupted_at_the_very_end_only_writes(model, tokenizer, interrupted, monkeypatch):
    out, whole = interrupted
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            distill(model, tokenizer, questions(), out, **SETTINGS)
    monkeypatch.setattr(LlamaForCausalLM, "generate", None)
    assert distill(model, tokenizer, questions(), out, **SETTINGS).resumed == 7
    assert out.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n": 4}, "n was 3 and is 4"),
        ({"seed": 6}, "seed was 5 and is 6"),
        ({"judge": "exact"}, "judge was 'contains' and is 'exact'"),
        ({"temperature": 0.5}, "temperature was 1.0 and is 0.5"),
        ({"batch_size": 1}, "batch_size was 2 and is 1"),
        ({"max_new_tokens": 13}, "max_new_tokens was 12 and is 13"),
        ({"keep": 2}, "keep was 1 and is 2"),
        ({"template": {"think": True}}, "another template"),
    ],
)
def test_what_is_left_of_a_run_with_other_settings_is_refused(model, tokenizer, interrupted, change, named):
    out, _ = interrupted
    with pytest.raises(ConfigError, match=rf"out\.jsonl\.partial.*{named}.*delete it, or start over with overwrite"):
        distill(model, tokenizer, questions(), out, **SETTINGS | change)


def test_what_is_left_of_a_run_of_another_model_or_data_is_refused(model, tokenizer, interrupted):
    out, whole = interrupted
    with pytest.raises(ConfigError, match=r"other settings \(another samples\)"):
        distill(model, tokenizer, questions(6), out, **SETTINGS)
    trained = words_model()
    torch.nn.init.zeros_(trained.model.layers[1].self_attn.q_proj.weight)
    with pytest.raises(ConfigError, match=r"other settings \(another weights\)"):
        distill(trained, tokenizer, questions(), out, **SETTINGS)
    assert distill(model, tokenizer, questions(), out, **SETTINGS).resumed == 4
    assert out.read_bytes() == whole


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda left: b"notes of mine\n", "damaged, or not from"),
        (lambda left: b"notes of mine", "not begun by this run"),
        (lambda left: b'["a list"]\n', "damaged, or not from"),
        (lambda left: left.replace(b'"batch": 1', b'"batch": 0'), "two runs wrote"),
        (lambda left: left[:-20] + b"\n", "damaged, or not from"),
    ],
)
def test_a_damaged_partial_file_is_refused_and_overwritten_on_request(model, tokenizer, interrupted, damage, reason):
    out, whole = interrupted
    partial = out.with_name("out.jsonl.partial")
    damaged = damage(partial.read_bytes())
    partial.write_bytes(damaged)
    with pytest.raises(ConfigError, match=rf"out\.jsonl\.partial.*{reason}"):
        distill(model, tokenizer, questions(), out, **SETTINGS)
    assert partial.read_bytes() == damaged
    assert distill(model, tokenizer, questions(), out, **SETTINGS, overwrite=True).resumed == 0
    assert out.read_bytes() == whole


def test_a_finished_file_is_replaced_only_on_request(model, tokenizer, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("mine\n")
    with pytest.raises(ConfigError, match=r"out\.jsonl exists.*overwrite=True \(--overwrite\)"):
        distill(model, tokenizer, questions(), out, **SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    distill(model, tokenizer, questions(), out, **SETTINGS, overwrite=True)
    assert out.read_text() != "mine\n"


def test_another_tokenizer_is_refused_whatever_it_makes_of_the_first_prompt(model, tokenizer, interrupted):
    out, whole = interrupted
    other = words_tokenizer()
    other.add_tokens(["seven"])
    with pytest.raises(ConfigError, match=r"other settings \(another tokenizer\)"):
        distill(model, other, questions(), out, **SETTINGS)
    tokenizer(["red", "red green"], padding=True)  # which a tokenizer remembers
    assert distill(model, tokenizer, questions(), out, **SETTINGS).resumed == 4
    assert out.read_bytes() == whole


def test_a_second_run_is_refused_before_it_harms_the_first(model, tokenizer, tmp_path, monkeypatch):
    out, answers, refused = tmp_path / "out.jsonl", module._answers, []

    def meanwhile(*args):
        for overwrite in (False, True):
            with pytest.raises(ConfigError, match=r"out\.jsonl: another run is writing it"):
                distill(model, tokenizer, questions(), out, **SETTINGS, overwrite=overwrite)
            refused.append(overwrite)
        return answers(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_answers", meanwhile)
        distill(model, tokenizer, questions(), out, **SETTINGS)
    assert refused == [False, True] * 4
    distill(model, tokenizer, questions(), tmp_path / "alone.jsonl", **SETTINGS)
    assert out.read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.jsonl", "out.jsonl"]


def test_rows_that_cannot_be_asked_are_named_before_the_first_answer_and_left_out(tokenizer, tmp_path, capsys):
    tokenizer = words_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + (TEMPLATE)
    )
    tokenizer.add_tokens(["seven"])  # which the model has no embedding for
    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=12, eos_token_id=3, bos_token_id=None, **size)).eval()
    good = questions(5)
    contents = {"seven": "token ids from 1 to 12, and the model has 12", "red " * 10: "13 tokens and 12 to be written"}
    bad = [Sample(({"role": "user", "content": text},), "red", None, 20 + i) for i, text in enumerate(contents)]
    bad.append(Sample(({"role": "system", "content": "red"}, {"role": "user", "content": "red"}), "red", None, 22))
    mixed = [*good[:2], *bad, *good[2:]]
    result = distill(model, tokenizer, mixed, tmp_path / "mixed.jsonl", **SETTINGS, judge="none")
    distill(model, tokenizer, good, tmp_path / "good.jsonl", **SETTINGS, judge="none")
    assert (tmp_path / "mixed.jsonl").read_bytes() == (tmp_path / "good.jsonl").read_bytes()
    assert result.rows == 5
    for line, row, problem in zip(result.left_out, (20, 21, 22), (*contents.values(), "no system"), strict=True):
        assert line.startswith(f"row {row}: ") and problem in line
    said = capsys.readouterr().err.splitlines()
    assert said == ["3 of 8 prompts are left out:", *(f"  {line}" for line in result.left_out)]
    with pytest.raises(ConfigError, match="none of the 3 can be answered; the first, row 20: token ids"):
        distill(model, tokenizer, bad, tmp_path / "bad.jsonl", **SETTINGS)


def test_a_run_whose_template_writes_the_date_goes_on_on_another_day(model, tmp_path, monkeypatch):
    class Clock(datetime.datetime):
        day = 1

        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, cls.day)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    tokenizer = words_tokenizer()
    tokenizer.chat_template = "{{ ['red', 'green', 'blue'][strftime_now('%d') | int % 3] }} " + TEMPLATE
    distill(model, tokenizer, questions(), tmp_path / "whole.jsonl", **SETTINGS, judge="none")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            distill(model, tokenizer, questions(), tmp_path / "out.jsonl", **SETTINGS, judge="none")
    partial = tmp_path / "out.jsonl.partial"
    partial.write_bytes(b"".join(partial.read_bytes().splitlines(keepends=True)[:3]))
    Clock.day = 2
    assert distill(model, tokenizer, questions(), tmp_path / "out.jsonl", **SETTINGS, judge="none").resumed == 4
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# --- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"n": 0}, "n=0: expected at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: expected at least 1"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"keep": 0}, "keep=0: expected at least 1"),
        ({"keep": 4}, "keep=4: expected at most n=3"),
        ({"temperature": -1}, "temperature=-1: expected at least 0"),
        ({"temperature": float("nan")}, "temperature=nan: expected at least 0"),
        ({"temperature": 0}, "temperature=0: all n=3 answers"),
        ({"judge": "contain"}, "judge='contain': .*did you mean 'contains'"),
        ({"samples": []}, "samples: there are none"),
        ({"out": "out.json"}, r"out\.json: expected a file that ends in \.jsonl"),
        (
            {"samples": [Sample(({"role": "user", "content": "x"},), None, None, 3), *questions(1)]},
            "judge='contains': 1 of 2 samples have no reference answer to judge by, first row 3",
        ),
        (
            {"samples": [Sample(({"role": "user", "content": "x"},), "<think>so", None, 3), *questions(1)]},
            "judge='contains': 1 of 2 samples have no reference answer to judge by, first row 3",
        ),
    ],
)
def test_wrong_settings_are_refused(model, tokenizer, tmp_path, change, problem):
    arguments = {"samples": questions(), "out": "out.jsonl", **SETTINGS, **change}
    samples, out = arguments.pop("samples"), tmp_path / arguments.pop("out")
    with pytest.raises(ConfigError, match=problem):
        distill(model, tokenizer, samples, out, **arguments)
    assert not list(tmp_path.iterdir())


def test_answers_without_an_end_are_refused(model, tmp_path):
    tokenizer = words_tokenizer()
    tokenizer.eos_token = model.generation_config.eos_token_id = None
    with pytest.raises(ConfigError, match=r"no.* end-of-text token; set tokenizer\.eos_token"):
        distill(model, tokenizer, questions(), tmp_path / "out.jsonl", **SETTINGS)


# --- the command ---------------------------------------------------------------------------------------------


def test_the_command_does_what_the_function_does(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"prompt": sample.messages[0]["content"], "answer": sample.answer}) for sample in questions()]
    bad = ["{", '{"prompt": ""}', *['{"prompt": 1}'] * 5]
    (tmp_path / "data.jsonl").write_text("\n".join([*lines, *bad]))
    result = invoke(
        f"distill {folder} data.jsonl out.jsonl --n 3 --max-new-tokens 12 --batch-size 2 --seed 5 --keep 2"
        " --temperature 0.9 --judge none"
    )
    assert result.exit_code == 0, result.output
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    samples, _ = read_samples("data.jsonl")
    settings = {**SETTINGS, "keep": 2, "temperature": 0.9, "judge": "none"}
    expected = distill(model, AutoTokenizer.from_pretrained(folder), samples, "expected.jsonl", **settings)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "expected.jsonl").read_bytes()
    assert result.stdout.splitlines() == [
        f"7 prompts: {expected.answered} with an answer that ended in 12 tokens",
        f"kept {expected.kept} answers, wrote out.jsonl",
    ]
    said = result.stderr.splitlines()
    assert said[0] == "7 of 14 rows of data.jsonl are left out:"
    assert [line.split(":")[0] for line in said[1:]] == [*(f"  row {row}" for row in range(7, 12)), "  and 2 more"]

    again = invoke(f"distill {folder} data.jsonl out.jsonl --judge none")
    assert again.exit_code == 1
    assert "Error: out.jsonl exists; name another file, or have it replaced" in again.stderr
    assert invoke(f"distill {folder} data.jsonl out.jsonl --judge none --max-new-tokens 2 --overwrite").exit_code == 0
    assert (tmp_path / "out.jsonl").read_bytes() != (tmp_path / "expected.jsonl").read_bytes()


def test_the_command_fails_and_leaves_no_file_if_nothing_is_kept(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"prompt": "red", "answer": "never said"}')
    result = invoke(f"distill {folder} data.jsonl out.jsonl --n 1 --max-new-tokens 3")
    assert result.exit_code == 1 and "no answer was kept" in result.stderr
    assert not list(tmp_path.glob("out*"))


def test_help_of_the_command_is_laid_out_for_80_columns():
    result = invoke("distill --help")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    options = re.findall(r"--[a-z-]+", result.stdout)
    for option in ("--n", "--temperature", "--max-new-tokens", "--batch-size", "--keep", "--judge", "--seed"):
        assert option in options
