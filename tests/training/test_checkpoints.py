"""Runs that are killed go on with the same bits; damaged, foreign and unusable checkpoints are named."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from levi_fast.errors import DataError
from levi_fast.modeling import LeviModel
from levi_fast.training.best_epoch import FitResult
from levi_fast.training.checkpoints import CheckpointOptions, Checkpoints, TrainingState
from levi_fast.training.fit import TrainingOptions, fit

Tasks = Callable[..., Any]
SCRIPT = Path(__file__).with_name("killed_trainer.py")


class Killed(Exception):
    pass


def trained(
    task: Any, folder: Path | None, *, steps: int | None = None, save_steps: int | None = None, **options: Any
) -> tuple[LeviModel, FitResult, list[str]]:
    """A run of 3 epochs of 5 steps; ``steps``: it ends by an exception in that forward pass of this process."""
    model, notes, seen = task.model(seed=1), [], 0
    forward = model.forward

    def counted(**inputs: Any) -> Any:
        nonlocal seen
        seen += model.training
        if seen == steps:
            raise Killed
        return forward(**inputs)

    model.forward = counted
    chosen = {"epochs": 3, "batch_size": 16, "learning_rate": 5e-3, "seed": 5, **options}
    kept = None if folder is None else CheckpointOptions(str(folder), save_steps, notes.append)
    result = fit(model, task.train, task.validation, TrainingOptions(**chosen), checkpoints=kept)
    return model, result, notes


def assert_same(one: tuple[LeviModel, FitResult, Any], other: tuple[LeviModel, FitResult, Any]) -> None:
    assert one[1].history == other[1].history
    names = ("best_epoch", "weights", "validation", "view_epoch")
    assert [getattr(one[1], name) for name in names] == [getattr(other[1], name) for name in names]
    assert one[0].state_dict().keys() == other[0].state_dict().keys()
    for name, value in one[0].state_dict().items():
        assert torch.equal(value, other[0].state_dict()[name]), name


@pytest.mark.parametrize(
    ("view", "problem", "fields"),
    [
        ("text", "classes", {"dropout": 0.2}),
        ("tabular", "regression", {"mix": "learned", "objective": "both"}),
        ("recommendation", "regression", {"dropout": 0.2}),
        ("transformer", "multi-label", {}),
        (None, "classes", {"dropout": 0.2}),
        ("recommendation", "regression", {"standalone_view": True, "dropout": 0.2}),
    ],
)
@pytest.mark.parametrize(("save_steps", "steps"), [(None, 8), (2, 8), (1, 1), (3, 15)])
def test_a_run_that_ended_early_goes_on_with_the_same_bits(
    cached_task: Tasks,
    tmp_path: Path,
    view: str | None,
    problem: str,
    fields: dict[str, Any],
    save_steps: int,
    steps: int,
) -> None:
    task = cached_task(view, problem, **fields)
    whole = trained(task, None)
    with pytest.raises(Killed):
        trained(task, tmp_path / "kept", steps=steps, save_steps=save_steps)
    torch.rand(7)  # another process is elsewhere with its generator
    again = trained(task, tmp_path / "kept", save_steps=save_steps)
    assert any("going on from" in note for note in again[2]) == (steps > 1)
    assert_same(whole, again)
    assert_same(whole, trained(task, tmp_path / "kept"))  # and from its end


def test_progress_is_told_of_the_epochs_before(cached_task: Tasks, tmp_path: Path) -> None:
    task, told = cached_task(), []
    with pytest.raises(Killed):
        trained(task, tmp_path, steps=12)
    fit(
        task.model(seed=1), task.train, task.validation,
        TrainingOptions(epochs=3, batch_size=16, learning_rate=5e-3, seed=5),
        checkpoints=CheckpointOptions(str(tmp_path)), on_epoch=lambda epoch, epochs, scores: told.append(epoch),
    )  # fmt: skip
    assert told == [1, 2, 3]


def test_a_checkpoint_holds_what_is_trained_and_only_the_newest_stay(cached_task: Tasks, tmp_path: Path) -> None:
    task = cached_task()
    model, _, _ = trained(task, tmp_path, save_steps=1)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["step-000000014.safetensors", "step-000000015.safetensors"]
    trained_bytes = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    # the weights, AdamW's two moments, the best epoch's weights; the generator's state and the header are the rest
    assert 4 * trained_bytes < files[-1].stat().st_size < 4 * trained_bytes + 30_000


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[:-100]
    elif how == "empty":
        content = bytearray()
    elif how == "header":
        content[:8] = b"\xff" * 8
    else:
        content[-50] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "empty", "header", "bit"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    cached_task: Tasks, tmp_path: Path, how: str
) -> None:
    task = cached_task()
    whole = trained(task, None)
    trained(task, tmp_path, save_steps=2)
    damage(tmp_path / "step-000000015.safetensors", how)
    again = trained(task, tmp_path, save_steps=2)
    assert "step-000000015.safetensors is damaged" in again[2][0] and "step-000000014" in again[2][1]
    assert_same(whole, again)
    for path in tmp_path.iterdir():
        damage(path, how)
    from_the_start = trained(task, tmp_path)
    assert sum("is damaged" in note for note in from_the_start[2]) == 2
    assert_same(whole, from_the_start)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 1e-3}, "option learning_rate was 0.005, is 0.001"),
        ({"epochs": 4}, "option epochs was 3, is 4"),
        ({"seed": 6}, "option seed was 5, is 6"),
    ],
)
def test_a_run_with_other_options_is_refused(
    cached_task: Tasks, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    trained(cached_task(), tmp_path)
    with pytest.raises(DataError, match=f"is of another run: .*{named}"):
        trained(cached_task(), tmp_path, **change)


def test_a_run_with_other_data_or_another_model_is_refused(cached_task: Tasks, tmp_path: Path) -> None:
    trained(cached_task(), tmp_path)
    with pytest.raises(DataError, match=r"training rows was .*validation rows was"):
        trained(cached_task(seed=7), tmp_path)
    with pytest.raises(DataError, match=r"config dropout was 0.2, is"):
        other = tmp_path / "other"
        trained(cached_task(dropout=0.2), other)
        trained(cached_task(dropout=0.3), other)


def test_taps_that_are_stored_otherwise_are_refused(cached_task: Tasks, tmp_path: Path) -> None:
    """An int8 cache gives other taps than a float32 one of the same texts."""
    trained(cached_task(), tmp_path)
    task = cached_task()
    task.train.set_taps(task.train.taps().bfloat16())
    with pytest.raises(DataError, match="taps was float32, is bfloat16"):
        trained(task, tmp_path)


def test_what_is_known_early_is_compared_early(tmp_path: Path) -> None:
    options = CheckpointOptions(str(tmp_path / "kept"))
    Checkpoints(options, {"seed": 1}).check()  # there is none yet
    Checkpoints(options, {"seed": 1, "taps": "float32"}).save(TrainingState(0, 1, {"a": torch.ones(2)}), 1)
    Checkpoints(options, {"seed": 1}).check()
    with pytest.raises(DataError, match="is of another run: seed was 1, is 2"):
        Checkpoints(options, {"seed": 2}).check()
    (path,) = (tmp_path / "kept").iterdir()
    path.write_bytes(b"")
    Checkpoints(options, {"seed": 2}).check()  # damaged: named when it is to be read


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"--checkpoints: expected a folder, but .*file is a file"):
        CheckpointOptions(str(tmp_path / "file"))
    with pytest.raises(DataError, match="holds 'file'"):
        CheckpointOptions(str(tmp_path))
    with pytest.raises(DataError, match="--save-steps: expected at least 1, got 0"):
        CheckpointOptions(str(tmp_path / "new"), 0)


def test_clearing_leaves_nothing(tmp_path: Path) -> None:
    options = CheckpointOptions(str(tmp_path / "kept"))
    Checkpoints(options, {}).save(TrainingState(0, 1, {"a": torch.ones(2)}), 1)
    (tmp_path / "kept" / ".step-000000002.safetensors.x.tmp").write_text("half")
    options.clear()
    assert not (tmp_path / "kept").exists()
    options.clear()


@settings(max_examples=30)
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed(tmp_path_factory: pytest.TempPathFactory, place: int, bit: int) -> None:
    folder = tmp_path_factory.mktemp("kept")
    options = CheckpointOptions(str(folder))
    state = TrainingState(1, 2, {"a": torch.randn(5), "b": torch.arange(3)}, {"history": [0.5]})
    Checkpoints(options, {"seed": 1}).save(state, 7)
    (path,) = folder.iterdir()
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)
    found = Checkpoints(options, {"seed": 1}).newest()
    if found is not None:  # white space in the header, say: the content is what was written
        assert (found.epoch, found.step, found.scores) == (1, 2, {"history": [0.5]})
        assert found.tensors.keys() == state.tensors.keys()
        assert all(torch.equal(found.tensors[name], state.tensors[name]) for name in state.tensors)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["in every step", "cached"])
def test_kill_9_at_any_moment(tiny_bert_dir: str, tmp_path: Path, backbone: str) -> None:
    named = tiny_bert_dir if backbone == "in every step" else "-"

    def run(folder: str, result: str, *kill: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), named, str(tmp_path / folder), str(tmp_path / result), *kill]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    whole = run("whole", "whole.safetensors")
    assert whole.returncode == 0, whole.stderr
    expected = (tmp_path / "whole.safetensors").read_bytes()
    # 4 steps an epoch, a checkpoint every third step and at each epoch's end
    for kill in ("step:1", "step:2", "write:1", "step:4", "write:2", "write:1", "step:1", "step:2"):
        dead = run("kept", "result.safetensors", kill)
        assert dead.returncode == -9, (kill, dead.stdout, dead.stderr)
        assert not (tmp_path / "result.safetensors").exists()
    end = run("kept", "result.safetensors")
    assert end.returncode == 0 and "going on from" in end.stdout, end.stderr
    assert (tmp_path / "result.safetensors").read_bytes() == expected
