"""Checkpoints of a training run: killed at any moment, the same command goes on and ends with the same bits.

A checkpoint is one safetensors file: trained weights, optimizer state, random generator and the best epoch's weights
as tensors; the position and the scores as JSON in its header. It is written under a temporary name, fsynced and
renamed, and carries a digest of its content, so that one damaged later is found out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from levi_fast.errors import DataError
from levi_fast.storage import write_atomic

# The newest may be damaged later, so the one before it stays.
KEPT = 2
FORMAT = 1


@dataclass
class TrainingState:
    """Where a run is.

    Args:
        epoch: the epoch that the next step belongs to, from 0.
        step: steps of that epoch that are done.
        tensors: by name, all that is needed to go on.
        scores: what is not a tensor: JSON values.
    """

    epoch: int
    step: int
    tensors: dict[str, Tensor]
    scores: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointOptions:
    """Where and how often a run writes checkpoints.

    Args:
        folder: for the checkpoints of this run alone; created with the first one.
        save_steps: steps between them; None is one after every epoch.
        on_note: told of a damaged checkpoint, and of going on from one.

    Raises:
        DataError: the folder is a file or holds anything else, or ``save_steps`` is below 1.
    """

    folder: str
    save_steps: int | None = None
    on_note: Callable[[str], None] = field(default=lambda text: None, compare=False)

    def __post_init__(self) -> None:
        if self.save_steps is not None and self.save_steps < 1:
            raise DataError(f"--save-steps: expected at least 1, got {self.save_steps}")
        path = Path(self.folder)
        if path.exists() and not path.is_dir():
            raise DataError(f"--checkpoints: expected a folder, but {path} is a file")
        strangers = sorted(entry.name for entry in path.iterdir() if not _is_ours(entry)) if path.is_dir() else []
        if strangers:
            raise DataError(f"--checkpoints: expected a folder of its own, but {path} holds {strangers[0]!r}")

    def clear(self) -> None:
        """Remove the checkpoints: the run has ended and its result is written."""
        folder = Path(self.folder)
        if folder.is_dir():
            for path in folder.iterdir():
                if _is_ours(path):
                    path.unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()


class Checkpoints:
    """The checkpoints of one run.

    Args:
        options: where they are.
        run: what the run is: its options, and digests of its data and initial weights; JSON values. Checkpoints of
            another run are refused.
    """

    def __init__(self, options: CheckpointOptions, run: Mapping[str, Any]) -> None:
        self.folder, self.save_steps, self.note = Path(options.folder), options.save_steps, options.on_note
        self.run = json.loads(json.dumps(dict(run)))

    def due(self, step: int, steps_per_epoch: int, steps_done: int) -> bool:
        """Whether a checkpoint is wanted inside an epoch; at its end there always is one.

        Args:
            step: steps of the epoch that are done.
            steps_per_epoch: how many it has.
            steps_done: of the whole run.
        """
        return self.save_steps is not None and step < steps_per_epoch and steps_done % self.save_steps == 0

    def save(self, state: TrainingState, steps_done: int) -> None:
        """Write a checkpoint, and remove all but the newest :data:`KEPT`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".step-*.tmp"):  # of a run that was killed while it wrote
            left.unlink(missing_ok=True)
        content = json.dumps({"epoch": state.epoch, "step": state.step, "scores": state.scores, "run": self.run})
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
        header = {"format": str(FORMAT), "content": content, "sha256": _digest(tensors, content)}
        write_atomic(self.folder / f"step-{steps_done:09d}.safetensors", safetensors.torch.save(tensors, header))
        for path in self._paths()[KEPT:]:
            path.unlink(missing_ok=True)

    def newest(self) -> TrainingState | None:
        """The newest checkpoint that is whole, or None: begin at the beginning. Every damaged one is named.

        Raises:
            DataError: it is of another run.
        """
        for path in self._paths():
            try:
                content, tensors = _read(path)
            except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
                self.note(f"checkpoint {path} is damaged ({error}); looking for the one before it")
                continue
            self._check_run(path, content["run"], {*content["run"], *self.run})
            self.note(f"going on from {path}: epoch {content['epoch'] + 1}, step {content['step']}")
            return TrainingState(content["epoch"], content["step"], tensors, content["scores"])
        return None

    def check(self) -> None:
        """Compare what is known of the run so far with the newest checkpoint, before anything is computed.

        Raises:
            DataError: that is of another run.
        """
        for path in self._paths():
            try:
                with safetensors.safe_open(path, framework="pt") as file:
                    theirs = json.loads((file.metadata() or {})["content"])["run"]
            except (OSError, ValueError, KeyError, safetensors.SafetensorError):
                continue  # newest() names it
            return self._check_run(path, theirs, self.run)

    def _paths(self) -> list[Path]:
        """Newest first."""
        return sorted(self.folder.glob("step-*.safetensors"), reverse=True)

    def _check_run(self, path: Path, theirs: Mapping[str, Any], names: Collection[str]) -> None:
        different = [name for name in sorted(names) if theirs.get(name) != self.run.get(name)]
        if different:
            listed = "; ".join(f"{name} was {theirs.get(name)}, is {self.run.get(name)}" for name in different)
            raise DataError(
                f"--checkpoints: {path} is of another run: {listed}. Give the options and data of then, name another "
                "folder, or remove this one"
            )


def _is_ours(path: Path) -> bool:
    return path.name.startswith((".step-", "step-")) and path.suffix in (".safetensors", ".tmp")


def _digest(tensors: Mapping[str, Tensor], content: str) -> str:
    digest = hashlib.sha256(content.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safetensors.safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if header.get("format") != str(FORMAT):
        raise ValueError(f"its format is {header.get('format')}, expected {FORMAT}")
    if _digest(tensors, header["content"]) != header["sha256"]:
        raise ValueError("its content does not fit its checksum")
    return json.loads(header["content"]), tensors
