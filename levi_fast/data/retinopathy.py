"""Diabetic retinopathy in photographs of the eye, graded 0 to 4; another country's photographs are OOD.

Training data is Kaggle's *Diabetic Retinopathy Detection* (2015, photographs by EyePACS): ``trainLabels.csv`` (image,
level) with ``train/10_left.jpeg``, and if there, ``retinopathy_solution.csv`` (image, level, Usage) with ``test/``.
OOD data is Kaggle's *APTOS 2019 Blindness Detection*: ``train.csv`` (id_code, diagnosis) with
``train_images/0a1b.png``. Training on the first and testing on the second is the country shift of Band et al.,
*Benchmarking Bayesian Deep Learning on Diabetic Retinopathy Detection Tasks*, NeurIPS 2021 Datasets and Benchmarks;
they ask whether the grade is 2 or more, here the grade itself is predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from levi_fast.data.images import IMAGE_EXTENSIONS, ImageSet, ImageSplits
from levi_fast.data.tables import Columns, read_table
from levi_fast.errors import DataError

GRADES = ("0", "1", "2", "3", "4")
# Labels, column of the image, column of the grade, folder of the images.
_TRAINING = (("trainLabels.csv", "image", "level", "train"), ("train.csv", "id_code", "diagnosis", "train_images"))
_TEST = (("retinopathy_solution.csv", "image", "level", "test"),)  # APTOS's test.csv has no grades
_VALIDATION_SHARE, _TEST_SHARE = 0.1, 0.2


def load_retinopathy(data: str | Path, ood: Mapping[str, str] | None = None, seed: int = 0) -> ImageSplits:
    """List graded photographs.

    Both eyes of a patient (``10_left``, ``10_right``) go to the same set: a tenth of the patients chooses the epoch,
    and where the folder has no graded test photographs, a fifth of the patients is the ID test set.

    Args:
        data: folder of the training data.
        ood: folders of the same form, or of APTOS's, by name.
        seed: deals out the patients.

    Raises:
        DataError: a folder without labels, an image that is missing, a grade that is none, too few patients.
    """
    whole = read_graded(data, "train")
    sets = {}
    test = _labels(Path(data), _TEST)
    if test is not None:
        sets["test"] = _read(Path(data), test, "test")
    patients = [patient(file) for file in whole.files]
    order = np.random.default_rng(seed).permutation(sorted(set(patients))).tolist()
    held = max(1, round(_VALIDATION_SHARE * len(order)))
    tested = 0 if test is not None else max(1, round(_TEST_SHARE * len(order)))
    if len(order) <= held + tested:
        raise DataError(f"{data}: expected more patients than {held + tested}, to hold some out, got {len(order)}")
    group = dict.fromkeys(order, "train")
    group.update(dict.fromkeys(order[:held], "validation"))
    group.update(dict.fromkeys(order[held : held + tested], "test"))
    for split in ("train", "validation", "test"):
        rows = [row for row, one in enumerate(patients) if group[one] == split]
        if rows:
            sets[split] = whole.select(rows)
    for name, folder in (ood or {}).items():
        sets[f"ood {name}"] = read_graded(folder, name)
    return ImageSplits(sets, GRADES)


def read_graded(folder: str | Path, name: str) -> ImageSet:
    """The photographs of ``trainLabels.csv`` with ``train/``, or of ``train.csv`` with ``train_images/``.

    Raises:
        DataError: neither is there, an image is missing, or a grade is none.
    """
    form = _labels(Path(folder), _TRAINING)
    if form is None:
        raise DataError(f"{name}: {folder}: expected trainLabels.csv with train/, or train.csv with train_images/")
    return _read(Path(folder), form, name)


def patient(file: str) -> str:
    """Whose eye it is: ``train/10_left.jpeg`` is of patient 10; a name without a side stands for itself."""
    stem = file.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    return stem.removesuffix("_left").removesuffix("_right")


def _labels(folder: Path, forms: tuple[tuple[str, str, str, str], ...]) -> tuple[str, str, str, str] | None:
    """The form that a folder has: its labels and its images."""
    return next((form for form in forms if (folder / form[0]).is_file() and (folder / form[3]).is_dir()), None)


def _read(folder: Path, form: tuple[str, str, str, str], name: str) -> ImageSet:
    labels_file, image_column, grade_column, images = form
    table = read_table(folder / labels_file, Columns(categorical=(image_column,), label=grade_column))
    there = {path.stem: path.name for path in (folder / images).iterdir() if path.suffix.lower() in IMAGE_EXTENSIONS}
    files, labels = [], []
    for row, image in enumerate(table.cells[image_column]):
        grade = str(table.cells[grade_column][row]).strip()
        if grade not in GRADES:
            raise DataError(
                f"{table.where(row)}: column {grade_column!r}: expected a grade from 0 to 4, got {grade!r}"
            )
        file = there.get(str(image).strip())
        if file is None:
            raise DataError(f"{table.where(row)}: {folder / images} has no image {image!r}")
        files.append(f"{images}/{file}")
        labels.append(int(grade))
    return ImageSet(name, folder, tuple(files), tuple(labels))
