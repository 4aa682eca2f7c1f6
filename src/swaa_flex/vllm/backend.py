"""The attention backend: vLLM's FlashAttention over its pages, where rows see what the recipe says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states
from vllm.v1.kv_cache_interface import AttentionSpec

from ..errors import BackendUnavailableError, ConfigError, UnsupportedModelError
from .prompts import PromptLengths
from .recipe import LOGGER, check_layer, recipe_of, rule_at, rules_of
from .rows import Rule, Stretches, attend, cut, cut_decode, have_sliding, in_tail

SERVED = (
    "swaa_flex serves decoders without MLA whose keys and values are float16 or bfloat16; "
    "without a recipe, another --attention-backend may run this"
)


class Backend(FlashAttentionBackend):
    """What vLLM registers as CUSTOM."""

    @staticmethod
    def get_name() -> str:
        """The name that users choose it by."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Attention]:
        """What runs a layer."""
        return Attention

    @staticmethod
    def get_builder_cls() -> type[MetadataBuilder]:
        """What prepares a step."""
        return MetadataBuilder

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        """What of a configuration it cannot run, and what it can; vLLM puts this into its error."""
        reasons: list[str] = super().validate_configuration(*args, **kwargs)
        return [*reasons, SERVED] if reasons else []

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: Any) -> bool:
        """No quantised ones: a part of a softmax would need the scales of its own keys."""
        return kv_cache_dtype in (None, "auto", "float16", "bfloat16")

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoders only: no encoders, no cross-attention."""
        return bool(attn_type == AttentionType.DECODER)

    @classmethod
    def supports_sink(cls) -> bool:
        """No learned sink logits: each part of a softmax would count them."""
        return False

    @classmethod
    def supports_non_causal(cls) -> bool:
        """No rows that see later keys."""
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """No: a row is summed in one part or in two, by what else is in its step."""
        return False


@dataclass
class Metadata(FlashAttentionMetadata):
    """Of one step. `stretches` has the rules that some row slides by; with other rules all rows are full."""

    stretches: dict[Rule, Stretches] = field(default_factory=dict)


class MetadataBuilder(FlashAttentionMetadataBuilder):
    """Cuts the rows of a step, once for each rule."""

    supports_update_block_table = False  # stretches have block tables of their own

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec) -> AttentionCGSupport:
        """Steps of decode rows: all are full, or all slide.

        Sliding rows of several tokens differ in their sinks, so there one token each.
        """
        rules = [rule for rule in rules_of(vllm_config) if rule is not None]
        if all(rule.dense_decode for rule in rules):
            return AttentionCGSupport.UNIFORM_BATCH
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        rules = rules_of(vllm_config)
        # In the order of the layers, so that steps are built alike everywhere.
        found = {name: rule_at(rules, extract_layer_index(name), name) for name in layer_names}
        self.rules = list(dict.fromkeys(rule for rule in found.values() if rule))
        most = vllm_config.scheduler_config.max_num_seqs
        self.sinks = {rule: torch.zeros(most, dtype=torch.int32, device=device) for rule in self.rules}
        self.prompts = PromptLengths.of(vllm_config)
        if self.rules:
            self._check(layer_names[0])
        self._say([name for name, rule in found.items() if rule])

    def _check(self, layer_name: str) -> None:
        if type(self) is not MetadataBuilder:  # vLLM derives from a builder what changes the steps that it is told of
            raise UnsupportedModelError(
                f"{type(self).__name__}: layers such as {layer_name} have an attention of their own, which a recipe "
                "cannot be combined with; make them full_attention_layers"
            )
        config = self.vllm_config
        untold = config.speculative_config is not None or config.model_config.runner_type == "pooling"
        if self.prompts is None and not untold:
            raise BackendUnavailableError(
                "the logits processor of swaa_flex, which learns where prompts end, was not loaded; expected vLLM to "
                "load the plugin swaa_flex in each process: install the package swaa-flex on all machines"
            )
        # One token of a prompt in a step of answers would run the graph of such steps, all rows of which are dense.
        graphs = config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        tokens = config.scheduler_config.max_num_batched_tokens
        most = config.scheduler_config.max_num_seqs * (1 + config.num_speculative_tokens)
        if graphs and tokens <= most and any(rule.dense_decode for rule in self.rules):
            raise ConfigError(
                f"max_num_batched_tokens={tokens}: a prompt could come token by token beside {most} tokens of "
                "answers, and a CUDA graph of full-attention decode would take it for one; "
                f"expected more than {most}, or --enforce-eager"
            )

    def _say(self, layer_names: list[str]) -> None:
        """Which layers slide, and by what recipe."""
        layers = self.vllm_config.compilation_config.static_forward_context
        sliding = [name for name in layer_names if name in layers and layers[name].impl.own_window is None]
        numbers = " ".join(str(extract_layer_index(name)) for name in sliding)
        if sliding:
            LOGGER.info("swaa_flex: %r; layers that slide: %s", recipe_of(self.vllm_config), numbers)
        elif layer_names and all(name in layers for name in layer_names):
            LOGGER.warning(
                "swaa_flex: the layers %s have a window of their own, so the recipe changes nothing for them; where "
                "all others are full_attention_layers, it changes nothing at all",
                " ".join(str(extract_layer_index(name)) for name in layer_names),
            )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        """Of a step, for all layers of this group; see the base class."""
        common = common_attn_metadata
        base = super().build(0, common, fast_build)
        metadata = Metadata(**vars(base))
        if not self.rules:
            return metadata
        starts = common.query_start_loc_cpu
        lengths = common.seq_lens_cpu_upper_bound
        prefilling = common.is_prefilling
        assert lengths is not None and prefilling is not None
        if self.prompts is not None:
            prompts = self.prompts.of_batch(common.num_reqs)
        else:
            prompts = torch.where(prefilling, lengths, 0).int()
        single = common.max_query_len == 1
        decodes = single and not bool(prefilling.any())
        on_device = None
        for rule in self.rules:
            if single and not rule.dense_decode:
                # A CUDA graph of decode steps runs the last rows of prompts too, if they come alone.
                dense = in_tail(rule, lengths, prompts) if rule.dense_tail and not decodes else None
                metadata.stretches[rule] = cut_decode(
                    rule,
                    base.query_start_loc,
                    base.seq_lens,
                    base.block_table,
                    self.sinks[rule][: common.num_reqs],
                    max_keys=base.max_seq_len,
                    dense=None if dense is None else dense.to(self.device, non_blocking=True),
                )
                continue
            if decodes or not have_sliding(rule, lengths - starts.diff(), lengths, prompts):
                continue
            if on_device is None:
                on_device = prompts.to(self.device, non_blocking=True)
            metadata.stretches[rule] = cut(
                rule,
                base.query_start_loc,
                base.seq_lens,
                on_device,
                base.block_table,
                rows=base.num_actual_tokens,
                max_rows=base.max_query_len,
                max_keys=base.max_seq_len,
            )
        return metadata

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        """Never: a common prefix is not common to rows that slide."""
        return False


class Attention(FlashAttentionImpl):
    """Of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, *args, **kwargs)
        self.rules = rules_of(get_current_vllm_config())
        self.own_window = sliding_window
        self.biases = alibi_slopes

    def rule_of(self, layer: torch.nn.Module) -> Rule | None:
        """How the rows of this layer see; None if full, or by a window of the model's own."""
        name = str(layer.layer_name)
        rule = rule_at(self.rules, extract_layer_index(name), name)
        if rule is not None:
            check_layer(rule, self.own_window, self.biases)
        # A window of the model's own that is no wider shows every row what the rule would.
        return None if self.own_window is not None else rule

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Metadata,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of a step, see the base class: `output`, `[rows, heads, head_dim]`, is written."""
        rule = self.rule_of(layer)
        stretches = None if attn_metadata is None or rule is None else attn_metadata.stretches.get(rule)
        if rule is None or stretches is None:
            full: Tensor = super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
            return full
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(
                "quantised output of attention: switch the fusion of attention and quantisation off"
            )
        rows = attn_metadata.num_actual_tokens
        key_cache, value_cache = (canonicalize_singleton_dim_strides(x) for x in kv_cache.unbind(1))

        def kernel(
            keys: Tensor, stretches: Stretches, max_keys: int, *, causal: bool, window: int | None
        ) -> tuple[Tensor, Tensor]:
            out, lse = flash_attn_varlen_func(
                q=query[:rows],
                k=key_cache,
                v=value_cache,
                cu_seqlens_q=stretches.start,
                max_seqlen_q=stretches.max_rows,
                seqused_k=keys,
                max_seqlen_k=max_keys,
                softmax_scale=self.scale,
                causal=causal,
                window_size=None if window is None else [window - 1, 0],
                block_table=stretches.block_table,
                softcap=self.logits_soft_cap,
                return_softmax_lse=True,
                num_splits=attn_metadata.max_num_splits,
                fa_version=self.vllm_flash_attn_version,
            )
            return out, lse

        attend(rule, stretches, kernel, merge_attn_states, output[:rows].view(rows, self.num_heads, self.head_size))
        return output
