"""`vllm serve` with the plugin answers as transformers with swaa_flex does, for many clients at once.

`pytest -m gpu -n0 tests/test_vllm_server_gpu.py`
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import pytest
import torch
from conftest import needs_smollm2

from swaa_flex import SWAAConfig
from swaa_flex.cli import checkpoint
from swaa_flex.cli.passkey import found, passkeys

pytestmark = [pytest.mark.gpu, needs_smollm2]

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("vllm", reason="needs the package vllm: pip install '.[vllm]'")

import openai  # noqa: E402  # which vllm needs
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

NAME = "smollm2"
RECIPE = SWAAConfig(
    sliding_window=128, sink_tokens=16, full_attention_layers="1::2", full_attention_decode=True, dense_tail=32
)
LENGTHS = (600, 640, 680, 720, 760, 800, 840, 880, 920, 960, 980, 1000)  # of prompts, tokens
NEW = 20
CLIENTS = 32
# Two engines round differently in bfloat16: log-probabilities of this model by up to 0.2. So tokens may differ from
# the first on whose two best are nearer than twice that. The digits of a key that is found are 2 and more apart.
TIE = 0.5
START_SECONDS, STOP_SECONDS, ANSWER_SECONDS = 420, 30, 120


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    text: str
    gaps: list[float]  # between the two best log-probabilities of each token

    @property
    def certain(self) -> int:
        """Tokens before the first that may as well be another."""
        return next((i for i, gap in enumerate(self.gaps) if gap < TIE), len(self.gaps))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model as one downloads it: bfloat16, with tokenizer and chat template."""
    model, tokenizer = checkpoint.load(checkpoint.installed())
    path = tmp_path_factory.mktemp(NAME)
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def prompts(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [passkeys(tokenizer, tokens, 160, 1, seed=tokens)[0] for tokens in LENGTHS]


@pytest.fixture(scope="module")
def expected(folder, prompts):
    """What transformers with swaa_flex answers; computed before the server takes its part of the GPU."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="swaa_flex", swaa=RECIPE.to_dict()
    )
    model = model.to("cuda").eval()
    answers = []
    for prompt in prompts:
        out = model.generate(
            prompt.input_ids.to("cuda"),
            attention_mask=torch.ones_like(prompt.input_ids).to("cuda"),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = out.sequences[0, prompt.input_ids.shape[1] :].tolist()
        best = torch.cat(out.logits).float().log_softmax(-1).topk(2).values
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        answers.append(Answer(tokens, text, (best[:, 0] - best[:, 1]).tolist()))
    del model
    torch.cuda.empty_cache()
    return answers


def command(folder, port, *options):
    serve = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder)]
    serve += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME]
    serve += ["--attention-backend", "CUSTOM", "--no-enable-prefix-caching"]
    # Chunks of prompts are shorter than the prompts, so that chunks and answers share steps.
    serve += ["--max-model-len", "2048", "--max-num-batched-tokens", "512", "--max-num-seqs", "64"]
    return [*serve, "--gpu-memory-utilization", "0.3", *options]


def environment():
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    return os.environ | quiet


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stop(process):
    """The server and what it has started."""
    for how, seconds in ((signal.SIGINT, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
        if process.poll() is None:
            os.killpg(process.pid, how)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                continue
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what it may have left behind


def get(url, path):
    """The text of a page, or None while nobody answers. Past any proxy."""
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        return opener.open(url + path, timeout=5).read().decode()
    except (urllib.error.URLError, OSError):
        return None


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.2)
    return False


@pytest.fixture(scope="module")
def server(folder, expected, tmp_path_factory):
    """Its address, while it runs."""
    port, log = free_port(), tmp_path_factory.mktemp("log") / "server.log"
    recipe = ["--additional-config", json.dumps({"swaa": RECIPE.to_dict()})]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        process = subprocess.Popen(
            command(folder, port, *recipe),
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
        )
        try:
            wait_until(lambda: process.poll() is not None or get(url, "/health") is not None, START_SECONDS)
            tail = "\n".join(log.read_text().splitlines()[-60:])
            assert process.poll() is None and get(url, "/health") is not None, f"the server did not start:\n{tail}"
            yield url
            assert process.poll() is None, "the server ended by itself:\n" + log.read_text()[-5000:]
        finally:
            stop(process)


@pytest.fixture
def client(server):
    http = openai.DefaultHttpxClient(trust_env=False, timeout=ANSWER_SECONDS)  # past any proxy
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", http_client=http, max_retries=0) as client:
        yield client


def ask(client, prompt, **options):
    fields = {"model": NAME, "prompt": prompt.input_ids[0].tolist(), "temperature": 0, "max_tokens": NEW}
    return client.completions.create(**fields | options, extra_body={"return_token_ids": True})


def check(choice, answer, prompt):
    """Whether it is the answer that transformers gives, as far as rounding leaves one."""
    tokens = choice.model_extra["token_ids"]
    assert choice.finish_reason in ("stop", "length")
    certain = answer.certain
    assert tokens[:certain] == answer.tokens[:certain], (choice.text, answer)
    if certain == len(answer.tokens):
        assert tokens == answer.tokens
    if found(answer.text) == prompt.key:
        assert found(choice.text) == prompt.key, (choice.text, answer)


def all_at_once(client, prompts, expected, also=None):
    """Asks as many clients as there are, which start together, and perhaps one that does something else."""
    start = threading.Barrier(CLIENTS + (also is not None))

    def one(number):
        start.wait(ANSWER_SECONDS)
        return ask(client, prompts[number % len(prompts)]).choices[0]

    def other():
        start.wait(ANSWER_SECONDS)
        return also()

    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        running = [pool.submit(one, number) for number in range(CLIENTS)]
        beside = pool.submit(other) if also else None
        choices = [future.result(ANSWER_SECONDS) for future in running]
        if beside:
            beside.result(ANSWER_SECONDS)
    assert len(choices) == CLIENTS
    for number, choice in enumerate(choices):
        check(choice, expected[number % len(prompts)], prompts[number % len(prompts)])


def test_the_prompts_tell_something(prompts, expected):
    assert sum(found(answer.text) == prompt.key for answer, prompt in zip(expected, prompts, strict=True)) >= 6
    assert sum(answer.certain for answer in expected) >= 6 * len(expected), "too many ties to compare anything"


def test_passkeys_are_answered_as_by_transformers(client, prompts, expected):
    for prompt, answer in zip(prompts, expected, strict=True):
        response = ask(client, prompt)
        assert response.usage.prompt_tokens == prompt.input_ids.shape[1] > 512, "comes in two chunks"
        check(response.choices[0], answer, prompt)


def test_a_stream_has_the_text_of_a_whole_answer(client, prompts):
    for prompt in prompts[:3]:
        whole = ask(client, prompt).choices[0]
        chunks = [chunk.choices[0] for chunk in ask(client, prompt, stream=True)]
        assert len(chunks) > 3 and "".join(chunk.text for chunk in chunks) == whole.text
        assert chunks[-1].finish_reason == whole.finish_reason


def test_chats_are_written_as_the_template_says(client, folder):
    messages = [{"role": "user", "content": "Name the colour of the sky in one word."}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    written = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    response = client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=NEW)
    assert response.usage.prompt_tokens == len(tokenizer(written, add_special_tokens=False).input_ids)
    assert response.choices[0].message.content


def test_many_clients_at_once_all_get_their_answers(client, prompts, expected):
    all_at_once(client, prompts, expected)


def test_a_client_that_leaves_in_the_middle_harms_no_other(client, server, prompts, expected):
    def leave():
        stream = client.completions.create(
            model=NAME,
            prompt=prompts[0].input_ids[0].tolist(),
            max_tokens=1000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        assert len(list(islice(stream, 5))) == 5
        stream.close()

    def idle():
        lines = (get(server, "/metrics") or "").splitlines()
        counts = [
            line for line in lines if line.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting{"))
        ]
        return len(counts) >= 2 and all(float(line.rsplit(" ", 1)[1]) == 0 for line in counts)

    all_at_once(client, prompts, expected, also=leave)
    assert wait_until(idle, STOP_SECONDS), "a request stayed behind"
    all_at_once(client, prompts, expected)


def test_without_a_recipe_the_server_says_how_to_give_one_and_ends(folder, tmp_path):
    log = tmp_path / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command(folder, free_port()),
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
        )
        try:
            assert process.wait(START_SECONDS) != 0
        finally:
            stop(process)
    lines = [line for line in log.read_text().splitlines() if "ConfigError: the attention backend" in line]
    assert lines and "has no recipe; give one by --additional-config" in lines[0], log.read_text()[-5000:]
