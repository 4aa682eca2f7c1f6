"""A dense reference of SWAA inside transformers, written from the definitions and without the library's masks."""

import math

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from swaa_flex import SWAAConfig


class Reference:
    """Registers `attn_implementation="swaa_reference"`; `config` and `prompt_lengths` are set by the test."""

    config: SWAAConfig
    prompt_lengths: list[int] | None = None

    @classmethod
    def mask(cls, *, batch_size, q_length, kv_length, q_offset=0, kv_offset=0, attention_mask=None, **kwargs):
        kwargs["allow_is_causal_skip"] = False
        native = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            **kwargs,
        )
        native.asked = attention_mask, int(q_offset), kv_offset
        return native

    @classmethod
    def visible(cls, module, native: Tensor, q_len: int, kv_len: int) -> Tensor:
        batch, config = native.shape[0], cls.config
        kind = config.resolve(module.config.num_hidden_layers)[module.layer_idx]
        if kind.full:
            return native
        padding, q_offset, kv_offset = native.asked
        slots = max(q_offset + q_len, kv_offset + kv_len)
        real = torch.ones(batch, slots, dtype=torch.long)
        if padding is not None:
            real = torch.nn.functional.pad(padding.long(), (0, slots - padding.shape[1]))
        position = real.cumsum(-1) - 1
        q = position[:, None, q_offset : q_offset + q_len, None]
        kv = position[:, None, None, kv_offset : kv_offset + kv_len]
        near = (q - kv < config.sliding_window) | (kv < config.sink_tokens)
        if cls.prompt_lengths is not None:
            length = torch.tensor(cls.prompt_lengths)[:, None, None, None]
            decode, tail = q >= length, (q >= length - config.dense_tail) & (q < length)
        else:
            last = real.cumsum(-1).amax(-1)[:, None, None, None]  # rows of this forward end with the sequence
            decode, tail = torch.tensor(q_len == 1), (q >= last - config.dense_tail) & torch.tensor(q_len > 1)
        dense = tail | decode if kind.full_attention_decode else tail
        return native & (near | dense)

    @classmethod
    def attention(cls, module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        visible = cls.visible(module, attention_mask, query.shape[2], key.shape[2])
        scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible, -math.inf)
        if s_aux is not None:
            scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
        weights = scores.softmax(-1).nan_to_num(0)[..., : key.shape[2]]
        return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("swaa_reference", Reference.attention)
AttentionMaskInterface.register("swaa_reference", Reference.mask)


def under_reference(model, config, call, prompt_lengths=None):
    Reference.config, Reference.prompt_lengths = config, prompt_lengths
    model.set_attn_implementation("swaa_reference")
    try:
        return call()
    finally:
        model.set_attn_implementation("swaa_flex")


class Truth(Reference):
    """One dense forward over a finished conversation, told which columns are answers."""

    dense: Tensor
    decode: Tensor
    held_from: Tensor

    @classmethod
    def set(cls, config, sequence, attention_mask, answers):
        cls.config = config
        columns = torch.arange(sequence.shape[1])
        cls.decode = torch.zeros(len(columns), dtype=torch.bool)
        tail = torch.zeros(len(columns), dtype=torch.bool)
        # What a layer without full-attention decode holds of earlier turns when the rows of a prompt come.
        cls.held_from = torch.zeros(len(columns), dtype=torch.long)
        for start, stop in answers:
            cls.decode[start:stop] = True
            tail[max(0, start - config.dense_tail) : start] = True
            cls.held_from[stop:] = max(0, stop - (config.sliding_window - 1))
        cls.dense = tail & ~cls.decode

    @classmethod
    def visible(cls, module, native: Tensor, q_len: int, kv_len: int) -> Tensor:
        config = cls.config
        kind = config.resolve(module.config.num_hidden_layers)[module.layer_idx]
        if kind.full:
            return native
        padding, _, _ = native.asked
        position = padding.long().cumsum(-1) - 1
        q, kv = position[:, None, :, None], position[:, None, None, :]
        near = (q - kv < config.sliding_window) | (kv < config.sink_tokens)
        dense = cls.dense[:, None].expand(q_len, kv_len)
        if kind.full_attention_decode:
            dense = dense | cls.decode[:, None]
        elif not getattr(module, "is_sliding", False):  # what the model itself restricts, transformers' layers hold
            dense = dense & (torch.arange(kv_len) >= cls.held_from[:, None])
        return native & (near | dense)


AttentionInterface.register("swaa_truth", Truth.attention)
AttentionMaskInterface.register("swaa_truth", Truth.mask)
