"""Checkpoints of transformers' own Trainer that can be trusted after a crash: sealed when whole, checked when read.

Trainer writes a checkpoint's files one after another, so a process that is killed may leave half of them, and a power
loss any part of their bytes. ::

    trainer = Trainer(model, arguments, callbacks=[SealCheckpoints()], ...)
    trainer.train(resume_from_checkpoint=last_sealed_checkpoint(arguments.output_dir))
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from levi_fast.cache.weights import file_sha256
from levi_fast.storage import fsync_directory, write_atomic

SEAL = "checksums.json"


class SealCheckpoints(TrainerCallback):
    """Flushes every checkpoint to disk as Trainer ends it, then writes its files' checksums beside them: its seal.

    Raises:
        ValueError: at the start of training with ``save_total_limit=1``, where Trainer removes the only sealed
            checkpoint before the next one is.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.save_total_limit == 1:
            raise ValueError("save_total_limit: expected at least 2, so that a whole checkpoint always stays, got 1")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # every rank has a file of its own in there
        if not args.should_save:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in files:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        seal = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
        write_atomic(folder / SEAL, json.dumps(seal, indent=1) + "\n")
        fsync_directory(folder.parent)


def last_sealed_checkpoint(
    output_dir: str | os.PathLike[str],
    *,
    remove_unsealed: bool = False,
    on_damage: Callable[[str], None] = warnings.warn,
) -> str | None:
    """The newest checkpoint of a Trainer that is whole; None where there is none, and training begins anew.

    Args:
        output_dir: the Trainer's.
        remove_unsealed: also remove newer checkpoints that are not, which Trainer would otherwise count.
        on_damage: told of every newer checkpoint that is not whole, and why.
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    for folder in sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        damage = _damage(folder)
        if damage is None:
            return str(folder)
        on_damage(f"{folder} is not whole: {damage}; looking for the one before it")
        if remove_unsealed:
            shutil.rmtree(folder)
    return None


def _damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        seal = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {SEAL}, so its writing was cut short"
    except (OSError, ValueError) as error:
        return f"{SEAL} cannot be read ({error})"
    for name, checksum in seal.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if file_sha256(path) != checksum:
            return f"{name} has changed since it was written"
    return None
