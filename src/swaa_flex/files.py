"""Files that are there as a whole or not at all, files that one run writes at a time, and folders that are files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import ConfigError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader, or a run that was killed, finds the old or the new one whole.

    Args:
        path: the file; its folder is made.
        content: what it is to hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


_RESERVED: ContextVar[frozenset[Path]] = ContextVar("reserved", default=frozenset())
"""Files that a command holds for the code it calls. `reserved` adds one, and the `held` that takes it over removes it,
each for as long as its block lasts; other threads see none."""


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Keeps a file, and what is written beside it, to this run: another run that wants it is refused at once.

    The operating system holds the lock, on a file `PATH.lock`, and releases it when the process ends, however it ends.
    Of the processes of one run (`accelerate launch`), the first one holds it.

    Args:
        path: the file; its folder is made.

    Raises:
        ConfigError: if another run holds it, or nothing can be written there.
    """
    own = path.absolute()
    if own not in _RESERVED.get():
        with _locked(path):
            yield
        return
    token = _RESERVED.set(_RESERVED.get() - {own})
    try:
        yield
    finally:
        _RESERVED.reset(token)


@contextmanager
def reserved(path: Path) -> Iterator[None]:
    """Holds a file for code that will hold it itself: a command is refused before it loads a model, not after.

    Args:
        path: the file; its folder is made, and is gone afterwards if nothing was written there.

    Raises:
        ConfigError: as `held`.
    """
    with _locked(path):
        token = _RESERVED.set(_RESERVED.get() | {path.absolute()})
        try:
            yield
        finally:
            _RESERVED.reset(token)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    if not is_first_process():
        yield
        return
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ConfigError(f"{path}: another run is writing it; wait until it has ended, or choose another") from error
    except OSError as error:
        raise ConfigError(f"{path}: nothing can be written there ({error}); choose another place") from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows deletes no file that is open
            Path(lock.lock_file).unlink()  # while it is locked: a lock on a file that is gone counts for nothing
        lock.release()
        with suppress(OSError):  # the first one that is not empty
            for folder in made:
                folder.rmdir()


def is_first_process() -> bool:
    """Whether this is the first process of those that a launcher has started, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def refuse_file(folder: str | Path, called: str = "") -> None:
    """Refuses to write where a file lies, of which transformers only logs.

    Args:
        folder: where to write.
        called: what the message begins with, the path itself if that is not said.

    Raises:
        ConfigError: if it is a file.
    """
    if Path(folder).exists() and not Path(folder).is_dir():
        raise ConfigError(f"{called or folder} is a file; expected a folder, existing or new")
