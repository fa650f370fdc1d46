"""``levi-fast bench growth``: how the cost of ops, epochs and steps grows with each size, and fits of it."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from levi_fast.bench import ensemble, pooling
from levi_fast.bench.fits import growth_fits
from levi_fast.bench.methods import levi_method
from levi_fast.bench.options import check_choices, check_seconds
from levi_fast.bench.record import Record
from levi_fast.bench.synthetic_taps import SyntheticEpoch
from levi_fast.bench.timing import interleaved, quartiles, timed
from levi_fast.bench.workload import load_minilm_or
from levi_fast.config import LeviConfig
from levi_fast.errors import DataError
from levi_fast.functional import masked_mean_pool
from levi_fast.kernels.masked_mean_pool import eager_forward
from levi_fast.modeling import get_levi_model

PARTS = ("ensemble", "pooling", "cached", "step")
PEERS = ("eager", "hand-batched", "grouped-mm", "sum-over-count", "bmm")
ENSEMBLE = {"L": 6, "D": 384, "V": 64, "H": 128, "C": 2, "B": 256}  # but for the size that varies
ENSEMBLE_SIZES = {"B": (1, 4, 16, 64, 256, 1024, 4096), "L": (1, 2, 4, 8, 16, 32)}
POOLING_BATCH, POOLING_WIDTH = 8, 384
POOLING_SIZES = (8, 32, 128, 512, 2048)
EXAMPLES, QUICK_EXAMPLES = (10_000, 30_000, 100_000, 300_000, 1_000_000), (10_000, 30_000, 100_000)
ONCE_FROM = 300_000  # rows of an epoch that is run once: it takes seconds, and varies little
STEP_BATCHES, STEP_LENGTH = (1, 4, 16, 64), 32
STEP_LENGTHS, STEP_BATCH = (8, 32, 128, 256), 8
STEP_VOCABULARY = 1000  # ids are drawn from the first so many, which every tokenizer has
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class GrowthOptions:
    """What is measured.

    Args:
        parts: of :data:`PARTS`.
        peers: of :data:`PEERS`, of the ensemble and of pooling.
        backbone: hub id or folder, of ``step``; None is the packaged MiniLM.
        quick: no epochs of more than 100,000 rows.
        seconds: of interleaved rounds for every size; at least three rounds.
    """

    parts: tuple[str, ...] = PARTS
    peers: tuple[str, ...] = ("eager",)
    backbone: str | None = None
    quick: bool = False
    seconds: float = 1.0

    def __post_init__(self) -> None:
        check_choices("--parts", self.parts, PARTS)
        check_choices("--peers", self.peers, PEERS)
        if not self.parts:
            raise DataError(f"--parts: expected some of {', '.join(PARTS)}; got none")
        check_seconds("--seconds", self.seconds)


Times = dict[str, list[float]]  # by contender


def bench_growth(
    options: GrowthOptions, output: Path | None, note: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Measure on CPU in float32; the document as described in :mod:`levi_fast.bench.record`, its one part ``growth``.

    A row has ``sizes`` and ours at each: ``rounds``, ``median_us``, ``quartiles_us``, and the fits of
    :func:`levi_fast.bench.fits.growth_fits` (microseconds); ``peers`` has the same of every peer.

    Args:
        options: what.
        output: a JSON file, written after every row; rows of other cases in it stay.
        note: told of every size as it begins.

    Raises:
        DataError: the backbone cannot be loaded.
        WrongResultError: a result of ours is further from float64 than twice PyTorch's own.
    """
    backbone = load_minilm_or(options.backbone) if "step" in options.parts else None
    record = Record(output, asdict(options), keep=True)

    def measure(what: str, variable: str, sizes: Sequence[int], each: Callable[[int], Times], **case: Any) -> None:
        found = []
        for size in sizes:
            note(f"{what}: {variable} {size:,}")
            found.append(each(size))
        record.add("growth", growth_row(what, variable, sizes, found, **case))

    if "ensemble" in options.parts:
        for variable, sizes in ENSEMBLE_SIZES.items():
            measure("ensemble, forward+backward", variable, sizes, partial(ensemble_times, variable, options))
    if "pooling" in options.parts:
        measure("pooling", "T", POOLING_SIZES, partial(pooling_times, options))
    if "cached" in options.parts:
        examples = QUICK_EXAMPLES if options.quick else EXAMPLES
        measure("epoch from the cache", "examples", examples, partial(epoch_times, options))
    if backbone is not None:
        name, module, _ = backbone
        limit = int(getattr(module.config, "max_position_embeddings", STEP_LENGTHS[-1]))
        lengths = [length for length in STEP_LENGTHS if length <= limit]
        step = Step(module)
        measure("step with the backbone", "batch", STEP_BATCHES,
                lambda size: step.times(size, min(STEP_LENGTH, limit), options), backbone=name)  # fmt: skip
        measure("step with the backbone", "length", lengths,
                lambda size: step.times(STEP_BATCH, size, options), backbone=name)  # fmt: skip
    return record.document


def growth_row(what: str, variable: str, sizes: Sequence[int], times: Sequence[Times], **more: Any) -> dict[str, Any]:
    """A row from the seconds of every round at every size, by contender; ``ours`` is one."""
    found: dict[str, dict[str, Any]] = {}
    for name in times[0]:
        medians = [1e6 * statistics.median(each[name]) for each in times]
        found[name] = {
            "rounds": [len(each[name]) for each in times],
            "median_us": [round(value, 2) for value in medians],
            "quartiles_us": [[round(1e6 * value, 2) for value in quartiles(each[name])] for each in times],
            **growth_fits(sizes, medians),
        }
    return {
        "case": {"what": what, "variable": variable, **more},
        "dtype": "float32",
        "pass": "forward" if what == "pooling" else "forward+backward",
        "sizes": list(sizes),
        **found.pop("ours"),
        "peers": found,
    }


def ensemble_times(variable: str, options: GrowthOptions, size: int) -> Times:
    """The ensemble's forward and backward pass at one batch or number of taps."""
    shape = tuple({**ENSEMBLE, variable: size}[axis] for axis in ensemble.AXES)
    case = ensemble.Case(shape, torch.float32, True, [peer for peer in options.peers if peer in ensemble.PEERS])
    case.check()
    return interleaved({name: partial(case.run, name) for name in case.calls}, options.seconds, LEAST_ROUNDS)


def pooling_times(options: GrowthOptions, tokens: int) -> Times:
    """Pooling ``[8, T, 384]``, all tokens kept, of one input again and again."""
    hidden = torch.randn(POOLING_BATCH, tokens, POOLING_WIDTH)
    mask = torch.ones(POOLING_BATCH, tokens, dtype=torch.int64)
    forms: dict[str, Callable[..., Any]] = {"ours": masked_mean_pool}
    peers = {"eager": eager_forward, "sum-over-count": pooling.sum_over_count, "bmm": pooling.batched_product}
    forms |= {name: form for name, form in peers.items() if name in options.peers}

    def run(form: Callable[..., Any], _: int) -> float:
        return timed(lambda: form(hidden, mask))

    with torch.no_grad():
        return interleaved({name: partial(run, form) for name, form in forms.items()}, options.seconds, LEAST_ROUNDS)


def epoch_times(options: GrowthOptions, rows: int) -> Times:
    """A cached epoch of so many rows of random taps."""
    with tempfile.TemporaryDirectory(prefix="levi-fast-bench-") as folder:
        epoch = SyntheticEpoch(rows, Path(folder))
        seconds = [epoch.run()]
        end = time.perf_counter() + options.seconds
        while rows < ONCE_FROM and (len(seconds) < LEAST_ROUNDS or time.perf_counter() < end):
            seconds.append(epoch.run())
    return {"ours": seconds}


class Step:
    """LEVI's training step with the backbone in it, on random token ids without padding."""

    def __init__(self, backbone: nn.Module) -> None:
        self.vocabulary = min(STEP_VOCABULARY, int(backbone.config.vocab_size))  # type: ignore[union-attr, arg-type]
        text = {"type": "text", "vocab_size": self.vocabulary}
        torch.manual_seed(0)
        fields: dict[str, Any] = {"num_labels": 2, "problem_type": "single_label_classification"}
        self.method = levi_method(get_levi_model(backbone, LeviConfig(task_model=text, **fields)))

    def times(self, batch: int, length: int, options: GrowthOptions) -> Times:
        """Of ``batch`` texts of ``length`` tokens."""
        ids = torch.randint(min(5, self.vocabulary - 1), self.vocabulary, (batch, length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(batch) % 2}
        return interleaved({"ours": lambda _: self.method.seconds(inputs)}, options.seconds, LEAST_ROUNDS)


def growth_tables(document: Mapping[str, Any]) -> list[Table]:
    """The fits, for a terminal."""
    rows = document.get("growth", [])
    if not rows:
        return []
    table = Table(title="growth: exponent over the upper half of sizes; fixed cost and cost per unit")
    table.title_justify = "left"
    table.add_column("what")
    table.add_column("sizes")
    for name in ("exponent", "fixed µs", "µs a unit", "off by"):
        table.add_column(name, justify="right")
    for row in rows:
        sizes = f"{row['case']['variable']} {row['sizes'][0]:,} to {row['sizes'][-1]:,}"
        for peer, found in (("", row), *row["peers"].items()):
            error = "" if found["exponent_stderr"] is None else f" ± {found['exponent_stderr']:.2f}"
            table.add_row(
                f"  {peer}" if peer else row["case"]["what"].replace("forward+backward", "f+b"),
                "" if peer else sizes,
                f"{found['exponent']:.2f}{error}",
                f"{found['fixed']:,.3g}",
                f"{found['per_unit']:,.3g}",
                f"{found['linear_fit_worst']:.0%}",
            )
    return [table]
