"""Which backend can run where, and which one "auto" takes: functions of the call and of what the device can do."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from .config import BACKENDS
from .errors import BackendUnavailableError, ConfigError, did_you_mean

FLASH_HEAD_DIM = 128
FLASH_CAPABILITIES = (9, 10)  # compute capability majors: Hopper, Blackwell
FLASH_ROWS = 128
"""Query rows from which flash is taken: it has no split over keys on sm90, which few rows need."""


class Inputs(NamedTuple):
    """What a call is for, as far as it is known. Backends, kernels and block lists are chosen from it.

    Attributes:
        q_len: number of query rows.
        kv_len: number of keys.
        device: of all tensors.
        batch: number of sequences.
        heads: number of query heads.
        kv_heads: number of key-value heads.
        dtype: of query, key and value.
        head_dim: of query and key.
        value_dim: of the value; None is taken for `head_dim`.
        needs_grad: whether the backward pass will run.
        needs_lse: whether the log-sum-exp is wanted, as learned sink logits need it too.
        in_graph: whether torch.compile traces the call into a graph.
    """

    q_len: int
    kv_len: int
    device: torch.device
    batch: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    dtype: torch.dtype | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    needs_grad: bool = False
    needs_lse: bool = False
    in_graph: bool = False

    @classmethod
    def of(cls, query: Tensor, value: Tensor, *, needs_grad: bool, needs_lse: bool, in_graph: bool) -> Inputs:
        """What a call with these tensors is for."""
        batch, heads, q_len, head_dim = query.shape
        _, kv_heads, kv_len, value_dim = value.shape
        return cls(
            q_len=q_len,
            kv_len=kv_len,
            device=query.device,
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            dtype=query.dtype,
            head_dim=head_dim,
            value_dim=value_dim,
            needs_grad=needs_grad,
            needs_lse=needs_lse,
            in_graph=in_graph,
        )

    @property
    def head_dims(self) -> tuple[int, ...]:
        """Of query and value, those that are known."""
        return tuple(dim for dim in (self.head_dim, self.value_dim) if dim is not None)

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        assert self.heads is not None and self.kv_heads is not None
        return self.heads // self.kv_heads


class Capability(NamedTuple):
    """What a device can do, as far as the choice of backends and kernels depends on it.

    Attributes:
        device_type: "cuda", "cpu" or another of torch's.
        compute: the compute capability of a CUDA device, such as "9.0".
        hip: whether the device is AMD's.
        has_flash: whether the package flash-attn-4 is installed.
        flash_lse_is_scaled: whether flex_attention takes FLASH's log-sum-exp for base 2 and scales it once too often.
    """

    device_type: str
    compute: str = ""
    hip: bool = False
    has_flash: bool = False
    flash_lse_is_scaled: bool = False

    @property
    def major(self) -> int:
        """The major number of the compute capability, 0 if there is none."""
        return int(self.compute.partition(".")[0] or 0)

    @property
    def is_hopper(self) -> bool:
        """Whether the options measured on an H200 hold."""
        return self.major == 9 and not self.hip


def capability_of(device: torch.device) -> Capability:
    """What a device can do."""
    if device.type != "cuda":
        return Capability(device.type)
    return Capability(
        "cuda",
        compute=_compute(device.index),
        hip=torch.version.hip is not None,
        has_flash=_has_flash(),
        flash_lse_is_scaled=_flash_lse_is_scaled(),
    )


def resolve(backend: str, inputs: Inputs, capability: Capability) -> str:
    """The backend that runs, given what was asked for.

    "auto" takes flash only if dtype and head_dim are known to suit it.

    Args:
        backend: "auto" or a backend by name.
        inputs: what the call is for.
        capability: what the device can do.

    Raises:
        ConfigError: for a name that is no backend.
        BackendUnavailableError: if the backend asked for, or with "auto" every backend, cannot run; says what is
            missing and the way out.
    """
    if backend not in BACKENDS:
        raise ConfigError(
            f"backend={backend!r}: expected one of {', '.join(BACKENDS)}{did_you_mean(backend, BACKENDS)}"
        )
    if backend != "auto":
        reason = why_not(backend, inputs, capability)
        if reason:
            raise BackendUnavailableError(f"backend={backend!r} cannot run here: {reason}")
        return backend
    reason = ""
    for candidate in _candidates(inputs, capability):
        reason = why_not(candidate, inputs, capability)
        if not reason:
            return candidate
    raise BackendUnavailableError(f"attention cannot run here: {reason}")


def why_not(backend: str, inputs: Inputs, capability: Capability) -> str:
    """Why a backend cannot run, with the way out; empty if it can."""
    if backend == "chunked":
        return _why_not_chunked(inputs, capability)
    if backend == "cpp":
        return _why_not_cpp(inputs, capability)
    otherwise = "call it outside of torch.compile" if inputs.in_graph else "use backend='chunked'"
    if capability.device_type != "cuda":
        return f"it needs a CUDA device and the tensors are on {inputs.device}; use backend='auto'"
    for dim in inputs.head_dims:
        if dim < 16:
            return f"head_dim={dim}: it takes at least 16; {otherwise}"
    if backend == "flash":
        return _why_not_flash(inputs, capability)
    if inputs.dtype == torch.float64:
        return f"it takes float32, bfloat16 and float16, not float64; {otherwise}"
    return ""


def _candidates(inputs: Inputs, capability: Capability) -> list[str]:
    """What "auto" tries, the best first."""
    if capability.device_type == "cpu":
        return ["cpp" if inputs.in_graph else "chunked"]
    if capability.device_type != "cuda":
        return ["chunked"]
    suits_flash = inputs.q_len >= FLASH_ROWS and inputs.dtype is not None and inputs.head_dim is not None
    return [*(["flash"] if suits_flash else []), "triton", *([] if inputs.in_graph else ["chunked"])]


def _why_not_chunked(inputs: Inputs, capability: Capability) -> str:
    if not inputs.in_graph:
        return ""
    others = "use backend='auto', or " if capability.device_type in ("cpu", "cuda") else ""
    return (
        "it reads the mask's bounds on the host, which breaks a torch.compile graph; "
        f"{others}call it outside of the compiled function"
    )


def _why_not_cpp(inputs: Inputs, capability: Capability) -> str:
    if capability.device_type != "cpu":
        return f"it is FlexAttention's CPU kernel and the tensors are on {inputs.device}; use backend='auto'"
    where, otherwise = "", "use backend='chunked'"
    if inputs.in_graph:
        where, otherwise = "inside torch.compile ", "call it outside of torch.compile"
    if inputs.needs_grad:
        return (
            f"gradients are asked for {where}and FlexAttention has no backward pass on CPU; run it under "
            f"torch.no_grad(), or {otherwise}"
        )
    if inputs.needs_lse:
        return (
            f"learned sink logits or return_lse are asked for {where}and FlexAttention on CPU returns no "
            f"log-sum-exp; {otherwise}"
        )
    if inputs.dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, not {_name(inputs.dtype)}; {otherwise}"
    return ""


def _why_not_flash(inputs: Inputs, capability: Capability) -> str:
    if not capability.has_flash:
        return (
            "the package flash-attn-4 is not installed; pip install --pre 'swaa-flex[flash]', or use backend='triton'"
        )
    if capability.major not in FLASH_CAPABILITIES:
        return f"it needs compute capability 9.0 or 10.0 and this GPU has {capability.compute}; use backend='triton'"
    if inputs.dtype not in (None, torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {_name(inputs.dtype)}; use backend='triton'"
    for dim in inputs.head_dims:
        if dim > FLASH_HEAD_DIM or dim % 8:
            return f"head_dim={dim}: it takes multiples of 8 up to {FLASH_HEAD_DIM}; use backend='triton'"
    return ""


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


# torch.compile cannot trace what these ask, so to a graph they are constants, which may be text and booleans.


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _compute(index: int | None) -> str:
    return "{}.{}".format(*torch.cuda.get_device_capability(index))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_flash() -> bool:
    return _is_installed("flash_attn") and _is_installed("flash_attn.cute")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _flash_lse_is_scaled() -> bool:
    return not _mentions_log2()


@functools.cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def _mentions_log2() -> bool:
    # torch 2.13 tells base 2 and base e apart, by a variable of this name; torch 2.11 does not.
    return "stats_are_log2" in inspect.getsource(flex_attention)
