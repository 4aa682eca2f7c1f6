"""`generate` of transformers over a compiled model: sampling, stopping and what is returned are transformers' own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateNonBeamOutput
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import ConfigError
from .cache import CACHE

if TYPE_CHECKING:
    from .compiled import CompiledModel


class ServedModel(GenerationMixin):
    """A model as `generate` of transformers sees it, whose forwards a `CompiledModel` answers.

    It is made for one call of `generate`, which goes on as for any model up to the forwards: the first one starts a
    request with all prompts, each further one is a decode step with the tokens chosen last. There is no cache to be
    made or handed on, and no attention mask that grows. What is not defined here, such as `config`, is the model's.

    Args:
        server: the compiled model.
    """

    main_input_name = "input_ids"

    def __init__(self, server: CompiledModel) -> None:
        self.server = server
        self.calls = 0  # of the server when this request was last looked after

    def __getattr__(self, name: str) -> Any:
        return getattr(self.server.model, name)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> CausalLMOutputWithPast:
        """A decode step: `input_ids` are the tokens chosen last, `[sequences, 1]`.

        `generate` looks at the names of these parameters to find out what to prepare.
        """
        if self.server.calls != self.calls:
            raise ConfigError(
                "generate: a streamer, logits processor or stopping criterion has begun a request of its own with the "
                "same compiled model, which replaced this one; compile the model twice for requests within requests"
            )
        logits = self.server.decode_step(input_ids)
        self.calls = self.server.calls
        return CausalLMOutputWithPast(logits=logits[:, None])

    def __call__(self, input_ids: Tensor, **options: Any) -> CausalLMOutputWithPast:
        """A decode step, whatever else `generate` says to a model."""
        return self.forward(input_ids)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As that of transformers, on this machine alone."""
        refuse([name for name in _BEYOND_DECODING if is_given(kwargs.get(name))])
        return super().generate(*args, **kwargs | {"synced_gpus": False})

    def decode(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None,
        **kwargs: Any,
    ) -> GenerateNonBeamOutput | torch.LongTensor:
        """What `generate` of the model itself has prepared, with the keywords that it hands to a decoding method."""
        inputs = without_preparations(input_ids, kwargs)
        refuse_what_is_not_honoured(generation_config, inputs)
        return self._sample(
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            streamer=streamer,
            attention_mask=inputs.get("attention_mask"),
            use_cache=True,
        )

    # --- the steps of `generate` that are other ones here; transformers 5.17 to 5.24 ------------------------------

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """The first step that knows all that was asked for."""
        config, inputs = super()._prepare_generation_config(generation_config, **kwargs)
        refuse_what_is_not_honoured(config, inputs)
        return config, inputs

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # so none is made

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        return False  # it is compiled

    @contextmanager
    def _optimize_model_for_decode(self) -> Iterator[None]:
        yield  # graphs run the experts that they were made with

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> CausalLMOutputWithPast:
        new = generation_config.max_length - input_ids.shape[1]
        logits = self.server._begin(input_ids, model_kwargs.get("attention_mask"), new)
        self.calls = self.server.calls
        return CausalLMOutputWithPast(logits=logits[:, None])

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Of a decode step."""
        return {"input_ids": input_ids[:, -1:]}

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        return model_kwargs


_BEYOND_DECODING = ("assistant_model", "custom_generate", "synced_gpus", "cache_implementation")
"""Keywords with which `generate` turns to other code before it looks at the rest."""


def refuse_what_is_not_honoured(config: GenerationConfig, inputs: Mapping[str, Any]) -> None:
    """Refuses what `generate` was asked for beyond choosing tokens one after the other.

    Args:
        config: of the call.
        inputs: the keywords of the call that are no options of it.

    Raises:
        ConfigError: says what to do instead.
    """
    mode = config.get_generation_mode()
    asked = {
        mode.value: mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE),
        "use_cache=False": config.use_cache is False,
        "cache_implementation": config.cache_implementation is not None,
        "prefill_chunk_size": config.prefill_chunk_size is not None,
        "guidance_scale": config.guidance_scale not in (None, 1),
        **{name: is_given(value) for name, value in inputs.items() if name not in ("input_ids", "attention_mask")},
    }
    refuse([name for name, is_asked in asked.items() if is_asked])


def refuse(names: list[str]) -> None:
    """Raises ConfigError, which says what to do instead, if there is any name of something that was asked for."""
    if names:
        raise ConfigError(
            f"generate of a compiled model cannot honour {', '.join(names)}: it decodes greedily or samples, from "
            "input_ids and attention_mask, with a cache and chunks of its own; leave it out, or call generate of the "
            "model itself, with SWAACache or without"
        )


def is_given(value: Any) -> bool:
    """Whether a keyword asks for something."""
    return value is not None and value is not False and not (isinstance(value, dict) and not value)


def without_preparations(input_ids: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a caller has given of the keywords that `generate` of a model hands to a decoding method.

    Args:
        input_ids: `[sequences, len]`.
        kwargs: the keywords; `generate` adds positions, a cache, and options of the forward.
    """
    given = {name: value for name, value in kwargs.items() if name not in ("use_cache", "logits_to_keep")}
    if not getattr(given.get(CACHE), "_is_user_defined", False):
        given.pop(CACHE, None)
    positions, mask = given.get("position_ids"), given.get("attention_mask")
    if positions is not None:
        real = torch.ones_like(input_ids) if mask is None else mask
        expected = real.cumsum(-1) - 1
        if positions.shape[-1] == expected.shape[-1] and bool(((positions == expected) | (real == 0)).all()):
            del given["position_ids"]
    return given
