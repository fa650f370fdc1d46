"""Folders of classes, as ImageNet has them, and the sets that test what was learned there: V2, R, A and Sketch.

Training data is ``DIR/train/CLASS/*.jpg`` with ``DIR/val`` and perhaps ``DIR/test`` beside it (Russakovsky et al.,
*ImageNet Large Scale Visual Recognition Challenge*, IJCV 2015). An OOD set is a folder of class folders:

- ImageNet-Sketch (Wang et al., *Learning Robust Global Representations by Penalizing Local Predictive Power*,
  NeurIPS 2019): the 1,000 classes under the same names (``n01440764``);
- ImageNet-R (Hendrycks et al., *The Many Faces of Robustness*, ICCV 2021) and ImageNet-A (Hendrycks et al., *Natural
  Adversarial Examples*, CVPR 2021): 200 of these classes. As in both benchmarks' own evaluation, the prediction is
  the best of the classes that the set has, not of all 1,000;
- ImageNet-V2 (Recht et al., *Do ImageNet Classifiers Generalize to ImageNet?*, ICML 2019): folders ``0`` to ``999``,
  the place of a class among the sorted names.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from levi_fast.data.images import ImageSet, ImageSplits, image_files
from levi_fast.data.preprocessing import VALIDATION_FRACTION, stratified_holdout
from levi_fast.errors import DataError

_VALIDATION_FOLDERS = ("val", "valid", "validation")


def load_image_folders(data: str | Path, ood: Mapping[str, str] | None = None, seed: int = 0) -> ImageSplits:
    """List the images of ``DIR/train``, ``DIR/val``, ``DIR/test`` and of OOD folders.

    Where there is a ``test``, ``val`` chooses the epoch. Where there is not, as in ImageNet, ``val`` is what is
    reported, and a tenth of the training images, class by class, chooses the epoch.

    Args:
        data: folder with ``train``.
        ood: folders of class folders by name.
        seed: of the images that are held out.

    Returns:
        sets by split; label names are the training folders', sorted.

    Raises:
        DataError: a folder that is missing or empty, fewer than two classes, or a class that training does not have.
    """
    root = Path(data)
    if not (root / "train").is_dir():
        raise DataError(f"{data}: expected a folder 'train' with one folder per class")
    names = class_names(root / "train")
    if len(names) < 2:
        raise DataError(f"{root / 'train'}: expected at least two folders of classes, got {len(names)}")
    train = _listed(root / "train", {name: place for place, name in enumerate(names)}, "train")
    evaluated = [root / name for name in _VALIDATION_FOLDERS if (root / name).is_dir()]
    if len(evaluated) > 1:
        raise DataError(f"{data}: expected one of {evaluated[0].name} and {evaluated[1].name}, got both")
    sets = {"train": train}
    if (root / "test").is_dir():
        sets["test"] = read_class_folders(root / "test", names, "test", known_only=True)
        if evaluated:
            sets["validation"] = read_class_folders(evaluated[0], names, "validation", known_only=True)
    elif evaluated:
        sets["test"] = read_class_folders(evaluated[0], names, "test", known_only=True)
    for name, folder in (ood or {}).items():
        sets[f"ood {name}"] = read_class_folders(folder, names, name)
    return ImageSplits(with_validation(sets, seed), names)


def class_names(folder: Path) -> tuple[str, ...]:
    """The class folders in a folder, sorted; hidden ones are passed over."""
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))


def read_class_folders(folder: str | Path, names: Sequence[str], name: str, *, known_only: bool = False) -> ImageSet:
    """The images of class folders, with the labels of a training set.

    Folders are told by their names; where no training class has any of these names and all are whole numbers, they
    are places among ``names``. Where only some of the training classes are there, ``classes`` names those. Folders of
    classes that training does not have are left out, with a warning.

    Args:
        folder: of class folders.
        names: of the training labels, in order.
        name: of the set.
        known_only: a class that training does not have is an error, and ``classes`` is None: for ID sets.

    Raises:
        DataError: no such folder, no image, a number out of range, or no class (``known_only``: not every class) that
            training has.
    """
    place = Path(folder)
    if not place.is_dir():
        raise DataError(f"{name}: expected a folder with one folder per class, {folder} is not a folder")
    found = class_names(place)
    if not found:
        raise DataError(f"{name}: {folder}: expected folders of classes, found none")
    label_of = {class_name: label for label, class_name in enumerate(names)}
    if not set(found) & set(label_of) and all(one.isdecimal() for one in found):
        largest = max(map(int, found))
        if largest >= len(names):
            raise DataError(
                f"{name}: {folder}: folders are numbers of classes, expected 0 to {len(names) - 1}, the places of "
                f"the {len(names)} training classes, got {largest}"
            )
        label_of = {one: int(one) for one in found}
    unknown = [one for one in found if one not in label_of]
    if len(unknown) == len(found) or (unknown and known_only):
        raise DataError(f"{name}: {folder}: class {unknown[0]!r} is not among the training classes {_brief(names)}")
    if unknown:
        warnings.warn(
            f"{name}: {len(unknown)} of {len(found)} classes are not among the training classes, and were left out: "
            f"{_brief(unknown)}",
            stacklevel=2,
        )
    images = _listed(place, {one: label_of[one] for one in found if one in label_of}, name)
    if known_only or len(set(images.labels)) == len(names):
        return images
    return ImageSet(name, place, images.files, images.labels, tuple(sorted(set(images.labels))))


def with_validation(sets: Mapping[str, ImageSet], seed: int) -> dict[str, ImageSet]:
    """The sets with "validation": where there is none, a seeded tenth of the training images, class by class."""
    if "validation" in sets:
        return dict(sets)
    import torch

    labels = torch.tensor(sets["train"].labels, dtype=torch.int64)
    kept, held = stratified_holdout(labels, VALIDATION_FRACTION, seed)
    train = sets["train"]
    return {**sets, "train": train.select(kept), "validation": train.select(held)}


def _listed(folder: Path, label_of: Mapping[str, int], name: str) -> ImageSet:
    files: list[str] = []
    labels: list[int] = []
    for class_name, label in label_of.items():
        found = image_files(folder / class_name)
        files += [f"{class_name}/{file}" for file in found]
        labels += [label] * len(found)
    if not files:
        raise DataError(f"{name}: {folder}: expected images in the folders of classes, found none")
    return ImageSet(name, folder, tuple(files), tuple(labels))


def _brief(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
