"""layerwise_loss: numbers and gradients against fp64, for every backend, instruction set, dtype, stride and size."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from levi_fast import functional
from levi_fast.kernels import backend_report, native, use_backend
from levi_fast.kernels.layerwise_loss import PROBLEM_TYPES

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ISAS = list(native.load().build_info.isa_supported()) if native.load().loaded else []
OP = torch.ops.levi_fast.layerwise_loss.default
BACKWARD = torch.ops.levi_fast.layerwise_loss_backward.default
LAYOUTS = ["contiguous", "transposed", "every second", "offset", "expanded layers", "expanded outputs"]


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same numbers (but for expanded layouts) with other strides; gaps are filled with NaN."""
    layers, batch, outputs = values.shape
    if layout == "transposed":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "every second":
        wide = values.new_full((2 * layers, 2 * batch, 2 * outputs), torch.nan)
        wide[::2, ::2, ::2] = values
        return wide[::2, ::2, ::2]
    if layout == "offset":
        wide = values.new_full((layers, batch + 1, outputs + 3), torch.nan)
        wide[:, 1:, 3:] = values
        return wide[:, 1:, 3:]
    if layout == "expanded layers" and layers:
        return values[:1].expand(layers, -1, -1)
    if layout == "expanded outputs" and outputs:
        return values[..., :1].expand(-1, -1, outputs)
    return values


def draw_target(problem: int, batch: int, outputs: int, strided: bool, ignored: float) -> Tensor:
    if problem == 0:
        labels = torch.randint(max(outputs, 1), (2 * batch,))
        labels[torch.rand(2 * batch) < ignored] = -100
        return labels[::2] if strided else labels[:batch]
    target = torch.rand(batch, outputs) if problem == 1 else torch.randn(batch, outputs)
    return target.T.contiguous().T if strided else target


def truth(logits: Tensor, target: Tensor, problem: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """PyTorch's own loss and gradient, computed in ``dtype``."""
    wide = logits.detach().to(dtype).requires_grad_()
    layers, batch, outputs = logits.shape
    if problem == 0:
        loss = F.cross_entropy(wide.reshape(layers * batch, outputs), target.repeat(layers))
    else:
        goal = target.to(dtype).expand(layers, batch, outputs)
        loss = F.binary_cross_entropy_with_logits(wide, goal) if problem == 1 else F.mse_loss(wide, goal)
    return loss.detach(), torch.autograd.grad(loss, wide)[0]


CASES = st.fixed_dictionaries(
    {
        "problem": st.sampled_from([0, 1, 2]),
        "layers": st.sampled_from([1, 2, 3, 7]),
        "batch": st.sampled_from([0, 1, 2, 5, 33, 1100]),
        "outputs": st.sampled_from([1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 130]),
        "dtype": st.sampled_from(FLOATS),
        "layout": st.sampled_from(LAYOUTS),
        "strided_target": st.booleans(),
        "ignored": st.sampled_from([0.0, 0.3, 1.0]),
        "scale": st.sampled_from([0.1, 4.0, 60.0]),
        "seed": st.integers(0, 2**16),
    }
)


def compare(case: dict) -> None:
    torch.manual_seed(case["seed"])
    problem, shape = case["problem"], (case["layers"], case["batch"], case["outputs"])
    logits = lay_out((case["scale"] * torch.randn(shape)).to(case["dtype"]), case["layout"])
    target = draw_target(problem, *shape[1:], case["strided_target"], case["ignored"])
    loss, gradient = OP(logits, target, problem, True)
    again = OP(logits, target, problem, True)
    assert loss.dtype == gradient.dtype == torch.float32 and gradient.shape == shape and gradient.is_contiguous()
    assert torch.equal(gradient, again[1]) and (torch.equal(loss, again[0]) or loss.isnan())
    bare, empty = OP(logits, target, problem, False)
    assert (torch.equal(bare, loss) or loss.isnan()) and empty.numel() == 0
    if logits.numel() == 0 or (problem == 0 and (target == -100).all()):
        assert loss.isnan() and not gradient.any()  # PyTorch's mean over nothing
        return
    exact, exact_gradient = truth(logits, target, problem, torch.float64)
    eager, eager_gradient = truth(logits, target, problem, torch.float32)
    eps = torch.finfo(torch.float32).eps
    for ours, plain, wanted in ((loss, eager, exact), (gradient, eager_gradient, exact_gradient)):
        allowed = 2 * (plain.double() - wanted).norm() + 4 * eps * wanted.norm() + 1e-12
        assert (ours.double() - wanted).norm() <= allowed
    by = torch.tensor(-3.0)
    scaled = BACKWARD(by, gradient, logits.new_empty(0))
    assert scaled.dtype == case["dtype"] and torch.equal(scaled, (by * gradient).to(case["dtype"]))


@pytest.mark.native
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(case=CASES)
def test_value_and_gradient_on_every_instruction_set(isa: str, case: dict) -> None:
    native.set_cpu_isa(isa)
    try:
        compare(case)
    finally:
        native.set_cpu_isa("auto")


@pytest.mark.native
def test_the_cpp_backend_serves_cpu() -> None:
    assert backend_report()["layerwise_loss"]["cpu"].serves == "cpp"


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_backend_gives_the_reference_gradient(backend: str, problem_type: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    problem = PROBLEM_TYPES.index(problem_type)
    logits = (4 * torch.randn(3, 9, 5)).to(dtype).requires_grad_()
    target = draw_target(problem, 9, 5, strided=False, ignored=0.3)
    with use_backend(backend):
        loss = functional.layerwise_loss(logits, target, problem_type)
    (1024 * loss).backward()
    exact, gradient = truth(logits, target, problem, torch.float64)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-7)
    eps = torch.finfo(min(dtype, torch.float32, key=lambda d: torch.finfo(d).bits)).eps
    torch.testing.assert_close(logits.grad.double(), 1024 * gradient, rtol=4 * eps, atol=1e-4)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("problem", [0, 1, 2])
@pytest.mark.parametrize("outputs", [3, 40])
def test_one_bad_example_leaves_the_other_gradients_alone(problem: int, poison: float, outputs: int) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(2, 6, outputs), draw_target(problem, 6, outputs, strided=False, ignored=0.0)
    clean = OP(logits, target, problem, True)[1]
    logits[1, 3] = poison
    soiled = OP(logits, target, problem, True)[1]
    others = torch.ones(2, 6, dtype=torch.bool)
    others[1, 3] = False
    assert torch.equal(soiled[others], clean[others])
    if problem == 0:  # an example that does not count has no say at all
        target[3] = -100
        loss, gradient = OP(logits, target, problem, True)
        assert loss.isfinite() and gradient.isfinite().all() and not gradient[:, 3].any()


@pytest.mark.native
@pytest.mark.parametrize("problem", [0, 1, 2])
def test_the_same_bits_for_any_number_of_threads(restore_threads: None, problem: int) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(5, 3000, 9), draw_target(problem, 3000, 9, strided=False, ignored=0.1)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(OP(logits, target, problem, True))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("problem", [0, 1, 2])
@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(problem: int, dtype: torch.dtype) -> None:
    logits, target = torch.randn(2, 4, 3, dtype=dtype), draw_target(problem, 4, 3, strided=False, ignored=0.2)
    torch.library.opcheck(OP, (logits, target, problem, False))
    torch.library.opcheck(OP, (logits.requires_grad_(), target, problem, True))
    gradient = torch.randn(2, 4, 3)
    torch.library.opcheck(BACKWARD, (torch.tensor(2.0), gradient, logits.new_empty(0)))


@pytest.mark.native
def test_offsets_past_two_to_the_31_elements() -> None:
    far = 2**31 + 5
    # Untouched pages of an empty tensor cost no memory. Rows as far apart as this are copied together first.
    logits = torch.empty(far + 64).as_strided((2, 4, 3), (far, 8, 1))
    logits.copy_(torch.randn(2, 4, 3))
    target = torch.tensor([0, 2, -100, 1])
    for ours, wanted in zip(OP(logits, target, 0, True), OP(logits.contiguous(), target, 0, True), strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.native
def test_bad_input_is_named() -> None:
    logits, labels = torch.randn(2, 4, 3), torch.tensor([0, 2, -100, 1])
    for arguments, message in [
        ((logits[0], labels, 0), r"layer_logits must be \[L, B, C\], got \[4, 3\]"),
        ((logits, labels, 3), "problem must be 0, 1 or 2, got 3"),
        ((logits.long(), labels, 0), "layer_logits must be float"),
        ((logits, labels.int(), 0), "target must be (torch.)?int64, got (torch.)?int32"),
        ((logits, labels, 2), "target must be (torch.)?float32, got (torch.)?int64"),
        ((logits, labels[:3], 0), r"target must fit layer_logits \[2, 4, 3\], got \[3\]"),
        ((logits, torch.rand(4, 2), 1), r"target must fit layer_logits \[2, 4, 3\], got \[4, 2\]"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            OP(*arguments, True)
        with pytest.raises(RuntimeError, match=message):
            OP(*(a.to("meta") if isinstance(a, Tensor) else a for a in arguments), True)
    for label in (3, -1):
        with pytest.raises(RuntimeError, match=f"target must hold classes from 0 to 2, or -100 .* got {label}"):
            OP(logits, torch.tensor([0, 2, label, 1]), 0, True)


def test_a_second_derivative_says_so() -> None:
    logits = torch.randn(2, 4, 3, requires_grad=True)
    loss = functional.layerwise_loss(logits, torch.tensor([0, 2, 0, 1]), "single_label_classification")
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()
