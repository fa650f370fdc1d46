"""``levi-fast cache``: the taps of a frozen backbone on disk, for any number of training runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from levi_fast.cli_options import (
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

if TYPE_CHECKING:
    from levi_fast.training.request import TrainRequest

CACHE = "Cache"

cache_app = typer.Typer(
    help="Keep the frozen backbone's taps on disk, for any number of training runs (levi-fast train --cache DIR).",
    no_args_is_help=True,
)

FolderOption = Annotated[str, typer.Option("--cache", metavar="DIR", help="Of the cache.", rich_help_panel=CACHE)]
ReadOption = Annotated[
    str,
    typer.Option("--cache", metavar="DIR", help="Of the cache; any fsspec address too.", rich_help_panel=CACHE),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        "--cache-dtype",
        help="Of the stored numbers: float32, bfloat16, or int8 with a scale per tap of a row.",
        rich_help_panel=CACHE,
    ),
]
ShardOption = Annotated[
    int,
    typer.Option(min=1, help="Forward passes per shard: what a killed build loses at most.", rich_help_panel=CACHE),
]


def _request(
    data: dict[str, Any],
    cache: str,
    *,
    taps: str | None,
    pooling: str,
    dtype: str,
    seed: int,
    device: str,
    **options: Any,
) -> TrainRequest:
    """A request for the taps alone: what a run with a task model needs beside them is not asked for."""
    from levi_fast.training.fit import TrainingOptions
    from levi_fast.training.request import TrainRequest

    return TrainRequest(
        output="",
        method="taps-only",
        task_model="none",
        model={"pooling": pooling} if taps is None else {"pooling": pooling, "taps": parse_taps(taps)},
        options=TrainingOptions(seed=seed, device=device),
        cache=cache,
        cache_dtype=dtype,
        **data,
        **options,
    )


@cache_app.command()
def build(
    cache: FolderOption,
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
    taps: TapsOption = None,
    pooling: PoolingOption = "mean",
    dtype: DtypeOption = "float32",
    batches_per_shard: ShardOption = 64,
    rebuild: Annotated[
        bool,
        typer.Option("--rebuild", help="Replace a cache that was built from something else.", rich_help_panel=CACHE),
    ] = False,
    seed: SeedOption = 0,
    backbone_batch_size: BackboneBatchOption = 32,
    device: DeviceOption = "auto",
    num_threads: ThreadsOption = None,
) -> None:
    """Run the backbone once over all texts and keep its taps; a killed build goes on where it was.

    Under torchrun the processes share the work: torchrun --nproc-per-node N -m levi_fast cache build ...
    """
    prepare_libraries(num_threads, "levi_fast.training.cache_commands")
    from levi_fast.report.console import Console
    from levi_fast.training.cache_commands import build as run

    fields = data_fields(
        train_file=train_file, validation=validation, test=test, ood=ood, text_column=text_column,
        numeric_column=numeric_column, categorical_column=categorical_column, label_column=label_column,
        problem_type=problem_type, label_separator=label_separator, max_length=max_length, task_name=task_name,
        split_column=split_column, data=data, split=split, max_train_rows=max_train_rows,
        max_eval_rows=max_eval_rows,
    )  # fmt: skip
    request = _request(
        fields, cache, taps=taps, pooling=pooling, dtype=dtype, seed=seed, device=device, backbone=backbone,
        backbone_dtype=backbone_dtype, backbone_batch_size=backbone_batch_size,
    )  # fmt: skip
    run(request, Console(), overwrite=rebuild, batches_per_shard=batches_per_shard)


@cache_app.command()
def estimate(
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
    taps: TapsOption = None,
    pooling: PoolingOption = "mean",
    dtype: DtypeOption = "float32",
    cache: Annotated[
        str, typer.Option("--cache", metavar="DIR", help="Where it would be; not read.", rich_help_panel=CACHE)
    ] = "cache",
    seed: SeedOption = 0,
    backbone_batch_size: BackboneBatchOption = 32,
    device: DeviceOption = "auto",
    num_threads: ThreadsOption = None,
) -> None:
    """Say how large a cache would be and how long it would take, from a few timed batches; nothing is written."""
    prepare_libraries(num_threads, "levi_fast.training.cache_commands")
    from levi_fast.report.console import Console
    from levi_fast.training.cache_commands import estimate as run

    fields = data_fields(
        train_file=train_file, validation=validation, test=test, ood=ood, text_column=text_column,
        numeric_column=numeric_column, categorical_column=categorical_column, label_column=label_column,
        problem_type=problem_type, label_separator=label_separator, max_length=max_length, task_name=task_name,
        split_column=split_column, data=data, split=split, max_train_rows=max_train_rows,
        max_eval_rows=max_eval_rows,
    )  # fmt: skip
    request = _request(
        fields, cache, taps=taps, pooling=pooling, dtype=dtype, seed=seed, device=device, backbone=backbone,
        backbone_dtype=backbone_dtype, backbone_batch_size=backbone_batch_size,
    )  # fmt: skip
    run(request, Console())


@cache_app.command()
def inspect(cache: ReadOption) -> None:
    """Print what a cache holds and what it was built from."""
    from levi_fast.report.console import Console
    from levi_fast.training.cache_commands import inspect as run

    run(cache, Console())


@cache_app.command()
def verify(cache: ReadOption) -> None:
    """Compare every file with its checksum; status 1 where one is damaged, and cache build repairs it."""
    from levi_fast.report.console import Console
    from levi_fast.training.cache_commands import verify as run

    if not run(cache, Console()):
        raise typer.Exit(1)


@cache_app.command()
def plan(
    examples: Annotated[int, typer.Option(min=1, help="Different ones.", rich_help_panel=CACHE)] = 1_000_000,
    tokens: Annotated[int, typer.Option(min=1, help="Per example, with padding.", rich_help_panel=CACHE)] = 256,
    backbone_size: Annotated[
        str, typer.Option(metavar="NAME", help="MiniLM, 1B, 8B or 70B.", rich_help_panel=CACHE)
    ] = "8B",
    taps: Annotated[
        int | None, typer.Option(min=1, help="How many layers are kept; all by default.", rich_help_panel=CACHE)
    ] = None,
    dtype: DtypeOption = "bfloat16",
    cluster: Annotated[
        str,
        typer.Option(
            metavar="NODESxDEVICES[:KIND]", help="Kinds: cpu, A100, H100, H200, B200.", rich_help_panel=CACHE
        ),
    ] = "1x8:H100",
    utilisation: Annotated[
        float, typer.Option(help="Of a GPU's published peak: an assumption, not measured.", rich_help_panel=CACHE)
    ] = 0.4,
    tables: Annotated[
        bool, typer.Option("--tables", help="Print the tables of docs/scaling.md.", rich_help_panel=CACHE)
    ] = False,
) -> None:
    """Say what a cache would cost on machines that are not at hand, by a model; see docs/scaling.md."""
    from levi_fast.cache import scaling
    from levi_fast.errors import DataError

    if tables:
        print(scaling.tables())
        return
    if backbone_size not in scaling.SIZES:
        raise DataError(f"--backbone-size: expected one of {', '.join(scaling.SIZES)}, got {backbone_size!r}")
    where = scaling.Cluster.parse(cluster)
    size = scaling.SIZES[backbone_size]
    found = scaling.plan(examples, tokens, size, where, taps=taps, dtype=dtype, utilisation=utilisation)
    print(scaling.describe(found, where, utilisation))
