"""Which backend can run where, and which one "auto" takes."""

from __future__ import annotations

import importlib.util

import torch

from .config import BACKENDS
from .errors import BackendUnavailableError, ConfigError, did_you_mean

FLASH_HEAD_DIM = 128
FLASH_CAPABILITIES = (9, 10)  # compute capability majors: Hopper, Blackwell


def resolve(
    backend: str,
    device: torch.device,
    *,
    q_len: int,
    needs_grad: bool = False,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
) -> str:
    """The backend that runs, given what was asked for.

    Args:
        backend: "auto" or a backend by name.
        device: the device of the query.
        q_len: number of query rows.
        needs_grad: whether the backward pass will run.
        dtype: of the query, if known.
        head_dim: of the query, if known.

    Raises:
        ConfigError: for a name that is no backend.
        BackendUnavailableError: if the backend asked for cannot run; says what is missing and the way out.
    """
    if backend not in BACKENDS:
        raise ConfigError(
            f"backend={backend!r}: expected one of {', '.join(BACKENDS)}{did_you_mean(backend, BACKENDS)}"
        )
    compiling = torch.compiler.is_compiling()
    if backend == "auto":
        if device.type == "cuda":
            # flash has no split over keys on sm90, so decoding is triton's.
            flash = q_len >= 128 and not why_not(
                "flash", device, needs_grad=needs_grad, dtype=dtype, head_dim=head_dim
            )
            backend = "flash" if flash else "triton"
            if why_not(backend, device, dtype=dtype, head_dim=head_dim) and not compiling:
                backend = "chunked"
        else:
            backend = "cpp" if device.type == "cpu" and compiling else "chunked"
    reason = why_not(backend, device, needs_grad=needs_grad, dtype=dtype, head_dim=head_dim)
    if reason:
        raise BackendUnavailableError(f"backend={backend!r} cannot run here: {reason}")
    return backend


def why_not(
    backend: str,
    device: torch.device,
    *,
    needs_grad: bool = False,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
) -> str:
    """Why a backend cannot run, with the way out; empty if it can."""
    if backend == "chunked":
        if torch.compiler.is_compiling():
            return (
                "it reads the mask's bounds on the host, which breaks a torch.compile graph; use backend='auto', or "
                "call it outside the compiled function"
            )
        return ""
    if backend == "cpp":
        if device.type != "cpu":
            return f"it is FlexAttention's CPU kernel and the tensors are on {device}; use backend='auto'"
        if needs_grad:
            return (
                "FlexAttention has no backward pass on CPU; run it under torch.no_grad(), or without torch.compile, "
                "where backend='chunked' has gradients"
            )
        if dtype is not None and dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it takes float32, bfloat16 and float16, not {_name(dtype)}; use backend='chunked'"
        return ""
    if device.type != "cuda":
        return f"it needs a CUDA device and the tensors are on {device}; use backend='auto'"
    if head_dim is not None and head_dim < 16:
        return f"head_dim={head_dim}: it takes at least 16; use backend='chunked'"
    if backend == "triton":
        if dtype == torch.float64:
            return "it takes float32, bfloat16 and float16, not float64; use backend='chunked'"
        return ""
    missing: str = _flash_missing(device.index)
    if missing:
        return missing
    if dtype is not None and dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {_name(dtype)}; use backend='triton'"
    if head_dim is not None and (head_dim > FLASH_HEAD_DIM or head_dim % 8):
        return f"head_dim={head_dim}: it takes multiples of 8 up to {FLASH_HEAD_DIM}; use backend='triton'"
    return ""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _flash_missing(device_index: int | None) -> str:
    """What the machine lacks for flash; a constant for torch.compile, which cannot trace the question."""
    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
        return (
            "the package flash-attn-4 is not installed; pip install --pre 'swaa-flex[flash]', or use backend='triton'"
        )
    major, minor = torch.cuda.get_device_capability(device_index)
    if major not in FLASH_CAPABILITIES:
        return f"it needs compute capability 9.0 or 10.0 and this GPU has {major}.{minor}; use backend='triton'"
    return ""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_hopper(device_index: int | None) -> bool:
    """Whether the CUDA device has compute capability 9; a constant for torch.compile."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device_index)[0] == 9


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
