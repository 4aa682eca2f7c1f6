"""vLLM's own engine with the plugin on a CPU: scheduler, batches, preemption, verification of drafts.

The package vllm brings no kernels that run there, so a few lines of torch stand in for them. This file run as a script
is the process that they are put into.
"""

import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec

import pytest
import torch
from vllm_stand_ins import RECIPES, merge, served_model, varlen

LENGTHS = (1, 17, 63, 64, 200, 413, 257, 401)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="needs the package vllm: nox -s tests_vllm")
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU there are the kernels: tests/test_vllm_gpu.py")
@pytest.mark.parametrize("case", ["recipes", "preemption", "prefix caching", "drafts"])
def test_answers_of_the_engine_are_those_of_transformers(case):
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, case], capture_output=True, text=True, timeout=400, env=environment
    )
    assert done.returncode == 0, done.stderr[-5000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"recipe"')]
    assert results
    for result in results:
        assert result["same tokens"] and result["error"] < 1e-3, result
        assert result["error to full"] > 1, f"the test must tell masks apart: {result}"
    if case == "preemption":
        assert all(result["preempted"] for result in results)


# --- the process ----------------------------------------------------------------------------------------------


def main(case):
    stand_in()
    model = served_model()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if case == "recipes":
            for name in RECIPES:
                compare(model, folder, name, random_prompts(*LENGTHS))
            compare(model, folder, "dense tail, no FA decode", random_prompts(257))  # its last row comes alone
        elif case == "preemption":
            few = {"num_gpu_blocks_override": 26, "max_model_len": 512, "max_num_batched_tokens": 1100}
            for name in ("FA decode", "dense tail, no FA decode"):
                compare(model, folder, name, random_prompts(180, 190, 170, 200), new=60, **few)
        elif case == "prefix caching":
            (prompt,) = random_prompts(300)
            compare(
                model, folder, "all SWA", [prompt, [*prompt[:150], 7, 8], [*prompt, 5]], enable_prefix_caching=True
            )
        else:
            first, second = random_prompts(30, 97)
            drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
            for name in ("all SWA", "FA decode"):
                compare(model, folder, name, [first * 5, second * 3], new=40, speculative_config=drafts)


def random_prompts(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 1000, (n,), generator=generator).tolist() for n in lengths]


def compare(model, folder, name, prompts, new=12, **options):
    """Prints how far the answers of the engine are from those of transformers."""
    import swaa_flex

    config = RECIPES[name]
    found, preempted = answers(folder, config, prompts, new, options)
    errors, same = {}, True
    for recipe in (config, "full"):
        swaa_flex.adapt(model, recipe)
        errors[recipe] = 0.0
        for prompt, (tokens, theirs) in zip(prompts, found, strict=True):
            with torch.no_grad(), swaa_flex.prompt(len(prompt)):
                logits = model(torch.tensor([prompt + tokens[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
            rows = logits.log_softmax(-1)
            ours = rows.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            errors[recipe] = max(errors[recipe], (ours - torch.tensor(theirs)).abs().max().item())
            same &= recipe == "full" or rows.argmax(-1).tolist() == tokens
    result = {"recipe": name, "same tokens": same, "error": errors[config], "error to full": errors["full"]}
    print(json.dumps(result | {"preempted": preempted}), flush=True)


def answers(folder, config, prompts, new, options):
    """Tokens and their log-probabilities, and how often a request was preempted."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    plain = {"enable_prefix_caching": False, "max_num_batched_tokens": 256, "max_model_len": 1100}
    plain |= {"block_size": 32, "num_gpu_blocks_override": 200}  # the stand-in copies all of them
    plain |= {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "attention_backend": "CUSTOM"}
    llm = LLM(folder, additional_config={"swaa": config.to_dict()}, **plain | options)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempt, count = scheduler._preempt_request, itertools.count()

    def counted(*args, **kwargs):
        next(count)
        return preempt(*args, **kwargs)

    scheduler._preempt_request = counted
    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, logprobs=1, detokenize=False)
    done = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    outputs = [request.outputs[0] for request in done]
    del llm, scheduler
    gc.collect()
    cleanup_dist_env_and_memory()
    found = [
        (list(o.token_ids), [s[t].logprob for t, s in zip(o.token_ids, o.logprobs, strict=True)]) for o in outputs
    ]
    return found, next(count)


def stand_in():
    """Puts functions of torch in the place of what vLLM 0.23 compiles, and has it take the backend of the user."""
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform
    from vllm.platforms.interface import DeviceCapability

    class Platform(CpuPlatform):
        """A CPU that accepts attention backends as a GPU does."""

        @classmethod
        def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
            asked = attn_selector_config._asdict() | {"device_capability": DeviceCapability(9, 0)}
            assert not selected_backend.get_class().validate_configuration(**asked)
            return selected_backend.get_path()

    vllm.platforms._current_platform = Platform()  # before anything else of vLLM asks for it
    compiled = torch.library.Library("_C", "FRAGMENT")
    compiled.define("init_cpu_memory_env(int[] nodes) -> ()")
    compiled.impl("init_cpu_memory_env", lambda nodes: None, "CompositeExplicitAutograd")
    stand_in.compiled = compiled  # goes with its last reference

    import vllm.utils.cpu_triton_utils as kernels
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
    from vllm.v1.attention.backends import fa_utils, flash_attn

    RotaryEmbedding.forward_cpu = RotaryEmbedding.forward_native
    kernels.compute_slot_mapping_kernel = kernels._FuncWrapper(slot_mapping)
    kernels.rejection_greedy_sample_kernel = kernels._FuncWrapper(greedy_verification)
    kernels.expand_kernel = kernels._FuncWrapper(expand)
    for name in ("sample_recovered_tokens_kernel", "rejection_random_sample_kernel"):
        setattr(kernels, name, kernels._FuncWrapper(lambda *args, **kwargs: None))  # nothing is random
    flash_attn.reshape_and_cache_flash = write_pages
    flash_attn.get_flash_attn_version = lambda **_: 3
    flash_attn.get_scheduler_metadata = lambda **_: None
    flash_attn.flash_attn_supports_quant_query_input = lambda: False
    fa_utils.flash_attn_varlen_func = flash_attn.flash_attn_varlen_func = varlen

    from swaa_flex.vllm import backend

    backend.flash_attn_varlen_func, backend.merge_attn_states = varlen, merge
    backend.Backend.supported_dtypes = [torch.float32]


def write_pages(key, value, key_cache, value_cache, slots, *rest):
    real = slots >= 0
    for rows, pages in ((key, key_cache), (value, value_cache)):
        pages[slots[real] // pages.shape[1], slots[real] % pages.shape[1]] = rows[: len(slots)][real]


def slot_mapping(tokens, most, query_start, positions, block_table, stride, page, slots, **rest):
    for number, (begin, end) in enumerate(itertools.pairwise(query_start.tolist())):
        at = positions[begin:end]
        slots[begin:end] = block_table[number][at // page].long() * page + at % page
    slots[tokens:most] = -1


def greedy_verification(out, drafts_end, drafts, best, bonus, is_greedy, most, *args, **rest):
    for number, (begin, end) in enumerate(itertools.pairwise([0, *drafts_end.tolist()])):
        for at, (draft, token) in enumerate(zip(drafts[begin:end], best[begin:end], strict=True)):
            out[number, at] = token
            if draft != token:
                break
        else:
            out[number, end - begin] = bonus.view(-1)[number]


def expand(out, values, ends, replaced, replacement, **rest):
    for number, (begin, end) in enumerate(itertools.pairwise([0, *ends.tolist()])):
        out[begin:end] = replacement if values[number] == replaced else values[number]


if __name__ == "__main__":
    main(sys.argv[1])
