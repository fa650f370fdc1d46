"""``levi-fast export``: a trained model as one file for a server."""

from __future__ import annotations

from typing import Annotated

import typer

from levi_fast.cli_options import MODEL, RUN, ThreadsOption, prepare_libraries


def export(
    model: Annotated[str, typer.Option(metavar="DIR", help="What levi-fast train wrote.", rich_help_panel=MODEL)],
    output: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="New file, ending in .pt2 (pt2, aoti) or .onnx; STEM.json and STEM-preprocessing/ come beside it.",
            rich_help_panel=RUN,
        ),
    ],
    format: Annotated[
        str,
        typer.Option(
            help="pt2 (torch.export), onnx, or aoti (compiled by AOTInductor for this kind of CPU).",
            rich_help_panel=RUN,
        ),
    ] = "pt2",
    head_only: Annotated[
        bool,
        typer.Option(
            "--head-only",
            help="From pooled taps [L, B, D] and the task model's inputs to logits; the backbone is not loaded.",
            rich_help_panel=MODEL,
        ),
    ] = False,
    ops: Annotated[
        str,
        typer.Option(
            help="plain (PyTorch's operators) or fused (this library's; its shared library is copied beside the "
            "file and must be loaded by the host).",
            rich_help_panel=MODEL,
        ),
    ] = "plain",
    verify: Annotated[
        bool, typer.Option(help="Run the written file and compare it with the model.", rich_help_panel=RUN)
    ] = True,
    backbone: Annotated[
        str | None,
        typer.Option(metavar="ID|FOLDER", help="Where the backbone is now, if it moved.", rich_help_panel=MODEL),
    ] = None,
    num_threads: ThreadsOption = None,
) -> None:
    """Export a saved model for serving without levi_fast."""
    prepare_libraries(num_threads, "levi_fast.training.export_command")
    from levi_fast.report.console import Console
    from levi_fast.training.export_command import export as run

    run(
        model,
        output,
        Console(),
        format=format,
        head_only=head_only,
        ops=ops,
        verify=verify,
        backbone=backbone,
    )
