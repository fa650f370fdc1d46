"""One training with the reference ensemble and one with the drop-in: MovieLens' figures and seconds of both.

    python benchmarks/drop_in.py --data DIR [--cache DIR]         # ratings.csv and movies.csv

On the split that seed 0 draws, each seed trains one model twice, from the same initial weights and on the same taps,
with the defaults of ``levi-fast train``: with the ensemble of ``levi_fast.reference`` and every op's eager twin, and
after ``levi_fast.swap(model)``.
Writes a JSON file with both runs' metrics, the largest difference of their predictions and the seconds of each.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers

import levi_fast
from levi_fast import DEFAULT_BACKBONE, ActivationCache, LeviConfig, load_backbone, load_tokenizer
from levi_fast.bench.record import facts
from levi_fast.kernels import use_backend
from levi_fast.modeling import LeviModel, get_levi_model
from levi_fast.storage import write_atomic
from levi_fast.training.fit import TrainingOptions, fit
from levi_fast.training.named_tasks import TASK_TRAINING, MovieLensSplits
from levi_fast.training.prediction import predict
from levi_fast.training.runs import Splits, TapBank, score


def train(model: LeviModel, splits: Splits, options: TrainingOptions) -> dict[str, Any]:
    """One training run's figures, and its predictions on the test rows."""
    transformers.set_seed(options.seed)
    result = fit(model, splits.train, splits.validation, options)
    assert splits.test is not None
    return {
        "id": score(model, splits.test),
        "ood": {name: score(model, dataset) for name, dataset in splits.ood.items()},
        "blend": result.blend,
        "best_epoch": result.best_epoch,
        "seconds": round(result.seconds, 2),
        "logits": torch.from_numpy(predict(model, splits.test).logits).double(),
    }


def both(
    backbone: Any, config: LeviConfig, splits: Splits, bank: TapBank, options: TrainingOptions
) -> dict[str, Any]:
    """The reference's run and the drop-in's."""
    runs: dict[str, Any] = {"seed": options.seed}
    for name in ("reference", "drop-in"):
        transformers.set_seed(options.seed)
        model = get_levi_model(backbone, config)
        levi_fast.swap(model, undo=True)
        bank.attach(model, splits)
        if name == "reference":
            assert type(model.ensemble) is levi_fast.reference.LayerwiseEnsemble
            with use_backend("eager"):
                runs[name] = train(model, splits, options)
        else:
            assert levi_fast.swap(model) == 1
            runs[name] = train(model, splits, options)
    one, two = (runs[name].pop("logits") for name in ("reference", "drop-in"))
    runs["largest difference of a prediction"] = float((one - two).abs().max())
    return runs


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Per split: the mean difference of the two runs' RMSE, beside what seeds alone make of it."""
    table: dict[str, Any] = {}

    def rmse(run: dict[str, Any], split: str) -> float:
        return float((run["id"] if split == "id" else run["ood"][split])["rmse"])

    for split in ("id", *rows[0]["reference"]["ood"]):
        pairs = [(rmse(row["reference"], split), rmse(row["drop-in"], split)) for row in rows]
        table[split] = {
            "reference": statistics.mean(a for a, _ in pairs),
            "drop-in": statistics.mean(b for _, b in pairs),
            "largest difference of a seed": max(abs(a - b) for a, b in pairs),
            "standard deviation over seeds": statistics.stdev(a for a, _ in pairs),
        }
    seconds = [row["reference"]["seconds"] / row["drop-in"]["seconds"] for row in rows]
    table["seconds of the reference over the drop-in's, median"] = statistics.median(seconds)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--cache", type=Path, help="folder for activation caches, one per seed's split; default: none"
    )
    parser.add_argument("--seeds", type=int, choices=range(2, 101), metavar="N", default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "drop-in-movielens.json")
    arguments = parser.parse_args()

    transformers.utils.logging.disable_progress_bar()
    backbone, tokenizer = load_backbone(DEFAULT_BACKBONE), load_tokenizer(DEFAULT_BACKBONE)
    task = MovieLensSplits.load(str(arguments.data), "genres", 0)
    splits = task.encode(tokenizer, max_length=None, backbone_config=backbone.config)
    assert task.processor.labels is not None
    config = LeviConfig(
        backbone=DEFAULT_BACKBONE,
        task_model=task.task_model("auto", len(tokenizer)),
        **task.processor.labels.config_fields(),
    )
    if arguments.cache is None:
        bank = TapBank.build(backbone, config, splits)
    else:
        cache = ActivationCache.build(arguments.cache, DEFAULT_BACKBONE, dict(splits.named()), preprocessor=tokenizer)
        bank = TapBank.from_cache(cache, splits)
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        rows.append(
            both(
                backbone, config, splits, bank, TrainingOptions(seed=seed, cross_fit=0, **TASK_TRAINING["movielens"])
            )
        )
        print(json.dumps(rows[-1]), flush=True)
    document = {
        "what": __doc__.strip().splitlines()[0],
        "machine": facts(),
        "sizes": splits.sizes(),
        "summary": summary(rows),
        "runs": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.output, json.dumps(document, indent=1) + "\n")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
