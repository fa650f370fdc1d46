"""Options that several commands share, and the parsing of their values."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from levi_fast.errors import DataError
from levi_fast.startup import importing

DATA = "Data"
MODEL = "Model"
TRAINING = "Training"
RUN = "Run"

DeviceOption = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu or cuda.", rich_help_panel=RUN)]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="CPU threads; as many as torch takes by default.", rich_help_panel=RUN)
]
BackboneBatchOption = Annotated[
    int, typer.Option(min=1, help="Texts per forward pass of the backbone.", rich_help_panel=RUN)
]
TrainFileOption = Annotated[
    str | None,
    typer.Option(
        "--train", metavar="FILE", help="Training rows: .csv, .tsv, .jsonl or .parquet.", rich_help_panel=DATA
    ),
]
ValidationOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="ID rows that choose the epoch and the blend; by default a tenth of --train, class by class.",
        rich_help_panel=DATA,
    ),
]
TestOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="ID test rows; by default the validation rows are reported.", rich_help_panel=DATA
    ),
]
OodOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=FILE",
        help="A named out-of-distribution file (image-folders, retinopathy: folder); repeatable.",
        rich_help_panel=DATA,
    ),
]
TextColumnOption = Annotated[
    list[str] | None,
    typer.Option(metavar="C", help="Text; repeatable, joined with a newline.", rich_help_panel=DATA),
]
NumericColumnOption = Annotated[
    list[str] | None,
    typer.Option(metavar="C", help="Numbers for the task model; repeatable.", rich_help_panel=DATA),
]
CategoricalColumnOption = Annotated[
    list[str] | None,
    typer.Option(metavar="C", help="Categories for the task model; repeatable.", rich_help_panel=DATA),
]
LabelColumnOption = Annotated[str | None, typer.Option(metavar="C", help="What is predicted.", rich_help_panel=DATA)]
SplitColumnOption = Annotated[
    str | None,
    typer.Option(
        metavar="C",
        help="Column of --train that says each row's set, as in WILDS: train, val, test (or id_val, id_test, and "
        "then val and test are OOD); any other value is an OOD set of that name. 0, 1, 2 are train, val, test.",
        rich_help_panel=DATA,
    ),
]
ProblemTypeOption = Annotated[
    str | None,
    typer.Option(
        help="single_label_classification, multi_label_classification or regression; inferred by default: text, "
        "truth values and up to 100 different whole numbers are classes, lists are multi-label, other numbers "
        "are regression.",
        rich_help_panel=DATA,
    ),
]
LabelSeparatorOption = Annotated[
    str, typer.Option(help="Between the labels of a text cell (multi-label).", rich_help_panel=DATA)
]
MaxLengthOption = Annotated[
    int | None,
    typer.Option(
        help="Tokens per text, longer ones are cut; 256, or what the backbone takes if that is less.",
        show_default="256",
        rich_help_panel=DATA,
    ),
]
TaskNameOption = Annotated[
    str | None,
    typer.Option(
        help="A named data set in place of --train: movielens, amazon, image-folders, domainnet, retinopathy, "
        "digits.",
        rich_help_panel=DATA,
    ),
]
TaskDataOption = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="The folder (or file) of the named data set; digits keeps the backbones that it pre-trains there.",
        rich_help_panel=DATA,
    ),
]
SplitOption = Annotated[
    str | None,
    typer.Option(
        help="movielens: what is held out as OOD, genres (the default) or years. amazon: the categories to train on, "
        "separated by commas; the others are OOD. domainnet: the domains, likewise.",
        rich_help_panel=DATA,
    ),
]
MaxTrainRowsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="movielens, amazon, images: draw that many training rows.",
        show_default="movielens 6000, amazon 20000, else all",
        rich_help_panel=DATA,
    ),
]
MaxEvalRowsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="movielens, amazon, images: and of every other set.",
        show_default="movielens 1500, amazon 2000, else all",
        rich_help_panel=DATA,
    ),
]
BackboneOption = Annotated[
    str | None,
    typer.Option(
        metavar="ID|FOLDER",
        help="Pre-trained model, kept frozen.",
        show_default="sentence-transformers/all-MiniLM-L6-v2",
        rich_help_panel=MODEL,
    ),
]
BackboneDtypeOption = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16, int8 or int4 (CPU; int4 by torchao): fewer bits take less memory and change the "
        "taps a little; the model remembers.",
        show_default="as the checkpoint has it",
        rich_help_panel=MODEL,
    ),
]
TapsOption = Annotated[
    str | None,
    typer.Option(
        help="Layers to read: all, last, mid (20 to 80 % of the depth), even:4, or indices from 0 such as 0,2,-1; or "
        "chosen by the training data: cka:4, gradnorm or probe (see levi-fast select-taps).",
        show_default="all",
        rich_help_panel=MODEL,
    ),
]
PoolingOption = Annotated[str, typer.Option(help="Over tokens: mean, cls or last.", rich_help_panel=MODEL)]
SeedOption = Annotated[int, typer.Option(help="Of everything random.", rich_help_panel=TRAINING)]


def parse_ood(values: Sequence[str]) -> dict[str, str]:
    """``NAME=FILE`` arguments as a mapping.

    Raises:
        DataError: another form, or a name given twice.
    """
    files: dict[str, str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        name = name.strip()
        if not equals or not name or not path:
            raise DataError(f"--ood: expected NAME=FILE, such as new=reviews.csv, got {value!r}")
        if name in files:
            raise DataError(f"--ood: the name {name!r} is given twice: {files[name]} and {path}")
        files[name] = path
    return files


def parse_taps(value: str) -> str | list[int]:
    """``"0,2,-1"`` as indices; any other word as it is, for LeviConfig to judge."""
    parts = [part.strip() for part in value.split(",")]
    if all(part.lstrip("-").isdecimal() for part in parts):
        return [int(part) for part in parts]
    return value


def parse_blend(value: str) -> float | None:
    """A number, or None for ``auto``.

    Raises:
        DataError: neither.
    """
    if value == "auto":
        return None
    try:
        return float(value)
    except ValueError:
        raise DataError(f"--blend: expected 'auto' or a number from 0 to 1, got {value!r}") from None


def data_fields(
    *,
    train_file: str | None,
    validation: str | None,
    test: str | None,
    ood: Sequence[str] | None,
    text_column: Sequence[str] | None,
    numeric_column: Sequence[str] | None,
    categorical_column: Sequence[str] | None,
    label_column: str | None,
    split_column: str | None,
    problem_type: str | None,
    label_separator: str,
    max_length: int | None,
    task_name: str | None,
    data: str | None,
    split: str | None,
    max_train_rows: int | None = None,
    max_eval_rows: int | None = None,
) -> dict[str, Any]:
    """The fields of a ``TrainRequest`` that say which data is meant.

    Raises:
        DataError: options that do not go together, or a malformed ``--ood``.
    """
    from levi_fast.data.tables import Columns
    from levi_fast.training.image_tasks import IMAGE_TASKS, WITH_OOD_FOLDERS

    oods = parse_ood(ood or [])
    if task_name is not None and (
        train_file
        or validation
        or test
        or text_column
        or label_column
        or split_column
        or (oods and task_name not in WITH_OOD_FOLDERS)
    ):
        raise DataError("--task-name brings its own data: leave out --train, --validation, --test, --ood and columns")
    if task_name is None and data is not None:
        raise DataError("--data: only with --task-name; give your own files with --train")
    drawn = ("movielens", "amazon", *IMAGE_TASKS)
    if task_name not in drawn and (max_train_rows is not None or max_eval_rows is not None):
        raise DataError(f"--max-train-rows, --max-eval-rows: only with --task-name {', '.join(drawn)}")
    columns = Columns(
        tuple(text_column or ()),
        tuple(numeric_column or ()),
        tuple(categorical_column or ()),
        label_column,
        split_column,
    )
    from levi_fast.training.tasks import TableFiles

    return {
        "files": None if train_file is None else TableFiles(train_file, validation, test, oods),
        "columns": columns,
        "problem_type": problem_type,
        "label_separator": label_separator,
        "max_length": max_length,
        "task_name": task_name,
        "data": data,
        "split": split,
        "max_train_rows": max_train_rows,
        "max_eval_rows": max_eval_rows,
        "ood": {} if task_name is None else oods,
    }


def prepare_libraries(num_threads: int | None, *modules: str) -> None:
    """Import what a command needs, quiet the libraries, whose notices are about their own doings, set the threads.

    Args:
        modules: the command's own; imported here, the garbage collector stays out of it.
    """
    with importing():
        import torch
        from transformers.utils import logging

        for module in modules:
            importlib.import_module(module)

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
