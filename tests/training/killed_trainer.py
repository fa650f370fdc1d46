"""Trains a small model with checkpoints and is killed on the way; run by test_checkpoints.py.

    python killed_trainer.py BACKBONE FOLDER RESULT [KILL]

BACKBONE: a folder, to run it in every step, or "-" for taps that are there already. KILL: "step:N" (kill -9 after the
N-th forward pass of training in this process) or "write:N" (in the middle of writing its N-th checkpoint). RESULT, a
safetensors file, is written at the end: the weights, and every score in its header.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import safetensors.torch
import torch

from levi_fast import LeviConfig, get_levi_model
from levi_fast.data.encoded import EncodedDataset
from levi_fast.modeling import LeviModel
from levi_fast.training import checkpoints
from levi_fast.training.fit import TrainingOptions, fit

SPEC = {"type": "text", "vocab_size": 48, "embedding_dim": 8, "view_width": 8, "token_dropout": 0.3, "dropout": 0.2}


def texts(count: int, seed: int) -> EncodedDataset:
    generator = torch.Generator().manual_seed(seed)
    rows = [
        [2, *torch.randint(4, 40, (length,), generator=generator).tolist(), 3]
        for length in torch.randint(1, 9, (count,), generator=generator).tolist()
    ]
    return EncodedDataset(f"seed {seed}", token_ids=rows, labels=torch.tensor([sum(row) % 3 for row in rows]))


def build(backbone: str, train: EncodedDataset, validation: EncodedDataset) -> LeviModel:
    fields = {"hidden_width": 8, "dropout": 0.2, "mix": "learned", "objective": "both", "task_model": SPEC}
    config = LeviConfig(num_labels=3, problem_type="single_label_classification", **fields)
    torch.manual_seed(0)
    if backbone != "-":
        return get_levi_model(backbone, config)
    generator = torch.Generator().manual_seed(5)
    for dataset in (train, validation):
        dataset.set_taps(torch.randn(len(dataset), 48, generator=generator))
    return LeviModel(
        LeviConfig(**{**config.to_dict(), "tap_layers": [0, 1, 2], "tap_widths": [16] * 3, "view_width": 8})
    )


def kill_at(what: str) -> None:
    where, _, count = what.partition(":")
    seen = 0
    forward, write = LeviModel.forward, checkpoints.write_atomic

    def counted(last: bool) -> bool:
        nonlocal seen
        seen += 1
        return seen == int(count) and last

    def forward_then_die(self, *arguments, **keywords):
        result = forward(self, *arguments, **keywords)
        if self.training and counted(where == "step"):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def write_half_then_die(path: Path, data: bytes) -> None:
        if counted(where == "write"):
            Path(path).with_name(f".{Path(path).name}.half.tmp").write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, data)

    if where == "step":
        LeviModel.forward = forward_then_die
    else:
        checkpoints.write_atomic = write_half_then_die


def main() -> None:
    torch.set_num_threads(1)
    backbone, folder, result = sys.argv[1:4]
    if len(sys.argv) > 4:
        kill_at(sys.argv[4])
    train, validation = texts(60, 0), texts(25, 1)
    model = build(backbone, train, validation)
    options = TrainingOptions(epochs=3, batch_size=16, learning_rate=5e-3, seed=4)
    kept = checkpoints.CheckpointOptions(folder, save_steps=3, on_note=lambda text: print(text, flush=True))
    fitted = fit(model, train, validation, options, checkpoints=kept)
    scores = {"history": fitted.history, "epoch": fitted.best_epoch, "blend": fitted.blend}
    safetensors.torch.save_file(model.state_dict(), result, {"scores": json.dumps(scores)})


if __name__ == "__main__":
    main()
