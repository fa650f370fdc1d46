"""What each of LEVI's choices is worth: one changed at a time, on real data, over seeds.

    python benchmarks/evidence/ablations.py --shared DIR --work DIR [--data imdb] [--seeds 5]

``DIR`` of ``--shared`` holds imdb-counterfactual/ and movielens-small/. Runs are kept in ``--work`` as JSON lines,
taps beside them; the summary goes to ``benchmarks/results/evidence-ablations-DATA.json``. Training sizes go up to
10,000 where the data has as many rows.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from variants import DATA, Record, Variant, figures, load
from variants import run as train

from levi_fast.report.console import Console
from levi_fast.report.metrics_file import versions, write_metrics
from levi_fast.report.statistics import mean_and_sd
from levi_fast.training.metrics import SELECTION_METRIC

RESULTS = Path(__file__).parents[1] / "results"
SIZES = (100, 300, 1000, 3000, 10_000)

GROUPS: dict[str, list[Variant]] = {
    "default": [Variant("levi")],
    "taps": [Variant(f"taps {form}", model={"taps": form}) for form in
             ("last", "mid", "even:3", "cka:3", "gradnorm", "probe")],
    "objective": [
        Variant("objective ensemble", model={"objective": "ensemble"}),
        Variant("objective both", model={"objective": "both"}),
        Variant("objective both, learned mix", model={"objective": "both", "mix": "learned"}),
    ],
    "normalisation": [Variant("no normalisation", model={"normalize": False})],
    "adapting layers": [
        Variant("linear adapting layers", model={"hidden_width": None}),
        Variant("hidden width 64", model={"hidden_width": 64}),
    ],
    "view size": [Variant(f"view width {width}", task_model={"view_width": width}) for width in (4, 16, 256)],
    "view dropout": [Variant(f"view dropout {p:g}", model={"view_dropout": p}) for p in (0.0, 0.25, 0.75, 0.9)],
    "training size": [
        Variant(f"{method}, {rows} rows", method, rows=rows)
        for rows in SIZES
        for method in ("levi", "taps-only", "linear-probe", "task-model")
    ],
}  # fmt: skip


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Per variant: mean and standard deviation of each figure over seeds, and every seed's."""
    summary: dict[str, Any] = {}
    metric = next(name for name in SELECTION_METRIC.values() if name in runs[0]["id"])
    for name in dict.fromkeys(run["variant"] for run in runs):
        own = sorted((run for run in runs if run["variant"] == name), key=lambda run: run["seed"])
        scores = {"ID": [run["id"][metric] for run in own]}
        scores.update({split: [run["ood"][split][metric] for run in own] for split in own[0]["ood"]})
        scores["mean of OOD"] = [statistics.fmean(run["ood"][s][metric] for s in run["ood"]) for run in own]
        summary[name] = {
            "group": own[0]["group"],
            "scores": {
                split: {**dict(zip(("mean", "sd"), mean_and_sd(values), strict=True)), "seeds": values}
                for split, values in scores.items()
            },
            "blends": [run["blend"] for run in own],
            "tap_layers": [run["tap_layers"] for run in own],
            "training_rows": own[0]["training_rows"],
            "seconds": statistics.fmean(run["seconds"] for run in own),
        }
    return {"metric": metric, "variants": summary}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shared", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="folder for finished runs and taps")
    parser.add_argument("--data", choices=DATA, default="imdb")
    parser.add_argument("--seeds", type=int, default=5)
    asked = parser.parse_args()
    console = Console()
    record = Record(asked.work / f"ablations-{asked.data}.jsonl")
    grouped = [(group, variant) for group, variants in GROUPS.items() for variant in variants]
    for seed in range(asked.seeds):
        missing = {variant.name for variant in record.missing(asked.data, seed, [variant for _, variant in grouped])}
        group_of_seed = load(asked.data, asked.shared, seed, asked.work, console) if missing else None
        for group, variant in grouped:
            if variant.name not in missing or group_of_seed is None:
                continue
            if not group_of_seed.has(variant):
                if not asked.data.startswith("movielens") or variant.rows is None:
                    continue
                # the other variants keep the rows that they always had
                group_of_seed = load(asked.data, asked.shared, seed, asked.work, console, variant.rows)
                if not group_of_seed.has(variant):
                    continue
            found = figures(*train(group_of_seed, variant))
            record.add({"data": asked.data, "seed": seed, "group": group, "variant": variant.name, **found})
            console.note(f"{asked.data}, seed {seed}, {variant.name}: {found['seconds']} s")
    document = {"data": asked.data, "seeds": asked.seeds, **summarise(record.runs), "versions": versions()}
    write_metrics(RESULTS / f"evidence-ablations-{asked.data}.json", document)


if __name__ == "__main__":
    main()
