"""The plugin for vLLM: `--attention-backend CUSTOM` serves a model with a recipe.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). Nothing of vLLM is patched.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Makes the backend known to vLLM as CUSTOM. May be called again."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, "swaa_flex.vllm.backend.Backend")
