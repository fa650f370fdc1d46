"""A tiny backbone, data sets of random texts with repeats, and folders compared byte by byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from levi_fast.backbones import load_backbone
from levi_fast.data.encoded import EncodedDataset
from levi_fast.taps import TapExtractor

SMALL = {"batch_size": 4, "batches_per_shard": 2}


class Counting(TapExtractor):
    """A TapExtractor that counts its batches, and can do something before one of them."""

    batches = 0
    before: Callable[[int], None] = staticmethod(lambda batch: None)

    def __call__(self, **inputs: Any) -> Any:
        self.batches += 1
        self.before(self.batches)
        return super().__call__(**inputs)


@pytest.fixture
def backbone(tiny_bert_dir: str) -> torch.nn.Module:
    return load_backbone(tiny_bert_dir)


@pytest.fixture
def counting(backbone: torch.nn.Module) -> Callable[..., Counting]:
    """``counting(**arguments)``: a new counting extractor on the tiny backbone."""
    return lambda **arguments: Counting(backbone, **arguments)


@pytest.fixture
def texts() -> Callable[..., EncodedDataset]:
    """``texts(count, seed, repeats)``: texts of 3 to 12 tokens, the last ``repeats`` equal to the first ones."""

    def make(count: int = 30, seed: int = 0, repeats: int = 3) -> EncodedDataset:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 11, (count - repeats,), generator=generator).tolist()
        rows = [[2, *torch.randint(4, 40, (length,), generator=generator).tolist(), 3] for length in lengths]
        return EncodedDataset(f"seed {seed}", token_ids=rows + rows[:repeats], labels=torch.zeros(count))

    return make


@pytest.fixture
def read_folder() -> Callable[[Path], dict[str, bytes]]:
    """``read_folder(path)``: the content of every file, by name."""
    return lambda folder: {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
