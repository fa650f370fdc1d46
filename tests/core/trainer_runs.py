"""A Trainer that is killed on the way; run by test_trainer_features.py.

    python trainer_runs.py BACKBONE FOLDER [step:N | save:N]

kill -9 comes after the N-th step of this process, or in the middle of writing its N-th checkpoint. At the end the
trained weights are written to FOLDER/end.safetensors.
"""

from __future__ import annotations

import os
import signal
import sys

import safetensors.torch
import torch
from test_trainer_features import saving
from transformers import TrainerCallback

from levi_fast import load_backbone
from levi_fast.training import trainer_checkpoints


class KillAtStep(TrainerCallback):
    def __init__(self, count: int) -> None:
        self.left = count

    def on_step_end(self, *_: object, **__: object) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    torch.set_num_threads(1)
    backbone, folder = sys.argv[1:3]
    trainer = saving(load_backbone(backbone), folder, config={"mix": "learned", "objective": "both", "dropout": 0.2})
    where, _, count = (sys.argv[3] if len(sys.argv) > 3 else "").partition(":")
    if where == "step":
        trainer.add_callback(KillAtStep(int(count)))
    elif where == "save":
        write, left = trainer._save_optimizer_and_scheduler, int(count)

        def die(output_dir: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            write(output_dir)

        trainer._save_optimizer_and_scheduler = die
    last = trainer_checkpoints.last_sealed_checkpoint(folder, remove_unsealed=True)
    trainer.train(resume_from_checkpoint=last)
    safetensors.torch.save_file(trainer.model.state_dict(), f"{folder}/end.safetensors")


if __name__ == "__main__":
    main()
