"""One rank of a Trainer; run by test_ranks_of_training.py, by itself or under torchrun.

    python trainer_rank.py BACKBONE FOLDER '{"batch": 8, "accumulate": 1, "shard": false, "die": false}'

Rank 0 writes FOLDER/end.safetensors, the trained weights, and FOLDER/end.json: losses, evaluation, all-reduces, and
the backbone's bytes in this process before and after sharding. ``die``: rank 1 ends with status 7 in its third step;
``trained``: see LeviConfig.backbone_training.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import safetensors.torch
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
from test_trainer_features import SPEC, losses, trainer_of

from levi_fast import load_backbone
from levi_fast.ranks import end_rank
from levi_fast.sharding import bytes_here, shard_backbone


class Watch(TrainerCallback):
    """Counts all-reduces of gradients, and dies where it is told to."""

    def __init__(self, die: bool) -> None:
        self.die, self.reduced, self.trainer = die, 0, None

    def on_train_begin(self, *_: object, **__: object) -> None:
        model = self.trainer.model_wrapped
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model.register_comm_hook(None, self._reduce)

    def _reduce(self, state, bucket):  # register_comm_hook refuses annotations that are strings
        self.reduced += 1
        return allreduce_hook(state, bucket)

    def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
        if self.die and os.environ.get("RANK") == "1" and state.global_step == 3:
            os._exit(7)


def main() -> None:
    torch.set_num_threads(1)
    backbone, folder, told = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    still = {"view_dropout": 0.0, "task_model": {**SPEC, "dropout": 0.0, "token_dropout": 0.0}}
    loaded = load_backbone(backbone)
    for module in loaded.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    watch = Watch(told.get("die", False))
    trainer = trainer_of(
        loaded, Path(folder), config={**still, "backbone_training": told.get("trained", "frozen")}, callbacks=[watch],
        max_steps=8, logging_steps=1, per_device_train_batch_size=told["batch"],
        gradient_accumulation_steps=told.get("accumulate", 1), ddp_find_unused_parameters=False,
    )  # fmt: skip
    watch.trainer = trainer
    held = [bytes_here(trainer.model.backbone)]
    if told.get("shard"):
        shard_backbone(trainer.model)
        held.append(bytes_here(trainer.model.backbone))
    trainer.train()
    metrics = trainer.evaluate()
    if os.environ.get("RANK", "0") == "0":
        safetensors.torch.save_file(trainer.model.state_dict(), f"{folder}/end.safetensors")
        found = {"losses": losses(trainer), "reduced": watch.reduced, "held": held}
        found["metrics"] = {name: metrics[name] for name in ("eval_loss", "eval_accuracy")}
        Path(folder, "end.json").write_text(json.dumps(found))
    end_rank()


if __name__ == "__main__":
    main()
