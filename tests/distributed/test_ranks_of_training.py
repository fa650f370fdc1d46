"""Two processes over gloo train what one process trains on the same batches; one that dies ends the job."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

Launch = Callable[[list[str], int], Any]
RANK = Path(__file__).with_name("trainer_rank.py")


@pytest.fixture
def train(
    tiny_bert_dir: str, tmp_path: Path, launch: Launch
) -> Callable[..., tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    def run(name: str, ranks: int, **told: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        folder = tmp_path / name
        folder.mkdir()
        ended = launch([str(RANK), tiny_bert_dir, str(folder), json.dumps(told)], ranks)
        assert ended.returncode == 0, ended.stderr[-3000:]
        return json.loads((folder / "end.json").read_text()), load_file(folder / "end.safetensors")

    return run


def assert_close(one: Any, other: Any) -> None:
    """Gradients are summed in another order: the last bits of a float32 differ."""
    assert np.allclose(one[0]["losses"], other[0]["losses"], rtol=1e-5)
    assert np.isclose(one[0]["metrics"]["eval_loss"], other[0]["metrics"]["eval_loss"], rtol=1e-5)
    assert one[0]["metrics"]["eval_accuracy"] == other[0]["metrics"]["eval_accuracy"]
    for name, value in one[1].items():
        torch.testing.assert_close(value, other[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_two_processes_train_what_one_does(train: Callable[..., Any]) -> None:
    one = train("one", 1, batch=16)
    two = train("two", 2, batch=8)
    assert_close(one, two)
    assert one[0]["reduced"] == 0 and two[0]["reduced"] == 8
    accumulated = train("accumulated", 2, batch=4, accumulate=2)
    assert_close(one, accumulated)
    assert accumulated[0]["reduced"] == 8  # once a step, not once a batch
    sharded = train("sharded", 2, batch=8, shard=True)
    assert_close(one, sharded)
    before, after = sharded[0]["held"]
    assert before / 2 <= after < 0.55 * before


def test_adapters_are_trained_by_two_processes_too(train: Callable[..., Any]) -> None:
    pytest.importorskip("peft")
    assert_close(train("one", 1, batch=16, trained="lora"), train("two", 2, batch=8, trained="lora"))


def test_a_rank_that_dies_ends_the_job(tiny_bert_dir: str, tmp_path: Path, launch: Launch) -> None:
    started = time.monotonic()
    ended = launch([str(RANK), tiny_bert_dir, str(tmp_path), '{"batch": 8, "die": true}'], 2)
    assert ended.returncode != 0 and "exitcode  : 7" in ended.stderr
    assert time.monotonic() - started < 90
    assert not (tmp_path / "end.json").exists()


def test_the_command_line_under_torchrun(command: list[str], tmp_path: Path, launch: Launch) -> None:
    found = {}
    for ranks, batch in ((1, 16), (2, 8)):
        # without a task model nothing is dropped at random
        more = ["--method", "taps-only", "--batch-size", str(batch), "--output", str(tmp_path / str(ranks))]
        ended = launch([*command, *more], ranks)
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert ended.stdout.count("OOD new") == 1 and ended.stderr.count("wrote ") == 1  # one process speaks
        found[ranks] = json.loads((tmp_path / str(ranks) / "metrics.json").read_text())
    assert found[1]["best_epoch"] == found[2]["best_epoch"]
    for split in ("validation", "id"):
        assert np.isclose(found[1][split]["log_loss"], found[2][split]["log_loss"], rtol=1e-4)
    assert np.isclose(found[1]["ood"]["new"]["log_loss"], found[2]["ood"]["new"]["log_loss"], rtol=1e-4)


def test_a_sweep_is_spread_over_processes(command: list[str], tmp_path: Path, launch: Launch) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("seed: [1, 2, 3, 4]\n")
    for ranks in (1, 2):  # each process has two workers, which are no ranks themselves
        more = ["--sweep", str(sweep), "--output", str(tmp_path / str(ranks)), "--num-threads", "2"]
        ended = launch([*command, *more], ranks)
        assert ended.returncode == 0, ended.stderr[-3000:]
    one, two = (json.loads((tmp_path / name / "sweep.json").read_text()) for name in ("1", "2"))
    assert [head["id"] for head in one["columns"][0]["heads"]] == [head["id"] for head in two["columns"][0]["heads"]]
    states = [load_file(tmp_path / name / "model.safetensors") for name in ("1", "2")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
