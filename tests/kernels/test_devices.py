"""Every backend on every device it serves, through the public functions, against float64; on GPUs where one is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import levi_fast
from levi_fast import functional, reference
from levi_fast.kernels import backend_report, use_backend

GPU = torch.cuda.is_available()
PLACES = [
    pytest.param(("cpu", "cpp"), marks=pytest.mark.native, id="cpu-cpp"),
    pytest.param(("cpu", "eager"), id="cpu-eager"),
    *(pytest.param(("cuda", name), marks=pytest.mark.gpu, id=f"cuda-{name}") for name in ("triton", "cuda") if GPU),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# L, D (a tuple: unequal), V, H, C, B
CASES = {
    "one example": (3, 24, 8, 16, 2, 1),
    "odd": (3, 33, 7, 17, 5, 33),
    "packed": (4, 64, 32, 128, 8, 130),
    "linear": (2, 40, 16, None, 3, 65),
    "taps alone": (2, 48, 0, 32, 2, 20),
    "unequal": (4, (16, 24, 40, 96), 8, 32, 3, 50),
    "many classes": (2, 32, 8, 24, 300, 17),
}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device; the backend is in use while the test runs."""
    device, backend = request.param
    reason = backend_report()["layerwise_ensemble"][device].others.get(backend, "")
    if reason and "first" not in reason:
        pytest.skip(reason)
    torch.manual_seed(0)
    with use_backend(backend):
        yield device


def close(name: str, ours: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """At most twice the error of the reference in the same dtype, in norm, and a rounding in that dtype."""
    assert ours.shape == exact.shape and ours.dtype == plain.dtype
    allowed = 2 * (plain.double() - exact).norm() + 4 * torch.finfo(dtype).eps * exact.norm() + 1e-7
    assert (ours.double() - exact).norm() <= allowed, name


def step(model: reference.LayerwiseEnsemble, taps: list[Tensor], view: Tensor | None, loss: Any, bank: bool) -> Any:
    """Predictions with and without the view, the loss, and every gradient."""
    taps = [tap.detach().requires_grad_() for tap in taps]
    view = None if view is None else view.detach().requires_grad_()
    output = model(torch.stack(taps) if bank else taps, view, zeroed_view=True)
    value = loss(output.layer_logits) + output.logits_without_view.to(output.layer_logits.dtype).square().mean()
    wanted = [*taps, *([] if view is None else [view]), *model.parameters()]
    return [*output, value, *torch.autograd.grad(value, wanted)]


def draw(name: str, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    layers, widths, view_width, hidden, outputs, batch = CASES[name]
    sizes = widths if isinstance(widths, tuple) else (widths,) * layers
    spec = reference.LayerwiseEnsemble(
        sizes, view_width, outputs, hidden_width=hidden, mix="learned", view_dropout=0.0, device=device, dtype=dtype
    )
    taps = [torch.randn(batch, width, device=device).to(dtype) for width in sizes]
    view = torch.randn(batch, view_width, device=device).to(dtype) if view_width else None
    return spec, taps, view, torch.randint(0, outputs, (batch,), device=device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_a_training_step(place: str, name: str, dtype: torch.dtype) -> None:
    spec, taps, view, target = draw(name, dtype, place)
    fast = copy.deepcopy(spec)
    fast.__class__ = levi_fast.LayerwiseEnsemble
    bank = not isinstance(CASES[name][1], tuple)
    kind = "single_label_classification"

    def exactly(layer_logits: Tensor) -> Tensor:  # the reference's loss works in fp32
        flat = layer_logits.flatten(0, 1)
        return torch.nn.functional.cross_entropy(flat, target.repeat(len(layer_logits)))

    exact = step(copy.deepcopy(spec).double(), [t.double() for t in taps], view if view is None else view.double(),
                 exactly, bank)  # fmt: skip
    plain = step(spec, taps, view, lambda y: reference.layerwise_loss(y, target, kind), bank)
    ours = step(fast, taps, view, lambda y: functional.layerwise_loss(y, target, kind), bank)
    again = step(fast, taps, view, lambda y: functional.layerwise_loss(y, target, kind), bank)
    for position, results in enumerate(zip(ours, plain, exact, strict=True)):
        close(f"result {position}", *results, dtype)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 700, 64), (37, 19, 33), (300, 5, 16)])
def test_pooling(place: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    hidden = torch.randn(shape, device=place).to(dtype).requires_grad_()
    mask = torch.rand(shape[:2], device=place) > 0.3
    ours = functional.masked_mean_pool(hidden, mask)
    (ours_grad,) = torch.autograd.grad(ours.float().square().sum(), hidden)
    results = []
    for wide in (hidden.detach().requires_grad_(), hidden.detach().double().requires_grad_()):
        kept = mask[..., None].to(wide.dtype)
        pooled = (wide * kept).sum(1) / kept.sum(1).clamp(min=1)
        results.append((pooled, torch.autograd.grad(pooled.to(torch.float64).square().sum(), wide)[0]))
    close("pooled", ours, results[0][0], results[1][0], dtype)
    close("gradient", ours_grad, results[0][1], results[1][1], dtype)


def test_pooling_into_a_bank(place: str) -> None:
    bank = torch.full((3, 20, 48), 7.0, device=place)
    hidden, mask = torch.randn(20, 300, 48, device=place), torch.rand(20, 300, device=place) > 0.3
    functional.masked_mean_pool_into(bank[1], hidden, mask, normalize=True)
    expected = torch.nn.functional.layer_norm(functional.masked_mean_pool(hidden, mask), (48,))
    torch.testing.assert_close(bank[1], expected)
    assert (bank[::2] == 7).all()


# --- what a GPU alone can show ------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(place: str) -> None:
    if place != "cuda":
        pytest.skip("a GPU's own: graphs, streams and sizes that a CPU would take minutes for")


@pytest.mark.usefixtures("on_gpu")
def test_a_whole_step_replays_as_one_cuda_graph() -> None:
    torch.manual_seed(1)
    losses = []
    for captured in (False, True):
        torch.manual_seed(2)
        model = levi_fast.LayerwiseEnsemble((64,) * 4, 16, 3, hidden_width=32, mix="learned", view_dropout=0.0).cuda()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, capturable=True)
        taps, view = torch.randn(4, 32, 64, device="cuda"), torch.randn(32, 16, device="cuda")
        target = torch.randint(0, 3, (32,), device="cuda")
        value = torch.zeros((), device="cuda")

        def train(model=model, optimizer=optimizer, taps=taps, view=view, target=target, value=value) -> None:  # type: ignore[no-untyped-def]
            optimizer.zero_grad(set_to_none=True)
            loss = functional.layerwise_loss(model(taps, view).layer_logits, target, "single_label_classification")
            loss.backward()
            optimizer.step()
            value.copy_(loss.detach())

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                train()
        torch.cuda.current_stream().wait_stream(stream)
        replay = train
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                train()
            replay = graph.replay
        curve = []
        for _ in range(5):
            replay()
            curve.append(value.item())
        losses.append(curve)
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]


@pytest.mark.usefixtures("on_gpu")
def test_more_elements_than_32_bits_count() -> None:
    row = torch.randn(64, device="cuda", dtype=torch.bfloat16)
    virtual = row.expand(70_000, 512, 64)  # 2.3e9 elements, 128 bytes
    pooled = functional.masked_mean_pool(virtual, torch.ones(70_000, 512, device="cuda", dtype=torch.bool))
    assert torch.equal(pooled, row.expand(70_000, 64))
    model = levi_fast.LayerwiseEnsemble(
        (32,) * 18, 8, 2, hidden_width=2048, dtype=torch.bfloat16, device="cuda"
    ).eval()
    taps = torch.randn(
        18, 65_536, 32, device="cuda", dtype=torch.bfloat16
    )  # 18 x 65,536 x 2,048 = 2.4e9 hidden values
    view = torch.randn(65_536, 8, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        whole = model(taps, view).layer_logits
        for rows in (slice(0, 64), slice(65_472, 65_536)):
            part = model(taps[:, rows], view[rows]).layer_logits
            torch.testing.assert_close(whole[:, rows], part, rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("on_gpu")
def test_work_goes_to_the_current_stream() -> None:
    hidden = torch.randn(64, 512, 768, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        hidden.normal_()  # what the op reads is written on this stream, just before
        ours = functional.masked_mean_pool(hidden)
        expected = hidden.mean(1)
    stream.synchronize()
    torch.testing.assert_close(ours, expected)


@pytest.mark.usefixtures("on_gpu")
def test_compiled_training_on_a_gpu() -> None:
    torch.compiler.reset()
    model = levi_fast.LayerwiseEnsemble((32,) * 3, 8, 2, hidden_width=16, view_dropout=0.0).cuda()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch in (7, 19):
        taps, view = torch.randn(3, batch, 32, device="cuda"), torch.randn(batch, 8, device="cuda")
        results = []
        for one in (model, compiled):
            output = one(taps, view)
            results.append(
                (output.logits, torch.autograd.grad(output.logits.square().sum(), list(model.parameters())))
            )
        torch.testing.assert_close(results[1], results[0])
