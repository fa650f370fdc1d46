"""The output folder appears whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from levi_fast.errors import DataError
from levi_fast.training.output import new_folder, require_new_folder

WRITER = """
import signal, sys, time
from pathlib import Path
from levi_fast.training.output import new_folder
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has its children ignore it
with new_folder(sys.argv[1]) as stage:
    (stage / "half.bin").write_bytes(b"x" * 1000)
    print("writing", flush=True)
    time.sleep(60)
"""


def test_files_and_subfolders_arrive_together(tmp_path: Path) -> None:
    target = tmp_path / "a" / "model"
    with new_folder(target) as stage:
        (stage / "one.txt").write_text("1")
        (stage / "sub").mkdir()
        (stage / "sub" / "two.txt").write_text("2")
        assert not target.exists()
    assert sorted(path.name for path in target.rglob("*")) == ["one.txt", "sub", "two.txt"]
    assert os.listdir(target.parent) == ["model"]
    umask = os.umask(0)
    os.umask(umask)
    assert (target / "one.txt").stat().st_mode & 0o777 == 0o666 & ~umask
    assert target.stat().st_mode & 0o777 == 0o777 & ~umask


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "model") as stage:
        (stage / "one.txt").write_text("1")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_of_writing(tmp_path: Path, number: int) -> None:
    target = tmp_path / "model"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == b"writing\n"
    time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(timeout=30) != 0
    process.stdout.close()
    process.stderr.close()
    assert not target.exists()
    left = os.listdir(tmp_path)
    # nobody can tidy up after SIGKILL, but what is left is hidden and does not pass for a model
    assert left == [] if number != signal.SIGKILL else all(name.startswith(".model.partial-") for name in left)
    with new_folder(target) as stage:
        (stage / "one.txt").write_text("1")
    assert (target / "one.txt").exists()


def test_content_that_came_meanwhile_is_not_lost(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(DataError, match="exists and is not empty"), new_folder(target) as stage:
        (stage / "one.txt").write_text("1")
        target.mkdir()
        (target / "other.txt").write_text("somebody else's")
    assert os.listdir(target) == ["other.txt"] and os.listdir(tmp_path) == ["model"]


def test_what_cannot_become_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file"):
        require_new_folder(tmp_path / "file")
    with pytest.raises(DataError, match="cannot write into"):
        require_new_folder(tmp_path / "file" / "model")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="link to nothing"):
        require_new_folder(tmp_path / "link")
    (tmp_path / "empty").mkdir()
    assert require_new_folder(tmp_path / "empty") == tmp_path / "empty"
