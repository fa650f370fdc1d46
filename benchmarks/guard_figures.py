"""The figures of benchmarks/guard.py: counts, bytes and ratios, none of them a time.

Lower is better for every figure. All are taken on one thread, with small inputs of fixed seeds.
"""

from __future__ import annotations

import gc
import importlib.metadata
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import BertConfig, BertModel

from levi_fast import LayerwiseEnsemble, LeviConfig, LeviModel, functional, get_levi_model, reference
from levi_fast.bench import ensemble
from levi_fast.bench.ensemble import KIND, Case
from levi_fast.bench.timing import timed
from levi_fast.data.encoded import EncodedDataset
from levi_fast.environment import environment_report
from levi_fast.kernels.masked_mean_pool import eager_forward
from levi_fast.training.fit import TrainingOptions, fit
from levi_fast.training.lean import clip_gradients

LAYERS, WIDTH, VIEW, HIDDEN, CLASSES, BATCH, TOKENS, VOCABULARY = 3, 16, 8, 8, 2, 8, 12, 48
RATIO_CASES = [(6, 384, 64, 128, 2, 1), (6, 384, 64, 128, 2, 32), (4, 128, 32, 64, 9, 64)]  # L, D, V, H, C, B
HEAVY = ("torch", "transformers", "numpy", "scipy", "sklearn", "datasets", "pandas")
TEXT = {"type": "text", "vocab_size": VOCABULARY, "embedding_dim": 8, "view_width": VIEW}


@dataclass(frozen=True)
class Kind:
    """What figures of one kind share.

    Args:
        unit: for a reader.
        tolerance: how much above the baseline, relative to it, is still ok.
        depends: names in :func:`environment`: where one differs from the baseline's, nothing is compared.
        elsewhere: the tolerance on another model of CPU, where that matters.
    """

    unit: str
    tolerance: float
    depends: tuple[str, ...] = ()
    elsewhere: float | None = None


LIBRARIES = ("python", "torch", "transformers")
KINDS = {
    "calls": Kind("Python calls", 0.1, (*LIBRARIES, "native")),
    "ops": Kind("ops", 0.0, ("torch", "transformers", "native")),
    "bytes": Kind("bytes allocated", 0.02, ("torch", "isa")),
    "layers": Kind("layers run", 0.0),
    "modules": Kind("modules", 0.1, ("python", "typer", "rich")),
    "heavy": Kind("modules of torch, numpy and the like", 0.0),
    "folder": Kind("bytes on disk", 0.02, ("transformers",)),
    "ratio": Kind("of eager's time", 0.75, ("torch", "isa"), elsewhere=1.5),
}


@dataclass(frozen=True)
class Figure:
    """A measured value and which of :data:`KINDS` it is."""

    kind: str
    value: float


def environment() -> dict[str, str]:
    """What figures depend on."""
    report = environment_report()
    cpu = report["cpu"]
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__.split("+")[0],
        **{name: importlib.metadata.version(name) for name in ("transformers", "typer", "rich")},
        "native": "loaded" if report["native"]["loaded"] else "not loaded",
        "isa": str(cpu["isa_in_use"]),
        "cpu": cpu["name"],
    }


def measure() -> dict[str, Figure]:
    """All figures, by name."""
    torch.set_num_threads(1)
    figures: dict[str, Figure] = {}
    calls = {**op_calls(), **step_calls()}
    counted = profiled(calls)
    for name, call in calls.items():
        figures[f"{name}: calls"] = Figure("calls", python_calls(call))
        ops, allocated = counted[name]
        figures[f"{name}: ops"] = Figure("ops", ops)
        if "step" not in name:
            figures[f"{name}: bytes"] = Figure("bytes", allocated)
    figures["step of fit on cached taps: calls"] = Figure("calls", calls_per_step_of_fit())
    figures |= layers_run() | modules_imported() | model_folder() | ratios()
    return figures


def python_calls(call: Callable[[], object], repeats: int = 4) -> int:
    """Python functions entered during one call: the fewest of some, so that filling a cache does not count."""
    counts = []
    before = sys.getprofile()
    for _ in range(repeats):
        count = 0

        def count_calls(_frame: Any, event: str, _argument: Any) -> None:
            nonlocal count
            count += event == "call"

        gc.disable()  # a collection would run finalizers of others
        sys.setprofile(count_calls)
        try:
            call()
        finally:
            sys.setprofile(before)
            gc.enable()
        counts.append(count)
    return min(counts)


def profiled(calls: Mapping[str, Callable[[], object]]) -> dict[str, tuple[int, int]]:
    """Of one warm call each: ops dispatched, ATen's and the library's, those inside others too; bytes allocated."""
    for call in calls.values():
        for _ in range(3):  # an optimizer's first steps differ
            call()
    # One profiler for all: starting one takes seconds.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for name, call in calls.items():
            with record_function(f"guard: {name}"):
                call()
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    found, waiting = {}, list(results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.name.startswith("guard: "):
            found[event.name.removeprefix("guard: ")] = _below(event)
    return found


def _below(event: Any) -> tuple[int, int]:
    ops, allocated, waiting = 0, 0, list(event.children)
    while waiting:
        inner = waiting.pop()
        waiting += inner.children
        if inner.tag == torch._C._profiler._EventType.Allocation:
            allocated += max(inner.extra_fields.alloc_size, 0)  # below 0: given back
        ops += inner.name.startswith(("aten::", "levi_fast::"))
    return ops, allocated


def op_calls() -> dict[str, Callable[[], object]]:
    """One call of every op, forward and with its backward pass."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(BATCH, TOKENS, WIDTH, generator=generator)
    mask = (torch.arange(TOKENS) < torch.arange(BATCH)[:, None] + 4).long()
    taps = torch.randn(LAYERS, BATCH, WIDTH, generator=generator)
    view, target = torch.randn(BATCH, VIEW, generator=generator), torch.arange(BATCH) % CLASSES
    logits, bank = torch.randn(LAYERS, BATCH, CLASSES, generator=generator), torch.empty(BATCH, WIDTH)
    model = LayerwiseEnsemble([WIDTH] * LAYERS, VIEW, CLASSES, hidden_width=HIDDEN, view_dropout=0.0)
    asking = [tensor.clone().requires_grad_() for tensor in (hidden, logits)]
    pooled, given = torch.ones(BATCH, WIDTH), torch.ones(LAYERS, BATCH, CLASSES)

    def ensemble_backward() -> None:
        model.zero_grad()
        model(taps, view).layer_logits.backward(given)

    def without_gradient(call: Callable[[], object]) -> Callable[[], object]:
        return torch.no_grad()(call)

    return {
        "pooling forward": without_gradient(lambda: functional.masked_mean_pool(hidden, mask)),
        "pooling into a bank": without_gradient(lambda: functional.masked_mean_pool_into(bank, hidden, mask)),
        "pooling forward and backward": lambda: torch.autograd.grad(
            functional.masked_mean_pool(asking[0], mask), asking[0], pooled
        ),
        "ensemble forward": without_gradient(lambda: model(taps, view)),
        "ensemble forward and backward": ensemble_backward,
        "loss forward": without_gradient(lambda: functional.layerwise_loss(logits, target, KIND)),
        "loss forward and backward": lambda: torch.autograd.grad(
            functional.layerwise_loss(asking[1], target, KIND), asking[1]
        ),
    }


def tiny_backbone() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=TOKENS,
    )  # fmt: skip
    return BertModel(config)


def tiny_model(**fields: Any) -> LeviModel:
    return get_levi_model(
        tiny_backbone(), LeviConfig(num_labels=CLASSES, task_model=TEXT, hidden_width=8, problem_type=KIND, **fields)
    )


def step_calls() -> dict[str, Callable[[], object]]:
    """One training step with the backbone in it, and one on its precomputed taps."""
    ids = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) % VOCABULARY
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    calls: dict[str, Callable[[], object]] = {}
    for name in ("training step", "training step on cached taps"):
        model = tiny_model().train()
        batch = {**inputs, "labels": torch.arange(BATCH) % CLASSES}
        if "cached" in name:
            batch["taps"] = model.extract_taps(**inputs)
            model.backbone = None
        calls[name] = _step(model, batch)
    return calls


def _step(model: LeviModel, batch: dict[str, Tensor]) -> Callable[[], None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)

    def step() -> None:
        model(**batch).loss.backward()
        clip_gradients(trained, 1e9)
        optimizer.step()
        optimizer.zero_grad()

    return step


def calls_per_step_of_fit() -> float:
    """Python calls that each further step of an epoch costs, in the loop that ``levi-fast train`` runs."""
    sizes = (2 * BATCH, 6 * BATCH)
    _fit(sizes[0])
    counts = [python_calls(partial(_fit, size), 2) for size in sizes]
    return (counts[1] - counts[0]) / (sizes[1] // BATCH - sizes[0] // BATCH)


def _fit(size: int) -> None:
    model = tiny_model()
    data = []
    for rows in (size, BATCH):
        labels = torch.arange(rows) % CLASSES
        dataset = EncodedDataset("rows", token_ids=[[1 + i % 8] * 4 for i in range(rows)], labels=labels)
        dataset.set_taps(torch.randn(rows, LAYERS * WIDTH, generator=torch.Generator().manual_seed(rows)))
        data.append(dataset)
    fit(
        model,
        *data,
        TrainingOptions(epochs=1, batch_size=BATCH, max_grad_norm=1e9, cross_fit=0, device="cpu"),
        loop="lean",
    )


def layers_run() -> dict[str, Figure]:
    """How many of the backbone's layers run for a tap at each."""
    figures = {}
    for last in range(LAYERS):
        model = tiny_model(taps=[last]).eval()
        assert model.extractor is not None
        ran = []
        for block in model.extractor.blocks:
            block.register_forward_pre_hook(lambda module, _, ran=ran: ran.append(module))
        model.extract_taps(input_ids=torch.ones(1, 4, dtype=torch.int64))
        figures[f"tap at layer {last} of {LAYERS}: layers"] = Figure("layers", len(ran))
    return figures


def modules_imported() -> dict[str, Figure]:
    """Modules that fresh interpreters hold after ``import levi_fast`` and ``levi-fast --help``, beyond their own."""
    show_help = "from levi_fast.cli import main\nwith contextlib.suppress(SystemExit): main(['--help'])"
    figures = {}
    for name, code in (("import levi_fast", "import levi_fast"), ("levi-fast --help", show_help)):
        script = f"import contextlib, sys\nbefore = set(sys.modules)\n{code}\nprint(*set(sys.modules) - before)"
        command = [sys.executable, "-c", script]
        modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1].split()
        figures[f"{name}: modules"] = Figure("modules", len(modules))
        heavy = [module for module in modules if module.split(".")[0] in HEAVY]
        figures[f"{name}: heavy"] = Figure("heavy", len(heavy))
    return figures


def model_folder() -> dict[str, Figure]:
    with tempfile.TemporaryDirectory() as folder:
        tiny_model().save_pretrained(folder)
        sizes = [path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()]
    return {"saved model: folder": Figure("folder", sum(sizes))}


def ratios(repeats: int = 3, rounds: int = 50) -> dict[str, Figure]:
    """Our time over eager PyTorch's: the fastest call of each in interleaved rounds; of some repeats, the least."""
    ensemble.COLD_BYTES = 2**20  # inputs that fit any cache: their reading from memory is the same for both
    contenders: dict[str, Callable[[str, int], float]] = {}
    for shape in RATIO_CASES:
        case = Case(shape, torch.float32, backward=True, peers=["eager"])
        case.check()
        contenders[f"ensemble forward and backward {'x'.join(map(str, shape))}"] = case.run
    hidden, mask = torch.randn(8, 64, 384), (torch.arange(64) < torch.arange(8)[:, None] * 4 + 32).long()
    pools = {"ours": functional.masked_mean_pool, "eager": eager_forward}
    contenders["pooling forward 8x64x384"] = lambda name, _: timed(lambda: pools[name](hidden, mask))
    logits, target = torch.randn(6, 32, 2).requires_grad_(), torch.arange(32) % 2
    losses = {"ours": functional.layerwise_loss, "eager": reference.layerwise_loss}
    contenders["loss forward and backward 6x32x2"] = lambda name, _: timed(
        lambda: losses[name](logits, target, KIND).backward()
    )
    return {f"{name}: ratio": Figure("ratio", least_ratio(run, repeats, rounds)) for name, run in contenders.items()}


def least_ratio(run: Callable[[str, int], float], repeats: int, rounds: int) -> float:
    """``run(name, round)`` gives the seconds of "ours" and of "eager"."""
    found = []
    for _ in range(repeats):
        fastest = {"ours": float("inf"), "eager": float("inf")}
        for index in range(rounds):
            for name in fastest:
                fastest[name] = min(fastest[name], run(name, index))
        found.append(fastest["ours"] / fastest["eager"])
    return round(min(found), 3)
