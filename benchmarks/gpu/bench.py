"""Times all ops on a GPU beside their peers; writes JSON after every row, so that a run cut short keeps what it has.

    python benchmarks/gpu/bench.py --output gpu.json [--budget 300]

As `levi-fast bench kernels --device cuda`; `--device cpu --quick` tries every row out, at the smallest sizes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from levi_fast.bench.gpu.run import bench_gpu


def main() -> None:
    """Run, and fail where a row did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=300, help="seconds")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="few repetitions of tiny cases, to try the script out")
    options = parser.parse_args()
    run = bench_gpu(options.output, options.device, options.budget, options.quick)
    if run.result.get("failures"):
        raise SystemExit("\n".join(run.result["failures"]))


if __name__ == "__main__":
    main()
