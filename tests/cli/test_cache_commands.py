"""``levi-fast cache build | estimate | inspect | verify``."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Run = Callable[..., tuple[int, str, str]]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def data_arguments(train_arguments: list[str]) -> list[str]:
    """The data and model flags of ``train_arguments``, which are those of ``cache`` too."""
    return train_arguments[1 : train_arguments.index("--epochs")]


@pytest.fixture
def cache(tmp_path: Path) -> list[str]:
    return ["--cache", str(tmp_path / "cache")]


class TestBuild:
    def test_then_train_then_look(
        self, levi_fast: Run, train_arguments: list[str], data_arguments: list[str], cache: list[str], tmp_path: Path
    ) -> None:
        status, _, err = levi_fast("cache", "build", *cache, *data_arguments)
        assert status == 0, err
        assert re.search(r"cache: 120 rows, \d+ different ones; .* on disk; about .* s", err)
        assert re.search(r"wrote .*cache: .* KiB of float32 taps of 3 layers", err)
        before = content(tmp_path / "cache")
        status, _, err = levi_fast(*train_arguments, *cache)
        assert status == 0 and "on disk" not in err  # nothing to build any more
        status, out, err = levi_fast("cache", "inspect", *cache)
        assert status == 0, err
        for expected in ("finished", "bert:float32:", "layers 0, 1, 2 of 3", "mean", "ood new", "validation", "36"):
            assert expected in out, out
        status, out, _ = levi_fast("cache", "verify", *cache)
        assert status == 0 and re.fullmatch(r"\d+ files are what the manifest says\n", out)
        assert content(tmp_path / "cache") == before

    def test_the_same_as_train_builds(
        self, levi_fast: Run, train_arguments: list[str], data_arguments: list[str], cache: list[str], tmp_path: Path
    ) -> None:
        assert levi_fast("cache", "build", *cache, *data_arguments)[0] == 0
        assert levi_fast(*train_arguments, "--cache", str(tmp_path / "other"))[0] == 0
        assert content(tmp_path / "cache") == content(tmp_path / "other")

    def test_flags(self, levi_fast: Run, data_arguments: list[str], cache: list[str], tmp_path: Path) -> None:
        more = ["--taps", "0,-1", "--pooling", "cls", "--dtype", "int8", "--batches-per-shard", "1"]
        more += ["--backbone-batch-size", "8", "--max-length", "20", "--backbone-dtype", "bfloat16"]
        status, _, err = levi_fast("cache", "build", *cache, *data_arguments, *more)
        assert status == 0, err
        manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
        key = manifest["key"]
        assert (key["taps"], key["pooling"], key["dtype"], key["max_length"]) == ([0, 2], "cls", "int8", 20)
        assert key["backbone_dtype"] == "bfloat16" and manifest["backbone"]["loaded_as"] == "bfloat16"
        assert manifest["layout"] == {"batch_size": 8, "batches_per_shard": 1}
        assert all(shard["count"] <= 8 for part in manifest["parts"].values() for shard in part["shards"])

    def test_another_key_needs_rebuild(
        self, levi_fast: Run, data_arguments: list[str], cache: list[str], tmp_path: Path
    ) -> None:
        assert levi_fast("cache", "build", *cache, *data_arguments)[0] == 0
        status, _, err = levi_fast("cache", "build", *cache, *data_arguments, "--dtype", "int8")
        assert status == 2 and "dtype: 'float32' in the cache, 'int8' now" in err and "--rebuild" in err
        status, _, err = levi_fast("cache", "build", *cache, *data_arguments, "--dtype", "int8", "--rebuild")
        assert status == 0, err
        assert json.loads((tmp_path / "cache" / "manifest.json").read_text())["key"]["dtype"] == "int8"

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--dtype", "float16"], "--cache-dtype: expected one of float32, bfloat16, int8, got 'float16'"),
            (["--taps", "7"], "7 is out of range for a backbone of 3 layers"),
            (["--task-name", "movielens"], "--task-name brings its own data"),
            (["--device", "tpu"], "--device: expected auto, cpu or cuda"),
        ],
    )
    def test_bad_flags(
        self,
        levi_fast: Run,
        data_arguments: list[str],
        cache: list[str],
        tmp_path: Path,
        more: list[str],
        message: str,
    ) -> None:
        for command in ("build", "estimate"):
            status, _, err = levi_fast("cache", command, *cache, *data_arguments, *more)
            assert status == 2 and message in err, err
        assert not (tmp_path / "cache").exists()

    @pytest.mark.slow
    def test_killed_on_the_way(
        self, levi_fast: Run, data_arguments: list[str], cache: list[str], tmp_path: Path
    ) -> None:
        arguments = [*data_arguments, "--batches-per-shard", "1", "--backbone-batch-size", "2"]
        arguments += ["--num-threads", str(torch.get_num_threads())]
        process = subprocess.Popen(
            [sys.executable, "-m", "levi_fast", "cache", "build", *cache, *arguments],
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            while len(list((tmp_path / "cache").glob("shard-*.json"))) < 3 and process.poll() is None:
                time.sleep(0.001)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        status, out, _ = levi_fast("cache", "inspect", *cache)
        assert status == 0 and "not finished" in out
        status, _, err = levi_fast("cache", "verify", *cache)
        assert status == 1
        status, _, err = levi_fast("cache", "build", *cache, *arguments)
        assert status == 0 and re.search(r"different ones, \d+ of them still to be run", err), err
        assert levi_fast("cache", "build", "--cache", str(tmp_path / "whole"), *arguments)[0] == 0
        assert content(tmp_path / "cache") == content(tmp_path / "whole")


class TestVerify:
    def test_damage_is_named_and_repaired(
        self, levi_fast: Run, data_arguments: list[str], cache: list[str], tmp_path: Path
    ) -> None:
        levi_fast("cache", "build", *cache, *data_arguments)
        before = content(tmp_path / "cache")
        with open(tmp_path / "cache" / "shard-00002.safetensors", "r+b") as file:
            file.seek(-5, os.SEEK_END)
            file.write(b"\xff")
        os.truncate(tmp_path / "cache" / "shard-00000.safetensors", 100)
        status, out, err = levi_fast("cache", "verify", *cache)
        assert status == 1
        assert "shard-00002.safetensors: its checksum differs" in out
        assert re.search(r"shard-00000\.safetensors: 100 bytes instead of \d+", out)
        assert "2 of" in err and "cache build rebuilds them, and nothing else" in err
        assert levi_fast("cache", "build", *cache, *data_arguments)[0] == 0
        assert content(tmp_path / "cache") == before

    @pytest.mark.parametrize("command", ["inspect", "verify"])
    def test_no_cache(self, levi_fast: Run, cache: list[str], command: str) -> None:
        status, _, err = levi_fast("cache", command, *cache)
        assert status == 2 and "holds no manifest.json" in err


def test_estimate_writes_nothing(levi_fast: Run, data_arguments: list[str], cache: list[str], tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    status, out, err = levi_fast("cache", "estimate", *cache, *data_arguments)
    assert status == 0, err
    assert re.fullmatch(r"120 rows, \d+ different ones; [\d.]+ KiB on disk; about [\d.]+ s\n", out)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_movielens(levi_fast: Run, tmp_path: Path, tiny_bert_dir: str, shared_data: Path, cache: list[str]) -> None:
    """Real data: texts of target and history, split by the seed; the cached run has the bits of the uncached one."""
    data = ["--task-name", "movielens", "--data", str(shared_data / "movielens-small"), "--backbone", tiny_bert_dir]
    data += ["--max-length", "32", "--seed", "3"]
    status, _, err = levi_fast("cache", "build", *cache, *data)
    assert status == 0, err
    found: dict[str, Any] = {}
    for name, more in (("plain", []), ("cached", cache)):
        folder = tmp_path / name
        status, _, err = levi_fast("train", *data, *more, "--epochs", "1", "--output", str(folder))
        assert status == 0, err
        found[name] = (folder / "model.safetensors").read_bytes()
    assert found["plain"] == found["cached"]


@pytest.mark.slow
def test_torchrun(levi_fast: Run, data_arguments: list[str], tmp_path: Path) -> None:
    arguments = [*data_arguments, "--batches-per-shard", "1", "--backbone-batch-size", "4", "--num-threads", "1"]
    threads = torch.get_num_threads()
    try:
        assert levi_fast("cache", "build", "--cache", str(tmp_path / "one"), *arguments)[0] == 0
    finally:
        torch.set_num_threads(threads)
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "levi_fast", "cache", "build", "--cache", str(tmp_path / "two"), *arguments),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("wrote ") == 1  # one of them speaks
    assert content(tmp_path / "one") == content(tmp_path / "two")
