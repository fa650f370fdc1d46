"""One rank of ``fit``; run by test_checkpoints_of_ranks.py under torchrun.

    python fit_rank.py BACKBONE FOLDER RESULT LOOP [KILL]

BACKBONE, RESULT: as of killed_trainer.py, which this imports; rank 0 writes RESULT, the others RESULT.RANK. FOLDER:
of the checkpoints, or "-" for none. LOOP: see ``fit``. KILL: "RANK@step:N" or "RANK@write:N", as there, for that
rank alone. RATE, a variable: the learning rate.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from killed_trainer import build, kill_at, texts

from levi_fast.errors import DataError
from levi_fast.ranks import end_rank
from levi_fast.training.checkpoints import CheckpointOptions
from levi_fast.training.fit import TrainingOptions, fit


def main() -> None:
    torch.set_num_threads(1)
    rank = os.environ.get("RANK", "0")
    backbone, folder, result, loop = sys.argv[1:5]
    if len(sys.argv) > 5:
        where, _, what = sys.argv[5].partition("@")
        if where == rank:
            kill_at(what)
    train, validation = texts(61, 0), texts(300, 1)  # neither fills the last step of two processes or of three
    model = build(backbone, train, validation)
    options = TrainingOptions(epochs=3, batch_size=8, learning_rate=float(os.environ.get("RATE", "5e-3")), seed=4)
    kept = None
    if folder != "-":
        kept = CheckpointOptions(folder, save_steps=3, on_note=lambda text: print(f"rank {rank}: {text}", flush=True))
    try:
        fitted = fit(model, train, validation, options, loop=loop, checkpoints=kept)
    except DataError as error:
        print(f"rank {rank}: {error}", flush=True)
        raise SystemExit(2) from error
    scores = {"history": fitted.history, "epoch": fitted.best_epoch, "blend": fitted.blend}
    content = safetensors.torch.save(model.state_dict(), {"scores": json.dumps(scores)})
    # every rank ends with the same model, and the first one's file is the result
    Path(result if rank == "0" else f"{result}.{rank}").write_bytes(content)
    end_rank()


if __name__ == "__main__":
    main()
