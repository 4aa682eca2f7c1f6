"""The plugin for vLLM: `--attention-backend CUSTOM` serves a model with a recipe.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). Nothing of vLLM is patched.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Makes the backend known to vLLM as CUSTOM, and the logits processor that follows prompts. May be called again.

    A version of vLLM that the plugin does not support is left as it is: its log says so where a recipe is asked for.
    """
    import vllm

    from . import discovery, unsupported

    if unsupported.is_supported(vllm.__version__):
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        register_backend(AttentionBackendEnum.CUSTOM, "swaa_flex.vllm.backend.Backend")
        discovery.offer_logits_processor()
    else:
        unsupported.say_where_a_recipe_is_asked_for()
