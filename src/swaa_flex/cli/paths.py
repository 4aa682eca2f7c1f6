"""Paths of the command line, checked before a model is loaded: what is missing, in the way, not writable, or taken."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import typer

from ..errors import ConfigError
from ..files import refuse_file, reserved


def read_file(option: str, path: Path | None) -> None:
    """Refuses a file that cannot be read.

    Args:
        option: the option or argument that names it, for the message.
        path: the file; None where the option was not given.

    Raises:
        ConfigError: if it is not there, is a folder, or may not be read.
    """
    if path is None:
        return
    with _named(option, path, "a file that can be read"), open(path, "rb"):
        pass


def read_adapter(option: str, folder: Path | None) -> None:
    """Refuses a folder without an adapter in peft's layout, and says so if peft itself is missing.

    Raises:
        ConfigError: if it is not one.
        ImportError: if peft is not installed.
    """
    if folder is None:
        return
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{option} {folder}: expected the folder of an adapter, with adapter_config.json")
    from ..tuning.adapters import peft

    peft()


def write_folder(option: str, folder: Path | None) -> None:
    """Refuses a folder, existing or new, that files cannot be written to. Nothing of the attempt is left.

    Raises:
        ConfigError: if it is a file, or may not be made or written to.
    """
    if folder is None:
        return
    refuse_file(folder, f"{option} {folder}: it")
    if int(os.environ.get("RANK", 0)) != 0:
        return  # the first process writes, and the attempts of several would meet
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with _named(option, folder, "a folder that can be written to"):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def write_file(option: str, path: Path | None) -> None:
    """Refuses a file, existing or new, that cannot be written.

    Raises:
        ConfigError: if it is a folder, or may not be written.
    """
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{option} {path}: it is a folder; expected a file, existing or new")
    write_folder(f"{option} {path}: its folder", path.parent)


def empty_folder(option: str, folder: Path) -> None:
    """Refuses a folder that holds something already.

    Raises:
        ConfigError: if so.
    """
    if contents(folder):
        raise ConfigError(f"{option} {folder}: it is not empty; expected a new folder; name another, or delete it")


def contents(folder: Path) -> list[Path]:
    """What a folder holds, apart from locks; nothing if there is no folder."""
    return [path for path in folder.iterdir() if path.suffix != ".lock"] if folder.is_dir() else []


def reserve(command: typer.Context, path: Path | None) -> None:
    """Keeps a file, and what is written beside it, to a command until it ends.

    Args:
        command: its context.
        path: the file that the library holds while it writes; None for none.

    Raises:
        ConfigError: if another run holds it.
    """
    if path is not None:
        command.with_resource(reserved(path))


@contextlib.contextmanager
def _named(option: str, path: Path, expected: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{option} {path}: expected {expected} ({error.strerror or error})") from error
