"""Small models of every supported family, and batches for them."""

import torch
from tiny_tokenizers import MARKS, WORDS
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    PreTrainedModel,
)

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


def tiny(family: str, **overrides) -> PreTrainedModel:
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


def words_model() -> LlamaForCausalLM:
    """One that knows the words of `words_tokenizer`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(MARKS + WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=3,
        bos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def composite(**options):
    """The configuration of a language model with a vision tower."""
    vision = dict(
        model_type="clip_vision_model", hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, image_size=28, patch_size=14,
    )  # fmt: skip
    return LlavaConfig(text_config=LlamaConfig(**SIZE), vision_config=vision, **options)
