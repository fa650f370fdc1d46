"""Latency of exported artefacts beside the model and the eager reference, at batches of a server's size.

    python benchmarks/bench_serving.py

MiniLM with all taps, a text task model and blending, random trained part. Every contender answers the same inputs;
all are checked against the eager reference before timing and run interleaved in one process on one thread; medians
count. "reference" is the model with levi_fast.reference's ensemble (swap undone). Writes
benchmarks/results/serving_cpu.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from levi_fast import DEFAULT_BACKBONE, LeviConfig, LeviModel, get_levi_model, swap
from levi_fast.bench.record import facts
from levi_fast.bench.timing import compared, interleaved, timed
from levi_fast.export import formats
from levi_fast.export.artefact import export_model
from levi_fast.export.inputs import InputSpec, head_inputs, model_inputs, task_inputs
from levi_fast.export.modules import ServingHead, ServingModel
from levi_fast.storage import write_atomic

RESULTS = Path(__file__).parent / "results" / "serving_cpu.json"
ARTEFACTS = (("pt2", "plain"), ("pt2", "fused"), ("onnx", "plain"), ("aoti", "plain"), ("aoti", "fused"))
SHAPES = {"head": ((1, 32), (8, 32)), "model": ((1, 32), (8, 64))}
TOLERANCE = 1e-4


def build() -> LeviModel:
    torch.manual_seed(0)
    spec = {"type": "text", "vocab_size": 30522}
    return get_levi_model(DEFAULT_BACKBONE, LeviConfig(num_labels=2, task_model=spec, blend=0.5)).eval()


def contenders(model: LeviModel, part: str, folder: Path) -> tuple[dict[str, Callable[..., Any]], list[InputSpec]]:
    """Functions of a list of tensors, by name."""
    inputs = head_inputs(model) if part == "head" else model_inputs(model)
    names = [spec.name for spec in inputs]
    eager = copy.deepcopy(model)
    swap(eager, undo=True)
    own = [spec.name for spec in task_inputs(model)]
    found: dict[str, Callable[..., Any]] = {}
    for name, one in (("reference", eager), ("levi_fast", model)):
        module = ServingHead(one, own) if part == "head" else ServingModel(one, names, own)
        found[name] = _without_gradient(module.eval())
    for kind, ops in ARTEFACTS:
        place = folder / f"{part}-{kind}-{ops}"
        place.mkdir()
        file = place / ("m.onnx" if kind == "onnx" else "m.pt2")
        export_model(model, file, format=kind, head_only=part == "head", ops=ops)
        found[f"{kind} {ops}"] = formats.load(kind, file, inputs)
    if part == "model":
        found["model(...)"] = _without_gradient(lambda *given: model(**dict(zip(names, given, strict=True))).logits)
    return found, inputs


def _without_gradient(module: Callable[..., Any]) -> Callable[[list[Tensor]], Any]:
    def run(arguments: list[Tensor]) -> Any:
        with torch.no_grad():
            return module(*arguments)

    return run


def measure(model: LeviModel, part: str, folder: Path, seconds: float) -> list[dict[str, Any]]:
    found, inputs = contenders(model, part, folder)
    rows = []
    for batch, tokens in SHAPES[part]:
        sizes = {"batch": batch, "sequence": tokens}
        batches = [[spec.example(sizes, seed=seed) for spec in inputs] for seed in range(16)]
        errors = {}
        for name, run in found.items():
            difference = (run(batches[0]) - found["reference"](batches[0])).abs().max()
            errors[name] = float(difference)
            assert difference <= TOLERANCE, (part, name, difference)
        times = interleaved({name: _timer(run, batches) for name, run in found.items()}, seconds, least=30)
        row = compared(times, "levi_fast")
        base = row["median_us"]["reference"]
        rows.append(
            {
                "part": part,
                "batch": batch,
                "tokens": tokens,
                "median_us": row["median_us"],
                "times_faster_than_reference": {n: round(base / t, 2) for n, t in row["median_us"].items()},
                "rounds": row["rounds"],
                "largest_difference_from_reference": errors,
            }
        )
        print(json.dumps(rows[-1], indent=1))
    return rows


def _timer(run: Callable[..., Any], batches: list[list[Tensor]]) -> Callable[[int], float]:
    return lambda index: timed(lambda: run(batches[index % len(batches)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each row")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # contenders bring thread pools of their own, which would wait for each other
    model = build()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for part in SHAPES for row in measure(model, part, Path(folder), arguments.seconds)]
    measured = (
        "interleaved calls in one process, inputs of random ids; onnxruntime and torch on one thread each; the "
        "machine was shared, so that the medians of a row compare, and absolute times less"
    )
    document = {"machine": facts(), "how": measured, "tolerance": TOLERANCE, "rows": rows}
    write_atomic(arguments.output, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
