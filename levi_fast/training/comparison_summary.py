"""From the cells of a comparison to its tables: means, paired tests, calibration, layers, cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from levi_fast.data.labels import REGRESSION, SINGLE_LABEL
from levi_fast.errors import DataError
from levi_fast.report.statistics import (
    examples_interval,
    examples_p_value,
    expected_calibration_error,
    holm,
    mean_and_sd,
    seeds_p_value,
)
from levi_fast.training.metrics import LOWER_IS_BETTER, SELECTION_METRIC, row_losses


def summarise(folder: Path, data: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """All of a comparison.

    Args:
        folder: of the cells.
        data, methods, seeds: names of what was compared; the first method is the reference of the tests.

    Returns:
        ``reference``, ``methods``, ``seeds`` and, by data set, ``metric``, ``splits`` and ``methods``: JSON values.

    Raises:
        DataError: cells of one data set and seed saw different rows.
    """
    return {
        "reference": methods[0],
        "methods": list(methods),
        "seeds": list(seeds),
        "data": {name: _of_data(folder / name, name, methods, seeds) for name in data},
    }


def _of_data(folder: Path, name: str, methods: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    cells = {
        (m, s): json.loads((folder / m / f"seed-{s}.json").read_text(encoding="utf-8"))
        for m in methods
        for s in seeds
    }
    for seed in seeds:
        if any(cells[m, seed]["data_digest"] != cells[methods[0], seed]["data_digest"] for m in methods):
            raise DataError(f"{folder}: the cells of seed {seed} saw different rows; remove those of the older data")
    first = cells[methods[0], seeds[0]]
    problem_type = first["problem_type"]
    metric = SELECTION_METRIC[problem_type]
    splits = {"ID": first["id_split"], **{f"OOD {ood}": f"ood {ood}" for ood in first["ood"]}}
    digests = [cells[methods[0], seed]["data_digest"] for seed in seeds]
    shared = {split for split in splits.values() if len({digest[split] for digest in digests}) == 1}
    losses = {m: _losses(folder / m, seeds, list(splits.values()), shared, problem_type) for m in methods}
    rows: dict[str, Any] = {}
    for method in methods:
        own = [cells[method, seed] for seed in seeds]
        figures = {split: [_scores(cell, split)[metric] for cell in own] for split in splits}
        rows[method] = {
            "scores": {split: _figure(values) for split, values in figures.items()},
            "all_metrics": {
                split: {
                    k: _figure([_scores(c, split)[k] for c in own if k in _scores(c, split)])
                    for k in _scores(own[0], split)
                }
                for split in splits
            },
            "calibration": _calibration(folder / method, seeds, splits, problem_type),
            "per_layer": _layers(own),
            "cost": {
                "seconds": _figure([cell["seconds"] for cell in own]),
                "trained_parameters": own[0]["trained_parameters"],
                "peak_resident_bytes": max(cell["peak_resident_bytes"] for cell in own),
                "peak_cuda_bytes": max(cell["peak_cuda_bytes"] for cell in own),
            },
            "chosen": [{k: c[k] for k in ("seed", "learning_rate", "best_epoch", "blend", "choices")} for c in own],
        }
    _add_tests(rows, methods, splits, losses, problem_type)
    return {
        "metric": metric,
        "lower_is_better": metric in LOWER_IS_BETTER,
        "problem_type": problem_type,
        "splits": list(splits),
        "id_split": first["id_split"],
        "sizes": first["sizes"],
        "methods": rows,
    }


def _add_tests(
    rows: dict[str, Any],
    methods: Sequence[str],
    splits: dict[str, str],
    losses: dict[str, dict[str, np.ndarray]],
    problem_type: str,
) -> None:
    """``tests[split]`` of every method but the reference: how much its error is above the reference's."""
    reference, others = methods[0], list(methods[1:])
    for split, stored in splits.items():
        tests = []
        for method in others:
            one, other = losses[method][stored], losses[reference][stored]
            low, high = examples_interval(one, other, root=problem_type == REGRESSION)
            means = (np.sqrt if problem_type == REGRESSION else np.asarray)([one.mean(), other.mean()])
            figures = [rows[m]["scores"][split]["values"] for m in (method, reference)]
            tests.append(
                {
                    "difference": float(means[0] - means[1]),
                    "interval": [low, high],
                    "examples": len(one),
                    "p_examples": examples_p_value(one, other),
                    "p_seeds": seeds_p_value(*figures),
                }
            )
        for kind in ("p_examples", "p_seeds"):
            for test, corrected in zip(tests, holm([_number(test[kind]) for test in tests]), strict=True):
                test[f"{kind}_holm"] = corrected
        for method, test in zip(others, tests, strict=True):
            rows[method].setdefault("tests", {})[split] = test


def _losses(
    folder: Path, seeds: Sequence[int], splits: Sequence[str], shared: set[str], problem_type: str
) -> dict[str, np.ndarray]:
    """Every example's loss by split: its mean over seeds where those score the same examples, else all of them."""
    found: dict[str, np.ndarray] = {}
    files = [load_file(folder / f"seed-{seed}.safetensors") for seed in seeds]
    for split in splits:
        labels = [file[f"{split}/labels"] for file in files]
        losses = [row_losses(f[f"{split}/logits"], y, problem_type) for f, y in zip(files, labels, strict=True)]
        found[split] = np.mean(losses, axis=0) if split in shared else np.concatenate(losses)
    return found


def _calibration(
    folder: Path, seeds: Sequence[int], splits: dict[str, str], problem_type: str
) -> dict[str, dict[str, Any]] | None:
    if problem_type != SINGLE_LABEL:
        return None
    files = [load_file(folder / f"seed-{seed}.safetensors") for seed in seeds]
    return {
        split: _figure([expected_calibration_error(f[f"{s}/logits"], f[f"{s}/labels"]) for f in files])
        for split, s in splits.items()
    }


def _layers(cells: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Weights and scores by layer, means over seeds."""
    found = [cell["per_layer"] for cell in cells]
    if any(layers is None for layers in found):
        return None
    scores = {split: np.mean([f["scores"][split] for f in found], axis=0).tolist() for split in found[0]["scores"]}
    weights = np.mean([f["weights"] for f in found], axis=0).tolist()
    return {"layers": found[0]["layers"], "weights": weights, "scores": scores}


def _scores(cell: dict[str, Any], split: str) -> dict[str, float]:
    scores: dict[str, float] = cell["id"] if split == "ID" else cell["ood"][split.removeprefix("OOD ")]
    return scores


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _figure(values: Sequence[float]) -> dict[str, Any]:
    mean, sd = mean_and_sd(values)
    return {"mean": mean, "sd": sd, "values": [float(value) for value in values]}
