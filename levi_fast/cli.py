"""``levi-fast``: the command line. Heavy imports wait until a command runs, so that ``--help`` is quick."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from levi_fast.errors import BackboneMismatchError, DataError

app = typer.Typer(
    name="levi-fast",
    help="Fine-tune on top of a frozen pre-trained model so that it holds up on data unlike the training data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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


@app.command()
def train(
    output: Annotated[str, typer.Option(help="New folder for the model and metrics.json.", rich_help_panel=RUN)],
    train_file: Annotated[
        str | None,
        typer.Option(
            "--train", metavar="FILE", help="Training rows: .csv, .tsv, .jsonl or .parquet.", rich_help_panel=DATA
        ),
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="ID rows that choose the epoch and the blend; by default a tenth of --train, class by class.",
            rich_help_panel=DATA,
        ),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="ID test rows; by default the validation rows are reported.", rich_help_panel=DATA
        ),
    ] = None,
    ood: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="A named out-of-distribution file; repeatable.", rich_help_panel=DATA),
    ] = None,
    text_column: Annotated[
        list[str] | None,
        typer.Option(metavar="C", help="Text; repeatable, joined with a newline.", rich_help_panel=DATA),
    ] = None,
    numeric_column: Annotated[
        list[str] | None,
        typer.Option(metavar="C", help="Numbers for the task model; repeatable.", rich_help_panel=DATA),
    ] = None,
    categorical_column: Annotated[
        list[str] | None,
        typer.Option(metavar="C", help="Categories for the task model; repeatable.", rich_help_panel=DATA),
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(metavar="C", help="What is predicted.", rich_help_panel=DATA)
    ] = None,
    problem_type: Annotated[
        str | None,
        typer.Option(
            help="single_label_classification, multi_label_classification or regression; inferred by default: text, "
            "truth values and up to 100 different whole numbers are classes, lists are multi-label, other numbers "
            "are regression.",
            rich_help_panel=DATA,
        ),
    ] = None,
    label_separator: Annotated[
        str, typer.Option(help="Between the labels of a text cell (multi-label).", rich_help_panel=DATA)
    ] = "|",
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens per text, longer ones are cut; 256, or what the backbone takes if that is less.",
            show_default="256",
            rich_help_panel=DATA,
        ),
    ] = None,
    task_name: Annotated[
        str | None, typer.Option(help="A named data set in place of --train: movielens.", rich_help_panel=DATA)
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="DIR", help="The folder of the named data set.", rich_help_panel=DATA)
    ] = None,
    split: Annotated[
        str, typer.Option(help="movielens: what is held out as OOD, genres or years.", rich_help_panel=DATA)
    ] = "genres",
    backbone: Annotated[
        str | None,
        typer.Option(
            metavar="ID|FOLDER",
            help="Pre-trained model, kept frozen.",
            show_default="sentence-transformers/all-MiniLM-L6-v2",
            rich_help_panel=MODEL,
        ),
    ] = None,
    backbone_dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or int8 (CPU): fewer bits are faster and change the taps a little; the model "
            "remembers.",
            show_default="as the checkpoint has it",
            rich_help_panel=MODEL,
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(help="levi, or a baseline: linear-probe, taps-only, task-model.", rich_help_panel=MODEL),
    ] = "levi",
    taps: Annotated[
        str | None,
        typer.Option(
            help="Layers to read: all, last, even:4, or indices from 0 such as 0,2,-1.",
            show_default="all",
            rich_help_panel=MODEL,
        ),
    ] = None,
    pooling: Annotated[str, typer.Option(help="Over tokens: mean, cls or last.", rich_help_panel=MODEL)] = "mean",
    task_model: Annotated[
        str,
        typer.Option(
            help="The small model trained from scratch: text, tabular, table (both) or none; auto takes what "
            "the columns allow.",
            rich_help_panel=MODEL,
        ),
    ] = "auto",
    hidden_width: Annotated[
        int, typer.Option(min=0, help="Of the adapting layers; 0 makes them linear.", rich_help_panel=MODEL)
    ] = 256,
    objective: Annotated[str, typer.Option(help="per_layer, ensemble or both.", rich_help_panel=MODEL)] = "per_layer",
    mix: Annotated[
        str, typer.Option(help="Of the layers' predictions: mean or learned.", rich_help_panel=MODEL)
    ] = "mean",
    view_dropout: Annotated[
        float, typer.Option(help="Probability of hiding the task model from an example.", rich_help_panel=MODEL)
    ] = 0.5,
    blend: Annotated[
        str,
        typer.Option(
            help="Weight of the prediction with the task model hidden: a number from 0 to 1, or auto: of 0, "
            "0.25 and 0.5 the largest that ID validation cannot tell from the best.",
            rich_help_panel=MODEL,
        ),
    ] = "auto",
    epochs: Annotated[
        int | None,
        typer.Option(
            help="The best one on ID validation is kept; 20, for movielens 12.",
            show_default="20",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Rows per step; 32, for movielens 128.", show_default="32", rich_help_panel=TRAINING),
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, at its peak.", rich_help_panel=TRAINING)] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.", rich_help_panel=TRAINING)] = 0.01,
    precompute: Annotated[
        bool,
        typer.Option(
            help="Run the frozen backbone once over all texts and keep its taps in memory; --no-precompute runs it "
            "in every epoch.",
            rich_help_panel=TRAINING,
        ),
    ] = True,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Keep the taps in this folder: filled by the first run, read by later ones, which do not load the "
            "backbone; see levi-fast cache.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    cache_dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the numbers in --cache: float32, bfloat16 or int8.",
            show_default="float32, or what is there",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="YAML with several configurations (lists of seed, learning_rate, label_column, ...) to "
            "train in one pass; the best on ID validation is saved, sweep.json has all.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    loop: Annotated[
        str,
        typer.Option(
            help="trainer (transformers' Trainer), lean (same results on precomputed taps, faster), or auto: lean "
            "wherever it serves.",
            rich_help_panel=TRAINING,
        ),
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of everything random.", rich_help_panel=TRAINING)] = 0,
    include_backbone: Annotated[
        bool,
        typer.Option(
            "--include-backbone",
            help="Write the whole backbone into the model folder too, which then needs nothing else.",
            rich_help_panel=RUN,
        ),
    ] = False,
    backbone_batch_size: BackboneBatchOption = 32,
    device: DeviceOption = "auto",
    num_threads: ThreadsOption = None,
) -> None:
    """Fine-tune on your own files (or a named data set) and report ID and OOD metrics."""
    from levi_fast.data.tables import Columns
    from levi_fast.training.output import require_new_folder

    require_new_folder(output)
    if task_name is not None and (train_file or validation or test or ood or text_column or label_column):
        raise DataError("--task-name brings its own data: leave out --train, --validation, --test, --ood and columns")
    if task_name is None and data is not None:
        raise DataError("--data: only with --task-name; give your own files with --train")
    oods = parse_ood(ood or [])
    columns = Columns(
        tuple(text_column or ()), tuple(numeric_column or ()), tuple(categorical_column or ()), label_column
    )
    model_fields: dict[str, Any] = {
        "pooling": pooling,
        "hidden_width": hidden_width or None,
        "objective": objective,
        "mix": mix,
        "view_dropout": view_dropout,
    }
    if taps is not None:
        model_fields["taps"] = parse_taps(taps)
    weight = parse_blend(blend)
    _prepare(num_threads)

    from levi_fast.report.console import Console
    from levi_fast.training.commands import TrainRequest
    from levi_fast.training.commands import train as run
    from levi_fast.training.fit import TrainingOptions
    from levi_fast.training.tasks import TASK_TRAINING, TableFiles

    schedule = {**TASK_TRAINING.get(task_name or "", {})}
    schedule.update({k: v for k, v in (("epochs", epochs), ("batch_size", batch_size)) if v is not None})
    request = TrainRequest(
        output=output,
        files=None if train_file is None else TableFiles(train_file, validation, test, oods),
        columns=columns,
        problem_type=problem_type,
        label_separator=label_separator,
        task_name=task_name,
        data=data,
        split=split,
        backbone=backbone,
        backbone_dtype=backbone_dtype,
        method=method,
        task_model=task_model,
        max_length=max_length,
        precompute=precompute,
        cache=cache,
        cache_dtype=cache_dtype,
        include_backbone=include_backbone,
        backbone_batch_size=backbone_batch_size,
        loop=loop,
        model=model_fields,
        options=TrainingOptions(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            seed=seed,
            blend=weight,
            device=device,
            **schedule,
        ),
    )
    if sweep is not None:
        from levi_fast.training.sweep_command import train_sweep

        train_sweep(request, sweep, Console())
    else:
        run(request, Console())


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(metavar="DIR", help="What levi-fast train wrote.", rich_help_panel=DATA)],
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="Rows with the same columns (movielens: its folder).", rich_help_panel=DATA
        ),
    ],
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the metrics as JSON.", rich_help_panel=RUN)
    ] = None,
    predictions: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Write a prediction per row as CSV; the label column may be missing.",
            rich_help_panel=RUN,
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            metavar="ID|FOLDER",
            help="Where the backbone is now, if it moved; its weights must be those of training.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    backbone_batch_size: BackboneBatchOption = 32,
    device: DeviceOption = "auto",
    num_threads: ThreadsOption = None,
) -> None:
    """Run a saved model on a file."""
    _prepare(num_threads)
    from levi_fast.report.console import Console
    from levi_fast.training.commands import evaluate as run

    run(
        model,
        data,
        Console(),
        output=output,
        predictions=predictions,
        backbone=backbone,
        backbone_batch_size=backbone_batch_size,
        device=device,
    )


@app.command()
def demo(
    output: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Keep the generated CSV files, the figures and the LEVI model here."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the data and of training.")] = 0,
    num_threads: ThreadsOption = None,
) -> None:
    """Train LEVI and its baselines on generated (synthetic) reviews with real MiniLM weights; needs no network."""
    _prepare(num_threads)
    from levi_fast.report.console import Console
    from levi_fast.training.demo import demo as run

    run(Console(), output=output, seed=seed)


@app.command()
def env() -> None:
    """Print versions, devices, and which backend serves which op; why the others do not."""
    import rich

    from levi_fast.environment import environment_report, render

    rich.print(render(environment_report()))


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


def _prepare(num_threads: int | None) -> None:
    """Quiet the libraries, whose notices are about their own doings, and set the number of threads."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if num_threads is not None:
        torch.set_num_threads(num_threads)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    if category is UserWarning:  # what this package says; deprecations inside libraries are not for the user
        print(f"warning: {message}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 2 for arguments or data that cannot be used, 1 for anything else.

    ``LEVI_FAST_DEBUG=1`` shows the traceback of an error and all warnings.
    """
    debug = os.environ.get("LEVI_FAST_DEBUG", "") not in ("", "0")
    if not debug:
        warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        app(args=None if arguments is None else list(arguments), prog_name="levi-fast")
    except (DataError, BackboneMismatchError) as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
