"""Models spread over processes (tensor parallelism) or dispatched by accelerate answer as on one device."""

from pathlib import Path

import pytest
import torch
from generate_in_processes import CACHES, RECIPES, answers
from processes import PROCESSES, run_in_processes
from tiny_models import SIZE, batch, tiny
from transformers import AutoModelForCausalLM

from swaa_flex import SWAACache
from swaa_flex.hf import make_forward_mask


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny("llama", vocab_size=100).save_pretrained(path)  # transformers 5.17 shards lm_head in equal parts only
    return path


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_a_model_sharded_by_tensor_parallelism_generates_what_one_process_does(saved, tmp_path):
    run_in_processes("generate_in_processes.py", saved, tmp_path)
    whole = answers(saved)
    heads, layers = SIZE["num_key_value_heads"], SIZE["num_hidden_layers"]
    for rank in range(PROCESSES):
        sharded = torch.load(tmp_path / f"{rank}.pt")
        assert sharded.keys() == whole.keys() == {(recipe, cache) for recipe in RECIPES for cache in CACHES}
        for cell, expected in whole.items():
            assert expected["kv_heads"] == [heads] * layers
            assert sharded[cell]["kv_heads"] == [heads // PROCESSES] * layers, "the model must have been sharded"
            assert torch.equal(sharded[cell]["tokens"], expected["tokens"]), cell
            torch.testing.assert_close(sharded[cell]["logits"], expected["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("max_length", [None, 128])
def test_layers_that_accelerate_fetches_from_disk_generate_what_the_plain_model_does(
    recipe, max_length, saved, tmp_path
):
    options = {"attn_implementation": "swaa_flex", "swaa": RECIPES[recipe]}
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(SIZE["num_hidden_layers"])}
    plain = AutoModelForCausalLM.from_pretrained(saved, **options)
    spread = AutoModelForCausalLM.from_pretrained(
        saved, **options, device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    assert {p.device.type for p in spread.model.layers[1].parameters()} == {"meta"}, "accelerate must hold the layer"
    inputs = batch()

    def generate(model):
        return model.generate(
            **inputs,
            past_key_values=SWAACache(model.config, max_length=max_length),
            max_new_tokens=20,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )

    ours, expected = generate(spread), generate(plain)
    assert torch.equal(ours.sequences, expected.sequences)
    torch.testing.assert_close(ours.logits, expected.logits)


def test_a_mask_follows_layers_to_their_device_with_one_copy_per_device():
    config = tiny("llama", swaa=RECIPES["releases"]).config
    mask = make_forward_mask(
        2, 70, 70, q_offset=torch.tensor(0), attention_mask=batch()["attention_mask"], config=config
    )
    there = mask.to("meta", non_blocking=True)  # as accelerate calls it
    assert there is mask.to(torch.device("meta"))
    assert mask.to("cpu") is mask
    assert there.forward.device == torch.device("meta")
    assert {tensor.device.type for tensor in (there.forward.q_offset, *there.forward.ends)} == {"meta"}
    assert {tensor.device.type for tensor in (mask.forward.q_offset, *mask.forward.ends)} == {"cpu"}
    assert (there.shape, there.forward.native) == (mask.shape, mask.forward.native)
