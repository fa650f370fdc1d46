"""Hold the results under benchmarks/results/ to what the kernels and the frozen engine are meant to reach.

    python benchmarks/targets.py [--results DIR]

Prints each target, the figure and whether it is met. What was never measured is "not measured", not met. The exit
status is 0 whatever stands there: a target is a goal, not a test (benchmarks/guard.py is one).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pages import RESULTS

SMALL_GFLOP = 0.1  # a case under this is small, the others are large
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """A goal, what was measured of it, and the rows that miss it.

    Args:
        group: kernels on CPU or GPU, frozen engine, package.
        goal: in words, with the bound.
        figure: what was measured, in words; "not measured" where no file has it.
        met: None where nothing was measured.
        missed: one line for each row that misses it.
        source: the results file.
    """

    group: str
    goal: str
    figure: str
    met: bool | None
    missed: tuple[str, ...] = ()
    source: str = ""


def judged(
    group: str, goal: str, source: str, rows: Iterable[tuple[str, float]], bound: float, *, at_most: bool = False
) -> Target:
    """A bound on every row: the figure is the worst row's, and how many of all hold."""
    found = list(rows)
    if not found:
        return Target(group, goal, "not measured", None, (), source)
    missed = [(name, value) for name, value in found if (value > bound if at_most else value < bound)]
    worst = (max if at_most else min)(found, key=lambda row: row[1])
    figure = _shown(worst[1])
    if len(found) > 1:
        figure = f"{len(found) - len(missed)} of {len(found)}; worst {figure}"
    return Target(
        group, goal, figure, not missed, tuple(f"{name}: {_shown(value)}" for name, value in missed), source
    )


def _shown(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.0f}"


def targets(results: Path) -> list[Target]:
    """Every target, in the order in which a reader asks."""

    def read(name: str) -> dict[str, Any]:
        path = results / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    return [
        *kernels_on_cpu(read("kernels_cpu")),
        *kernels_on_gpu([json.loads(path.read_text()) for path in sorted((results / "gpu").glob("*bench*.json"))]),
        *streaming(read("streaming_cpu")),
        *cache(read("cache_cpu"), read("cached_training_cpu")),
        *heads(read("many_heads_cpu")),
        *package(read("package_cpu")),
    ]


def name_of(row: Row) -> str:
    """``(6, 384, 64) bfloat16 forward``."""
    case = ", ".join(str(value) for value in row["case"].values())
    return f"({case}) {row['dtype']} {row.get('pass', '')}".strip()


def kernels_on_cpu(document: Row) -> list[Target]:
    """The ensemble's and pooling's bounds; rows from ``levi-fast bench kernels --peers all``."""
    group, source = "kernels, CPU", "kernels_cpu.json"
    rows = document.get("ensemble", [])
    both = [row for row in rows if row["pass"] == "forward+backward"]
    small = [row for row in both if row["gflop"] < SMALL_GFLOP]
    large = [row for row in both if row["gflop"] >= SMALL_GFLOP]
    pools = [row for row in document.get("pooling", []) if row["pass"] == "forward"]
    in_cache, out_of_cache = ([row for row in pools if row["case"]["input"] == where] for where in ("warm", "cold"))

    def ratio(row: Row, peer: str) -> float:
        return float(row["median_us"][peer] / row["median_us"]["ours"])

    def over_float32(row: Row) -> float:
        (other,) = [r for r in both if r["case"] == row["case"] and r["dtype"] == "float32"]
        return float(other["median_us"]["ours"] / row["median_us"]["ours"])

    by_flop = [row for row in large if row["dtype"] == "bfloat16" and row["bound_by"] == "flop"]
    makers: Sequence[tuple[str, Sequence[Row], Callable[[Row], float], float]] = (
        ("ensemble: no row below 0.98 times the best peer", rows, lambda r: r["best_peer_over_ours"], 0.98),
        ("forward + backward under 0.1 GFLOP: 2.5 times eager", small, lambda r: ratio(r, "eager"), 2.5),
        (
            "forward + backward under 0.1 GFLOP: 1.5 times the best peer", small,
            lambda r: r["best_peer_over_ours"], 1.5,
        ),
        ("large, fp32: 0.75 of the measured GEMM rate", [r for r in large if r["dtype"] == "float32"],
         lambda r: r["fraction_of_roofline"], 0.75),
        ("large, bf16: 0.75 of the measured GEMM rate", [r for r in large if r["dtype"] == "bfloat16"],
         lambda r: r["fraction_of_roofline"], 0.75),
        ("bf16 over our own fp32 where FLOP bound: 1.8 times", by_flop, over_float32, 1.8),
        ("pooling out of cache: 0.9 of the read bandwidth", out_of_cache, lambda r: r["fraction_of_roofline"], 0.9),
        ("pooling in cache: 1.6 times the bmm form", in_cache, lambda r: ratio(r, "bmm"), 1.6),
    )  # fmt: skip
    return [
        judged(group, goal, source, [(name_of(r), of(r)) for r in some], bound) for goal, some, of, bound in makers
    ]


def kernels_on_gpu(documents: Sequence[Row]) -> list[Target]:
    """Rows of benchmarks/gpu/bench.py; a CUDA graph's time where there is one."""
    group, source = "kernels, GPU", "gpu/"
    rows = [row for document in documents for row in document["rows"]]

    def best(row: Row) -> Row:
        found: Row = row.get("graph", row["plain"])
        return found

    def of(start: str, keep: Callable[[Row], bool] = lambda _: True) -> list[Row]:
        return [row for row in rows if row["op"].startswith(start) and keep(row)]

    def peers(some: Sequence[Row], peer: str) -> list[tuple[str, float]]:
        found = [(name_of(row), best(row)["times_faster_than"].get(peer)) for row in some]
        return [(name, value) for name, value in found if value is not None]

    def roofline(some: Sequence[Row]) -> list[tuple[str, float]]:
        return [(name_of(row), best(row)["of_roofline"]) for row in some]

    both = "layerwise_ensemble forward+backward"
    all_peers = [
        (f"{name_of(row)} against {peer}", value)
        for row in of("layerwise_ensemble")
        for peer, value in best(row)["times_faster_than"].items()
    ]
    pools = of("masked_mean_pool", lambda r: r["case"]["B"] * r["case"]["T"] * r["case"]["D"] * 2 >= 64e6)
    return [
        judged(group, "pooling of 64 MB and more: 0.85 of the copy bandwidth", source, roofline(pools), 0.85),
        judged(group, "forward + backward, B ≤ 64: 3 times torch.compile's max-autotune", source,
               peers(of(both, lambda r: r["case"]["B"] <= 64), "compile"), 3),
        judged(group, "forward + backward, B ≥ 1,024: 1.2 times torch.compile's max-autotune", source,
               peers(of(both, lambda r: r["case"]["B"] >= 1024), "compile"), 1.2),
        judged(group, "ensemble: never slower than a peer", source, all_peers, 1.0),
        judged(group, "small batches: 0.6 of the bandwidth floor", source,
               roofline(of("layerwise_ensemble f", lambda r: r["case"]["B"] <= 64)), 0.6),
        judged(group, "token-level batches: 0.65 of the matrix rate", source,
               roofline(of(both, lambda r: r["case"]["B"] >= 65536)), 0.65),
        judged(group, "a head's training step replays as one CUDA graph", source,
               [(name_of(row), float("graph" in row)) for row in of("training step")], 1.0),
    ]  # fmt: skip


def streaming(document: Row) -> list[Target]:
    """Streamed taps; benchmarks/bench_streaming.py."""
    group, source = "frozen engine", "streaming_cpu.json"
    memory = document.get("memory", {}).get("measured", {"rows": [], "one_hidden_state_mib": 1.0})
    beyond = [
        (f"{row['forward']} taps of {row['layers']}", row["beyond_bare_mib"] / memory["one_hidden_state_mib"])
        for row in memory["rows"]
        if row["forward"].isdecimal()
    ]
    last = [
        (f"{row['backbone']}, layer {row['last_tap']} of {row['of_layers']}", row["ratio"] - row["bound"])
        for row in document.get("last_taps", {}).get("measured", [])
    ]
    step = document.get("training_step", {}).get("measured", {})
    return [
        judged(group, "peak memory beyond the bare forward's, 6 to 32 taps: within one hidden state", source,
               beyond, 1.0, at_most=True),
        judged(group, "last tap at layer k of n: time beyond (k/n + 0.08) of the full forward", source, last, 0.0,
               at_most=True),
        judged(group, "a training step: at most 1.10 times the bare forward", source,
               [("MiniLM", step["levi_over_forward"])] if step else [], 1.10, at_most=True),
        judged(group, "a training step: at most half of LoRA's", source,
               [("MiniLM", step["levi_over_lora"])] if step else [], 0.5, at_most=True),
    ]  # fmt: skip


def cache(building: Row, training: Row) -> list[Target]:
    """The activation cache and training from it; bench_cache.py and bench_cached_training.py."""
    group, source = "frozen engine", "cached_training_cpu.json"
    builds = [(name, part["measured"]["median"]) for name, part in building.items() if name.startswith("build_")]
    found = [judged(group, "building a cache: 0.95 times the bare throughput", "cache_cpu.json", builds, 0.95)]
    for name, title in (("movielens", "MovieLens"), ("imdb", "IMDb")):
        bounds = {"uncached": 50, "lora": 100} if name == "movielens" else {"uncached": 15, "lora": 30}
        measured = training.get(name, {}).get("measured", {})
        for peer, bound in bounds.items():
            rows = [(title, measured[f"times_faster_than_{peer}"])] if measured else []
            theirs = "the uncached epoch" if peer == "uncached" else "a LoRA epoch"
            found.append(
                judged(group, f"{title}, an epoch from the cache: 1/{bound} of {theirs}", source, rows, bound)
            )
    growth = training.get("growth", {}).get("measured", [])
    for taps in dict.fromkeys(row["taps"] for row in growth):
        own = {row["examples"]: row for row in growth if row["taps"] == taps}
        cost = own[max(own)]["microseconds_per_example"] / own[min(own)]["microseconds_per_example"]
        goal = f"cost per example at {max(own):,} over {min(own):,} examples, {taps}: at most 1.25"
        found.append(judged(group, goal, source, [(taps, cost)], 1.25, at_most=True))
        if taps == "streamed":
            rows = [(f"{count:,} examples", row["anonymous_memory_grew_mib"]) for count, row in own.items()]
            found.append(judged(group, "an epoch that streams: at most 64 MiB more", source, rows, 64, at_most=True))
    return found


def heads(document: Row) -> list[Target]:
    """Many heads in one pass; bench_heads.py."""
    group, source = "frozen engine", "many_heads_cpu.json"
    parts = {name: part["measured"] for name, part in document.items() if name.split()[0] in ("training", "command")}
    rows = [(name, part["ratio"]) for name, part in parts.items()]
    equal = [
        (name, float(all(part["equal_to_runs_on_one_thread"][what] for what in ("weights", "figures"))))
        for name, part in parts.items()
        if "equal_to_runs_on_one_thread" in part
    ]
    return [
        judged(group, "16 heads together: at most a quarter of 16 cached runs", source, rows, 0.25, at_most=True),
        judged(group, "each head equals its separate run, bit for bit (1: yes)", source, equal, 1.0),
    ]


def package(document: Row) -> list[Target]:
    """What having the package costs; ``levi-fast bench package``."""
    found = document.get("imports", {}).get("ratios", {}).get("levi_fast_beside_torch_and_transformers")
    rows = [("import", found["median"])] if found else []
    goal = "importing levi_fast beside torch and transformers: at most 1.15 times these alone"
    return [judged("package", goal, "package_cpu.json", rows, 1.15, at_most=True)]


def main() -> None:
    """Print the table."""
    import rich
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    found = targets(parser.parse_args().results)
    table = Table("group", "target", "figure", "met")
    for target in found:
        met = "not measured" if target.met is None else "met" if target.met else "not met"
        table.add_row(target.group, "\n  ".join((target.goal, *target.missed)), target.figure, met)
    rich.print(table)
    counts = [sum(target.met is state for target in found) for state in (True, False, None)]
    print(f"{counts[0]} met, {counts[1]} not met, {counts[2]} not measured")


if __name__ == "__main__":
    main()
