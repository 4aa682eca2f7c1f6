"""LoRA adapters together with the recipe they were trained for."""

from __future__ import annotations

import importlib
import importlib.util
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import CONFIG_NAME, PreTrainedConfig, PreTrainedModel

from .. import recipes
from ..config import SWAAConfig
from ..errors import ConfigError
from ..files import held, refuse_file, write_atomically
from ..hf.adapt import adapt
from ..hf.config import swaa_of

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

ADAPTER = "adapter"
RECIPE = "swaa_config.json"
_REFERENCE = "sliding_window_size"  # a key that only the reference implementation's dicts have


def load_adapter(
    model: PreTrainedModel, folder: str | Path, swaa: str | SWAAConfig | Mapping[str, Any] | None = None
) -> PeftModel:
    """Puts a LoRA adapter on its base model, under the recipe it was trained for.

    All that peft saves with one is part of it: DoRA's magnitudes, trained embeddings, heads and norms
    (`modules_to_save`), single tokens (`trainable_token_indices`), biases.

    Adapters of `finetune` bring their recipe in `swaa_config.json`. Others, such as those that the paper's authors
    released, take it from `swaa`.

    Args:
        model: the base model, with whatever attention it was loaded.
        folder: an adapter in peft's layout (`adapter_config.json` and weights).
        swaa: a recipe name, a `SWAAConfig`, its fields as a dict, or a dict of the reference implementation
            (`sliding_window_size`, `keep_first`, `force_fa_decode`, `non_sliding_layers`); None for the adapter's own.

    Returns:
        The model with the adapter, ready for generation.

    Raises:
        ConfigError: if there is no adapter, no recipe, or the adapter is for another model or replaces whole layers.
        ImportError: if peft is not installed.
    """
    folder = Path(folder)
    refuse_adapter(model)
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{folder}: expected a LoRA adapter in peft's layout, but there is no adapter_config.json")
    described = _read(folder / "adapter_config.json")
    if not any((folder / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin")):
        raise ConfigError(f"{folder}: the adapter has no weights (adapter_model.safetensors)")
    if str(described.get("peft_type", "LORA")).upper() != "LORA":
        raise ConfigError(f"{folder}: expected a LoRA adapter, got one of type {described['peft_type']}")
    recipe = _recipe(model, folder, swaa)
    library = peft()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # refused below
            tuned: PeftModel = library.PeftModel.from_pretrained(adapt(model, recipe), str(folder))
    except Exception as error:  # peft and safetensors have many
        raise ConfigError(
            f"{folder}: the adapter does not fit this model ({model.config.model_type}); it is for "
            f"{described.get('base_model_name_or_path')} and its layers {described.get('target_modules')}. Load the "
            f"model again ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        ) from error
    _refuse_other_weights(tuned, folder)
    _refuse_copied_layers(tuned, folder)
    return tuned.eval()


def merge(tuned: PeftModel, folder: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Folds an adapter into its base model and saves a plain one, with the recipe in its config.

    `AutoModelForCausalLM.from_pretrained(folder)` then runs it under the recipe, once swaa_flex is imported.

    Args:
        tuned: what `finetune` or `load_adapter` returned; not to be used afterwards.
        folder: where to save.
        dtype: of the weights that are saved; None for what they are.

    Returns:
        The merged model.

    Raises:
        ConfigError: if the folder is a file, or another run is writing it.
    """
    refuse_file(folder)
    with held(Path(folder) / CONFIG_NAME):
        merged: PreTrainedModel = tuned.merge_and_unload()
        if dtype is not None:
            merged = merged.to(dtype)  # type: ignore[arg-type]
        merged.save_pretrained(folder)
    return merged


def save_swaa(config: PreTrainedConfig, folder: Path) -> None:
    """Writes the recipe of a model beside its adapter."""
    write_atomically(folder / RECIPE, json.dumps(swaa_of(config).to_dict(), indent=2) + "\n")


def _recipe(model: PreTrainedModel, folder: Path, swaa: str | SWAAConfig | Mapping[str, Any] | None) -> SWAAConfig:
    text = model.config.get_text_config()
    if swaa is None:
        if not (folder / RECIPE).is_file():
            raise ConfigError(
                f"{folder} does not say which recipe it was trained for (there is no {RECIPE}); say so with "
                "swaa=SWAAConfig(...) or swaa={'sliding_window_size': 2048, ...}"
            )
        swaa = _read(folder / RECIPE)
    if isinstance(swaa, Mapping) and _REFERENCE in swaa:
        return SWAAConfig.from_reference(swaa, text.num_hidden_layers)
    return recipes.coerce(swaa, text.model_type)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: expected a JSON object ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return found


def _refuse_other_weights(tuned: PeftModel, folder: Path) -> None:
    """Refuses weights that are not those of the layers of this model, of which peft warns, or says nothing.

    What an adapter consists of, peft knows: besides the matrices of LoRA, magnitudes (DoRA), whole modules
    (`modules_to_save`), single tokens, biases. Whole embeddings may be there too (`save_embedding_layers`).
    """
    wanted = set(peft().get_peft_model_state_dict(tuned, save_embedding_layers=False))
    found = set(peft().load_peft_weights(str(folder), device="cpu"))
    others = found - wanted - set(tuned.state_dict())
    for problem, names in (("lacks weights of this model", wanted - found), ("has weights of others", others)):
        if names:
            raise ConfigError(
                f"{folder}: the adapter {problem}, {len(names)} in all, such as {min(names)}; it is for another "
                "model, or in a layout other than peft's. Load the model again"
            )


def _refuse_copied_layers(tuned: PeftModel, folder: Path) -> None:
    """Refuses adapters for which peft copies attention: the copy has a configuration of its own.

    So it would keep the recipe of today when the model gets another one.
    """
    base = tuned.get_base_model()
    own = {id(module.config) for module in base.modules() if isinstance(module, PreTrainedModel)}
    for name, module in base.named_modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and id(config) not in own:
            raise ConfigError(
                f"{folder}: the adapter brings whole copies of layers with attention, such as {name} "
                "(modules_to_save or layer_replication), which would not follow a change of the recipe; expected "
                "weights of single projections, embeddings, norms or the head. Load the model again"
            )


def refuse_adapter(model: PreTrainedModel) -> None:
    """Refuses a model that carries an adapter already."""
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise ConfigError(
            "the model carries a LoRA adapter already; take it off with unload(), fold it in with "
            "swaa_flex.tuning.merge, or load the model again"
        )


def peft() -> Any:
    """The package peft, which is optional."""
    if importlib.util.find_spec("peft") is None:
        raise ImportError("fine-tuning takes the package peft: pip install 'swaa-flex[tune]'")
    return importlib.import_module("peft")
