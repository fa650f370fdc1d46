"""Image files as rows: which files a set has, and batches that are decoded when they are asked for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from levi_fast.data.encoded import PIXELS, EncodedDataset
from levi_fast.errors import DataError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_DECODERS = 8  # threads; what Pillow decodes, it decodes without Python's lock


@dataclass(frozen=True)
class ImageSet:
    """The images of one set.

    Args:
        name: for messages.
        root: folder that ``files`` are relative to.
        files: one image each, with ``/`` between folders.
        labels: index into the task's label names, of every file.
        classes: the labels among which a prediction is made, ascending; None for all. Benchmarks whose images are of
            some classes of their training data only (ImageNet-R, ImageNet-A) are scored so.
    """

    name: str
    root: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def select(self, rows: Sequence[int]) -> ImageSet:
        """The given rows, in the given order."""
        files, labels = tuple(self.files[row] for row in rows), tuple(self.labels[row] for row in rows)
        return ImageSet(self.name, self.root, files, labels, self.classes)

    def drawn(self, count: int | None, seed: int) -> ImageSet:
        """At most ``count`` rows, drawn by ``seed``, in their order; ``classes`` stay."""
        if count is None or count >= len(self):
            return self
        return self.select(sorted(np.random.default_rng(seed).permutation(len(self))[:count].tolist()))


@dataclass(frozen=True)
class ImageSplits:
    """Sets of images by split ("train", "validation", "test", "ood NAME"), and the names of their labels."""

    sets: dict[str, ImageSet]
    names: tuple[str, ...]


class EncodedImages(EncodedDataset):
    """Rows that are image files, decoded and brought to the backbone's form whenever a batch is asked for.

    Batches carry ``pixel_values`` ``[B, 3, height, width]`` float32 in place of token ids. Nothing decoded is kept:
    where the task model reads images, every epoch decodes them again.

    Args:
        images: the files.
        processor: transformers' image processor of the backbone.

    Raises:
        DataError: a file that is not there; when a batch is asked for, one that cannot be decoded.
    """

    def __init__(self, images: ImageSet, processor: Any) -> None:
        super().__init__(images.name, labels=torch.tensor(images.labels, dtype=torch.int64))
        self.images, self.processor = images, processor
        self.lengths = torch.ones(len(images), dtype=torch.int64)  # images are all of one length
        if images.classes is not None:
            self.classes = torch.tensor(images.classes, dtype=torch.int64)
        # Name, size and time stand for the content, as they do for make: reading everything would cost as much as
        # the backbone's own pass.
        self._keys: list[bytes] = []
        for file in images.files:
            try:
                status = os.stat(images.root / file)
            except OSError as error:
                raise DataError(f"{images.name}: {images.root / file}: no such image") from error
            self._keys.append(f"{images.root.name}/{file}\0{status.st_size}\0{status.st_mtime_ns}".encode())

    @property
    def feeds_backbone(self) -> bool:
        return True

    def backbone_inputs(self, rows: Tensor) -> dict[str, Tensor]:
        """``pixel_values`` of the given rows.

        Raises:
            DataError: an image that cannot be decoded.
        """
        paths = [self.images.root / self.images.files[row] for row in rows.tolist()]
        if not paths:
            return {}
        with ThreadPoolExecutor(min(_DECODERS, len(paths))) as threads:
            decoded = list(threads.map(decode, paths))
        return {PIXELS: self.processor(images=decoded, return_tensors="pt")["pixel_values"].float()}

    def input_bytes(self) -> Iterator[bytes]:
        """What tells every image from others: its name, size and time."""
        yield from self._keys

    def content_digest(self) -> str:
        """SHA-256 of what tells the images, and of the labels."""
        digest = hashlib.sha256(super().content_digest().encode())
        for key in self._keys:
            digest.update(hashlib.sha256(key).digest())
        return digest.hexdigest()

    def subset(self, rows: Sequence[int], name: str) -> EncodedImages:
        """The given rows as a data set of their own, without taps."""
        return EncodedImages(self.images.select([int(row) for row in rows]), self.processor)


def decode(path: Path) -> Any:
    """An image file as a PIL image in RGB.

    Raises:
        DataError: Pillow is missing, or the file is no image.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("images need Pillow: pip install levi_fast[images]") from error
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what a damaged file raises
        raise DataError(f"{path}: cannot be decoded: {error}") from error


def image_files(folder: Path) -> list[str]:
    """The images in a folder and below, relative to it, in order of name; hidden files are passed over."""
    found = []
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.suffix.lower() in IMAGE_EXTENSIONS and not hidden and path.is_file():
            found.append(relative.as_posix())
    return sorted(found)
