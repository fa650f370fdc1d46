"""Streamed taps: peak memory over the number of taps, time to the last tap, and a training step beside LoRA's.

    python benchmarks/bench_streaming.py            # writes benchmarks/results/streaming_cpu.json

Memory: every figure comes from a process of its own. glibc is told to hand freed tensors back at once, the kernel's
high-water mark of resident memory (VmHWM) is reset after a warm-up, and its rise over one forward is read. Time:
median of interleaved rounds in one process. Backbones have random weights, apart from MiniLM for the training step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tasks import machine
from torch import nn

from levi_fast import DEFAULT_BACKBONE, LeviConfig, TapExtractor, get_levi_model, load_backbone
from levi_fast.quantization import BACKBONE_DTYPES
from levi_fast.storage import write_atomic

RESULTS = Path(__file__).parent / "results" / "streaming_cpu.json"
WIDTH, HEADS, DEPTH = 384, 12, 32
MEMORY_BATCH, MEMORY_TOKENS = 16, 128
MEMORY_REPEATS = 1  # with glibc told as above, repeats agree to the page


def bert(layers: int) -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=1000, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=HEADS,
            intermediate_size=4 * WIDTH,
        ),
        add_pooling_layer=False,
    )  # fmt: skip


def llama(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(
        LlamaConfig(
            vocab_size=1000, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=HEADS,
            intermediate_size=3 * WIDTH,
        )
    )  # fmt: skip


def gpt2(layers: int) -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config(vocab_size=1000, n_embd=WIDTH, n_layer=layers, n_head=HEADS))


def t5(layers: int) -> nn.Module:
    from transformers import T5Config, T5Model

    return T5Model(
        T5Config(
            vocab_size=1000, d_model=WIDTH, d_kv=WIDTH // HEADS, d_ff=4 * WIDTH, num_layers=layers, num_heads=HEADS
        )
    )


BACKBONES: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "bert": ("encoder", bert),
    "llama": ("decoder", llama),
    "gpt2": ("decoder", gpt2),
    "t5": ("encoder-decoder", t5),
}


def text(batch: int, tokens: int, vocabulary: int = 1000) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def high_water_mark() -> int:
    """VmHWM of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def peak_of(forward: Callable[[], object]) -> int:
    """Rise of the resident memory's high-water mark over one call, above what is resident before it."""
    forward()  # thread pools, code pages, packed weights
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water_mark()
    forward()
    return high_water_mark() - before


def measure_memory(layers: int, what: str) -> int:
    """Peak of one forward in this process; ``what``: bare, output_hidden_states, or a number of taps."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    backbone = bert(layers).eval()
    inputs = text(MEMORY_BATCH, MEMORY_TOKENS)

    def plain() -> object:
        with torch.no_grad():
            return backbone(**inputs, output_hidden_states=what == "output_hidden_states")

    if not what.isdecimal():
        return peak_of(plain)
    extractor = TapExtractor(backbone, "all" if int(what) == layers else f"even:{what}")
    return peak_of(lambda: extractor(**inputs))


def memory() -> dict[str, Any]:
    """Peaks of a forward by depth and by number of taps, each in a process of its own."""
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": str(2**16),
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_ARENA_MAX": "1",
    }
    rows = []
    cases = [(DEPTH, "bare"), *((DEPTH, str(taps)) for taps in (6, 12, 32)), (DEPTH, "output_hidden_states")]
    cases += [(depth, what) for depth in (6, 12) for what in ("bare", str(depth), "output_hidden_states")]
    for depth, what in cases:
        command = [sys.executable, __file__, "--measure", str(depth), what]
        peaks = [
            int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
            for _ in range(MEMORY_REPEATS)
        ]
        rows.append({"layers": depth, "forward": what, "peak_mib": round(statistics.median(peaks) / 2**20, 2)})
        print(rows[-1], flush=True)
    bare = {row["layers"]: row["peak_mib"] for row in rows if row["forward"] == "bare"}
    for row in rows:
        row["beyond_bare_mib"] = round(row["peak_mib"] - bare[row["layers"]], 2)
    hidden = MEMORY_BATCH * MEMORY_TOKENS * WIDTH * 4 / 2**20
    return {"batch": [MEMORY_BATCH, MEMORY_TOKENS], "width": WIDTH, "one_hidden_state_mib": hidden, "rows": rows}


def interleaved(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of every case, one call each a round; who follows whom changes, as it leaves memory behind."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for call in cases.values():
        call()
    order = list(cases.items())
    for place in range(rounds):
        generator = random.Random(place)
        for name, call in generator.sample(order, len(order)):
            started = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in taken.items()}


def last_taps(rounds: int) -> list[dict[str, Any]]:
    """Time up to the last tap beside the whole forward (of an encoder-decoder: of its encoder alone)."""
    layers, rows = 12, []
    inputs = text(16, 64)
    for name, (kind, build) in BACKBONES.items():
        torch.manual_seed(0)
        backbone = build(layers).eval()
        runner = TapExtractor(backbone, "last").runner

        arguments = inputs if kind == "encoder-decoder" else {**inputs, "use_cache": False}

        def full(runner: nn.Module = runner, arguments: dict[str, Any] = arguments) -> object:
            with torch.no_grad():
                return runner(**arguments)

        extractors = {k: TapExtractor(backbone, list(range(k))) for k in (3, 6, 9, 12)}
        cases: dict[str, Callable[[], object]] = {"full": full}
        cases.update({str(k): lambda e=e: e(**inputs) for k, e in extractors.items()})  # type: ignore[misc]
        seconds = interleaved(cases, rounds)
        for k in extractors:
            ratio = seconds[str(k)] / seconds["full"]
            rows.append(
                {
                    "backbone": name, "kind": kind, "last_tap": k, "of_layers": layers, "taps": k,
                    "ms": round(1e3 * seconds[str(k)], 2), "full_ms": round(1e3 * seconds["full"], 2),
                    "ratio": round(ratio, 4), "bound": round(k / layers + 0.08, 4),
                    "holds": ratio <= k / layers + 0.08,
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def training_step(rounds: int) -> dict[str, Any]:
    """One LEVI step (backbone run, default text task model, AdamW) beside the bare forward and a LoRA step."""
    from peft import LoraConfig, get_peft_model

    inputs = text(32, 64, 30000)
    labels = torch.arange(32) % 2
    bare = load_backbone(DEFAULT_BACKBONE)

    def forward() -> object:
        with torch.no_grad():
            return bare(**inputs)

    def stepper(model: nn.Module, loss_of: Callable[[], torch.Tensor]) -> Callable[[], object]:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)

        def step() -> None:
            loss_of().backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        model.train()
        return step

    task_model = {"type": "text", "vocab_size": 30522}
    levi = get_levi_model(load_backbone(DEFAULT_BACKBONE), LeviConfig(num_labels=2, task_model=task_model))
    lora = get_peft_model(
        load_backbone(DEFAULT_BACKBONE), LoraConfig(r=8, target_modules=["query", "value"], lora_dropout=0.0)
    )
    head = nn.Linear(WIDTH, 2)
    both = nn.ModuleList([lora, head])

    def lora_loss() -> torch.Tensor:
        pooled = lora(**inputs).last_hidden_state.mean(1)
        return nn.functional.cross_entropy(head(pooled), labels)

    seconds = interleaved(
        {
            "forward": forward,
            "levi": stepper(levi, lambda: levi(**inputs, labels=labels).loss),
            "lora": stepper(both, lora_loss),
        },
        rounds,
    )
    row = {
        "backbone": DEFAULT_BACKBONE, "batch": [32, 64],
        "bare_forward_ms": round(1e3 * seconds["forward"], 2), "levi_step_ms": round(1e3 * seconds["levi"], 2),
        "lora_step_ms": round(1e3 * seconds["lora"], 2),
        "levi_over_forward": round(seconds["levi"] / seconds["forward"], 4), "at_most": 1.10,
        "levi_over_lora": round(seconds["levi"] / seconds["lora"], 4), "at_most_of_lora": 0.5,
    }  # fmt: skip
    print(row, flush=True)
    return row


def backbone_dtypes(rounds: int) -> list[dict[str, Any]]:
    """Seconds of MiniLM's forward up to its last tap, by the dtype it is loaded in."""
    inputs = text(32, 64, 30000)
    extractors = {dtype: TapExtractor(load_backbone(DEFAULT_BACKBONE, dtype=dtype)) for dtype in BACKBONE_DTYPES}
    seconds = interleaved(
        {dtype: lambda e=e: e(**inputs) for dtype, e in extractors.items()},  # type: ignore[misc]
        rounds,
    )
    return [
        {"dtype": dtype, "ms": round(1e3 * value, 2), "times_faster": round(seconds["float32"] / value, 3)}
        for dtype, value in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=2, metavar=("LAYERS", "WHAT"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--parts", nargs="+", choices=("training_step", "last_taps", "backbone_dtypes", "memory"), default=None
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(measure_memory(int(arguments.measure[0]), arguments.measure[1]))
        return
    parts: dict[str, Callable[[], Any]] = {
        "training_step": lambda: training_step(arguments.rounds),
        "last_taps": lambda: last_taps(arguments.rounds),
        "backbone_dtypes": lambda: backbone_dtypes(arguments.rounds),
        "memory": memory,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    document = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for name in arguments.parts or parts:
        document[name] = {"machine": machine(), "measured": parts[name]()}
        write_atomic(arguments.output, json.dumps(document, indent=1) + "\n")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
