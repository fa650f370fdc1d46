"""``levi-fast``: the command line. Heavy imports wait until a command runs, so that ``--help`` is quick."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from levi_fast.cli_bench import bench_app
from levi_fast.cli_cache import cache_app
from levi_fast.cli_compare import compare
from levi_fast.cli_export import export
from levi_fast.cli_options import (
    DATA,
    MODEL,
    RUN,
    TRAINING,
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
    parse_blend,
    parse_taps,
    prepare_libraries,
)
from levi_fast.cli_select import select_taps
from levi_fast.errors import BackboneMismatchError, DataError
from levi_fast.ranks import end_rank
from levi_fast.startup import debugging, quiet_imports

app = typer.Typer(
    name="levi-fast",
    help="Fine-tune on top of a frozen pre-trained model so that it holds up on data unlike the training data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cache_app, name="cache")
app.add_typer(bench_app, name="bench")
app.command()(compare)
app.command()(export)
app.command("select-taps")(select_taps)


@app.command()
def train(
    output: Annotated[str, typer.Option(help="New folder for the model and metrics.json.", rich_help_panel=RUN)],
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
    backbone_layers: Annotated[
        str | None,
        typer.Option(
            help="Of an encoder-decoder: encoder, decoder or encoder+decoder. Else the dotted name of the list of "
            "layers, where it cannot be found.",
            show_default="encoder",
            rich_help_panel=MODEL,
        ),
    ] = None,
    backbone_training: Annotated[
        str,
        typer.Option(
            help="frozen; lora: adapters (peft) are trained with the ensemble; full: the whole backbone is. The last "
            "two run the backbone in every step.",
            rich_help_panel=MODEL,
        ),
    ] = "frozen",
    method: Annotated[
        str,
        typer.Option(
            help="levi, or a baseline: levi-no-standalone, levi-last-tap, taps-only (LEVI without view, or "
            "levi-no-view), linear-probe, mlp-probe, head2toe, output-ensemble, task-model; with the backbone "
            "trained: fine-tuning, lora, lp-ft, wise-ft, levi-fine-tuned, levi-lora.",
            rich_help_panel=MODEL,
        ),
    ] = "levi",
    taps: TapsOption = None,
    pooling: PoolingOption = "mean",
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
    view_loss: Annotated[
        float,
        typer.Option(
            help="Weight of the loss of the task model's own prediction, the backbone hidden; 0 leaves it out.",
            rich_help_panel=MODEL,
        ),
    ] = 0.0,
    standalone_view: Annotated[
        bool | None,
        typer.Option(
            "--standalone-view/--no-standalone-view",
            help="Train a second task model by itself beside LEVI; its prediction is averaged in, and the model "
            "kept, where ID validation finds it as good and the backbone alone worse.",
            show_default="on; off with --view-loss or a number for --blend",
            rich_help_panel=MODEL,
        ),
    ] = None,
    blend: Annotated[
        str,
        typer.Option(
            help="Weight of the prediction with the task model hidden: a number from 0 to 1, or auto: the "
            "largest that ID validation cannot tell from the best. Where that is 0, the task model's own prediction "
            "(--standalone-view or --view-loss) is averaged in if it is as good.",
            rich_help_panel=MODEL,
        ),
    ] = "auto",
    cross_fit: Annotated[
        int,
        typer.Option(
            help="Folds of the training rows. Where fewer than 1,000 validation rows choose a blend that leans on "
            "the task model, up to 10,000 training rows choose too, each predicted by a model that is trained "
            "without its fold; 0 leaves the choice to validation.",
            rich_help_panel=MODEL,
        ),
    ] = 4,
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
    backbone_learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Of a backbone that is trained.",
            show_default="5e-4 for lora, 5e-5 for full",
            rich_help_panel=TRAINING,
        ),
    ] = None,
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
            help="trainer (transformers' Trainer), lean (same results, faster on precomputed taps), graph (lean, its "
            "steps replayed as CUDA graphs; no GPU has run it yet), or auto: lean where that is worth it.",
            rich_help_panel=TRAINING,
        ),
    ] = "auto",
    checkpoints: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Write checkpoints here after every epoch. Killed at any moment, the same command goes on from the "
            "newest and ends with the same bits; they are removed when the model is written.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    save_steps: Annotated[
        int | None,
        typer.Option(help="Also every so many steps. Only with --checkpoints.", rich_help_panel=TRAINING),
    ] = None,
    seed: SeedOption = 0,
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
    from levi_fast.training.output import require_new_folder

    require_new_folder(output)
    if sweep is not None:
        from levi_fast.training.workers import start_server_early

        start_server_early(device)  # it is there when the data is read
    prepare_libraries(num_threads, "levi_fast.training." + ("commands" if sweep is None else "sweep_command"))
    fields = data_fields(
        train_file=train_file, validation=validation, test=test, ood=ood, text_column=text_column,
        numeric_column=numeric_column, categorical_column=categorical_column, label_column=label_column,
        problem_type=problem_type, label_separator=label_separator, max_length=max_length, task_name=task_name,
        split_column=split_column, data=data, split=split, max_train_rows=max_train_rows,
        max_eval_rows=max_eval_rows,
    )  # fmt: skip
    model_fields: dict[str, Any] = {
        "pooling": pooling,
        "hidden_width": hidden_width or None,
        "objective": objective,
        "mix": mix,
        "view_dropout": view_dropout,
        "view_loss": view_loss,
        "backbone_training": backbone_training,
    }
    if standalone_view is not None:
        model_fields["standalone_view"] = standalone_view
    if backbone_layers is not None:
        model_fields["backbone_layers"] = backbone_layers
    if taps is not None:
        model_fields["taps"] = parse_taps(taps)
    weight = parse_blend(blend)

    from levi_fast.report.console import Console
    from levi_fast.training.commands import train as run
    from levi_fast.training.fit import TrainingOptions
    from levi_fast.training.named_tasks import TASK_TRAINING
    from levi_fast.training.request import TrainRequest

    schedule = {**TASK_TRAINING.get(task_name or "", {})}
    schedule.update({k: v for k, v in (("epochs", epochs), ("batch_size", batch_size)) if v is not None})
    request = TrainRequest(
        output=output,
        **fields,
        backbone=backbone,
        backbone_dtype=backbone_dtype,
        method=method,
        task_model=task_model,
        precompute=precompute,
        cache=cache,
        cache_dtype=cache_dtype,
        include_backbone=include_backbone,
        backbone_batch_size=backbone_batch_size,
        loop=loop,
        checkpoints=checkpoints,
        save_steps=save_steps,
        model=model_fields,
        options=TrainingOptions(
            learning_rate=learning_rate,
            backbone_learning_rate=backbone_learning_rate,
            weight_decay=weight_decay,
            seed=seed,
            blend=weight,
            cross_fit=cross_fit,
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
            metavar="FILE", help="Rows with the same columns (of a named data set: its folder).", rich_help_panel=DATA
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
    prepare_libraries(num_threads, "levi_fast.training.evaluation")
    from levi_fast.report.console import Console
    from levi_fast.training.evaluation import evaluate as run

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
    prepare_libraries(num_threads, "levi_fast.training.demo")
    from levi_fast.report.console import Console
    from levi_fast.training.demo import demo as run

    run(Console(), output=output, seed=seed)


@app.command()
def env() -> None:
    """Print versions, devices, and which backend serves which op; why the others do not."""
    import rich

    from levi_fast.environment import environment_report, render

    rich.print(render(environment_report()))


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    if category is UserWarning:  # what this package says; deprecations inside libraries are not for the user
        print(f"warning: {message}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 2 for arguments or data that cannot be used, 1 for anything else.

    ``LEVI_FAST_DEBUG=1`` shows the traceback of an error and all warnings.
    """
    debug = debugging()
    if not debug:
        warnings.showwarning = _show_warning  # type: ignore[assignment]
    quiet_imports()
    try:
        app(args=None if arguments is None else list(arguments), prog_name="levi-fast")
    except SystemExit as end:
        if not end.code:
            end_rank()
        raise
    except (DataError, BackboneMismatchError) as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
