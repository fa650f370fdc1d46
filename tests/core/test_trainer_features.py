"""Features of the plain transformers Trainer with a LeviModel, each seen to act."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from levi_fast import LeviConfig, get_levi_model
from levi_fast.training.trainer_checkpoints import SEAL, SealCheckpoints, last_sealed_checkpoint

SCRIPT = Path(__file__).with_name("trainer_runs.py")
SPEC = {"type": "text", "vocab_size": 50, "embedding_dim": 8, "view_width": 6}


class Texts(torch.utils.data.Dataset):
    """Texts of 3 to 12 random tokens, unpadded; the label says whether token 7 is the second."""

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, 13, (size,), generator=generator).tolist()
        self.rows = [torch.randint(8, 40, (length,), generator=generator) for length in lengths]
        for row in self.rows[1::2]:
            row[1] = 7

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return {"input_ids": self.rows[place].tolist(), "labels": place % 2}


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    return {
        "input_ids": padded,
        "attention_mask": (padded != 0).long(),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer_of(backbone: Any, folder: Path, *, callbacks: Any = None, config: Any = None, **options: Any) -> Trainer:
    torch.manual_seed(0)
    model = get_levi_model(backbone, LeviConfig(**{"hidden_width": 16, "task_model": SPEC, **(config or {})}))
    chosen = {
        "max_steps": 20, "per_device_train_batch_size": 16, "learning_rate": 1e-2, "report_to": [],
        "disable_tqdm": True, "use_cpu": True, "seed": 3, "save_strategy": "no", "logging_steps": 5, **options,
    }  # fmt: skip
    return Trainer(
        model, TrainingArguments(output_dir=str(folder), **chosen), data_collator=collate, train_dataset=Texts(96, 1),
        eval_dataset=Texts(40, 2), compute_metrics=accuracy, callbacks=callbacks,
    )  # fmt: skip


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_early_stopping_stops(build_backbone: Any, tmp_path: Path) -> None:
    trainer = trainer_of(
        build_backbone("bert"), tmp_path, callbacks=[EarlyStoppingCallback(2)], max_steps=400, eval_strategy="steps",
        save_strategy="steps", eval_steps=20, save_steps=20, load_best_model_at_end=True,
        metric_for_best_model="accuracy",
    )  # fmt: skip
    trainer.train()
    seen = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert (trainer.state.global_step < 400 and max(seen) not in seen[-2:]) or seen[-3:] == [max(seen)] * 3
    assert trainer.evaluate()["eval_accuracy"] == max(seen)


def test_evaluation_gathers_predictions_alone(build_backbone: Any, tmp_path: Path) -> None:
    """What ``prediction_step`` returns is kept for every row of a data set: no hidden states, no taps."""
    trainer = trainer_of(build_backbone("bert"), tmp_path, config={"num_labels": 2})
    batch = collate([trainer.eval_dataset[place] for place in range(5)])
    loss, logits, labels = trainer.prediction_step(trainer.model.eval(), batch, prediction_loss_only=False)
    assert loss.ndim == 0 and isinstance(logits, torch.Tensor) and logits.shape == (5, 2)
    assert torch.equal(labels, batch["labels"])
    assert trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)[1:] == (None, None)


def test_the_best_model_is_loaded_at_the_end(build_backbone: Any, tmp_path: Path) -> None:
    """A learning rate that is far too high makes a late epoch worse than an early one."""
    trainer = trainer_of(
        build_backbone("bert"), tmp_path, max_steps=30, learning_rate=0.3, lr_scheduler_type="constant",
        eval_strategy="steps", save_strategy="steps", eval_steps=3, save_steps=3, load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    seen = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert min(seen) < seen[-1]
    assert trainer.evaluate()["eval_loss"] == min(seen)


def test_gradients_are_clipped_over_what_is_trained(build_backbone: Any, tmp_path: Path) -> None:
    norms = {}
    for limit in (1e-3, 1e9):
        trainer = trainer_of(
            build_backbone("bert"), tmp_path, max_steps=1, max_grad_norm=limit, optim="sgd", learning_rate=1.0,
            weight_decay=0.0, lr_scheduler_type="constant", logging_steps=1,
        )  # fmt: skip
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.train()
        moved = [value - before[name] for name, value in trainer.model.state_dict().items()]
        norms[limit] = float(torch.cat([change.flatten().float() for change in moved]).norm())
    assert norms[1e9] > 0.01 and np.isclose(norms[1e-3], 1e-3, rtol=1e-2)


def test_batches_grouped_by_length_are_less_padded(build_backbone: Any, tmp_path: Path) -> None:
    def padding(**options: Any) -> int:
        trainer = trainer_of(build_backbone("bert"), tmp_path, per_device_train_batch_size=4, **options)
        batches = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
        trainer.train()
        assert losses(trainer)[-1] < losses(trainer)[0]
        return sum(int((mask == 0).sum()) for mask in batches)

    assert padding(train_sampling_strategy="group_by_length") < 0.6 * padding()


def test_tensorboard_gets_the_curve(build_backbone: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "board")
    try:
        trainer = trainer_of(build_backbone("bert"), tmp_path, report_to=["tensorboard"])
        trainer.train()
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    board = EventAccumulator(str(next((tmp_path / "board").rglob("events*")).parent))
    board.Reload()
    assert np.allclose([point.value for point in board.Scalars("train/loss")], losses(trainer), rtol=1e-3)


def test_bf16_autocast_follows_float32(build_backbone: Any, tmp_path: Path) -> None:
    runs = [trainer_of(build_backbone("bert"), tmp_path, bf16=bf16) for bf16 in (False, True)]
    for trainer in runs:
        trainer.train()
    assert losses(runs[0]) != losses(runs[1])
    assert np.allclose(losses(runs[0]), losses(runs[1]), rtol=0.1)
    assert runs[1].model.ensemble.bias.dtype == torch.float32


@pytest.mark.slow
def test_torch_compile_gives_the_same_curve(build_backbone: Any, tmp_path: Path) -> None:
    still = {"view_dropout": 0.0, "task_model": {**SPEC, "dropout": 0.0, "token_dropout": 0.0}}
    runs = [
        trainer_of(build_backbone("bert"), tmp_path, config=still, max_steps=6, logging_steps=1, torch_compile=value)
        for value in (False, True)
    ]
    for trainer in runs:
        trainer.train()
    assert hasattr(runs[1].model_wrapped, "_orig_mod")
    assert np.allclose(losses(runs[0]), losses(runs[1]), rtol=1e-4)
    assert np.isclose(*(trainer.evaluate()["eval_loss"] for trainer in runs), rtol=1e-3)


@pytest.mark.parametrize("objective", ["per_layer", "ensemble", "both"])
def test_label_smoothing_is_in_every_layers_loss(build_backbone: Any, objective: str) -> None:
    fields = {"objective": objective, "label_smoothing": 0.2, "num_labels": 4, "view_dropout": 0.0}
    model = get_levi_model(build_backbone("bert"), LeviConfig(hidden_width=16, **fields)).train()
    batch = {"input_ids": torch.randint(8, 50, (6, 5)), "attention_mask": torch.ones(6, 5, dtype=torch.int64)}
    labels = torch.tensor([0, 3, 1, -100, 2, 1])
    output = model(**batch, labels=labels)

    def exact(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=0.2)

    layers = torch.stack([exact(logits) for logits in output.layer_logits]).mean()
    expected = {
        "per_layer": layers,
        "ensemble": exact(output.logits),
        "both": (layers + exact(output.logits)) / 2,
    }[objective]
    torch.testing.assert_close(output.loss, expected)
    plain = get_levi_model(build_backbone("bert"), LeviConfig(hidden_width=16, **{**fields, "label_smoothing": 0.0}))
    plain.load_state_dict(model.state_dict())  # evaluation is by the plain loss
    assert torch.equal(model.eval()(**batch, labels=labels).loss, plain.eval()(**batch, labels=labels).loss)


def test_label_smoothing_out_of_range_is_refused() -> None:
    for fields in ({"label_smoothing": 1.0}, {"label_smoothing": 0.1, "problem_type": "regression", "num_labels": 1}):
        with pytest.raises(ValueError, match="label_smoothing: expected a number"):
            LeviConfig(**fields)


def test_smoothing_by_trainer_is_said_to_bypass_the_objective(build_backbone: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="without labels"):
        trainer_of(build_backbone("bert"), tmp_path, label_smoothing_factor=0.1, max_steps=2).train()


# --- checkpoints ----------------------------------------------------------------------------------------------------


def saving(backbone: Any, folder: Path, **options: Any) -> Trainer:
    return trainer_of(
        backbone, folder, callbacks=[SealCheckpoints()], save_strategy="steps", save_steps=4, max_steps=12, **options
    )


def test_a_checkpoint_holds_what_is_trained(build_backbone: Any, tmp_path: Path) -> None:
    trainer = saving(build_backbone("bert"), tmp_path)
    trainer.train()
    trained, total = trainer.model.num_parameters_by_part()
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoint-4").iterdir())
    assert 3 * 4 * trained < size < 3 * 4 * trained + 60_000  # weights and two moments; the rest is bookkeeping
    assert total > 3 * trained


def test_an_unsealed_or_damaged_checkpoint_is_named_and_passed_over(build_backbone: Any, tmp_path: Path) -> None:
    saving(build_backbone("bert"), tmp_path).train()
    assert last_sealed_checkpoint(tmp_path) == str(tmp_path / "checkpoint-12")
    (tmp_path / "checkpoint-12" / SEAL).unlink()
    with (tmp_path / "checkpoint-8" / "optimizer.pt").open("r+b") as file:
        file.truncate(100)
    told: list[str] = []
    assert last_sealed_checkpoint(tmp_path, on_damage=told.append) == str(tmp_path / "checkpoint-4")
    assert "checkpoint-12 is not whole: it has no checksums.json" in told[0]
    assert "checkpoint-8 is not whole: optimizer.pt has changed" in told[1]
    last_sealed_checkpoint(tmp_path, remove_unsealed=True, on_damage=told.append)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4"]
    assert last_sealed_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(ValueError, match="save_total_limit: expected at least 2"):
        saving(build_backbone("bert"), tmp_path, save_total_limit=1).train()


@pytest.mark.slow
def test_a_trainer_killed_at_any_step_ends_with_the_same_bits(tiny_bert_dir: str, tmp_path: Path) -> None:
    def run(folder: str, *kill: str) -> int:
        command = [sys.executable, str(SCRIPT), tiny_bert_dir, str(tmp_path / folder), *kill]
        return subprocess.run(command, timeout=120, capture_output=True).returncode

    assert run("whole") == 0
    expected = (tmp_path / "whole" / "end.safetensors").read_bytes()
    for kill in ("step:3", "step:6", "save:2", "step:1", "save:1"):
        assert run("killed", kill) == -9, kill
    assert run("killed") == 0
    assert (tmp_path / "killed" / "end.safetensors").read_bytes() == expected
