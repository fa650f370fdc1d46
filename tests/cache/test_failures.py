"""Folders that cannot be written, are full, in use or something else."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from levi_fast import ActivationCache, DataError
from levi_fast.cache.lock import BuilderLock
from levi_fast.data.encoded import EncodedDataset

SMALL = {"batch_size": 4, "batches_per_shard": 2}
Texts = Callable[..., EncodedDataset]


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """A file system of its own at ``folder``; skips where this user may not mount."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def tmpfs(size: str) -> tuple[str, ...]:
    return ("-t", "tmpfs", "-o", f"size={size}", "tmpfs")


class TestFullDisk:
    def test_too_small_is_said_before_any_work(
        self, tmp_path: Path, counting: Callable[..., Any], texts: Texts
    ) -> None:
        extractor = counting()
        with mounted(tmp_path / "disk", *tmpfs("64k")):
            with pytest.raises(DataError, match=r"disk needs .*KiB more, and its disk has .*KiB left"):
                ActivationCache.build(tmp_path / "disk", extractor, texts(600, repeats=1), **SMALL)
            assert extractor.batches == 0
            assert not (tmp_path / "disk" / "manifest.json").exists()

    def test_filled_by_others_on_the_way(
        self, tmp_path: Path, counting: Callable[..., Any], texts: Texts, read_folder: Callable[[Path], Any]
    ) -> None:
        data = texts(60, repeats=1)
        ActivationCache.build(tmp_path / "whole", counting(), data, **SMALL)
        with mounted(tmp_path / "disk", *tmpfs("256k")):
            folder, hog = tmp_path / "disk" / "c", tmp_path / "disk" / "hog"

            def fill(batch: int) -> None:
                if batch == 6:  # two shards are finished by then
                    with contextlib.suppress(OSError), open(hog, "wb", buffering=0) as file:
                        while True:
                            file.write(b"x" * 1024)

            extractor = counting()
            extractor.before = fill
            with pytest.raises(DataError, match="c cannot be written: No space left on device; shards that are fin"):
                ActivationCache.build(folder, extractor, data, **SMALL)
            hog.unlink()
            resumed = counting()
            ActivationCache.build(folder, resumed, data, **SMALL)
            assert read_folder(folder) == read_folder(tmp_path / "whole")
            assert extractor.batches + resumed.batches <= 15 + 2

    def test_a_limit_on_file_sizes(self, tmp_path: Path, counting: Callable[..., Any], texts: Texts) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
            with pytest.raises(DataError, match="cannot be written: File too large"):
                ActivationCache.build(tmp_path / "c", counting(), texts(400, repeats=1), batch_size=100)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)
        assert not list((tmp_path / "c").glob("*.tmp"))


class TestReadOnly:
    def test_building(self, tmp_path: Path, counting: Callable[..., Any], texts: Texts) -> None:
        (tmp_path / "disk").mkdir()
        extractor = counting()
        with mounted(tmp_path / "disk", *tmpfs("1m")):
            subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
            for folder in (tmp_path / "disk", tmp_path / "disk" / "new"):
                with pytest.raises(DataError, match="cannot be written: Read-only file system"):
                    ActivationCache.build(folder, extractor, texts(), **SMALL)
        assert extractor.batches == 0

    def test_reading_works(self, tmp_path: Path, counting: Callable[..., Any], texts: Texts) -> None:
        with mounted(tmp_path / "disk", *tmpfs("1m")):
            ActivationCache.build(tmp_path / "disk", counting(), texts(), **SMALL)
            subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
            cache = ActivationCache.open(tmp_path / "disk")
            assert cache.verify() == [] and len(cache["data"].load()) == len(cache["data"])
            del cache  # its shards are mapped

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_without_permission(self, tmp_path: Path, counting: Callable[..., Any], texts: Texts) -> None:
        (tmp_path / "c").mkdir(mode=0o555)
        with pytest.raises(DataError, match="cannot be written: Permission denied"):
            ActivationCache.build(tmp_path / "c", counting(), texts(), **SMALL)


class TestTwoBuilders:
    def test_the_second_is_told_who_the_first_is(
        self, tmp_path: Path, counting: Callable[..., Any], texts: Texts
    ) -> None:
        code = (
            "import sys, time; from pathlib import Path; from levi_fast.cache.lock import BuilderLock\n"
            "with BuilderLock(Path(sys.argv[1]), 0, ''):\n    print('held', flush=True); time.sleep(60)"
        )
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"held\n"
            extractor = counting()
            with pytest.raises(DataError, match=f"being built by process {process.pid} on {socket.gethostname()}"):
                ActivationCache.build(tmp_path, extractor, texts(), **SMALL)
            assert extractor.batches == 0
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        # killed: its file is still there, its lock is not
        assert (tmp_path / "builder-0.lock").exists()
        ActivationCache.build(tmp_path, counting(), texts(), **SMALL)
        assert not (tmp_path / "builder-0.lock").exists()

    def test_within_one_process(self, tmp_path: Path, counting: Callable[..., Any], texts: Texts) -> None:
        with (
            BuilderLock(tmp_path, 0, ""),
            pytest.raises(DataError, match=f"being built by process {os.getpid()}"),
        ):
            ActivationCache.build(tmp_path, counting(), texts(), **SMALL)

    @pytest.mark.parametrize("content", [b"", b"\x00" * 50, b"[" * 9999, b'{"pid": {}}', b'{"pid": 1, "host": 2}'])
    def test_a_lock_file_with_anything_in_it_is_taken_over(
        self, tmp_path: Path, counting: Callable[..., Any], texts: Texts, content: bytes
    ) -> None:
        (tmp_path / "builder-0.lock").write_bytes(content)
        ActivationCache.build(tmp_path, counting(), texts(8), **SMALL)

    def test_an_error_lets_the_lock_go(self, tmp_path: Path, counting: Callable[..., Any], texts: Texts) -> None:
        def fail(batch: int) -> None:
            raise RuntimeError("out of memory, say")

        failing = counting()
        failing.before = fail
        with pytest.raises(RuntimeError, match="out of memory, say"):
            ActivationCache.build(tmp_path, failing, texts(), **SMALL)
        assert "out of memory, say" in json.loads((tmp_path / "builder-0.lock").read_text())["error"]
        ActivationCache.build(tmp_path, counting(), texts(), **SMALL)


class TestOtherFolders:
    def test_other_files(self, tmp_path: Path, counting: Callable[..., Any], texts: Texts) -> None:
        (tmp_path / "thesis.tex").write_text("years of work")
        for overwrite in (False, True):
            with pytest.raises(
                DataError, match=r"expected a new or empty folder or a cache, but .* holds thesis\.tex"
            ):
                ActivationCache.build(tmp_path, counting(), texts(), overwrite=overwrite, **SMALL)
        assert (tmp_path / "thesis.tex").read_text() == "years of work"

    def test_a_file(self, tmp_path: Path, counting: Callable[..., Any], texts: Texts) -> None:
        (tmp_path / "c").write_text("")
        with pytest.raises(DataError, match=r"expected a folder, but .* is a file"):
            ActivationCache.build(tmp_path / "c", counting(), texts(), **SMALL)
        with pytest.raises(DataError, match="holds no manifest"):
            ActivationCache.open(tmp_path / "c")

    def test_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="holds no manifest"):
            ActivationCache.open(tmp_path / "c")
