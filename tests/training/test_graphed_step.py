"""Steps replayed as graphs: the same bits as the plain loop.

Without a GPU a tape stands in for a CUDA graph: it does a step's operators again on the same memory, and no Python.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from levi_fast.errors import DataError
from levi_fast.kernels import use_backend
from levi_fast.modeling import LeviModel
from levi_fast.training import fit as fit_module
from levi_fast.training import graphed_step, lean, sweep
from levi_fast.training.checkpoints import CheckpointOptions
from levi_fast.training.fit import TrainingOptions, fit
from levi_fast.training.graphed_step import CudaGraphs, GraphedStep
from levi_fast.training.replicas import Replicas
from levi_fast.training.runs import Splits
from levi_fast.training.sweep import Head, train_heads

Tasks = Callable[..., Any]


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before += [(tensor, tensor.detach().clone()) for tensor in tree_leaves(value)]
        result = func(*args, **kwargs)
        self.done.append((func, args, kwargs, result))
        return result

    def undo(self) -> None:
        for tensor, value in reversed(self.before):
            tensor.data.copy_(value)

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, result in self.done:
                for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class TapedGraphs:
    """In place of CudaGraphs; counts what it is asked for."""

    def __init__(self, device: torch.device) -> None:
        self.tapes: list[Tape] = []
        self.replays = self.asides = 0

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        self.asides += 1
        yield

    def capture(self, work: Callable[[], object]) -> Callable[[], None]:
        tape = Tape()
        self.tapes.append(tape)
        try:
            with tape:
                work()
        finally:
            tape.undo()
        return lambda: self.replay(tape)

    def replay(self, tape: Tape) -> None:
        self.replays += 1
        tape.replay()


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> list[TapedGraphs]:
    """``loop="graph"`` on the CPU; rates as exact as the plain loop's numbers, and gradients clipped as on a GPU."""
    made: list[TapedGraphs] = []

    def make(device: torch.device) -> TapedGraphs:
        made.append(TapedGraphs(device))
        return made[-1]

    monkeypatch.setattr(lean, "CudaGraphs", make)
    monkeypatch.setattr(lean, "clip_gradients", torch.nn.utils.clip_grad_norm_)
    monkeypatch.setattr(graphed_step, "RATE_DTYPE", torch.float64)
    for module in (fit_module, sweep):
        monkeypatch.setattr(module, "check_loop", lambda *_, **__: None)
    return made


def trained(task: Any, loop: str, **options: Any) -> tuple[LeviModel, Any]:
    chosen = {"epochs": 5, "batch_size": 16, "learning_rate": 5e-3, "seed": 5, "cross_fit": 0, **options}
    model = task.model(seed=1)
    return model, fit(model, task.train, task.validation, TrainingOptions(**chosen), loop=loop)


def assert_same(one: tuple[LeviModel, Any], other: tuple[LeviModel, Any]) -> None:
    assert one[1].history == other[1].history
    for name, value in one[0].state_dict().items():
        assert torch.equal(value, other[0].state_dict()[name]), name


@pytest.mark.parametrize(
    ("view", "problem", "fields"),
    [
        ("text", "classes", {"dropout": 0.2}),
        ("tabular", "regression", {"mix": "learned", "objective": "both"}),
        ("recommendation", "regression", {"hidden_width": None, "objective": "ensemble"}),
        ("text", "multi-label", {"tap_widths": [16, 8, 12]}),
        (None, "classes", {"dropout": 0.2, "label_smoothing": 0.1}),
        ("transformer", "classes", {"view_loss": 0.5}),
        ("text", "classes", {"standalone_view": True}),
    ],
)
def test_replays_give_the_bits_of_the_plain_loop(
    cached_task: Tasks,
    taped: list[TapedGraphs],
    monkeypatch: pytest.MonkeyPatch,
    view: str | None,
    problem: str,
    fields: dict[str, Any],
) -> None:
    # the tape knows operators alone, and putting the CPU's generator back is none; on a GPU nothing is put back
    monkeypatch.setattr("levi_fast.standalone._generator_kept", contextlib.nullcontext)
    task = cached_task(view, problem, **fields)
    options = {"max_grad_norm": 0.3, "weight_decay": 0.1}
    with use_backend("eager"):  # what serves a GPU while its kernels are off
        plain = trained(task, "lean", **options)
        assert_same(trained(task, "graph", **options), plain)
    (graphs,) = taped
    assert graphs.asides + graphs.replays == 5 * 5  # 70 rows: the last batch has 6
    assert graphs.replays >= 10
    asked = {str(func) for tape in graphs.tapes for func, *_ in tape.done}
    # these would wait for a GPU
    assert asked.isdisjoint({"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.is_nonzero.default"})
    assert "aten._fused_adamw_.tensor_lr" in asked


def test_rates_of_single_precision_change_the_last_bits_alone(
    cached_task: Tasks, taped: list[TapedGraphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphed_step, "RATE_DTYPE", torch.float32)
    task = cached_task()
    plain, graphed = trained(task, "lean"), trained(task, "graph")
    assert taped[0].replays > 10
    for name, value in plain[0].state_dict().items():
        torch.testing.assert_close(graphed[0].state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_a_run_that_was_killed_goes_on_with_graphs_of_its_own(
    cached_task: Tasks, taped: list[TapedGraphs], tmp_path: Path
) -> None:
    task = cached_task("tabular", "classes", dropout=0.2)
    whole = trained(task, "lean")
    options = TrainingOptions(epochs=5, batch_size=16, learning_rate=5e-3, seed=5, cross_fit=0)

    def killed(epoch: int, *_: Any) -> None:
        if epoch == 3:
            raise KeyboardInterrupt

    for on_epoch in (killed, None):
        model, kept = task.model(seed=1), CheckpointOptions(str(tmp_path), save_steps=3)
        with contextlib.suppress(KeyboardInterrupt):
            result = fit(
                model, task.train, task.validation, options, loop="graph", checkpoints=kept, on_epoch=on_epoch
            )
    assert_same((model, result), whole)
    # 12 of 15 steps were in the last checkpoint; the 13 that were left begin with a warm-up of their own
    assert [(graphs.asides, graphs.replays) for graphs in taped] == [(6, 9), (6, 7)]


def test_what_cannot_be_captured_runs_without_graphs_and_says_so_once(
    cached_task: Tasks, taped: list[TapedGraphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = cached_task("tabular", "classes", dropout=0.2)
    plain = trained(task, "lean")
    capture, forward = TapedGraphs.capture, LeviModel.forward

    def asking(model: LeviModel, **inputs: Any) -> Any:
        forward(model, **inputs)
        torch.rand(3)  # drawn on the host
        raise RuntimeError("operation not permitted when stream is capturing\nand what to do")

    def failing(graphs: TapedGraphs, work: Callable[[], object]) -> Any:
        with monkeypatch.context() as during:
            during.setattr(LeviModel, "forward", asking)
            try:
                return capture(graphs, work)
            except RuntimeError as error:  # as torch does on leaving a capture that failed
                raise RuntimeError("operation failed due to a previous error during capture") from error

    monkeypatch.setattr(TapedGraphs, "capture", failing)
    with pytest.warns(UserWarning) as said:
        graphed = trained(task, "graph")
    assert [str(warning.message) for warning in said] == [
        "--loop graph: steps run without a graph, as capturing one failed: operation not permitted when stream is "
        "capturing"
    ]
    assert_same(graphed, plain)
    assert len(taped[0].tapes) == 1 and taped[0].replays == 0 and taped[0].asides == 25


def test_no_more_shapes_than_that_are_captured(
    cached_task: Tasks, taped: list[TapedGraphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphed_step, "MOST_GRAPHS", 1)
    task = cached_task("tabular", "classes")
    assert_same(trained(task, "graph"), trained(task, "lean"))
    assert len(taped[0].tapes) == 1 and taped[0].replays == 17  # 20 full batches but for their warm-up


@pytest.mark.filterwarnings("error")
def test_heads_of_a_sweep_are_trained_with_graphs(cached_task: Tasks, taped: list[TapedGraphs]) -> None:
    task = cached_task("tabular", "classes")
    options = TrainingOptions(epochs=2, batch_size=16, cross_fit=0)
    heads = [Head(loop, task.config, options, Splits(*task[1:]), loop) for loop in ("lean", "graph")]
    plain, graphed = train_heads(heads, workers=1)
    assert plain.fit.history == graphed.fit.history and plain.id == graphed.id  # type: ignore[union-attr]
    assert len(taped) == 1 and taped[0].replays == 5


@pytest.mark.parametrize("reason", ["the backbone runs in every step", "several processes train together"])
def test_what_graphs_are_not_for_runs_in_the_lean_loop(
    cached_task: Tasks, taped: list[TapedGraphs], monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    task = cached_task()
    model = task.model()
    if reason.startswith("several"):
        monkeypatch.setattr(fit_module, "_processes", lambda: 2)
    else:
        model.extractor = torch.nn.Identity()
        task.train.set_taps(None)
    seen: list[bool] = []

    def spied(*arguments: Any) -> None:
        seen.append(arguments[-1])
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_module, "train_lean", spied)
    said = pytest.warns(UserWarning, match=f"--loop graph: steps run without a graph, as {reason}")
    with said, pytest.raises(KeyboardInterrupt):
        fit(model, task.train, task.validation, TrainingOptions(epochs=1), loop="graph")
    assert seen == [False] and not taped


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused(cached_task: Tasks) -> None:
    task = cached_task()
    expected = "--loop graph: replays CUDA graphs, and --device auto is the CPU here"
    with pytest.raises(DataError, match=expected):
        trained(task, "graph")
    head = Head("one", task.config, TrainingOptions(), Splits(*task[1:]), "graph")
    with pytest.raises(DataError, match=expected):
        train_heads([head])
    with pytest.raises(DataError, match="head 'one': loop: expected lean or graph, got 'trainer'"):
        train_heads([Head("one", task.config, TrainingOptions(), Splits(*task[1:]), "trainer")])


# --- what a GPU alone can show ------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def losses(result: Any) -> list[float]:
    return [scores.get("log_loss", scores.get("rmse")) for scores in result.history]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.filterwarnings("error:--loop graph")
@pytest.mark.parametrize(
    ("view", "problem", "fields"),
    [
        ("text", "classes", {"dropout": 0.2}),
        ("tabular", "regression", {"mix": "learned", "objective": "both"}),
        ("text", "multi-label", {"tap_widths": [16, 8, 12]}),
        ("transformer", "classes", {}),
    ],
)
def test_graphs_of_a_gpu_train_as_the_lean_loop_does(
    cached_task: Tasks, view: str, problem: str, fields: dict[str, Any]
) -> None:
    """Rates are rounded to single precision, and sums on a GPU may be ordered otherwise from run to run."""
    task = cached_task(view, problem, **fields)
    plain, graphed = trained(task, "lean", blend=0.0), trained(task, "graph", blend=0.0)
    assert losses(graphed[1]) == pytest.approx(losses(plain[1]), rel=1e-2)


@pytest.mark.gpu
@needs_gpu
def test_a_replay_draws_and_computes_what_the_step_does(cached_task: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights after every step, dropout and changing rates included; captured and not, by the same class."""
    task = cached_task(None, "classes", dropout=0.2)
    device = torch.device("cuda", 0)
    curves = []
    for most in (1, 0):
        monkeypatch.setattr(graphed_step, "MOST_GRAPHS", most)
        model = task.model(seed=1)
        torch.nn.Module.to(model, device).train()
        torch.cuda.manual_seed(3)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        plain = lean.TrainingStep(model, optimizer, 0.3, Replicas(device=device))
        step = GraphedStep(plain, optimizer, CudaGraphs(device), device)
        curve = []
        for number in range(12):
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + number)
            step(task.train.__getitems__(torch.arange(16) + number))
            curve.append(torch.cat([p.detach().flatten() for p in model.parameters()]).cpu())
        curve.append(torch.rand(3, device=device).cpu())  # the generator is where it would be
        assert len(step._captured) == most and not step.failed
        curves.append(curve)
    for replayed, run in zip(*curves, strict=True):
        torch.testing.assert_close(replayed, run, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@needs_gpu
def test_a_capture_that_fails_on_a_gpu_leaves_training_as_it_was(
    cached_task: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = cached_task("tabular", "classes", dropout=0.2)
    plain = trained(task, "lean", blend=0.0)
    forward = LeviModel.forward

    def asking(model: LeviModel, **inputs: Any) -> Any:
        output = forward(model, **inputs)
        if output.loss is not None:
            float(output.loss)  # waits for the GPU, which no capture permits
        return output

    monkeypatch.setattr(LeviModel, "forward", asking)
    with pytest.warns(UserWarning, match="--loop graph: steps run without a graph, as capturing one failed"):
        graphed = trained(task, "graph", blend=0.0)
    assert losses(graphed[1]) == pytest.approx(losses(plain[1]), rel=1e-2)
