"""Training on taps that are random numbers in a memory-mapped file: their values make no difference to the time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from levi_fast.config import LeviConfig
from levi_fast.data.encoded import EncodedDataset
from levi_fast.modeling import LeviModel
from levi_fast.training.fit import TrainingOptions, fit

WIDTH, BATCH, VALIDATION = 384, 128, 1000


def mapped_taps(folder: Path, name: str, rows: int, width: int) -> Tensor:
    """Random taps [rows, width] in a file that is memory-mapped."""
    path = folder / f"{name}.bin"
    generator = torch.Generator().manual_seed(rows)
    with open(path, "wb") as file:
        for start in range(0, rows, 10_000):
            part = torch.randn(min(10_000, rows - start), width, generator=generator)
            file.write(part.numpy().tobytes())
    taps = torch.from_file(str(path), shared=True, size=rows * width).view(rows, width)
    assert taps.untyped_storage().filename is not None  # how the lean loop knows that they are on disk
    return taps


@dataclass
class SyntheticEpoch:
    """One tap of width 384, two numeric features, two classes: a cached epoch of any number of rows.

    Args:
        rows: of training.
        folder: for the taps' files, which stay there.
    """

    rows: int
    folder: Path

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def dataset(name: str, count: int) -> EncodedDataset:
            data = EncodedDataset(
                name,
                features={"numeric": torch.randn(count, 2, generator=generator)},
                labels=torch.randint(0, 2, (count,), generator=generator),
            )
            data.set_taps(mapped_taps(self.folder, name, count, WIDTH), keep_inputs=False)
            return data

        self.train, self.validation = dataset("train", self.rows), dataset("validation", VALIDATION)
        fields: dict[str, Any] = {"num_labels": 2, "problem_type": "single_label_classification"}
        task_model = {"type": "tabular", "num_numeric": 2}
        self.config = LeviConfig(tap_layers=[0], tap_widths=[WIDTH], view_width=64, task_model=task_model, **fields)
        self._fit(self.validation)  # warm-up

    def _fit(self, train: EncodedDataset) -> float:
        options = TrainingOptions(epochs=1, batch_size=BATCH, cross_fit=0, device="cpu")
        return fit(LeviModel(self.config), train, self.validation, options).seconds

    def run(self) -> float:
        """Train a new model for an epoch; seconds, validation included."""
        return self._fit(self.train)
