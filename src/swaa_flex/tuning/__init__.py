"""Fine-tuning under sliding-window masks: data, self-distillation, training, adapters."""

from pathlib import Path

from ..hf.adapt import full_attention
from .adapters import load_adapter, merge
from .data import Collator, Example, Sample, encode, encode_each, fit, prompt_ids, read_samples
from .train import TuningConfig, finetune

LAUNCH = Path(__file__).with_name("launch")
"""Configurations for `accelerate launch`: ddp.yaml and fsdp.yaml."""

__all__ = [
    "LAUNCH",
    "Collator",
    "Example",
    "Sample",
    "TuningConfig",
    "encode",
    "encode_each",
    "finetune",
    "fit",
    "full_attention",
    "load_adapter",
    "merge",
    "prompt_ids",
    "read_samples",
]
