"""The named task ``digits``: a controlled experiment on :mod:`levi_fast.data.digits`, its backbone pre-trained here.

The backbone is a small ViT that is trained on the experiment's own pre-training images, mark included. It stands in
for a pre-trained model whose features carry a known spuriousness; it is no foundation model, and figures reached with
it speak of that mechanism alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from levi_fast.config_checks import read_json
from levi_fast.data.digits import CANVAS, MARGIN, NONE, NUM_CLASSES, OOD_NAMES, DigitSet, draw, make_digits
from levi_fast.data.encoded import EncodedDataset
from levi_fast.data.labels import SINGLE_LABEL, LabelSpace
from levi_fast.data.preprocessing import TableProcessor
from levi_fast.data.tables import Columns
from levi_fast.errors import DataError
from levi_fast.storage import write_atomic
from levi_fast.training.output import new_folder
from levi_fast.training.runs import Splits
from levi_fast.training.tasks import save_task

PRETRAINING_FILE = "levi_pretraining.json"
# Of the stand-in; settled by its accuracy on held-out pre-training images, before any method was trained on top.
ARCHITECTURE: dict[str, Any] = {
    "image_size": CANVAS, "patch_size": 3, "num_channels": 1, "hidden_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "intermediate_size": 128,
}  # fmt: skip
PRETRAINING: dict[str, Any] = {"epochs": 30, "batch_size": 32, "learning_rate": 1e-3, "weight_decay": 0.05}
TASK_MODEL = {"type": "image", "channels": 1, "widths": [16, 32, 64]}


@dataclass
class DigitsTask:
    """The experiment of one seed, as :class:`levi_fast.training.named_tasks.MovieLensSplits` is one of MovieLens.

    Args:
        sets: see :func:`levi_fast.data.digits.make_digits`.
        folder: where the stand-ins are kept, one for each seed.
        seed: of the data and of pre-training.
        processor: with the label space; it reads no column.
    """

    sets: dict[str, DigitSet]
    folder: Path
    seed: int
    processor: TableProcessor

    @classmethod
    def load(cls, folder: str, seed: int) -> DigitsTask:
        """Make the data of a seed."""
        names = tuple(str(digit) for digit in range(NUM_CLASSES))
        labels = LabelSpace("digit", SINGLE_LABEL, "integer", names)
        return cls(make_digits(seed), Path(folder), seed, TableProcessor(Columns(label="digit"), labels, 1))

    def backbone(self) -> str:
        """Folder of the stand-in: pre-trained here unless an earlier run has left it.

        Raises:
            DataError: the folder holds something else, or a stand-in that was made otherwise.
        """
        place = self.folder / f"vit-seed-{self.seed}"
        settings = {"architecture": ARCHITECTURE, "pretraining": PRETRAINING, "seed": self.seed}
        if place.is_dir() and any(place.iterdir()):
            file = place / PRETRAINING_FILE
            if not file.is_file():
                raise DataError(f"--data: expected the pre-trained stand-in of an earlier run, but {file} is missing")
            found = read_json(file)
            if {name: found.get(name) for name in settings} != settings:
                raise DataError(f"--data: {place} was pre-trained with other settings; name another folder")
            return str(place)
        model = pretrain(self.sets["pretrain"], self.seed)
        with new_folder(place) as stage:
            model.save_pretrained(stage)
            document = {**settings, "accuracy": self._accuracies(model)}
            write_atomic(stage / PRETRAINING_FILE, json.dumps(document, indent=2) + "\n")
        return str(place)

    def load_preprocessor(self, backbone: str) -> None:
        """Nothing: the pixels are made as the stand-in reads them."""

    def encode(self, tokenizer: Any, *, max_length: int | None, backbone_config: Any) -> Splits:
        """Pixels from -1 to 1 as ``pixel_values``; there is no text, and the arguments are not used."""
        encoded = {
            name: EncodedDataset(
                f"digits {name}",
                features={"pixel_values": pixel_values(found.images)},
                labels=torch.from_numpy(found.labels),
            )
            for name, found in self.sets.items()
        }
        ood = {name: encoded[name] for name in OOD_NAMES}
        return Splits(encoded["train"], encoded["validation"], encoded["test"], ood)

    def task_model(self, kind: str, vocab_size: int | None) -> dict[str, Any] | None:
        """Spec of a small convolutional net; None for ``"none"``."""
        if kind not in ("auto", "none"):
            raise DataError(f"--task-model: digits has its own task model; expected auto or none, got {kind!r}")
        return None if kind == "none" else dict(TASK_MODEL)

    def save(self, directory: Path) -> None:
        """Write what :func:`levi_fast.training.named_tasks.load_saved_task` needs."""
        save_task(directory, self.processor, {"task": "digits", "seed": self.seed})

    def _accuracies(self, model: Any) -> dict[str, float]:
        """Of the stand-in's own classifier, on held-out images: as in pre-training, without and with a wrong mark."""
        own = self.sets["pretrain_test"]
        digits = own.images
        inside = digits[:, 0, MARGIN:-MARGIN, MARGIN:-MARGIN]
        nothing = np.full(len(own), NONE)
        wrong = (own.labels + 1) % NUM_CLASSES
        shown = {
            "as in pre-training": digits,
            "without mark": draw(inside, nothing, nothing),
            "another digit's mark": draw(inside, wrong, nothing),
        }
        with torch.no_grad():
            guesses = {k: model(pixel_values=pixel_values(v)).logits.argmax(-1).numpy() for k, v in shown.items()}
        return {name: float((guess == own.labels).mean()) for name, guess in guesses.items()}


def pixel_values(images: np.ndarray) -> Tensor:
    """Images from 0 to 1 as a model reads them: float32 of the same shape, from -1 to 1."""
    return torch.from_numpy(images) * 2.0 - 1.0


def pretrain(data: DigitSet, seed: int) -> Any:
    """Train the stand-in, a ``ViTForImageClassification``, on the CPU; it ends in eval mode.

    AdamW, a linear warm-up over the first tenth of the steps, then cosine decay. The same seed gives the same model
    on the same machine; torch's global generator is left as it was.
    """
    from transformers import ViTConfig, ViTForImageClassification, get_cosine_schedule_with_warmup

    pixels, labels = pixel_values(data.images), torch.from_numpy(data.labels)
    batch_size, epochs = PRETRAINING["batch_size"], PRETRAINING["epochs"]
    steps = epochs * -(-len(data) // batch_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViTForImageClassification(ViTConfig(**{**ARCHITECTURE, "num_labels": NUM_CLASSES}))
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=PRETRAINING["learning_rate"], weight_decay=PRETRAINING["weight_decay"]
        )
        schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(data)).split(batch_size):
                model(pixel_values=pixels[rows], labels=labels[rows]).loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    return model.eval()
