"""Named data sets: benchmarks whose files and splits are known, in place of the user's own tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from levi_fast.backbones import load_tokenizer
from levi_fast.config_checks import read_json
from levi_fast.data.encoded import EncodedDataset
from levi_fast.data.labels import REGRESSION, LabelSpace
from levi_fast.data.preprocessing import TableProcessor, length_limit, pad_token_id, tokenize, warn_truncated
from levi_fast.data.tables import Columns
from levi_fast.errors import DataError
from levi_fast.training.digits_task import DigitsTask
from levi_fast.training.image_tasks import IMAGE_TASKS, WITH_OOD_FOLDERS, ImageTask
from levi_fast.training.runs import Splits
from levi_fast.training.tasks import TASK_FILE, TableTask, names_in, save_task, splits_of

NAMED_TASKS = {
    "movielens": "the folder with ratings.csv and movies.csv",
    "amazon": "a folder with files such as Books.json.gz, or one of them",
    **IMAGE_TASKS,
    "digits": "a folder for the small ViT that the first run pre-trains",
}
"""Name -> what --data is."""

# What a named task trains with where the user does not say. MovieLens: validation cannot tell 12 epochs of 128 rows
# from TrainingOptions' own 20 of 32, and they take a fifth of the time.
TASK_TRAINING: dict[str, dict[str, int]] = {"movielens": {"epochs": 12, "batch_size": 128}}


class NamedTask(Protocol):
    """What ``levi-fast train`` asks of data: see :class:`levi_fast.training.tasks.TableTask`."""

    processor: TableProcessor

    def load_preprocessor(self, backbone: str) -> Any: ...

    def encode(self, tokenizer: Any, *, max_length: int | None, backbone_config: Any) -> Splits: ...

    def task_model(self, kind: str, vocab_size: int | None) -> dict[str, Any] | None: ...

    def save(self, directory: Path) -> None: ...


def load_named_task(
    name: str,
    data: str | None,
    *,
    split: str | None = None,
    seed: int = 0,
    problem_type: str | None = None,
    max_train_rows: int | None = None,
    max_eval_rows: int | None = None,
    ood: Mapping[str, str] | None = None,
) -> NamedTask:
    """Read and split a named data set.

    Args:
        name: one of :data:`NAMED_TASKS`.
        data: its folder or file.
        split: what is held out or trained on; see ``--split``.
        seed: of what is drawn.
        problem_type: where the labels can be read in several ways (amazon).
        max_train_rows, max_eval_rows: how many rows are drawn (movielens, amazon, images); None takes the data set's
            own number.
        ood: further folders by name (image-folders, retinopathy).

    Raises:
        DataError: an unknown name, or data that cannot be used.
    """
    if name not in NAMED_TASKS:
        raise DataError(f"--task-name: expected {', '.join(NAMED_TASKS)}, got {name!r}")
    if data is None:
        raise DataError(f"--task-name {name} needs --data, {NAMED_TASKS[name]}")
    if ood and name not in WITH_OOD_FOLDERS:
        raise DataError(f"--ood: --task-name {name} brings its own OOD sets")
    if name == "movielens":
        return MovieLensSplits.load(data, split or "genres", seed, max_train_rows, max_eval_rows)
    if name in IMAGE_TASKS:
        return ImageTask.read(name, data, split, seed, max_train_rows, max_eval_rows, ood or {})
    if name == "digits":
        return DigitsTask.load(data, seed)
    return AmazonReviews.read(data, split, seed, problem_type, max_train_rows, max_eval_rows)


@dataclass
class AmazonReviews(TableTask):
    """The named task ``amazon``: see :func:`levi_fast.data.amazon.load_amazon`.

    Stars are a number to predict, or with ``problem_type`` "single_label_classification" five classes, as in WILDS.
    """

    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        data: str,
        split: str | None,
        seed: int,
        problem_type: str | None = None,
        max_train_rows: int | None = None,
        max_eval_rows: int | None = None,
    ) -> AmazonReviews:
        """Draw reviews.

        Raises:
            DataError: files that cannot be used.
        """
        from levi_fast.data.amazon import load_amazon

        sizes = {"max_train": max_train_rows, "max_eval": max_eval_rows}
        given = {name: value for name, value in sizes.items() if value is not None}
        tables = load_amazon(data, names_in(split), seed, **given)
        columns = Columns(text=("title", "text"), label="rating")
        task = cls.of_tables(tables, columns, problem_type=problem_type or REGRESSION)
        task.settings = {
            "task": "amazon", "split": split, "seed": seed, "problem_type": problem_type,
            "max_train_rows": max_train_rows, "max_eval_rows": max_eval_rows,
        }  # fmt: skip
        return task

    def save(self, directory: Path) -> None:
        """Write what :func:`load_saved_task` needs."""
        save_task(directory, self.processor, self.settings)


@dataclass
class MovieLensSplits:
    """The named task ``movielens``: see :func:`levi_fast.data.movielens.load_movielens`."""

    examples: Any
    split: str
    seed: int
    processor: TableProcessor
    sizes: dict[str, int | None] = field(default_factory=dict)

    @classmethod
    def load(
        cls, data: str, split: str, seed: int, max_train_rows: int | None = None, max_eval_rows: int | None = None
    ) -> MovieLensSplits:
        """Read and split a folder with ``ratings.csv`` and ``movies.csv``.

        Args:
            data, split, seed: see :func:`levi_fast.data.movielens.load_movielens`.
            max_train_rows, max_eval_rows: ratings of the training set, and of every other; None: 6,000 and 1,500.

        Raises:
            DataError: the folder or a file cannot be used.
        """
        from levi_fast.data.movielens import load_movielens

        given: dict[str, Any] = {"max_train": max_train_rows} if max_train_rows is not None else {}
        if max_eval_rows is not None:
            given |= dict.fromkeys(("max_validation", "max_test", "max_ood"), max_eval_rows)
        examples = load_movielens(data, split=split, seed=seed, **given)
        ratings = examples.splits["train"].label
        labels = LabelSpace(
            "rating", REGRESSION, "number", target_mean=float(ratings.mean()), target_std=float(ratings.std()) or 1.0
        )
        processor = TableProcessor(Columns(text=("text",), label="rating"), labels, max_length=256)
        return cls(
            examples, split, seed, processor, {"max_train_rows": max_train_rows, "max_eval_rows": max_eval_rows}
        )

    def load_preprocessor(self, backbone: str) -> Any:
        """The backbone's tokenizer."""
        return load_tokenizer(backbone)

    def encode(self, tokenizer: Any, *, max_length: int | None, backbone_config: Any) -> Splits:
        """As :meth:`TableTask.encode`."""
        if tokenizer is not None:
            self.processor = replace(self.processor, max_length=length_limit(max_length, tokenizer, backbone_config))
        encoded = {}
        for name, rows in self.examples.splits.items():
            token_ids, cut = (None, 0)
            if tokenizer is not None:
                token_ids, cut = tokenize(rows.text, tokenizer, self.processor.max_length)
            encoded[f"ood {name}" if name in self.examples.ood_names else name] = EncodedDataset(
                f"movielens {name}",
                token_ids=token_ids,
                pad_token_id=0 if tokenizer is None else pad_token_id(tokenizer),
                features={key: torch.from_numpy(value) for key, value in rows.features.items()},
                labels=torch.from_numpy(rows.label),
                num_truncated=cut,
            )
        if tokenizer is not None:
            warn_truncated(encoded.values(), self.processor.max_length)
        return splits_of(encoded)

    def task_model(self, kind: str, vocab_size: int | None) -> dict[str, Any] | None:
        """Spec of the recommendation model; None for ``"none"``."""
        if kind not in ("auto", "none"):
            raise DataError(f"--task-model: movielens has its own task model; expected auto or none, got {kind!r}")
        spec: dict[str, Any] = self.examples.task_model
        return None if kind == "none" else spec

    def save(self, directory: Path) -> None:
        """Write what :func:`load_saved_task` needs."""
        save_task(
            directory, self.processor, {"task": "movielens", "split": self.split, "seed": self.seed, **self.sizes}
        )


def saved_task_name(directory: str | Path) -> str | None:
    """Which named data set a model folder was trained on; None for the user's own files.

    Raises:
        DataError: a damaged file, or a data set that this version does not know.
    """
    file = Path(directory) / TASK_FILE
    if not file.is_file():
        return None
    name = read_json(file).get("task")
    if name not in NAMED_TASKS:
        raise DataError(f"{file}: task: expected {', '.join(NAMED_TASKS)}, got {name!r}")
    return str(name)


def load_saved_task(directory: str | Path, data: str) -> NamedTask:
    """The named task that a model folder was trained on, of the data at ``data``, split alike.

    Raises:
        DataError: data that cannot be used, or settings that training did not write.
    """
    file = Path(directory) / TASK_FILE
    settings = read_json(file)
    try:
        name = settings.pop("task")
        return load_named_task(name, data, **settings)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: not what levi-fast train writes: {error}") from error
