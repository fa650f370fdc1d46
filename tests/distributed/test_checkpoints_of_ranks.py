"""Two processes, or three, that are killed go on together with the same bits, or refuse together."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # many starts of several processes

SCRIPT = Path(__file__).with_name("fit_rank.py")
Run = Callable[..., subprocess.CompletedProcess[str]]
Launch = Callable[[list[str], int], subprocess.CompletedProcess[str]]


@pytest.fixture(params=["cached", "in every step"])
def fit_ranks(request: pytest.FixtureRequest, tiny_bert_dir: str, tmp_path: Path, launch: Launch) -> Run:
    """``fit_ranks(ranks, folder, result, kill="", loop="auto")``."""
    backbone = "-" if request.param == "cached" else tiny_bert_dir

    def run(ranks: int, folder: str, result: str, kill: str = "", loop: str = "auto") -> Any:
        where = "-" if folder == "-" else str(tmp_path / folder)
        words = [str(SCRIPT), backbone, where, str(tmp_path / result), loop, *([kill] if kill else [])]
        return launch(words, ranks)

    return run


def test_two_processes_train_the_same_bits_in_either_loop_and_are_killed_at_any_moment(
    fit_ranks: Run, tmp_path: Path
) -> None:
    for loop in ("trainer", "lean"):
        ended = fit_ranks(2, "-", loop, loop=loop)
        assert ended.returncode == 0, ended.stderr[-3000:]
    expected = (tmp_path / "trainer").read_bytes()
    assert (tmp_path / "lean").read_bytes() == (tmp_path / "lean.1").read_bytes() == expected

    # 4 steps an epoch, a checkpoint every third step and at each epoch's end
    for kill, left in (("1@step:5", [3, 4]), ("0@write:1", [3, 4]), ("0@step:3", [4, 6])):
        dead = fit_ranks(2, "kept", "result", kill)
        assert dead.returncode != 0 and not (tmp_path / "result").exists(), (kill, dead.stdout, dead.stderr)
        found = sorted(int(path.stem.removeprefix("step-")) for path in (tmp_path / "kept").glob("step-*"))
        assert found == left, (kill, dead.stdout)
    newest = tmp_path / "kept" / "step-000000006.safetensors"
    content = bytearray(newest.read_bytes())
    content[-50] ^= 1
    newest.write_bytes(content)
    ended = fit_ranks(2, "kept", "result")
    assert ended.returncode == 0, ended.stderr[-3000:]
    said = ended.stdout.splitlines()  # the first process reads and speaks for all
    assert len(said) == 2 and said[0].startswith("rank 0: checkpoint ") and "6.safetensors is damaged" in said[0]
    assert said[1].startswith("rank 0: going on from ") and said[1].endswith("4.safetensors: epoch 2, step 0")
    assert (tmp_path / "result").read_bytes() == (tmp_path / "result.1").read_bytes() == expected


def test_three_processes_go_on_and_other_numbers_of_them_are_refused_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: Launch
) -> None:
    def run(ranks: int, folder: str, result: str, *kill: str) -> subprocess.CompletedProcess[str]:
        where = "-" if folder == "-" else str(tmp_path / folder)
        return launch([str(SCRIPT), "-", where, str(tmp_path / result), "lean", *kill], ranks)

    whole = run(3, "-", "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert run(3, "kept", "result", "2@step:5").returncode != 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    for ranks, rate, named in (
        (2, "5e-3", "processes was 3, is 2"),
        (3, "1e-3", "learning_rate was 0.005, is 0.001"),
    ):
        monkeypatch.setenv("RATE", rate)
        began = time.monotonic()
        refused = run(ranks, "kept", "result")
        assert refused.returncode != 0 and time.monotonic() - began < 90
        said = [
            line for line in refused.stdout.splitlines() if f"is of another run: {'option ' * (ranks == 3)}" in line
        ]
        assert said and all(named in line for line in said), refused.stdout
    monkeypatch.delenv("RATE")
    assert {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()} == before
    ended = run(3, "kept", "result")
    assert ended.returncode == 0 and "going on from" in ended.stdout, ended.stderr[-3000:]
    assert (tmp_path / "result").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("trained", ["lora", "full"])
def test_a_backbone_that_is_trained_ends_with_trainers_bits(
    command: list[str], tmp_path: Path, launch: Launch, trained: str
) -> None:
    """Weights behind the last tap get no gradient, in no process: they are neither waited for nor decayed."""
    if trained == "lora":
        pytest.importorskip("peft")
    base = [*command, "--backbone-training", trained, "--epochs", "2", "--batch-size", "4", "--num-threads", "1"]
    for output, more in (("trainer", []), ("lean", ["--checkpoints", str(tmp_path / "kept"), "--save-steps", "3"])):
        ended = launch([*base, "--output", str(tmp_path / output), *more], 2)
        assert ended.returncode == 0, ended.stderr[-3000:]
    assert files_of(tmp_path / "lean") == files_of(tmp_path / "trainer")


def files_of(folder: Path) -> dict[str, Any]:
    """What a model folder holds, without how long it took."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}
    metrics = json.loads(files.pop("metrics.json"))
    metrics.pop("seconds")
    return {**files, "metrics": metrics}


@pytest.mark.parametrize("how", [["--no-precompute"], ["--cache", "CACHE"]], ids=["uncached", "cached"])
def test_a_killed_job_given_again_ends_with_the_same_files(
    command: list[str],
    tmp_path: Path,
    how: list[str],
    start: Callable[[list[str], int], subprocess.Popen[str]],
    launch: Launch,
    kill_all: Callable[[subprocess.Popen[str]], None],
) -> None:
    base = [*command, *(str(tmp_path / "cache") if word == "CACHE" else word for word in how)]
    base += ["--epochs", "8", "--batch-size", "2", "--num-threads", "1"]
    kept = ["--checkpoints", str(tmp_path / "kept"), "--save-steps", "7"]
    whole = launch([*base, "--output", str(tmp_path / "whole")], 2)  # without a word of checkpoints
    assert whole.returncode == 0, whole.stderr[-3000:]
    job = start([*base, "--output", str(tmp_path / "again"), *kept], 2)
    try:
        deadline = time.monotonic() + 100
        while not list(tmp_path.glob("kept/step-*")) and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        assert job.poll() is None, "it ended before it could be killed"
    finally:
        kill_all(job)
    assert list(tmp_path.glob("kept/step-*")) and not (tmp_path / "again").exists()
    ended = launch([*base, "--output", str(tmp_path / "again"), *kept], 2)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert " ".join((ended.stdout + ended.stderr).split()).count("going on from") == 1
    assert files_of(tmp_path / "again") == files_of(tmp_path / "whole")
    assert not (tmp_path / "kept").exists()
