"""Streamed taps: peak memory over the number of taps, time to the last tap, and a training step beside LoRA's.

    python benchmarks/bench_streaming.py            # writes benchmarks/results/streaming_cpu.json

Memory: see levi_fast/bench/memory.py, which ``levi-fast bench memory`` runs too. Time: median of interleaved
rounds in one process. Backbones have random weights, apart from MiniLM for the training step.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from levi_fast import DEFAULT_BACKBONE, LeviConfig, TapExtractor, get_levi_model, load_backbone
from levi_fast.bench.backbones import bert as bert_of
from levi_fast.bench.memory import HEADS, WIDTH, forward_memory, text
from levi_fast.bench.record import facts
from levi_fast.quantization import BACKBONE_DTYPES
from levi_fast.storage import write_atomic

RESULTS = Path(__file__).parent / "results" / "streaming_cpu.json"


def bert(layers: int) -> nn.Module:
    return bert_of(layers, WIDTH, HEADS, 1000)


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
    parser.add_argument(
        "--parts", nargs="+", choices=("training_step", "last_taps", "backbone_dtypes", "memory"), default=None
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    parts: dict[str, Callable[[], Any]] = {
        "training_step": lambda: training_step(arguments.rounds),
        "last_taps": lambda: last_taps(arguments.rounds),
        "backbone_dtypes": lambda: backbone_dtypes(arguments.rounds),
        "memory": lambda: forward_memory(note=print),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    document = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for name in arguments.parts or parts:
        document[name] = {"machine": facts(), "measured": parts[name]()}
        write_atomic(arguments.output, json.dumps(document, indent=1) + "\n")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
