"""Memory and time of a 7B-class backbone (Llama: width 4096, 11008 inside, 32 heads) with random bfloat16 weights.

    python benchmarks/bench_large_backbone.py                              # 4 layers on the CPU, below 10 GB
    python benchmarks/bench_large_backbone.py --device cuda --layers 32    # the whole depth on a GPU of 24 GB or more

Every row comes from a process of its own, whose peak is VmHWM on the CPU, torch.cuda.max_memory_allocated on a GPU:

- bare: the frozen forward, ended at the last tap, nothing tapped but that;
- levi: a training step of LEVI with that many taps: forward, loss, backward and AdamW of the trained part;
- hidden_states: the forward with output_hidden_states=True, as tapping is often done.

Writes benchmarks/results/large_backbone_{cpu,cuda}.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from levi_fast import LeviConfig, TapExtractor, get_levi_model
from levi_fast.bench.memory import high_water_mark, text
from levi_fast.bench.record import facts
from levi_fast.storage import write_atomic

WHAT = ("bare", "levi", "hidden_states")
VOCABULARY = 32000


def build(layers: int, device: str) -> nn.Module:
    """The backbone, filled in place: no float32 copy is ever there."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers,
        num_attention_heads=32, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaModel(config).eval()  # its own initialisation
    finally:
        torch.set_default_dtype(before)


def step_of(what: str, backbone: nn.Module, taps: list[int], inputs: dict[str, torch.Tensor]) -> Callable[[], object]:
    """One forward, or one training step, over the inputs."""
    if what == "bare":
        extractor = TapExtractor(backbone, taps[-1:])
        return lambda: extractor(**inputs)
    if what == "hidden_states":
        backbone.requires_grad_(False)

        def forward() -> object:
            with torch.no_grad():
                return backbone(**inputs, use_cache=False, output_hidden_states=True).hidden_states

        return forward
    spec = {"type": "text", "vocab_size": VOCABULARY}
    model = get_levi_model(backbone, LeviConfig(num_labels=2, taps=taps, task_model=spec)).train()
    model.to(inputs["input_ids"].device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    labels = torch.arange(len(inputs["input_ids"]), device=inputs["input_ids"].device) % 2

    def step() -> object:
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def measure(what: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Weights, peak and seconds of one row, in this process."""
    cuda = arguments.device == "cuda"
    backbone = build(arguments.layers, arguments.device)
    weights = sum(p.numel() * p.element_size() for p in backbone.parameters())
    taps = list(range(arguments.layers - arguments.taps, arguments.layers))
    ids = text(arguments.batch, arguments.tokens, VOCABULARY)
    inputs = {name: value.to(arguments.device) for name, value in ids.items()}
    step = step_of(what, backbone, taps, inputs)
    step()  # thread pools, the optimizer's state
    times = []
    for _ in range(arguments.steps):
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {
        "what": what,
        "taps": {"bare": 1, "levi": len(taps), "hidden_states": arguments.layers}[what],
        "weight_bytes": weights,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else high_water_mark(),
        "median_seconds": round(statistics.median(times), 4),
        "seconds": [round(value, 4) for value in times],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--taps", type=int, default=4, help="how many of the last layers a training step taps")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", choices=WHAT, help="one row, printed; how the script runs itself")
    arguments = parser.parse_args()
    if not 1 <= arguments.taps <= arguments.layers:
        parser.error(f"--taps: expected 1 to {arguments.layers}, got {arguments.taps}")
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments)))
        return
    rows = []
    for what in WHAT:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", what]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    document = {
        "machine": facts(),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "backbone": "Llama, width 4096, 11008 inside, 32 heads, 32000 tokens, bfloat16, random weights",
        **{name: getattr(arguments, name) for name in ("layers", "batch", "tokens", "steps")},
        "rows": rows,
    }
    output = arguments.output or Path(__file__).parent / "results" / f"large_backbone_{arguments.device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, json.dumps(document, indent=1) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
