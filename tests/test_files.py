"""Files: whole or not at all, and written by one run at a time."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import swaa_flex
from swaa_flex import ConfigError
from swaa_flex.compile_cache import _MAGIC
from swaa_flex.files import held, reserved, write_atomically

HOLDER = """
import sys, time
from pathlib import Path
from swaa_flex.files import held

with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_file_is_held_by_one_run_and_free_afterwards(tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    with held(path):
        with pytest.raises(ConfigError, match=r"out\.jsonl: another run is writing it; wait"), held(path):
            pytest.fail("held twice")
        with held(path.with_name("other.jsonl")):
            pass
    with pytest.raises(KeyError), held(path):
        raise KeyError
    with held(path):
        pass
    assert list(tmp_path.iterdir()) == []  # a folder that was made for nothing is gone


def test_a_file_is_reserved_for_the_code_that_will_hold_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("out.jsonl")

    def is_refused():
        with pytest.raises(ConfigError, match="another run is writing it"), held(path):
            pytest.fail("held twice")
        return True

    with reserved(path), ThreadPoolExecutor() as other:
        assert other.submit(is_refused).result()
        for _ in range(2):
            with held(tmp_path / path):
                assert is_refused()
        with pytest.raises(ConfigError, match="another run is writing it"), reserved(path):
            pytest.fail("reserved twice")
    with held(path):
        assert is_refused()


def test_a_file_is_held_across_processes_and_free_once_its_holder_is_killed(tmp_path):
    path = tmp_path / "out.jsonl"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another run is writing it"), held(path):
            pytest.fail("held twice")
        holder.send_signal(signal.SIGKILL)
    with held(path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_several_processes_holds_for_all(tmp_path, monkeypatch):
    with held(tmp_path / "out.jsonl"):
        monkeypatch.setenv("RANK", "1")
        with held(tmp_path / "out.jsonl"):
            pass


def test_a_place_where_nothing_can_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "out.jsonl"
    with pytest.raises(ConfigError, match=r"out\.jsonl: nothing can be written there"), held(path):
        pytest.fail("held")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_atomically(tmp_path / "file", "old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "file", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


@pytest.mark.parametrize("header", [b"3", b"[1]", b'[["torch", "2.13"]]', b"null", b"", b"{", b"\xff", b"[" * 100_000])
def test_a_compile_cache_with_a_damaged_header_is_refused(header, tmp_path):
    (tmp_path / "cache").write_bytes(_MAGIC + header + b"\n")
    with pytest.raises(ConfigError, match="its header is damaged; compile again"):
        swaa_flex.load_compile_cache(tmp_path / "cache")
