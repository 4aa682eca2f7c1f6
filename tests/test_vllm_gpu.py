"""vLLM with the plugin answers what transformers with swaa_flex answers. `pytest -m gpu -n0 tests/test_vllm_gpu.py`"""

import gc
import os
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

# What vLLM warns of is no business of these tests.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("vllm", reason="needs the package vllm: pip install '.[vllm]'")

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402
from vllm_stand_ins import RECIPES, served_model  # noqa: E402

import swaa_flex  # noqa: E402
from swaa_flex import ConfigError  # noqa: E402

NEW = 24
ROUNDING, MEAN_ERROR = 0.3, 0.1  # of log-probabilities, by bfloat16 in two engines
LENGTHS = (1, 17, 63, 64, 200, 413, 700, 1001)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    served_model().to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 1000, (n,), generator=generator).tolist() for n in LENGTHS]


@contextmanager
def engine(path, **options):
    """vLLM in this process, which is gone afterwards."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = None
    plain = {"attention_backend": "CUSTOM", "enable_prefix_caching": False, "skip_tokenizer_init": True}
    plain |= {"gpu_memory_utilization": 0.2, "max_num_seqs": 16}
    try:
        llm = LLM(str(path), **plain | options)
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()  # ends the processes of other GPUs too
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def answers(path, config, prompts, **options):
    """Tokens and their log-probabilities, by vLLM: chunks of 256 tokens, all requests at once."""
    from vllm import SamplingParams

    sizes = {"max_num_batched_tokens": 256, "max_model_len": 1100}
    sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=1, detokenize=False)
    with engine(path, additional_config={"swaa": config.to_dict()}, **sizes, **options) as llm:
        done = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    outputs = [request.outputs[0] for request in done]
    return [
        (list(o.token_ids), [step[token].logprob for token, step in zip(o.token_ids, o.logprobs, strict=True)])
        for o in outputs
    ]


@torch.no_grad()
def log_probs(model, prompt, answer):
    """Of each token after the prompt, and of the likeliest one."""
    with swaa_flex.prompt(len(prompt)):
        logits = model(torch.tensor([prompt + answer[:-1]], device=model.device), use_cache=False).logits
    rows = logits[0, len(prompt) - 1 :].float().log_softmax(-1)
    return rows.gather(1, torch.tensor(answer, device=model.device)[:, None])[:, 0], rows.max(-1).values


def in_transformers(saved, recipe):
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16, attn_implementation="swaa_flex")
    return swaa_flex.adapt(model.cuda(), recipe)


def errors_of(model, prompts, found, best_within=None):
    """The mean error of the log-probabilities of each answer, which has to be the likeliest up to rounding."""
    errors = []
    for prompt, (tokens, theirs) in zip(prompts, found, strict=True):
        ours, best = log_probs(model, prompt, tokens)
        errors.append((ours - torch.tensor(theirs, device=ours.device)).abs().mean().item())
        if best_within is not None:
            assert (best - ours).max() < best_within, "not the likeliest token, by more than rounding"
    return errors


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_requests_of_different_lengths_in_one_batch(saved, prompts, name, graphs):
    if graphs and name not in ("all SWA", "dense tail"):
        pytest.skip("the two kinds of decode steps are enough")
    config = RECIPES[name]
    found = answers(saved, config, prompts, enforce_eager=not graphs)
    model = in_transformers(saved, config)
    errors = {config: errors_of(model, prompts, found, best_within=ROUNDING)}
    neighbours = [replace(config, sliding_window=window) for window in (63, 65)]
    for recipe in (*neighbours, "full"):
        errors[recipe] = errors_of(swaa_flex.adapt(model, recipe), prompts, found)
    for recipe, of_prompts in errors.items():
        print(name, recipe, "mean error by prompt", [f"{error:.3f}" for error in of_prompts])
    assert max(errors[config]) < MEAN_ERROR
    assert max(errors["full"]) > 0.5, "the test must tell masks apart"
    assert all(sum(errors[config]) < sum(errors[neighbour]) for neighbour in neighbours)


@pytest.mark.parametrize("graphs", [False, True])
def test_a_prompt_whose_last_row_comes_alone_keeps_its_dense_tail(saved, graphs):
    """Such a step is one of decode rows to vLLM, and its CUDA graph has to know better."""
    config = RECIPES["dense tail, no FA decode"]
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(5, 1000, (257,), generator=generator).tolist()]
    found = answers(saved, config, prompts, enforce_eager=not graphs)
    model = in_transformers(saved, config)
    assert max(errors_of(model, prompts, found, best_within=ROUNDING)) < MEAN_ERROR
    first = [(prompts[0], (tokens[:1], theirs[:1])) for tokens, theirs in found]
    without = errors_of(swaa_flex.adapt(model, replace(config, dense_tail=0)), *zip(*first, strict=True))
    assert max(without) > MEAN_ERROR, "the test must tell masks apart"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ["1/2 full", "dense tail, no FA decode"])
def test_two_gpus_answer_as_one_does(saved, prompts, name):
    config = RECIPES[name]
    one = answers(saved, config, prompts, enforce_eager=True)
    # vLLM's own reduction maps the memory of other GPUs, which virtual machines may not allow.
    both = answers(saved, config, prompts, enforce_eager=True, tensor_parallel_size=2, disable_custom_all_reduce=True)
    model = in_transformers(saved, config)
    for found in (one, both):
        assert max(errors_of(model, prompts, found, best_within=ROUNDING)) < MEAN_ERROR
    for prompt, (ours, _), (theirs, _) in zip(prompts, one, both, strict=True):
        split = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)
        if split is not None:  # only where the two tokens are alike to rounding
            (first, _), (second, _) = (log_probs(model, prompt, tokens[: split + 1]) for tokens in (ours, theirs))
            assert (first[-1] - second[-1]).abs() < ROUNDING


# --- what does not start --------------------------------------------------------------------------------------

SMALL = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 2}
MLA = SMALL | {"kv_lora_rank": 64, "q_lora_rank": None, "first_k_dense_replace": 2, "topk_method": "greedy"}
MLA |= {"qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
LLAMA = ("llama", "LlamaForCausalLM", SMALL)
NOT_VALID = "is not valid for this configuration. Reason: .*{}.*swaa_flex serves decoders without MLA"


@pytest.mark.parametrize(
    "kind, options, error, message",
    [
        (LLAMA, {"additional_config": {}}, ConfigError, "has no recipe; give one by --additional-config"),
        (LLAMA, {"additional_config": {"swaa": "balance"}}, ConfigError, "balanced"),
        (
            LLAMA,
            {"additional_config": {"swaa": {"full_attention_layers": [7]}}},
            ConfigError,
            "full_attention_layers: layer 7 of 2 does not exist",
        ),
        (LLAMA, {"enable_prefix_caching": True}, ConfigError, "start vLLM with --no-enable-prefix-caching"),
        (LLAMA, {"kv_cache_dtype": "fp8"}, ValueError, NOT_VALID.format("kv_cache_dtype not supported")),
        (("deepseek_v2", "DeepseekV2ForCausalLM", MLA), {}, ValueError, NOT_VALID.format("MLA not supported")),
        (
            ("bert", "BertModel", {n: v for n, v in SMALL.items() if n != "num_key_value_heads"}),
            {"runner": "pooling"},
            ValueError,
            NOT_VALID.format("ENCODER_ONLY not supported"),
        ),
    ],
    ids=["no recipe", "unknown recipe", "another number of layers", "prefix caching", "fp8", "MLA", "encoder"],
)
def test_what_cannot_be_served_does_not_start(tmp_path, kind, options, error, message):
    family, architecture, fields = kind
    AutoConfig.for_model(family, **fields, architectures=[architecture]).save_pretrained(tmp_path)
    plain = {"load_format": "dummy", "dtype": "bfloat16", "enforce_eager": True, "max_model_len": 256}
    plain |= {"additional_config": {"swaa": "balanced"}}
    with pytest.raises(error, match=message) as raised, engine(tmp_path, **plain | options):
        pass
    assert "\n" not in str(raised.value)
