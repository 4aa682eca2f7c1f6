"""lm-evaluation-harness over swaa_flex, against stock attention and against masks written out pair by pair."""

import json
import math
import random
import subprocess
import sys

import pytest
import torch
from conftest import jsonl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from swaa_flex import SWAAConfig, UnsupportedModelError
from swaa_flex.cli import app
from swaa_flex.hf.config import RECIPE_VARIABLE

lm_eval = pytest.importorskip("lm_eval", reason="takes lm_eval: pip install '.[lm-eval]'")
pytest.importorskip("datasets")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from swaa_flex.evaluation.harness import HarnessLM  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # lm_eval's own, and those of the packages it brings

WORDS = [f"w{number}" for number in range(40)]
WINDOW = SWAAConfig(
    sliding_window=6, sink_tokens=2, full_attention_layers=(), full_attention_decode=True, dense_tail=3
)
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
""",
    "cloze": """
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: "{{choices[0]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
""",
    "generate": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["w0 w0 w0"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, its tokenizer, and tasks: texts of different lengths, choices of one token and of several."""
    folder = tmp_path_factory.mktemp("lm_eval")
    torch.manual_seed(0)
    size = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    config = LlamaConfig(**size, vocab_size=42, max_position_embeddings=64, bos_token_id=1, eos_token_id=1)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data *= 4  # far from uniform, so that it matters what a row sees
    model.save_pretrained(folder / "model")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", "<end>", *WORDS])}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>", pad_token="<pad>"
    ).save_pretrained(folder / "model")
    order = random.Random(0)
    rows = []
    for number in range(8):
        lengths = (1, 1, 1) if number % 2 else (1, 3, 9)
        choices = [" ".join(order.choices(WORDS, k=length)) for length in lengths]
        rows.append({"text": " ".join(order.choices(WORDS, k=9 + 5 * number)), "choices": choices, "answer": 1})
    jsonl(folder / "rows.jsonl", *rows)
    source = f"{{data_files: {{test: {folder / 'rows.jsonl'}}}, cache_dir: {folder / 'cache'}}}"
    data = f"dataset_path: json\ndataset_kwargs: {source}\ntest_split: test\n"
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: local_{name}\n{data}{text}")
    return folder


def harness(kind, folder, *, attention="swaa_flex", batch_size=3, **options):
    options = {"attn_implementation": attention, "device": "cpu", "batch_size": batch_size} | options
    return kind(pretrained=str(folder / "model"), **options)


def evaluated(model, folder, *tasks):
    """Each sample's answers as lm_eval logs them, and the results."""
    done = lm_eval.simple_evaluate(
        model=model,
        tasks=[f"local_{name}" for name in tasks],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    return {task: [sample["resps"] for sample in samples] for task, samples in done["samples"].items()}, done


@pytest.fixture(scope="module")
def stock(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager").eval()


def logits(model, tokens, config=WINDOW, prompt_length=None):
    """Stock attention under a mask that is written out pair by pair."""
    end = math.inf if prompt_length is None else prompt_length
    allowed = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for q in range(len(tokens)):
        dense = config.full_attention_decode if q >= end else q >= end - config.dense_tail
        for k in range(q + 1):
            allowed[q, k] = dense or q - k < config.sliding_window or k < config.sink_tokens
    mask = torch.zeros(1, 1, *allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad():
        return model(torch.tensor([tokens]), attention_mask=mask).logits[0]


def score(model, context, continuation, **options):
    tokens = context + continuation
    scores = logits(model, tokens[:-1], **options).log_softmax(-1)[len(context) - 1 :]
    return scores.gather(1, torch.tensor(continuation)[:, None]).sum().item()


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_full_attention_gives_the_samples_of_stock_attention(folder):
    ours, _ = evaluated(harness(HarnessLM, folder, swaa="full"), folder, *TASKS)
    theirs, _ = evaluated(harness(HFLM, folder, attention="sdpa"), folder, *TASKS)
    assert ours.keys() == theirs.keys() == {f"local_{name}" for name in TASKS}
    for task in theirs:
        for our, their in zip(ours[task], theirs[task], strict=True):
            for (a,), (b,) in zip(our, their, strict=True):
                if task == "local_generate":
                    assert a == b
                elif task == "local_rolling":
                    assert a == pytest.approx(b, abs=1e-3)
                else:
                    assert a[0] == pytest.approx(b[0], abs=1e-3) and a[1] == b[1]


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_the_context_of_a_log_likelihood_is_the_prompt(folder, stock, decode, batch_size):
    config = SWAAConfig(**WINDOW.to_dict() | {"full_attention_decode": decode})
    model = harness(HarnessLM, folder, swaa=config, batch_size=batch_size, max_batch_size=4)
    samples, _ = evaluated(model, folder, "choice")
    differ = 0.0
    for row, answers in zip(rows_of(folder), samples["local_choice"], strict=True):
        context = model.tok_encode(row["text"])
        for choice, ((found, _),) in zip(row["choices"], answers, strict=True):
            continuation = model.tok_encode(choice)
            expected = score(stock, context, continuation, config=config, prompt_length=len(context))
            assert found == pytest.approx(expected, abs=1e-3)
            differ = max(differ, abs(expected - score(stock, context, continuation, config=config)))
    assert differ > 0.1  # without the boundary the answers are others


def test_a_context_that_is_cut_off_at_the_left_is_a_shorter_prompt(folder, stock):
    model = harness(HarnessLM, folder, swaa=WINDOW, max_length=15)
    context, continuation = list(range(5, 35)), [7, 8, 9, 10]
    ((found, _),) = model._loglikelihood_tokens([(("", ""), context, continuation)])
    assert found == pytest.approx(score(stock, context[-12:], continuation, prompt_length=12), abs=1e-3)


def test_requests_of_the_same_tokens_are_told_apart_by_where_the_prompt_ends(folder, stock):
    """Also where they only look the same, as lm_eval pads with token 0."""
    tokens = [*range(5, 25), 0]
    pairs = [(tokens[:end], tokens[end:] + last) for end in (8, 12) for last in ([], [3], [3, 4])]
    pairs += [(tokens[:8], [*tokens[8:], 9])]
    model = harness(HarnessLM, folder, swaa=WINDOW, batch_size=8)
    found = model._loglikelihood_tokens([(("", str(number)), *pair) for number, pair in enumerate(pairs)])
    expected = [score(stock, *pair, prompt_length=len(pair[0])) for pair in pairs]
    assert [value for value, _ in found] == pytest.approx(expected, abs=1e-3)


def test_in_rolling_perplexity_every_row_slides(folder, stock):
    model = harness(HarnessLM, folder, swaa=WINDOW, max_length=20)
    samples, _ = evaluated(model, folder, "rolling")
    none = SWAAConfig(**WINDOW.to_dict() | {"dense_tail": 0})
    for row, ((found,),) in zip(rows_of(folder), samples["local_rolling"], strict=True):
        tokens = model.tok_encode(row["text"])
        expected = 0.0
        for start in range(0, len(tokens), 20):  # lm_eval's windows; a last one is filled up with what came before
            stop = min(start + 20, len(tokens))
            context = [1, *tokens][max(0, stop - 20) : start + 1]
            expected += score(stock, context, tokens[start:stop], config=none)
        assert found == pytest.approx(expected, abs=1e-3)


def test_generated_rows_are_decode_rows(folder, stock):
    samples, _ = evaluated(model := harness(HarnessLM, folder, swaa=WINDOW), folder, "generate")
    for row, ((found,),) in zip(rows_of(folder), samples["local_generate"], strict=True):
        tokens = model.tok_encode(row["text"])
        prompt_length = len(tokens)
        for _ in range(5):
            tokens.append(int(logits(stock, tokens, prompt_length=prompt_length)[-1].argmax()))
            if tokens[-1] == 1:
                break
        assert found == model.tok_decode(tokens[prompt_length:])


def test_rows_that_no_request_asked_for_are_refused(folder):
    model = harness(HarnessLM, folder)
    model._lengths = {(4, 5, 6): 2}
    with pytest.raises(UnsupportedModelError, match=r"lm_eval==0\.4\.13"):
        model._model_call(torch.tensor([[1, 4, 5, 6]]))


def test_the_command_line_runs_lm_eval(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv(RECIPE_VARIABLE, "balanced")
    arguments = ["--tasks", "local_choice", "--include_path", folder, "--device", "cpu", "--batch_size", 3]
    arguments += ["--output_path", tmp_path / "out", "--log_samples", "--model", "hf", "--model_args"]
    arguments += [f"pretrained={folder / 'model'},attn_implementation=swaa_flex"]
    done = CliRunner().invoke(
        app, ["run", "--swaa", WINDOW.to_json(), "-m", "lm_eval", *map(str, arguments)], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    assert "--model hf does not say where prompts end: --model swaa_flex takes its place" in done.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["config"]["swaa"] == WINDOW.to_dict()
    (logged,) = (tmp_path / "out").rglob("samples_*.jsonl")
    found = [json.loads(line) for line in logged.read_text().splitlines()]
    expected, _ = evaluated(harness(HarnessLM, folder, swaa=WINDOW), folder, "choice")
    for sample in found:
        for ((value, _),), ((other, _),) in zip(
            sample["resps"], expected["local_choice"][sample["doc_id"]], strict=True
        ):
            assert float(value) == pytest.approx(other, abs=1e-6)


def test_other_models_run_as_without_the_launcher(folder):
    """In a process of its own: lm_eval registers its models when they are first imported, as this module has done."""
    program = [sys.executable, "-m", "swaa_flex", "run", "-m", "lm_eval", "--model", "hf", "--device", "cpu"]
    model = ["--model_args", f"pretrained={folder / 'model'},attn_implementation=sdpa"]
    task = ["--include_path", str(folder), "--tasks", "local_choice", "--limit", "2"]
    done = subprocess.run([*program, *model, *task], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0 and "|acc" in done.stdout, done.stdout
