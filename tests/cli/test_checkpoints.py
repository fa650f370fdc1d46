"""``levi-fast train --checkpoints``: a killed command, given again, ends with the same files."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., tuple[int, str, str]]


def files_of(folder: Path) -> dict[str, Any]:
    """What a model folder holds, without how long it took."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}
    metrics = json.loads(files.pop("metrics.json"))
    metrics.pop("seconds")
    return {**files, "metrics": metrics}


@pytest.mark.slow
@pytest.mark.parametrize("how", [["--no-precompute"], ["--cache", "CACHE"]], ids=["uncached", "cached"])
def test_a_killed_command_given_again_ends_with_the_same_files(
    train_arguments: list[str], tmp_path: Path, how: list[str]
) -> None:
    base = [*train_arguments, *(str(tmp_path / "cache") if word == "CACHE" else word for word in how)]
    base += ["--epochs", "6", "--batch-size", "2", "--num-threads", "1"]
    kept = ["--checkpoints", str(tmp_path / "kept"), "--save-steps", "5"]

    def command(output: str, *more: str) -> list[str]:
        return [sys.executable, "-m", "levi_fast", *base, "--output", str(tmp_path / output), *more]

    subprocess.run(command("whole"), check=True, capture_output=True, timeout=120)
    process = subprocess.Popen(command("again", *kept), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 100
        while not list(tmp_path.glob("kept/step-*")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        assert process.poll() is None, "it ended before it could be killed"
    finally:
        process.kill()
        process.wait()
    assert list(tmp_path.glob("kept/step-*")) and not (tmp_path / "again").exists()
    ended = subprocess.run(command("again", *kept), check=True, capture_output=True, text=True, timeout=120)
    assert "going on from" in " ".join((ended.stdout + ended.stderr).split())  # wrapped where the line ends
    assert files_of(tmp_path / "again") == files_of(tmp_path / "whole")
    assert not (tmp_path / "kept").exists()


def test_checkpoints_of_another_run_are_refused_before_the_backbone_runs(
    levi_fast: Run, train_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [*train_arguments, "--checkpoints", str(tmp_path / "kept")]
    monkeypatch.setattr("levi_fast.training.checkpoints.CheckpointOptions.clear", lambda self: None)
    assert levi_fast(*kept)[0] == 0

    def refuse(*_: Any) -> None:
        raise AssertionError("the backbone was run")

    monkeypatch.setattr("levi_fast.training.commands.build_bank", refuse)
    other = [*kept, "--output", str(tmp_path / "other")]
    for change, named in (
        (["--learning-rate", "0.5"], "option learning_rate was 0.001, is 0.5"),
        (["--train", str(tmp_path / "new.csv")], "training rows was"),
    ):
        status, _, err = levi_fast(*other, *change)
        assert status == 2 and named in " ".join(err.split()), err


def test_checkpoints_that_cannot_be_written_are_refused_at_once(
    levi_fast: Run, train_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ["--checkpoints", str(tmp_path / "kept")]
    output = train_arguments[train_arguments.index("--output") + 1]
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("seed: [1, 2]\n")
    for more, message in (
        (["--save-steps", "3"], "--save-steps: only with --checkpoints DIR"),
        ([*kept, "--save-steps", "0"], "--save-steps: expected at least 1, got 0"),
        ([*kept, "--loop", "trainer"], "--checkpoints: written by the lean loop alone"),
        ([*kept, "--sweep", str(sweep)], "--sweep: trains its heads whole; leave out --checkpoints"),
        (["--checkpoints", str(tmp_path)], "--checkpoints: expected a folder"),
        (["--checkpoints", output], "--checkpoints: expected a folder apart from --output"),
    ):
        status, _, err = levi_fast(*train_arguments, *more)
        assert status == 2 and message in err, (more, err)
