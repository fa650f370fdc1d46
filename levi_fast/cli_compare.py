"""``levi-fast compare``: methods × seeds × data, with tests and one page."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from levi_fast.cli_options import (
    DATA,
    MODEL,
    RUN,
    TRAINING,
    BackboneDtypeOption,
    BackboneOption,
    CategoricalColumnOption,
    DeviceOption,
    LabelColumnOption,
    LabelSeparatorOption,
    MaxLengthOption,
    NumericColumnOption,
    OodOption,
    ProblemTypeOption,
    SplitColumnOption,
    SplitOption,
    TapsOption,
    TaskDataOption,
    TaskNameOption,
    TestOption,
    TextColumnOption,
    ThreadsOption,
    TrainFileOption,
    ValidationOption,
    data_fields,
    parse_taps,
    prepare_libraries,
)
from levi_fast.errors import DataError

DEFAULT_METHODS = "levi,linear-probe,mlp-probe,taps-only,output-ensemble,task-model"


def compare(
    spec: Annotated[
        str | None,
        typer.Argument(metavar="[FILE.yaml]", help="Data, methods, seeds and settings; or name them by options."),
    ] = None,
    output: Annotated[
        str,
        typer.Option(metavar="DIR", help="New, or of an interrupted comparison, which goes on.", rich_help_panel=RUN),
    ] = ...,  # type: ignore[assignment]
    train_file: TrainFileOption = None,
    validation: ValidationOption = None,
    test: TestOption = None,
    ood: OodOption = None,
    text_column: TextColumnOption = None,
    numeric_column: NumericColumnOption = None,
    categorical_column: CategoricalColumnOption = None,
    label_column: LabelColumnOption = None,
    split_column: SplitColumnOption = None,
    problem_type: ProblemTypeOption = None,
    label_separator: LabelSeparatorOption = "|",
    max_length: MaxLengthOption = None,
    task_name: TaskNameOption = None,
    data: TaskDataOption = None,
    split: SplitOption = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="As of levi-fast train --method, separated by commas; the others are tested against the first.",
            show_default=DEFAULT_METHODS,
            rich_help_panel=MODEL,
        ),
    ] = None,
    backbone: BackboneOption = None,
    backbone_dtype: BackboneDtypeOption = None,
    taps: TapsOption = None,
    seeds: Annotated[
        str | None, typer.Option(help="Such as 0-4 or 0,3,7.", show_default="0-2", rich_help_panel=TRAINING)
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="20, for movielens 12.", show_default="20", rich_help_panel=TRAINING)
    ] = None,
    backbone_epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Of methods that train the backbone.", show_default="3", rich_help_panel=TRAINING),
    ] = None,
    max_train_rows: Annotated[
        int | None, typer.Option(min=1, help="Draw that many training rows.", rich_help_panel=DATA)
    ] = None,
    max_eval_rows: Annotated[
        int | None, typer.Option(min=1, help="Draw that many rows of every other split.", rich_help_panel=DATA)
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="The backbone's taps.", show_default="in --output", rich_help_panel=RUN),
    ] = None,
    device: DeviceOption = "auto",
    num_threads: ThreadsOption = None,
) -> None:
    """Compare methods over seeds and data: means, paired tests, calibration, cost, and one HTML page."""
    prepare_libraries(num_threads, "levi_fast.training.comparison")
    from levi_fast.report.console import Console
    from levi_fast.training.comparison import compare as run
    from levi_fast.training.comparison_file import (
        ComparedData,
        Comparison,
        parse_methods,
        parse_seeds,
        read_comparison,
    )

    settings = {
        "backbone": backbone, "backbone_dtype": backbone_dtype, "taps": None if taps is None else parse_taps(taps),
        "max_length": max_length, "epochs": epochs, "backbone_epochs": backbone_epochs,
        "max_train_rows": max_train_rows, "max_eval_rows": max_eval_rows,
    }  # fmt: skip
    given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    if spec is not None:
        asked = {"--train": train_file, "--task-name": task_name, "--methods": methods, "--seeds": seeds, **given}
        named = [name for name, value in asked.items() if value is not None]
        if named:
            raise DataError(f"{named[0]}: {spec} says what is compared; leave it out, or change the file")
        comparison = read_comparison(spec)
    else:
        if train_file is None and task_name is None:
            raise DataError("expected FILE.yaml, --train FILE with --label-column, or --task-name with --data")
        fields = data_fields(
            train_file=train_file, validation=validation, test=test, ood=ood, text_column=text_column,
            numeric_column=numeric_column, categorical_column=categorical_column, label_column=label_column,
            problem_type=problem_type, label_separator=label_separator, max_length=None, task_name=task_name,
            split_column=split_column, data=data, split=split,
        )  # fmt: skip
        for shared in ("max_length", "max_train_rows", "max_eval_rows"):
            fields.pop(shared)
        comparison = Comparison(
            [ComparedData(task_name or "data", fields)],
            parse_methods(methods or DEFAULT_METHODS),
            parse_seeds(seeds or "0-2"),
            given,
        )
    try:
        run(comparison, output, Console(), cache=cache, device=device)
    except ImportError as error:
        raise DataError(str(error)) from error
