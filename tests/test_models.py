"""Every supported family of models against the dense reference: one forward and greedy generation, left padded."""

import pytest
import torch
import transformers
from reference import Reference
from transformers import AutoConfig, AutoModelForCausalLM

from swaa_flex import SWAAConfig

SIZE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "attention_dropout": 0.0,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict] = {
    "llama": {},
    "qwen2": {},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 16},
    "qwen3": {},
    "qwen3_moe": MOE,
    "mistral": {"sliding_window": 40},
    "mixtral": {"num_local_experts": 4},
    "phi3": {"sliding_window": 40, "original_max_position_embeddings": 512},
    "gemma": {},
    "gemma2": {"sliding_window": 40, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 40, "query_pre_attn_scalar": 8},
    "gpt_oss": {"sliding_window": 40, "num_local_experts": 4},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "olmo2": {},
    "glm4": {},
    "granite": {},
    "cohere2": {"sliding_window": 40},
    "exaone4": {"sliding_window": 40},
    "starcoder2": {},
    "stablelm": {},
}
CONFIG = SWAAConfig(sliding_window=24, sink_tokens=3, full_attention_layers=[1], dense_tail=4)


def tiny(family: str, **overrides) -> transformers.PreTrainedModel:
    config = AutoConfig.for_model(family, **SIZE | FAMILIES[family] | overrides)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="swaa_flex").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "sinks" in name:
                parameter.normal_(0, 0.15 if parameter.dim() > 1 else 1.0)
    return model


def batch(length: int = 70, pads: int = 13) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 99, (2, length))
    mask = torch.ones_like(ids)
    ids[0, :pads], mask[0, :pads] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def under_reference(model, config, call, prompt_lengths=None):
    Reference.config, Reference.prompt_lengths = config, prompt_lengths
    model.set_attn_implementation("swaa_reference")
    try:
        return call()
    finally:
        model.set_attn_implementation("swaa_flex")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("full_attention_decode", [True, False])
def test_logits_and_greedy_tokens_equal_the_dense_reference(family, full_attention_decode):
    model = tiny(family)
    config = SWAAConfig(**CONFIG.to_dict() | {"full_attention_decode": full_attention_decode})
    model.config.swaa = config
    inputs = batch()
    real = inputs["attention_mask"].bool()

    @torch.no_grad()
    def forward():
        return model(**inputs).logits[real]

    ours, reference = forward(), under_reference(model, config, forward)
    torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)
    plain = under_reference(model, SWAAConfig(sliding_window=None), forward)
    assert (plain - reference).abs().max() > 1e-3, "the configuration must matter for the comparison to mean anything"

    def generate():
        return model.generate(
            **inputs, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
        )

    ours, reference = generate(), under_reference(model, config, generate)
    assert torch.equal(ours.sequences, reference.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(reference.logits), atol=1e-5, rtol=1e-5)
