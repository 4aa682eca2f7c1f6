"""`swaa-flex doctor`: what a bug report needs to know about the machine."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from typing import Annotated, Any

import torch
import typer

from .. import backends
from .._version import __version__
from ..config import BACKENDS

_PACKAGES = ("transformers", "accelerate", "triton", "flash-attn-4")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="The same as a JSON object.")] = False,
) -> None:
    """Print versions, devices and which backends can run here, ready to paste into a bug report.

    For a backend that cannot run, the line says what is missing and how to get it.

    [bold]Examples[/]

      swaa-flex doctor
      swaa-flex doctor --json > machine.json
    """
    report = examine()
    typer.echo(json.dumps(report, indent=2) if as_json else as_text(report))


def examine() -> dict[str, Any]:
    """Looks at the machine, initialising CUDA if there is one.

    Returns:
        `versions` (package to version, None if not installed), `platform`, `devices` (CUDA GPUs with `name`, `model`,
        `capability` and `memory_gib`, or `name` and `error`) and `backends` (name to None if it can run on the first
        GPU, or on the CPU if there is none, else the reason why not), as JSON values.
    """
    devices = [_device(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    default = torch.device("cuda" if devices and "error" not in devices[0] else "cpu")
    return {
        "versions": {
            "swaa_flex": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{package: _version(package) for package in _PACKAGES},
        },
        "platform": platform.platform(),
        "devices": devices,
        "backends": {name: _why_not(name, default) for name in BACKENDS if name != "auto"},
    }


def _why_not(name: str, device: torch.device) -> str | None:
    if device.type == "cpu" and name in ("flash", "triton"):
        return "it needs a CUDA GPU"
    return backends.why_not(name, device) or None


def as_text(report: dict[str, Any]) -> str:
    """What `examine` found, one line each."""
    lines = [(name, version or "not installed") for name, version in report["versions"].items()]
    lines.append(("platform", report["platform"]))
    for device in report["devices"]:
        found = "{model}, compute capability {capability}, {memory_gib} GiB" if "model" in device else "error: {error}"
        lines.append((device["name"], found.format(**device)))
    if not report["devices"]:
        lines.append(("devices", "no CUDA GPU"))
    lines += [
        (f"backend {name}", "available" if reason is None else f"no: {reason}")
        for name, reason in report["backends"].items()
    ]
    widest = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{widest}}  {value}" for name, value in lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(index: int) -> dict[str, Any]:
    name = f"cuda:{index}"
    try:
        properties = torch.cuda.get_device_properties(index)
    except RuntimeError as error:  # a broken driver is what a report should show, not what should prevent it
        return {"name": name, "error": str(error).partition("\n")[0]}
    return {
        "name": name,
        "model": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }
