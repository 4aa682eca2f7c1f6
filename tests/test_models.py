"""Every supported family of models against the dense reference: one forward and greedy generation, left padded."""

import pytest
import torch
from reference import under_reference
from tiny_models import FAMILIES, batch, tiny

from swaa_flex import SWAAConfig

CONFIG = SWAAConfig(sliding_window=24, sink_tokens=3, full_attention_layers=[1], dense_tail=4)


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
