"""Many random forwards that could disturb each other: every answer is that of a dense reference, or refused.

Two models share two threads. Forwards are refused, interrupted and checkpointed, compiled before and after `prompt()`,
run on copies of models and of caches, with and without caches of both kinds. The reference knows definitions only.
"""

import contextlib
import copy
import math
import pickle
import random
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import swaa_flex
from swaa_flex import ConfigError, MaskError, SWAACache, SWAAConfig, UnsupportedModelError
from swaa_flex.hf.cache import CACHE

SIZE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "eos_token_id": None,
}
REFUSALS = (ConfigError, MaskError, UnsupportedModelError)
STEPS = 200


class Subject:
    """An adapted model, its weights in a reference of its own, and one compiled function."""

    def __init__(self, make, config, full_attention_decode: bool) -> None:
        self.recipe = SWAAConfig(
            sliding_window=6,
            sink_tokens=2,
            full_attention_layers=(1,),
            full_attention_decode=full_attention_decode,
            dense_tail=3,
        )
        torch.manual_seed(0)
        self.plain = make(config(**SIZE)).double().eval()
        self.model = swaa_flex.adapt(copy.deepcopy(self.plain), self.recipe)
        # In single precision, as compiled kernels on a CPU know no double.
        self.compiled = torch.compile(copy.deepcopy(self.model).float(), backend="eager", dynamic=True)

    def right(self, ids: Tensor, prompt: int, pads: int = 0, model: nn.Module | None = None) -> Tensor:
        """Logits `[batch, len, vocab]` of a whole sequence, `prompt` tokens of it a prompt, by dense attention."""
        plain = copy.deepcopy(self.plain) if model is None else model  # the other thread has one of its own
        plain.set_attn_implementation("sdpa")
        position = torch.arange(ids.shape[1]) - pads
        q, k = position[:, None], position[None]
        causal = (k <= q) & (k >= 0) & (q >= 0)
        dense = (q >= prompt - self.recipe.dense_tail) & (q < prompt)
        if self.recipe.full_attention_decode:
            dense = dense | (q >= prompt)
        near = causal & ((q - k < self.recipe.sliding_window) | (k < self.recipe.sink_tokens) | dense)
        masks = [torch.where(seen, 0.0, -math.inf).double()[None, None] for seen in (near, causal)]
        masks = [torch.where((position < 0)[:, None], 0.0, mask) for mask in masks]  # pads see something, not NaN
        layers = plain.model.layers
        hooks = [
            layer.self_attn.register_forward_pre_hook(
                lambda module, args, kwargs, mask=mask: (args, kwargs | {"attention_mask": mask}), with_kwargs=True
            )
            for layer, mask in zip(layers, masks, strict=True)
        ]
        try:
            return plain(ids, position_ids=position.clamp(min=0)[None], use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()


def assert_right(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


class Interrupt:
    """A hook that interrupts the forwards of the thread that made it (a class, so that models can be pickled)."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def __call__(self, module, args):
        if threading.get_ident() == self.thread:
            raise KeyboardInterrupt


class Steps:
    """What a step may be; each raises if an answer is wrong, and may be refused."""

    def __init__(self, subject: Subject, seed: int) -> None:
        self.subject, self.random = subject, random.Random(seed)

    def ids(self, length: int) -> Tensor:
        return torch.tensor([[self.random.randrange(3, 60) for _ in range(length)]])

    def told_by_keyword(self):
        ids, prompt = self.ids(24), self.random.randrange(4, 24)
        out = self.subject.model(ids, use_cache=False, prompt_lengths=prompt).logits
        assert_right(out, self.subject.right(ids, prompt))

    def told_by_prompt_with_pads(self):
        ids, prompt, pads = self.ids(24), self.random.randrange(4, 20), 4
        mask = torch.ones_like(ids)
        mask[:, :pads] = 0
        with swaa_flex.prompt(prompt):
            # Rotary embeddings are in single precision: positions have to be those of the reference.
            positions = (torch.arange(24) - pads).clamp(min=0)[None]
            out = self.subject.model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        assert_right(out[:, pads:], self.subject.right(ids, prompt, pads)[:, pads:])

    def compiled(self):
        ids, prompt = self.ids(24), self.random.choice([8, 15])
        known = self.random.random() < 0.7
        with swaa_flex.prompt(prompt) if known else contextlib.nullcontext():
            out = self.subject.compiled(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        torch.testing.assert_close(
            out.double(), self.subject.right(ids, prompt if known else 24), atol=1e-4, rtol=1e-4
        )

    def continued(self, cache, disturb=lambda: None):
        ids, prompt = self.ids(24), self.random.randrange(9, 18)
        cache.prompt_lengths = prompt
        outs = [self.subject.model(ids[:, :prompt], **{CACHE: cache}).logits]
        for at in range(prompt, 24):
            if at == prompt + 2:
                disturb()
            outs.append(self.subject.model(ids[:, at : at + 1], **{CACHE: cache}).logits)
        assert_right(torch.cat(outs, 1), self.subject.right(ids, prompt))

    def growing_cache(self):
        self.continued(SWAACache(self.subject.model.config))

    def fixed_cache(self):
        self.continued(SWAACache(self.subject.model.config, max_length=32))

    def cache_among_others(self):
        other = Steps(self.subject, self.random.randrange(1 << 30))
        self.continued(
            SWAACache(self.subject.model.config), self.random.choice([other.refused, other.told_by_keyword])
        )

    def copied_cache(self):
        ids, model = self.ids(24), self.subject.model
        cache = SWAACache(model.config, prompt_lengths=20)
        model(ids[:, :12], **{CACHE: cache})
        twin = copy.deepcopy(cache)
        model(self.ids(5), **{CACHE: cache})
        out = model(ids[:, 12:], **{CACHE: twin}).logits
        assert_right(out, self.subject.right(ids, 20)[:, 12:])

    def copied_model(self):
        twin = self.random.choice([copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])(
            self.subject.model
        )
        plain = copy.deepcopy(self.subject.plain)
        if twin._modules is self.subject.model._modules:  # copy.copy
            twin._modules = dict(twin._modules)
        twin.lm_head = nn.Linear(32, 60, bias=False).double()
        plain.lm_head = twin.lm_head
        ids = self.ids(20)
        labels = ids.clone()
        labels[:, :11] = -100
        assert_right(twin(ids, labels=labels).logits, self.subject.right(ids, 11, model=plain))

    def refused(self):
        ids, model = self.ids(24), self.subject.model
        gap = torch.ones(1, 24, dtype=torch.long)
        gap[0, 7] = 0
        cache = SWAACache(model.config)
        wrong = [
            {"attention_mask": gap},
            {"prompt_lengths": torch.tensor([3, 4, 5])},
            {"decode_rows": torch.ones(1, 9, dtype=torch.bool)},
        ]
        with pytest.raises(REFUSALS):
            model(ids, **self.random.choice(wrong), **{CACHE: cache})

    def interrupted(self):
        model, cache = self.subject.model, SWAACache(self.subject.model.config)
        place = self.random.choice(["model.layers.0.mlp", "model.layers.1.mlp", "lm_head"])
        hook = model.get_submodule(place).register_forward_pre_hook(Interrupt())
        try:
            with pytest.raises(KeyboardInterrupt):
                model(self.ids(12), **{CACHE: cache})
        finally:
            hook.remove()
        with pytest.raises(ConfigError, match="interrupted"):
            model(self.ids(3), **{CACHE: cache})

    def checkpointed(self):
        ids, prompt, model = self.ids(24), 15, copy.deepcopy(self.subject.model)
        plain = copy.deepcopy(self.subject.plain)
        self.subject.right(ids, prompt, model=plain).square().sum().backward()
        how = self.random.choice(["keyword", "surrounding", "reentrant"])
        if how == "keyword":
            call = lambda i: model(i, use_cache=False, prompt_lengths=prompt).logits  # noqa: E731
            checkpoint(call, ids, use_reentrant=False).square().sum().backward()
        else:
            with swaa_flex.prompt(prompt):
                embedded = model.get_input_embeddings()(ids)
                call = lambda e: model(inputs_embeds=e, use_cache=False).logits  # noqa: E731
                out = checkpoint(call, embedded, use_reentrant=how == "reentrant")
            out.square().sum().backward()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-8, rtol=1e-8)

    def without_cache(self):
        ids = self.ids(20)
        known = self.random.random() < 0.5
        with swaa_flex.prompt(20) if known else contextlib.nullcontext():
            tokens = self.subject.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, use_cache=False
            )
        expected = self.subject.right(tokens, 20)[:, 19:-1].argmax(-1)
        assert torch.equal(tokens[:, 20:], expected)

    def under_another_attention(self):
        model = copy.deepcopy(self.subject.model)
        cache = SWAACache(model.config, max_length=32)
        swaa_flex.restore(model)
        with pytest.raises(ConfigError, match="attn_implementation='sdpa'"):
            model(self.ids(10), **{CACHE: cache})

    def packed(self):
        first, second = self.ids(14), self.ids(10)
        start = self.random.choice([0, 5])
        positions = torch.cat([torch.arange(14), start + torch.arange(10)])[None]
        flags = torch.zeros(1, 24, dtype=torch.bool)
        out = self.subject.model(
            torch.cat([first, second], 1), position_ids=positions, decode_rows=flags, use_cache=False
        ).logits
        assert_right(out[:, :14], self.subject.right(first, 14))
        if start == 0:
            assert_right(out[:, 14:], self.subject.right(second, 10))

    def plain_cache(self):
        ids, model = self.ids(24), self.subject.model
        if not self.subject.recipe.full_attention_decode:
            return
        with swaa_flex.prompt(16):
            cache = DynamicCache(config=model.config)
            outs = [model(ids[:, a:b], **{CACHE: cache}).logits for a, b in ((0, 9), (9, 16), (16, 17), (17, 24))]
        assert_right(torch.cat(outs, 1), self.subject.right(ids, 16))


KINDS = [name for name in vars(Steps) if not name.startswith("_") and name not in ("ids", "continued")]


def test_two_hundred_steps_of_two_models_in_two_threads():
    torch._dynamo.reset()
    subjects = [
        Subject(LlamaForCausalLM, LlamaConfig, full_attention_decode=True),
        Subject(Qwen3ForCausalLM, Qwen3Config, full_attention_decode=False),
    ]
    failures: list[str] = []
    refused: set[str] = set()
    # A step holds the lock of its thread; one that compiles holds both, since torch 2.11 crashes if another thread
    # computes while it traces.
    turns = [threading.Lock(), threading.Lock()]

    def work(thread: int) -> None:
        chosen = random.Random(thread)
        for step in range(STEPS // 2):
            kind = KINDS[step % len(KINDS)] if step < len(KINDS) else chosen.choice(KINDS)
            steps = Steps(chosen.choice(subjects), chosen.randrange(1 << 30))
            with contextlib.ExitStack() as around:
                for turn in turns if kind == "compiled" else [turns[thread]]:
                    around.enter_context(turn)
                around.enter_context(torch.set_grad_enabled(kind == "checkpointed"))
                try:
                    getattr(steps, kind)()
                except REFUSALS as error:
                    refused.add(f"{kind}: {type(error).__name__}")
                except BaseException as error:
                    failures.append(f"thread {thread}, step {step}, {kind}: {type(error).__name__} {error}"[:300])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch._dynamo.reset()
    assert failures == []
    # What may be refused, and no more: everything else has to be right.
    assert refused <= {"checkpointed: UnsupportedModelError", "without_cache: UnsupportedModelError"}
