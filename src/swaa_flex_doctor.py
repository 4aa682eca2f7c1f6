"""The entry point of the command `swaa-flex`, and what a bug report needs to know about the machine.

It lies outside of the package swaa_flex, which imports torch and transformers: whether these are missing or broken is
for `swaa-flex doctor` to find out. For the same reason only the standard library is imported at the top.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import shutil
import sys
from typing import Any

_PACKAGES = ("torch", "transformers", "accelerate", "triton", "flash-attn-4")
_IMPORTED = ("torch", "transformers", "accelerate", "triton")  # flash-attn-4 takes long, and is asked about below
_BACKENDS = ("flash", "triton", "cpp", "chunked")


def main() -> None:
    """The entry point of `swaa-flex`."""
    if sys.argv[1:] in (["doctor"], ["doctor", "--json"]):
        print(report(as_json="--json" in sys.argv))
        return
    try:
        from swaa_flex.cli import main as command
    except Exception as error:  # broken packages raise all kinds
        error.add_note("'swaa-flex doctor' says which packages are missing or broken")
        raise
    command()


def report(as_json: bool = False) -> str:
    """What `examine` found, a line each or as a JSON object."""
    found = examine()
    return json.dumps(found, indent=2) if as_json else as_text(found)


def examine() -> dict[str, Any]:
    """Looks at the machine, initialising CUDA if there is one.

    Returns:
        `versions` (package to version, with the reason if it cannot be imported; None if not installed), `platform`,
        `devices` (CUDA GPUs with `name`, `model`, `capability` and `memory_gib`, or `name` and `error`) and `backends`
        (name to None if it can run on the first GPU, or on the CPU if there is none, else the reason why not), as
        JSON values.
    """
    problems = {package: _problem(package) for package in _IMPORTED if _version(package) is not None}
    problems["swaa_flex"] = _problem("swaa_flex")
    versions = {"swaa_flex": _version("swaa-flex"), "python": platform.python_version()}
    if problems["swaa_flex"] is None:
        versions["swaa_flex"] = sys.modules["swaa_flex"].__version__
    versions |= {package: _version(package) for package in _PACKAGES}
    for package, problem in problems.items():
        if problem is not None:
            versions[package] = f"{versions[package] or 'no version'}, cannot be imported ({problem})"
    devices = [] if versions["torch"] is None or problems["torch"] is not None else _devices()
    on_gpu = bool(devices) and "error" not in devices[0]
    return {
        "versions": versions,
        "platform": platform.platform(),
        "devices": devices,
        "backends": {
            name: _why_not(name, on_gpu) if problems["swaa_flex"] is None else "swaa_flex cannot be imported"
            for name in _BACKENDS
        },
    }


def as_text(found: dict[str, Any]) -> str:
    """What `examine` found, one line each."""
    lines = [(name, version or "not installed") for name, version in found["versions"].items()]
    lines.append(("platform", found["platform"]))
    for device in found["devices"]:
        shown = "{model}, compute capability {capability}, {memory_gib} GiB" if "model" in device else "error: {error}"
        lines.append((device["name"], shown.format(**device)))
    if not found["devices"]:
        lines.append(("devices", "no CUDA GPU"))
    lines += [
        (f"backend {name}", "available" if reason is None else f"no: {reason}")
        for name, reason in found["backends"].items()
    ]
    widest = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{widest}}  {value}" for name, value in lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _problem(module: str) -> str | None:
    """Why a module cannot be imported."""
    try:
        importlib.import_module(module)
    except Exception as error:  # broken packages raise all kinds
        return _shortly(error)
    return None


def _shortly(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _devices() -> list[dict[str, Any]]:
    import torch

    try:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    except Exception as error:  # a broken driver is what a report should show, not what should prevent it
        return [{"name": "cuda", "error": str(error).partition("\n")[0]}]
    return [_device(f"cuda:{index}") for index in range(count)]


def _device(name: str) -> dict[str, Any]:
    import torch

    try:
        properties = torch.cuda.get_device_properties(int(name.removeprefix("cuda:")))
    except Exception as error:
        return {"name": name, "error": str(error).partition("\n")[0]}
    return {
        "name": name,
        "model": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def _why_not(name: str, on_gpu: bool) -> str | None:
    import torch

    from swaa_flex import backends

    if name in ("flash", "triton") and not on_gpu:
        return "it needs a CUDA GPU"
    try:
        asked = backends.Inputs(q_len=1, kv_len=1, device=torch.device("cuda" if on_gpu else "cpu"))
        reason = backends.why_not(name, asked, backends.capability_of(asked.device))
    except Exception as error:  # of a package that the backend needs
        return f"it cannot be asked ({_shortly(error)})"
    if not reason and name == "cpp":
        reason = _no_compiler()
    return reason or None


def _no_compiler() -> str:
    """Why torch.compile finds no C++ compiler; empty if it does."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        compiler = get_cpp_compiler()
        reason = "" if shutil.which(compiler) else f"no {compiler}"
    except Exception as error:
        reason = _shortly(error)
    return reason and f"it takes a C++ compiler, and there is none ({reason}); install g++, or name one in CXX"


if __name__ == "__main__":
    print(report(as_json="--json" in sys.argv))
