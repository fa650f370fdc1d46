"""LayerwiseEnsemble in a user's hands: compiled, exported, under autocast, checkpointed, in parallel, transformed."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import levi_fast
from levi_fast import functional, reference
from levi_fast.kernels import use_backend

WIDTH, VIEW, OUTPUTS, LAYERS = 8, 5, 3, 2


class Head(torch.nn.Module):
    """A user's model: something of their own before the ensemble, a loss after it."""

    def __init__(self, ensemble: type[reference.LayerwiseEnsemble] = levi_fast.LayerwiseEnsemble, **options: Any):
        super().__init__()
        torch.manual_seed(7)
        self.task = torch.nn.Linear(4, VIEW)
        options = {"hidden_width": 6, "mix": "learned", "view_dropout": 0.0, **options}
        self.ensemble = ensemble((WIDTH,) * LAYERS, VIEW, OUTPUTS, **options)

    def forward(self, taps: Tensor, x: Tensor, target: Tensor) -> Tensor:
        output = self.ensemble(taps, self.task(x))
        loss = functional.layerwise_loss(output.layer_logits, target, "single_label_classification")
        return loss + output.logits.float().square().mean()


def batch_of(size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    taps = torch.randn(LAYERS, size, WIDTH, generator=generator).to(dtype)
    x = torch.randn(size, 4, generator=generator).to(dtype)
    return taps, x, torch.randint(0, OUTPUTS, (size,), generator=generator)


def gradients(model: torch.nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


# --- torch.compile and torch.export -------------------------------------------------------------------------------


def test_compiles_whole_for_any_batch(backend: str) -> None:
    torch.compiler.reset()
    seen: list[torch.fx.GraphModule] = []
    first = 0

    def count(graph: torch.fx.GraphModule, example: list[Any]) -> Any:
        seen.append(graph)
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, example)

    model = Head()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    with use_backend(backend):
        for size in (7, 9, 17):  # a batch as large as some width would be taken for that width
            inputs = batch_of(size)
            loss, plain = compiled(*inputs), model(*inputs)
            torch.testing.assert_close(loss, plain)
            torch.testing.assert_close(gradients(model, loss), gradients(model, plain))
            first = first or len(seen)
    assert len(seen) == first  # no graph is made anew for a new batch size


@pytest.mark.parametrize("options", [{"hidden_width": None}, {"view_dropout": 0.5, "dropout": 0.3}])
def test_compiles_whole_while_training(backend: str, options: dict[str, Any]) -> None:
    torch.compiler.reset()
    model = Head(**options)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = batch_of(6)
    with use_backend(backend):
        torch.manual_seed(1)
        loss = compiled(*inputs)
        torch.manual_seed(1)
        plain = model(*inputs)
        torch.testing.assert_close(loss, plain)
        torch.testing.assert_close(gradients(model, loss), gradients(model, plain))


def test_compiles_whole_under_autocast_and_without_gradients(backend: str) -> None:
    torch.compiler.reset()
    model = Head().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = batch_of(5)
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(*inputs), model(*inputs))
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs), model(*inputs))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiles_with_inductor(backend: str) -> None:
    torch.compiler.reset()
    model = Head()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with use_backend(backend):
        for size in (4, 9):
            inputs = batch_of(size)
            loss, plain = compiled(*inputs), model(*inputs)
            torch.testing.assert_close(loss, plain)
            torch.testing.assert_close(gradients(model, loss), gradients(model, plain))


def test_exports_with_a_free_batch(backend: str) -> None:
    model = Head().eval()
    free = torch.export.Dim("batch", min=2)
    shapes = {"taps": {1: free}, "x": {0: free}, "target": {0: free}}
    with use_backend(backend):
        program = torch.export.export(model, batch_of(4), dynamic_shapes=shapes)
        for size in (4, 11):
            torch.testing.assert_close(program.module()(*batch_of(size)), model(*batch_of(size)))
    assert ("levi_fast.layerwise_ensemble.default" in str(program.graph)) == (backend != "eager")


# --- modes ----------------------------------------------------------------------------------------------------------


def test_autocast_trains_in_bf16_with_fp32_parameters(backend: str) -> None:
    model, spec = Head(), Head(reference.LayerwiseEnsemble)
    inputs = batch_of(12)
    results = []
    for one in (model, spec):
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            loss = one(*inputs)
        results.append((loss, gradients(one, loss)))
    assert all(g.dtype == torch.float32 for g in results[0][1])
    torch.testing.assert_close(results[0], results[1], rtol=0.05, atol=0.02)


def test_inference_mode(backend: str) -> None:
    model = Head().eval()
    inputs = batch_of(4)
    with use_backend(backend):
        expected = model(*inputs)
        with torch.inference_mode():
            inside = model(*batch_of(4))
            assert inside.is_inference()
            torch.testing.assert_close(inside, expected)
            torch.testing.assert_close(model(*inputs), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_activation_checkpointing(backend: str, reentrant: bool, autocast: bool) -> None:
    model = Head(view_dropout=0.5, dropout=0.3)  # the second forward must draw what the first one drew
    taps, x, target = batch_of(10)
    with use_backend(backend):
        results = []
        for wrapped in (False, True):
            torch.manual_seed(3)
            own = x.clone().requires_grad_()  # a reentrant checkpoint needs an input that asks for a gradient
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                if wrapped:
                    loss = checkpoint(model, taps, own, target, use_reentrant=reentrant)
                else:
                    loss = model(taps, own, target)
            loss.backward()
            results.append((loss.detach(), own.grad, [p.grad for p in model.parameters()]))
            model.zero_grad()
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_fp16_with_a_grad_scaler(backend: str) -> None:
    """fp32 weights, fp16 arithmetic, a scale that grows until gradients overflow: no step is spoiled by it."""
    losses = []
    for ensemble in (levi_fast.LayerwiseEnsemble, reference.LayerwiseEnsemble):
        model = Head(ensemble)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=4)
        inputs = batch_of(32)
        curve = []
        with use_backend(backend):
            for _ in range(12):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.float16):
                    loss = model(*inputs)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                curve.append(loss.item())
        assert scaler.get_scale() < 2.0**24  # it overflowed on the way, and backed off
        assert all(p.isfinite().all() for p in model.parameters())
        losses.append(curve)
    assert losses[0][-1] < 0.95 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


# --- copies and swap ------------------------------------------------------------------------------------------------


def test_swapping_in_mid_training_changes_nothing(backend: str) -> None:
    """Adam's moments belong to Parameter objects: after a swap, there or back, they go on where they were."""
    curves = []
    for swaps in (False, True):
        model = Head(reference.LayerwiseEnsemble)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        inputs = batch_of(16)
        curve = []
        with use_backend(backend):
            for step in range(9):
                if swaps and step == 3:
                    assert levi_fast.swap(model) == 1
                if swaps and step == 6:
                    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                    assert levi_fast.swap(model, undo=True) == 1
                loss = model(*inputs)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                curve.append(loss.item())
        assert len(optimizer.state) == len(list(model.parameters()))
        curves.append(curve)
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[0][-1] < curves[0][0]


# --- torch.func -----------------------------------------------------------------------------------------------------


def test_transforms_compute_or_say_that_they_cannot(backend: str) -> None:
    model, spec = Head().eval(), Head(reference.LayerwiseEnsemble).eval()
    taps, x, target = batch_of(4)
    xs = torch.stack([x, 2 * x, x - 1])

    def loss_of(one: torch.nn.Module) -> Any:
        return lambda x: one(taps, x, target)

    def parameters_loss(one: torch.nn.Module) -> Any:
        weights = {n: p.detach() for n, p in one.named_parameters()}
        return torch.func.grad(lambda w: torch.func.functional_call(one, w, (taps, x, target)))(weights)

    transforms = {
        "grad": lambda one: torch.func.grad(loss_of(one))(x),
        "parameters": parameters_loss,
        "vmap": lambda one: torch.func.vmap(loss_of(one))(xs),
        "per-example gradients": lambda one: torch.func.vmap(torch.func.grad(loss_of(one)))(xs),
        "jvp": lambda one: torch.func.jvp(loss_of(one), (x,), (torch.ones_like(x),)),
        "hessian": lambda one: torch.func.hessian(loss_of(one))(x[:, :1].repeat(1, 4)),
        "jacrev": lambda one: torch.func.jacrev(loss_of(one))(x),
    }
    for name, transform in transforms.items():
        expected = transform(spec)
        torch.testing.assert_close(transform(model), expected, msg=f"{name}, any backend")
        with use_backend(backend):
            try:
                given = transform(model)
            except RuntimeError as error:
                assert backend == "cpp" and "torch.func" in str(error), (name, error)
            else:
                torch.testing.assert_close(given, expected, msg=f"{name}, {backend}")


# --- DistributedDataParallel --------------------------------------------------------------------------------------

RANK = Path(__file__).with_name("data_parallel_rank.py")


@pytest.mark.slow
def test_distributed_data_parallel(backend: str, tmp_path: Path) -> None:
    arguments = [f"file://{tmp_path}/meeting", backend, str(tmp_path)]
    ranks = [subprocess.Popen([sys.executable, str(RANK), str(rank), *arguments]) for rank in range(2)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    model = Head()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    taps, x, target = batch_of(16)
    for _ in range(4):
        optimizer.zero_grad()
        halves = [model(taps[:, part], x[part], target[part]) for part in (slice(0, 8), slice(8, 16))]
        (sum(halves) / 2).backward()
        optimizer.step()
    torch.testing.assert_close(first, [p.detach() for p in model.parameters()])
