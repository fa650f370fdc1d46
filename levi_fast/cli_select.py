"""``levi-fast select-taps``: which layers to tap, told by the training data."""

from __future__ import annotations

from typing import Annotated

import typer

from levi_fast.cli_options import (
    MODEL,
    RUN,
    BackboneBatchOption,
    BackboneDtypeOption,
    BackboneOption,
    CategoricalColumnOption,
    DeviceOption,
    LabelColumnOption,
    LabelSeparatorOption,
    MaxEvalRowsOption,
    MaxLengthOption,
    MaxTrainRowsOption,
    NumericColumnOption,
    OodOption,
    PoolingOption,
    ProblemTypeOption,
    SeedOption,
    SplitColumnOption,
    SplitOption,
    TaskDataOption,
    TaskNameOption,
    TestOption,
    TextColumnOption,
    ThreadsOption,
    TrainFileOption,
    ValidationOption,
    data_fields,
    prepare_libraries,
)


def select_taps(
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
    max_train_rows: MaxTrainRowsOption = None,
    max_eval_rows: MaxEvalRowsOption = None,
    backbone: BackboneOption = None,
    backbone_dtype: BackboneDtypeOption = None,
    pooling: PoolingOption = "mean",
    selector: Annotated[
        list[str] | None,
        typer.Option(
            help="cka:k, gradnorm, probe, or mix (learned mixing weights, shown alone); repeatable.",
            show_default="all of them, with k half of the layers",
            rich_help_panel=MODEL,
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Activation cache; its layers are the ones to choose among. Built where there is none.",
            rich_help_panel=RUN,
        ),
    ] = None,
    chart: Annotated[
        str | None, typer.Option(metavar="FILE", help="Chart to write, .svg or .png.", rich_help_panel=RUN)
    ] = None,
    scores: Annotated[str | None, typer.Option(metavar="FILE", help="JSON to write.", rich_help_panel=RUN)] = None,
    seed: SeedOption = 0,
    backbone_batch_size: BackboneBatchOption = 32,
    device: DeviceOption = "auto",
    num_threads: ThreadsOption = None,
) -> None:
    """Score the backbone's layers on the training data, and say which ones each selector would tap."""
    prepare_libraries(num_threads, "levi_fast.training.select_command")
    from levi_fast.report.console import Console
    from levi_fast.training.fit import TrainingOptions
    from levi_fast.training.request import TrainRequest
    from levi_fast.training.select_command import select_taps as run

    fields = data_fields(
        train_file=train_file, validation=validation, test=test, ood=ood, text_column=text_column,
        numeric_column=numeric_column, categorical_column=categorical_column, label_column=label_column,
        problem_type=problem_type, label_separator=label_separator, max_length=max_length, task_name=task_name,
        split_column=split_column, data=data, split=split, max_train_rows=max_train_rows,
        max_eval_rows=max_eval_rows,
    )  # fmt: skip
    request = TrainRequest(
        output="", method="taps-only", task_model="none", model={"pooling": pooling},
        options=TrainingOptions(seed=seed, device=device), cache=cache, backbone=backbone,
        backbone_dtype=backbone_dtype, backbone_batch_size=backbone_batch_size, **fields,
    )  # fmt: skip
    run(request, Console(), selectors=selector or (), chart=chart, scores=scores)
