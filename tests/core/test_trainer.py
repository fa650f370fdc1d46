"""The plain transformers Trainer trains a LeviModel, keeps its best checkpoint and resumes."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from levi_fast import LeviConfig, LeviModel, get_levi_model


class Parity(Dataset):
    """Texts of random tokens; the label says whether token 7 is there."""

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(8, 50, (size, 6), generator=generator)
        self.labels = torch.arange(size) % 2
        self.ids[self.labels == 1, 2] = 7

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {
            "input_ids": self.ids[index],
            "attention_mask": torch.ones(6, dtype=torch.int64),
            "labels": self.labels[index],
            "unused": torch.tensor(1.0),
        }


def accuracy(prediction) -> dict[str, float]:
    assert isinstance(prediction.predictions, np.ndarray)  # the logits alone: no tuple, no hidden states
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def make_trainer(backbone, folder, steps=60, **options) -> Trainer:
    torch.manual_seed(0)
    spec = {"type": "text", "vocab_size": 50, "embedding_dim": 8, "view_width": 6, "token_dropout": 0.1}
    model = get_levi_model(backbone, LeviConfig(hidden_width=16, task_model=spec))
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=16, learning_rate=1e-2, report_to=[],
        eval_strategy="steps", save_strategy="steps", eval_steps=20, save_steps=20, logging_steps=20,
        disable_tqdm=True, use_cpu=True, seed=3, **options,
    )  # fmt: skip
    return Trainer(
        model, arguments, train_dataset=Parity(128, 1), eval_dataset=Parity(50, 2), compute_metrics=accuracy
    )


def test_training_evaluation_and_best_checkpoint(build_backbone, tmp_path):
    trainer = make_trainer(
        build_backbone("bert"), tmp_path, load_best_model_at_end=True, metric_for_best_model="accuracy"
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] > 0.9
    best = trainer.state.best_model_checkpoint
    assert best and LeviModel.from_pretrained(best, backbone=build_backbone("bert")) is not None
    trainer.save_model(str(tmp_path / "final"))
    loaded = LeviModel.from_pretrained(tmp_path / "final", backbone=build_backbone("bert"))
    batch = {k: v[None] for k, v in Parity(4, 5)[1].items() if k in ("input_ids", "attention_mask")}
    trainer.model.eval()
    assert torch.equal(loaded(**batch).logits, trainer.model(**batch).logits)


def test_gradient_accumulation_is_a_mean_over_the_larger_batch(build_backbone, tmp_path):
    losses = []
    for batch, accumulate in ((16, 1), (4, 4)):
        torch.manual_seed(0)
        model = get_levi_model(
            build_backbone("bert"),
            LeviConfig(hidden_width=16, view_dropout=0.0, task_model={
                "type": "text", "vocab_size": 50, "embedding_dim": 8, "view_width": 6, "token_dropout": 0.0,
                "dropout": 0.0}),
        )  # fmt: skip
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(batch)), max_steps=3, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate, learning_rate=1e-2, report_to=[], disable_tqdm=True, use_cpu=True,
            save_strategy="no", logging_steps=1, seed=3, max_grad_norm=1.0,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=Parity(48, 1))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert np.allclose(losses[0], losses[1], rtol=1e-4)


def test_a_checkpoint_resumes_where_it_was(build_backbone, tmp_path):
    whole = make_trainer(build_backbone("bert"), tmp_path / "whole", steps=40)
    whole.train()
    resumed = make_trainer(build_backbone("bert"), tmp_path / "resumed", steps=40)
    with torch.no_grad():  # what a fresh process would start from does not matter
        resumed.model.ensemble.bias += 1
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-20"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
