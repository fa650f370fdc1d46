"""A build that is killed goes on; damage is found, and only it is rebuilt. The kills are real (SIGKILL)."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from levi_fast import ActivationCache, DataError
from levi_fast.data.encoded import EncodedDataset

SMALL = {"batch_size": 4, "batches_per_shard": 2}
SCRIPT = Path(__file__).with_name("killed_builder.py")
Texts = Callable[..., EncodedDataset]
Folder = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def data(texts: Texts) -> dict[str, EncodedDataset]:
    """Those of killed_builder.py."""
    return {"train": texts(21, 0, 0), "test": texts(6, 1, 0)}


# before the plan, between shard and record, within a shard, before the manifest is final, while tidying up
FEW = [
    *("replace-1-before", "replace-1-after", "replace-2-after", "batch-4-before", "replace-5-before"),
    *("replace-5-after", "replace-6-after", "batch-8-before", "fsync-9-before", "replace-11-before"),
    *("replace-11-after", "unlink-2-before"),
]


def every() -> list[str]:
    """Every batch; before and after every rename, removal and a few of the flushes to disk of one build."""
    found = [f"batch-{number}-before" for number in range(1, 9)]
    for call, count in (("replace", 12), ("unlink", 5)):
        found += [f"{call}-{number}-{when}" for number in range(1, count + 1) for when in ("before", "after")]
    return found + [f"fsync-{number}-before" for number in range(1, 24, 3)]


class TestKilled:
    @pytest.mark.parametrize("moments", [FEW, pytest.param(every(), marks=pytest.mark.slow)], ids=["few", "all"])
    def test_at_any_moment_it_goes_on_and_ends_up_the_same(
        self,
        moments: list[str],
        tmp_path: Path,
        tiny_bert_dir: str,
        counting: Callable[..., Any],
        data: dict[str, EncodedDataset],
        read_folder: Folder,
    ) -> None:
        whole = counting()
        ActivationCache.build(tmp_path / "whole", whole, data, **SMALL)
        expected = read_folder(tmp_path / "whole")
        ran = subprocess.run(
            [
                *(sys.executable, str(SCRIPT), tiny_bert_dir, str(tmp_path / "killed")),
                *(str(torch.get_num_threads()), *moments),
            ],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        lines = [line.split() for line in ran.stdout.splitlines()]
        assert len(lines) == len(moments), ran.stderr
        for moment, end, done in lines:
            assert end == str(int(signal.SIGKILL)), f"{moment}: the build was not killed but ended with {end}"
            folder = tmp_path / "killed" / moment
            manifest = folder / "manifest.json"
            if not manifest.exists() or b'"complete": true' not in manifest.read_bytes():
                with pytest.raises(DataError, match=r"not finished|holds no manifest"):
                    ActivationCache.open(folder)
            resumed = counting()
            ActivationCache.build(folder, resumed, data, **SMALL)
            assert read_folder(folder) == expected, moment
            lost = int(done) + resumed.batches - whole.batches
            assert 0 <= lost <= 2, f"{moment}: {lost} batches were run twice, a shard has 2"

    @pytest.mark.slow
    def test_from_outside_at_a_time_of_its_own(
        self,
        tmp_path: Path,
        tiny_bert_dir: str,
        counting: Callable[..., Any],
        data: dict[str, EncodedDataset],
        read_folder: Folder,
    ) -> None:
        ActivationCache.build(tmp_path / "whole", counting(), data, **SMALL)
        arguments = [sys.executable, str(SCRIPT), tiny_bert_dir, str(tmp_path / "k"), str(torch.get_num_threads())]
        process = subprocess.Popen([*arguments, "fsync-999-before"], start_new_session=True)
        folder = tmp_path / "k" / "fsync-999-before"
        while not list(folder.glob("shard-*.json")) and process.poll() is None:
            time.sleep(0.0002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        ActivationCache.build(folder, counting(), data, **SMALL)
        assert read_folder(folder) == read_folder(tmp_path / "whole")


class TestDamage:
    @pytest.fixture
    def built(self, tmp_path: Path, counting: Callable[..., Any], data: dict[str, EncodedDataset]) -> Path:
        ActivationCache.build(tmp_path / "c", counting(), data, **SMALL)
        return tmp_path / "c"

    @pytest.mark.parametrize("kind", ["flipped byte", "truncated", "emptied", "removed", "longer"])
    def test_it_is_found_and_only_it_is_rebuilt(
        self,
        built: Path,
        counting: Callable[..., Any],
        data: dict[str, EncodedDataset],
        read_folder: Folder,
        kind: str,
    ) -> None:
        before = read_folder(built)
        others = {path.name: path.stat() for path in built.iterdir() if path.name != "shard-00001.safetensors"}
        file = built / "shard-00001.safetensors"
        content = bytearray(file.read_bytes())
        if kind == "flipped byte":
            content[random.Random(0).randrange(200, len(content))] ^= 0x10
        elif kind == "truncated":
            content = content[:-10]
        elif kind == "emptied":
            content = bytearray()
        elif kind == "longer":
            content += b"x"
        file.unlink()
        if kind != "removed":
            file.write_bytes(content)
        found = damaged(built)
        assert found == ["shard-00001.safetensors"]
        repairing = counting()
        cache = ActivationCache.build(built, repairing, data, **SMALL)
        assert repairing.batches == 2 and cache.verify() == []
        assert read_folder(built) == before
        for name, stat in others.items():
            now = (built / name).stat()
            assert (now.st_ino, now.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns), f"{name} was written again"

    def test_a_flipped_byte_does_not_reach_training(self, built: Path) -> None:
        file = built / "shard-00001.safetensors"
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
        cache = ActivationCache.open(built)  # sizes alone
        with pytest.raises(DataError, match=r"shard-00001\.safetensors is damaged: its checksum differs"):
            cache["test"].load(), cache["train"].load()
        ActivationCache.open(built, check=False)["train"].load()

    def test_a_damaged_index_is_rebuilt_without_the_backbone_running(
        self, built: Path, counting: Callable[..., Any], data: dict[str, EncodedDataset], read_folder: Folder
    ) -> None:
        before = read_folder(built)
        (built / "rows-000.safetensors").write_bytes(b"x" * 100)
        with pytest.raises(DataError, match=r"rows-000\.safetensors: 100 bytes instead of"):
            ActivationCache.open(built)
        repairing = counting()
        ActivationCache.build(built, repairing, data, **SMALL)
        assert repairing.batches == 0 and read_folder(built) == before

    def test_a_lost_manifest_is_a_new_build(
        self, built: Path, counting: Callable[..., Any], data: dict[str, EncodedDataset], read_folder: Folder
    ) -> None:
        before = read_folder(built)
        (built / "manifest.json").unlink()
        again = counting()
        ActivationCache.build(built, again, data, **SMALL)
        assert again.batches == 8 and read_folder(built) == before


def damaged(folder: Path) -> list[str]:
    """Files that a full check names, through an opened cache where it opens, else through the error."""
    try:
        return [one.file for one in ActivationCache.open(folder).verify()]
    except DataError as error:
        return [word.rstrip(":") for word in str(error).split() if word.startswith(("shard-", "rows-"))]
