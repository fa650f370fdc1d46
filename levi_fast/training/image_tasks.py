"""Images as named data sets: folders of classes, DomainNet, diabetic retinopathy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from levi_fast.backbones import load_image_processor
from levi_fast.data.domainnet import load_domainnet, read_image_list
from levi_fast.data.image_folders import load_image_folders, read_class_folders
from levi_fast.data.images import EncodedImages, ImageSet, ImageSplits
from levi_fast.data.labels import SINGLE_LABEL, LabelSpace
from levi_fast.data.preprocessing import TableProcessor
from levi_fast.data.retinopathy import load_retinopathy, read_graded
from levi_fast.data.tables import Columns
from levi_fast.errors import DataError
from levi_fast.training.runs import Splits
from levi_fast.training.tasks import names_in, save_task, splits_of

IMAGE_TASKS = {
    "image-folders": "a folder with train/CLASS/*.jpg, and val or test beside train",
    "domainnet": "the folder with real_train.txt and the other lists, beside the domains' folders",
    "retinopathy": "the folder with trainLabels.csv and train/",
}
"""Name -> what --data is."""
WITH_OOD_FOLDERS = ("image-folders", "retinopathy")


@dataclass
class ImageTask:
    """A named data set of images; see the loaders in :mod:`levi_fast.data`.

    Args:
        name: one of :data:`IMAGE_TASKS`.
        images: its sets.
        processor: the label space; there are no columns.
    """

    name: str
    images: ImageSplits
    processor: TableProcessor

    @classmethod
    def read(
        cls,
        name: str,
        data: str,
        split: str | None,
        seed: int,
        max_train_rows: int | None = None,
        max_eval_rows: int | None = None,
        ood: Mapping[str, str] | None = None,
    ) -> ImageTask:
        """List and split the images; none is decoded.

        Args:
            name, data: what, and where.
            split: the training domains of DomainNet, separated by commas.
            seed: of what is held out, and drawn.
            max_train_rows, max_eval_rows: draw that many training images, and of every other set.
            ood: further folders by name.

        Raises:
            DataError: a folder, list or file that cannot be used, or an option that the data set does not have.
        """
        if split is not None and name != "domainnet":
            raise DataError(f"--split: --task-name {name} has one split; leave it out")
        if name == "domainnet":
            images = load_domainnet(data, names_in(split), seed)
        elif name == "retinopathy":
            images = load_retinopathy(data, ood, seed)
        else:
            images = load_image_folders(data, ood, seed)
        sets = {
            part: one.drawn(max_train_rows if part == "train" else max_eval_rows, seed)
            for part, one in images.sets.items()
        }
        labels = LabelSpace("label", SINGLE_LABEL, "string", images.names)
        return cls(name, replace(images, sets=sets), TableProcessor(Columns(), labels, max_length=1))

    def load_preprocessor(self, backbone: str) -> Any:
        """The backbone's image processor."""
        return load_image_processor(backbone)

    def encode(self, tokenizer: Any, *, max_length: int | None, backbone_config: Any) -> Splits:
        """The sets with the image processor, given in place of a tokenizer; nothing is decoded yet.

        Raises:
            DataError: ``max_length``, or a file that is not there.
        """
        if max_length is not None:
            raise DataError("--max-length: images have no tokens; leave it out")
        return splits_of({split: EncodedImages(images, tokenizer) for split, images in self.images.sets.items()})

    def task_model(self, kind: str, vocab_size: int | None) -> dict[str, Any] | None:
        """Spec of the small convolutional net; None for ``"none"``."""
        if kind not in ("auto", "image", "none"):
            raise DataError(f"--task-model: images have their own; expected auto, image or none, got {kind!r}")
        return None if kind == "none" else {"type": "image"}

    def save(self, directory: Path) -> None:
        """Write what ``levi-fast evaluate`` needs beside the model and the image processor."""
        save_task(directory, self.processor, {"task": self.name})


def read_image_set(name: str, data: str, names: tuple[str, ...]) -> ImageSet:
    """The images at ``data``, with the labels of a trained model.

    Args:
        name: of the named data set that the model was trained on.
        data: a folder of class folders, a list of DomainNet's, or a folder with grades.
        names: the model's label names.

    Raises:
        DataError: what cannot be used, or a label that the model does not have.
    """
    if name == "image-folders":
        return read_class_folders(data, names, Path(data).name)
    if name == "retinopathy":
        return read_graded(data, Path(data).name)
    found: dict[int, str] = {}
    images = read_image_list(Path(data), found)
    for label, listed in found.items():
        known = names[label] if label < len(names) else "no class"
        if known not in (listed, str(label)):
            raise DataError(f"{data}: label {label} is {listed!r}, and {known!r} for the model")
    return images
