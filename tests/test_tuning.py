"""Fine-tuning on a tiny model: what it learns, what it writes, and that it can be killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from transformers import AutoModelForCausalLM, PreTrainedModel
from tune_in_processes import FAST, RECIPE, adapted, check_two_processes, examples

import swaa_flex
from swaa_flex import ConfigError, SWAAConfig, UnsupportedModelError
from swaa_flex.tuning import Example, TuningConfig, finetune, full_attention, load_adapter, merge, train

peft = pytest.importorskip("peft")


def uneven(count):
    """Answers of one token and more."""
    made = []
    for number in range(count):
        chosen = torch.Generator().manual_seed(number)
        ids = torch.randint(3, 99, (20 + 3 * number,), generator=chosen).tolist()
        made.append(Example(ids, [False] * (len(ids) - 1 - 2 * number) + [True] * (1 + 2 * number)))
    return made


def logged(folder, steps):
    """The losses of the training."""
    state = json.loads((folder / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    return [line["loss"] for line in state["log_history"] if "loss" in line]


def loss(model, given):
    total = count = 0
    with torch.no_grad():
        for example in given:
            ids = torch.tensor([example.input_ids])
            labels = torch.where(torch.tensor([example.decode_rows]), ids, -100)
            answers = int((labels != -100).sum())
            total += float(model(input_ids=ids, labels=labels).loss) * answers
            count += answers
    return total / count


@pytest.mark.parametrize("packing", [False, True])
def test_cross_entropy_falls(tmp_path, packing):
    model, given = adapted(), examples(8)
    before = loss(model, given)
    config = TuningConfig(epochs=8, batch_size=4, packing=packing, **FAST)
    assert loss(finetune(model, given, tmp_path, config=config, quiet=True).eval(), given) < before / 2
    assert model.config.swaa == RECIPE.to_dict()


def test_the_divergence_from_full_attention_falls(tmp_path):
    model, given = adapted(SWAAConfig(4, 0, (), False, 0)), examples(8)
    teacher = swaa_flex.restore(adapted()).eval()

    @torch.no_grad()
    def divergence():
        total = 0.0
        for example in given:
            ids, length = torch.tensor([example.input_ids]), len(example.input_ids) - 3
            ours = model(ids, prompt_lengths=length).logits[:, length - 1 : -1].log_softmax(-1)
            full = teacher(ids).logits[:, length - 1 : -1].log_softmax(-1)
            total += float((full.exp() * (full - ours)).sum())
        return total

    before = divergence()
    config = TuningConfig("kl", epochs=10, batch_size=4, **FAST | {"learning_rate": 5e-3})
    finetune(model, given, tmp_path, config=config, quiet=True).eval()
    assert divergence() < before / 2


def test_steps_equal_a_loop_over_single_samples(tmp_path):
    """One step of a batch of 4 in two forwards is one step of the mean over their answer tokens."""
    given = uneven(4)
    config = TuningConfig(max_steps=1, batch_size=2, schedule="constant", warmup_ratio=0, **FAST)
    finetune(adapted(), given, tmp_path, config=config, quiet=True)
    assert abs(logged(tmp_path, 1)[0] - loss(adapted(), given)) < 1e-4
    ours = load_file(tmp_path / "adapter" / "adapter_model.safetensors")

    lora = peft.LoraConfig(
        r=16, lora_alpha=128, target_modules=["q_proj", "k_proj", "v_proj"], lora_dropout=0, task_type="CAUSAL_LM"
    )
    base = adapted()
    torch.manual_seed(config.seed)
    model = peft.get_peft_model(base, lora).train()
    count = sum(sum(e.decode_rows) for e in given)
    for example in given:
        ids = torch.tensor([example.input_ids])
        labels = torch.where(torch.tensor([example.decode_rows]), ids, -100)
        answers = sum(example.decode_rows)
        (model(input_ids=ids, labels=labels).loss * answers / count).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0).step()
    theirs = peft.get_peft_model_state_dict(model)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-3, rtol=1e-3, msg=name)


def test_the_first_divergence_is_that_of_the_model_from_itself(tmp_path):
    given, recipe = uneven(4), SWAAConfig(4, 0, (), False, 0)
    config = TuningConfig("kl", max_steps=1, batch_size=2, **FAST)
    finetune(adapted(recipe), given, tmp_path, config=config, quiet=True)
    ours, teacher = adapted(recipe), swaa_flex.restore(adapted()).eval()
    total = count = 0
    with torch.no_grad():
        for example in given:
            ids, length = torch.tensor([example.input_ids]), example.decode_rows.index(True)
            student = ours(ids, prompt_lengths=length).logits[:, length - 1 : -1].log_softmax(-1)
            full = teacher(ids).logits[:, length - 1 : -1].log_softmax(-1)
            total += float((full.exp() * (full - student)).sum())
            count += sum(example.decode_rows)
    assert abs(logged(tmp_path, 1)[0] - total / count) < 1e-4


def test_scoring_held_out_examples_does_not_change_the_training(tmp_path):
    settings = {"max_steps": 3, "batch_size": 2, **FAST | {"dropout": 0.3}}
    losses = []
    for name, save_steps, held_out in (("a", 1, examples(3, 1)), ("b", 3, examples(3, 1)), ("c", 3, ())):
        config = TuningConfig(save_steps=save_steps, **settings)
        finetune(adapted(), examples(12), tmp_path / name, held_out=held_out, config=config, quiet=True)
        losses.append(logged(tmp_path / name, 3))
    assert losses[0] == losses[1] == losses[2] and len(losses[0]) == 3


def test_held_out_losses_are_stated_under_the_recipe_and_under_full_attention(tmp_path, capfd):
    model, held_out = adapted(), examples(5, seed=1)
    config = TuningConfig(max_steps=2, save_steps=2, batch_size=2, **FAST)
    tuned = finetune(model, examples(8), tmp_path, held_out=held_out, config=config).eval()
    said = capfd.readouterr().err
    swaa = loss(tuned, held_out)
    with full_attention(model.config):
        full = loss(tuned, held_out)
    assert abs(swaa - full) > 1e-3
    assert f"held-out loss {swaa:.4f}, with full attention {full:.4f}" in said
    assert "step 1/2  loss " in said and "tokens/s" in said


def test_checkpointed_and_plain_tuning_agree(tmp_path):
    weights = []
    for checkpointing in (False, True):
        config = TuningConfig(max_steps=2, gradient_checkpointing=checkpointing, **FAST)
        finetune(adapted(), examples(4), tmp_path / str(checkpointing), config=config, quiet=True)
        weights.append(load_file(tmp_path / str(checkpointing) / "adapter" / "adapter_model.safetensors"))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=1e-3, rtol=1e-3)


def test_the_adapter_brings_its_recipe_and_merges_into_a_plain_model(tmp_path):
    tuned = finetune(
        adapted(), examples(8), tmp_path / "run", config=TuningConfig(max_steps=3, **FAST), quiet=True
    ).eval()
    ids = torch.randint(3, 99, (1, 60))
    with torch.no_grad():
        expected = tuned(input_ids=ids).logits
        plain = tiny("llama")
        plain.set_attn_implementation("sdpa")
        loaded = load_adapter(plain, tmp_path / "run" / "adapter").eval()
        assert loaded.config.swaa == RECIPE.to_dict()
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected)
        merge(loaded, tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="swaa_flex").eval()
        assert merged.config.swaa == RECIPE.to_dict()
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_in_the_layout_of_the_released_ones_takes_the_recipe_it_is_told(tmp_path):
    """LoRA on q, k and v, rank 16, rank-stabilised, alpha 32: as the paper's code saves it, without a recipe."""
    lora = peft.LoraConfig(
        r=16, lora_alpha=32, use_rslora=True, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    trained = peft.get_peft_model(tiny("llama"), lora)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    trained.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"does not say which recipe.*sliding_window_size"):
        load_adapter(tiny("llama"), tmp_path)
    reference = {"sliding_window_size": 8, "keep_first": 2, "force_fa_decode": True, "non_sliding_layers": [1, 3, 47]}
    loaded = load_adapter(tiny("llama"), tmp_path, swaa=reference).eval()
    assert loaded.config.swaa == SWAAConfig(8, 2, (1, 3), True, 0).to_dict()
    assert loaded.base_model.model.model.layers[0].self_attn.q_proj.scaling == {"default": 8.0}
    ids = torch.randint(3, 99, (1, 60))
    with torch.no_grad():
        same = swaa_flex.adapt(trained.eval().get_base_model(), SWAAConfig(8, 2, (1, 3), True, 0))
        torch.testing.assert_close(loaded(input_ids=ids).logits, same(ids).logits)


KINDS = {
    "DoRA": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "norms": {"modules_to_save": ["input_layernorm", "post_attention_layernorm", "norm"]},
    "LoRA on embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on embeddings and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [5, 6]},
    "ranks of their own": {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "target_modules": ".*[qv]_proj"},
    "some layers": {"layers_to_transform": [1]},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_adapters_of_all_kinds_of_lora_are_loaded_and_merged(tmp_path, options):
    trained = peft.get_peft_model(tiny("llama"), peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **options}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    with_embeddings = "embed_tokens" in options.get("target_modules", ())  # as peft does, which then warns of it
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=with_embeddings)
    swaa_flex.adapt(trained, RECIPE).eval()
    ids = torch.randint(3, 99, (1, 60), generator=generator)
    with torch.no_grad():
        expected = trained(input_ids=ids).logits
        assert not torch.allclose(expected, swaa_flex.adapt(tiny("llama"), RECIPE).eval()(ids).logits, atol=1e-2)
        loaded = load_adapter(tiny("llama"), tmp_path / "adapter", RECIPE)
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected)
        merge(loaded, tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="swaa_flex").eval()
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{"modules_to_save": ["self_attn"]}, {"layer_replication": [[0, 2], [0, 1]]}])
def test_an_adapter_that_copies_attention_is_refused(tmp_path, options):
    lora = peft.LoraConfig(**{"r": 4, "target_modules": ["up_proj"], **options})
    peft.get_peft_model(tiny("llama"), lora).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"whole copies of layers with attention, such as .*self_attn"):
        load_adapter(tiny("llama"), tmp_path, RECIPE)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"examples": []}, "expected at least one"),
        ({"examples": [Example([5, 6, 7], [False] * 3)]}, r"examples\[0\]: none of its 3 tokens is an answer"),
        ({"config": {"target_modules": ("q_porj",)}}, r"no linear layer 'q_porj'.*did you mean 'q_proj'"),
        ({"config": {"objective": "dpo"}}, "objective='dpo': expected one of ce, kl"),
        ({"config": {"rank": 0}}, "rank=0: expected a positive integer"),
        ({"config": {"max_steps": 1.5}}, "max_steps=1.5: expected a positive integer"),
        ({"config": {"target_modules": "q_proj"}}, "target_modules='q_proj': expected a tuple"),
        ({"examples": [Example([5, 6, 7, 8], [False, False, True])]}, "4 input_ids and 3 decode_rows"),
        ({"examples": [Example([5, 6, 700], [False, False, True])]}, "token ids from 5 to 700, and the model has 99"),
        ({"recipe": None}, r"attn_implementation='sdpa'.*swaa_flex.adapt"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, given, problem):
    with pytest.raises(ConfigError, match=problem):
        model = adapted() if given.get("recipe", RECIPE) else swaa_flex.restore(adapted())
        config = TuningConfig(**given.get("config", {}))
        finetune(model, given.get("examples", examples(2)), tmp_path, config=config, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_two_merges_into_one_folder_do_not_meet(tmp_path, monkeypatch):
    tuned = finetune(adapted(), examples(2), tmp_path / "run", config=TuningConfig(max_steps=1, **FAST), quiet=True)
    save, refused = type(tuned.get_base_model()).save_pretrained, []

    def meanwhile(model, folder):
        with pytest.raises(ConfigError, match=r"config\.json: another run is writing it"):
            merge(tuned, folder)
        refused.append(folder)
        save(model, folder)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", meanwhile)
    merge(tuned, tmp_path / "merged")
    assert refused == [tmp_path / "merged"] and not list(refused[0].glob("*.lock"))


def test_a_folder_of_another_run_is_refused_by_name(tmp_path):
    finetune(adapted(), examples(2), tmp_path, config=TuningConfig(max_steps=1, **FAST), quiet=True)
    with pytest.raises(ConfigError, match=r"another run \(max_steps was 1 and is 2\)"):
        finetune(adapted(), examples(2), tmp_path, config=TuningConfig(max_steps=2, **FAST), quiet=True)
    with pytest.raises(ConfigError, match=r"another run \(examples was"):
        finetune(adapted(), examples(3), tmp_path, config=TuningConfig(max_steps=1, **FAST), quiet=True)
    other = adapted()
    with torch.no_grad():
        other.lm_head.weight.zero_()
    with pytest.raises(ConfigError, match=r"another run \(weights was"):
        finetune(other, examples(2), tmp_path, config=TuningConfig(max_steps=1, **FAST), quiet=True)
    # A finished run is not run again, and how often it saves does not matter.
    config = TuningConfig(max_steps=1, **FAST | {"log_steps": 7})
    again = finetune(adapted(), examples(2), tmp_path, config=config, quiet=True)
    assert not again.training and again.config.swaa == RECIPE.to_dict()


def test_a_second_run_in_the_same_folder_is_refused_before_the_first_checkpoint(tmp_path, monkeypatch):
    step, refused = train._Trainer.training_step, []

    def meanwhile(*args, **kwargs):
        with pytest.raises(ConfigError, match=r"run\.json: another run is writing it"):
            finetune(adapted(), examples(2), tmp_path, config=TuningConfig(max_steps=2, **FAST), quiet=True)
        refused.append(args)
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train._Trainer, "training_step", meanwhile)
        finetune(adapted(), examples(2), tmp_path, config=TuningConfig(max_steps=1, **FAST), quiet=True)
    assert len(refused) == 2 and json.loads((tmp_path / "run.json").read_text())["max_steps"] == 1
    assert not list(tmp_path.glob("*.lock"))


@pytest.mark.parametrize("broken", ["{", "[]"])
def test_damaged_and_foreign_folders_are_refused(tmp_path, broken):
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text(broken)
    (tmp_path / "other" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    for name, problem in (("run", "run.json is damaged"), ("other", "no run.json"), ("file", "is a file")):
        with pytest.raises(ConfigError, match=problem):
            finetune(adapted(), examples(2), tmp_path / name, config=TuningConfig(**FAST), quiet=True)


def test_a_model_is_as_before_after_an_interruption_and_carries_one_adapter_only(tmp_path, monkeypatch):
    model, ids = adapted(), torch.randint(3, 99, (1, 60))
    expected = model(ids, prompt_lengths=60).logits

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train._Trainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(model, examples(2), tmp_path / "a", config=TuningConfig(**FAST), quiet=True)
    assert not model.training and model.config.use_cache
    torch.testing.assert_close(model(ids, prompt_lengths=60).logits, expected)
    checkpointed = TuningConfig(gradient_checkpointing=True, max_steps=1, **FAST)
    tuned = finetune(model, examples(2), tmp_path / "b", config=checkpointed, quiet=True)
    assert not tuned.training and model.config.use_cache
    assert model.generate(ids, max_new_tokens=2, use_cache=True, return_dict_in_generate=True).past_key_values
    for again in (lambda: finetune(model, examples(2), tmp_path / "c"), lambda: load_adapter(model, tmp_path / "b")):
        with pytest.raises(ConfigError, match="carries a LoRA adapter already"):
            again()


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as accelerate starts them for ddp.yaml where there is no GPU
    with pytest.raises(
        ConfigError, match=r"2 processes were started and none knows of the others.*ACCELERATE_USE_CPU"
    ):
        finetune(adapted(), examples(2), tmp_path, quiet=True)


def test_a_model_is_trainable_again_after_an_error_and_the_folder_free(tmp_path, monkeypatch):
    model = adapted().train()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(train._Trainer, "training_step", fail)
        with pytest.raises(torch.OutOfMemoryError):
            finetune(model, examples(2), tmp_path, config=TuningConfig(batch_size=2, **FAST), quiet=True)
    assert [parameter.requires_grad for parameter in model.parameters()] == before and model.training
    finetune(model, examples(2), tmp_path, config=TuningConfig(batch_size=1, max_steps=1, **FAST), quiet=True)


@pytest.mark.parametrize("length", [{"max_steps": 3}, {"epochs": 0.5}], ids=str)
def test_a_run_that_was_killed_before_its_adapter_takes_no_further_step(tmp_path, length, monkeypatch):
    config = TuningConfig(schedule="constant", save_steps=1, **length, **FAST)

    def interrupted(*args):
        raise KeyboardInterrupt

    whole = finetune(adapted(), examples(12), tmp_path / "whole", config=config, quiet=True).state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(train, "_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(adapted(), examples(12), tmp_path / "killed", config=config, quiet=True)
    again = finetune(adapted(), examples(12), tmp_path / "killed", config=config, quiet=True).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    assert not (tmp_path / "killed" / "checkpoint-4").exists()


@pytest.mark.parametrize(
    ("model", "settings", "error", "message"),
    [
        (lambda: adapted(), {"learning_rate": float("inf")}, ConfigError, "learning_rate=inf: expected a positive"),
        (lambda: adapted(), {"learning_rate": 1e30}, ConfigError, r"diverged.*learning_rate=1e\+30"),
        (
            lambda: adapted(tie_word_embeddings=True),
            {"target_modules": ("lm_head",)},
            ConfigError,
            "lm_head shares its weights with the input embeddings",
        ),
        (
            lambda: swaa_flex.adapt(tiny("stablelm"), RECIPE),
            {},
            UnsupportedModelError,
            "'stablelm' does not hand keywords on",
        ),
    ],
)
def test_what_cannot_be_tuned_is_refused(tmp_path, model, settings, error, message):
    with pytest.raises(error, match=message):
        config = TuningConfig(max_steps=3, **FAST | settings)
        finetune(model(), examples(8), tmp_path, config=config, quiet=True)
    assert not (tmp_path / "adapter").exists()


def test_adapters_of_other_models_and_kinds_are_refused(tmp_path):
    """Of most of which peft only warns."""
    finetune(adapted(), examples(2), tmp_path, config=TuningConfig(max_steps=1, **FAST), quiet=True)
    folder = tmp_path / "adapter"
    weights = load_file(folder / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"has weights of others, 12 in all, such as .*layers\.2"):
        load_adapter(tiny("llama", num_hidden_layers=2), folder)
    with pytest.raises(ConfigError, match=r"lacks weights of this model, 12 in all, such as .*layers\.4"):
        load_adapter(tiny("llama", num_hidden_layers=6), folder)
    for changed in (
        {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()},
        {name.lower(): tensor for name, tensor in weights.items()},
        {name: tensor for name, tensor in weights.items() if "layers.1" not in name},
    ):
        save_file(changed, folder / "adapter_model.safetensors")
        with pytest.raises(ConfigError, match="lacks weights of this model"):
            load_adapter(tiny("llama"), folder)
    described = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(described | {"peft_type": "IA3"}))
    with pytest.raises(ConfigError, match="expected a LoRA adapter, got one of type IA3"):
        load_adapter(tiny("llama"), folder)
    other = peft.get_peft_model(tiny("llama"), peft.IA3Config(target_modules=["down_proj"], feedforward_modules=[]))
    with pytest.raises(ConfigError, match="carries a LoRA adapter already"):
        finetune(swaa_flex.adapt(other.base_model.model, RECIPE), examples(2), tmp_path / "other")


def test_a_model_is_not_merged_into_a_file(tmp_path):
    tuned = finetune(adapted(), examples(2), tmp_path, config=TuningConfig(max_steps=1, **FAST), quiet=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file is a file; expected a folder"):
        merge(tuned, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert merge(tuned, tmp_path / "merged", torch.bfloat16).dtype == torch.bfloat16


def test_adapters_that_do_not_fit_or_cannot_be_read_are_refused(tmp_path):
    finetune(adapted(), examples(2), tmp_path, config=TuningConfig(max_steps=1, **FAST), quiet=True)
    folder = tmp_path / "adapter"
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "swaa_config.json",
    ]
    with pytest.raises(ConfigError, match=r"does not fit this model \(llama\).*Load the model again"):
        load_adapter(tiny("llama", hidden_size=64), folder)
    (folder / "swaa_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"swaa_config.json: expected a JSON object"):
        load_adapter(tiny("llama"), folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="has no weights"):
        load_adapter(tiny("llama"), folder)


# --- several processes ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize(
    ("how", "tied"),
    [("fsdp", True), *(pytest.param(how, False, marks=pytest.mark.slow) for how in ("ddp", "fsdp"))],
)
def test_two_processes_have_the_losses_of_one(tmp_path, how, tied):
    check_two_processes(tmp_path, how, tied, ACCELERATE_USE_CPU="true")


# --- killed and started again ---------------------------------------------------------------------------------

KILLED = {"max_steps": 12, "save_steps": 2, "batch_size": 2, "learning_rate": 0.01, "log_steps": 1, "dropout": 0.1}


def run(folder):
    """What the processes below do."""
    finetune(adapted(), examples(30), folder, config=TuningConfig(**KILLED), quiet=True)


def start(folder):
    """In a process with one thread: sums must not depend on how many there are."""
    code = "import sys, torch; torch.set_num_threads(1); sys.path.insert(0, 'tests'); import test_tuning; "
    command = [sys.executable, "-c", f"{code} test_tuning.run(sys.argv[1])", str(folder)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[1], env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_killed_run_goes_on_to_the_same_adapter(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed, process = start(whole), start(killed)
    deadline = time.monotonic() + 120
    while not list(killed.glob("checkpoint-4*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "adapter").exists()
    # A checkpoint that was cut off while it was written is passed over.
    torn = killed / "checkpoint-11"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_step": 1')
    assert start(killed).wait() == undisturbed.wait() == 0
    for name in ("run.json", *(f"adapter/{path.name}" for path in (whole / "adapter").iterdir())):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
