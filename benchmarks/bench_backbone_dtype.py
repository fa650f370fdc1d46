"""What a backbone in bfloat16, int8 or int4 costs in accuracy on the IMDb reviews (bench_streaming.py has the times).

    python benchmarks/bench_backbone_dtype.py --data DIR     # orig/{train,dev,test}.tsv and new/test.tsv

For every dtype the taps of all splits are made once, then LEVI is trained on them with its defaults for a few seeds.
Writes benchmarks/results/backbone_dtype_cpu.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
from pathlib import Path
from typing import Any

import transformers

from levi_fast import DEFAULT_BACKBONE, LeviConfig, load_backbone, load_tokenizer
from levi_fast.bench.record import facts
from levi_fast.bench.workload import load_task
from levi_fast.quantization import BACKBONE_DTYPES
from levi_fast.storage import write_atomic
from levi_fast.training.fit import TrainingOptions
from levi_fast.training.runs import TapBank, run_method

RESULTS = Path(__file__).parent / "results" / "backbone_dtype_cpu.json"


def relative_error(bank: TapBank, reference: TapBank) -> float:
    """Of the training rows' taps, all layers together: norm of the difference over the norm."""
    taps, exact = bank.taps["train"][0], reference.taps["train"][0]
    return float((taps - exact).norm() / exact.norm())


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--max-length", type=int, default=128, help="tokens per review; the rest is cut")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    machine = facts()  # of the code that is loaded, whatever is edited while it runs
    transformers.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer(DEFAULT_BACKBONE)
    task = load_task("imdb", arguments.data)
    rows: list[dict[str, Any]] = []
    reference: TapBank | None = None
    for dtype in BACKBONE_DTYPES:
        backbone = load_backbone(DEFAULT_BACKBONE, dtype=dtype)
        splits = task.encode(tokenizer, max_length=arguments.max_length, backbone_config=backbone.config)
        assert task.processor.labels is not None
        config = LeviConfig(
            backbone=DEFAULT_BACKBONE,
            task_model=task.task_model("auto", len(tokenizer)),
            **task.processor.labels.config_fields(),
        )
        bank = TapBank.build(backbone, config, splits)
        reference = reference or bank
        scores: dict[str, list[float]] = {"id": [], "ood": []}
        for seed in range(arguments.seeds):
            result = run_method(
                "levi", config, splits, TrainingOptions(seed=seed, cross_fit=0), backbone=backbone, bank=bank
            )
            scores["id"].append(result.id["accuracy"])
            scores["ood"].append(result.ood["new"]["accuracy"])
        row = {
            "backbone_dtype": dtype,
            "relative_error_of_taps": relative_error(bank, reference),
            "id_accuracy": spread(scores["id"]),
            "ood_accuracy": spread(scores["ood"]),
            "by_seed": scores,
        }
        rows.append(row)
        print(row, flush=True)
    for row in rows:
        for split in ("id", "ood"):
            pairs = zip(row["by_seed"][split], rows[0]["by_seed"][split], strict=True)
            change = spread([ours - exact for ours, exact in pairs])
            row[f"{split}_accuracy_change"] = change["mean"]
            row[f"{split}_accuracy_change_standard_error"] = change["sd"] / arguments.seeds**0.5
    document = {
        "data": f"all reviews, cut after {arguments.max_length} tokens",
        "sizes": splits.sizes(),
        "seeds": arguments.seeds,
        "machine": machine,
        "torchao": importlib.metadata.version("torchao"),  # makes the int4 layers
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.output, json.dumps(document, indent=1) + "\n")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
