"""vLLM with the plugin answers what transformers with swaa_flex answers. `pytest -m gpu -n0 tests/test_vllm_gpu.py`"""

import os
from dataclasses import replace

import pytest
import torch

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("vllm", reason="needs the package vllm: pip install '.[vllm]'")

from test_models import tiny  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import swaa_flex  # noqa: E402
from swaa_flex import SWAAConfig  # noqa: E402

NEW = 24
LENGTHS = (1, 17, 63, 64, 200, 413, 700, 1001)
RECIPES = {
    "all SWA": SWAAConfig(64, 4, (), False, 0),
    "1/2 full": SWAAConfig(64, 4, "1::2", False, 0),
    "FA decode": SWAAConfig(64, 4, (), True, 0),
    "dense tail": SWAAConfig(64, 4, (), True, 16),
    "dense tail, no FA decode": SWAAConfig(64, 4, "1::2", False, 16),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model that minds a key more or less, and minds rounding less."""
    torch.manual_seed(0)
    model = tiny("llama", vocab_size=1000, hidden_size=256, head_dim=64, num_attention_heads=4, num_key_value_heads=2)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(0.5)
        layer.self_attn.k_proj.weight.data.mul_(0.5)
    path = tmp_path_factory.mktemp("model")
    model.to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 1000, (n,), generator=generator).tolist() for n in LENGTHS]


def answers(path, config, prompts, **options):
    """Tokens and their log-probabilities, by vLLM: chunks of 256 tokens, all requests at once."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        str(path),
        attention_backend="CUSTOM",
        additional_config={"swaa": config.to_dict()},
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_num_batched_tokens=256,
        max_model_len=1100,
        gpu_memory_utilization=0.2,
        **options,
    )
    sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=1, detokenize=False)
    try:
        done = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    finally:
        del llm
        cleanup_dist_env_and_memory()
    outputs = [request.outputs[0] for request in done]
    return [
        (list(o.token_ids), [step[token].logprob for token, step in zip(o.token_ids, o.logprobs, strict=True)])
        for o in outputs
    ]


@torch.no_grad()
def log_probs(model, prompt, answer):
    """Of each token after the prompt, and of the likeliest one."""
    with swaa_flex.prompt(len(prompt)):
        logits = model(torch.tensor([prompt + answer[:-1]], device="cuda"), use_cache=False).logits
    rows = logits[0, len(prompt) - 1 :].float().log_softmax(-1)
    return rows.gather(1, torch.tensor(answer, device="cuda")[:, None])[:, 0], rows.max(-1).values


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_requests_of_different_lengths_in_one_batch(saved, prompts, name, graphs):
    if graphs and name not in ("all SWA", "dense tail"):
        pytest.skip("the two kinds of decode steps are enough")
    config = RECIPES[name]
    found = answers(saved, config, prompts, enforce_eager=not graphs)
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16, attn_implementation="swaa_flex")
    errors = {}
    neighbours = [replace(config, sliding_window=window) for window in (63, 65)]
    for recipe in (config, *neighbours, "full"):
        swaa_flex.adapt(model.cuda(), recipe)
        errors[recipe] = []
        for prompt, (tokens, theirs) in zip(prompts, found, strict=True):
            ours, best = log_probs(model, prompt, tokens)
            errors[recipe].append((ours - torch.tensor(theirs, device="cuda")).abs().mean().item())
            if recipe == config:
                assert (best - ours).max() < 0.3, "not the likeliest token, by more than rounding"
        print(name, recipe, "mean error by prompt", [f"{error:.3f}" for error in errors[recipe]])
    assert max(errors[config]) < 0.1
    assert max(errors["full"]) > 0.5, "the test must tell masks apart"
    assert all(sum(errors[config]) < sum(errors[neighbour]) for neighbour in neighbours)
