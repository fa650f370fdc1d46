"""One function for each op: a row of its time beside its peers on a GPU, launched plainly and as a CUDA graph."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import levi_fast
from levi_fast import functional, reference
from levi_fast.bench.gpu.timing import DTYPES, Run, Step, error, finish_row, sets_for
from levi_fast.kernels import backend_report, use_backend

KIND: Literal["single_label_classification"] = "single_label_classification"


def by_other_backends(op: str, device: str, step: Step) -> dict[str, Step]:
    """The same step by every compiled backend that could serve but comes second."""
    others = backend_report()[op][device].others

    def named(backend: str) -> Step:
        def run(i: int) -> Any:
            with use_backend(backend):
                return step(i)

        return run

    return {name: named(name) for name, reason in others.items() if "comes first" in reason and name != "eager"}


def bench_pool(run: Run, case: tuple[int, int, int], name: str) -> None:
    """Pooling with every token kept, forward."""
    batch, length, width = case
    dtype = DTYPES[name]
    nbytes = batch * length * width * dtype.itemsize
    sets = sets_for(nbytes, run)
    hidden = [torch.randn(case, device=run.device, dtype=dtype) for _ in range(sets)]
    mask = torch.ones(batch, length, device=run.device, dtype=torch.int64)

    def usual(x: Tensor) -> Tensor:
        m = mask[..., None].to(x.dtype)
        return (x * m).sum(1) / m.sum(1).clamp(min=1e-9)

    compiled = torch.compile(usual)
    contenders: dict[str, Step] = {
        "ours": lambda i: functional.masked_mean_pool(hidden[i], mask),
        **by_other_backends("masked_mean_pool", run.device, lambda i: functional.masked_mean_pool(hidden[i], mask)),
        "usual": lambda i: usual(hidden[i]),
        "bmm": lambda i: torch.bmm(mask[:, None].to(dtype), hidden[i])[:, 0] / length,
    }
    if not run.quick:
        contenders["compile"] = lambda i: compiled(hidden[i])
    exact = hidden[0].double().mean(1)
    row = {
        "op": "masked_mean_pool forward",
        "case": dict(zip("BTD", case, strict=True)),
        "dtype": name,
        "error": {"ours": error(contenders["ours"](0), exact), "eager": error(usual(hidden[0]), exact)},
        "ms": run.time(contenders, sets),
    }
    finish_row(run, row, nbytes + batch * length * 8 + batch * width * dtype.itemsize, 0)


def bench_ensemble(run: Run, case: tuple[int, ...], name: str, backward: bool, compiled: bool) -> None:
    """The ensemble's layer-wise predictions; with ``backward`` the loss and the gradients of weights and view too."""
    layers, width, view_width, hidden, outputs, batch = case
    dtype = DTYPES[name]
    theirs = reference.LayerwiseEnsemble(
        (width,) * layers, view_width, outputs, hidden_width=hidden, view_dropout=0.0, device=run.device, dtype=dtype
    )
    ours = levi_fast.LayerwiseEnsemble(
        (width,) * layers, view_width, outputs, hidden_width=hidden, view_dropout=0.0, device=run.device, dtype=dtype
    )
    ours.load_state_dict(theirs.state_dict())
    weight_bytes = sum(p.numel() for p in theirs.parameters()) * dtype.itemsize
    tap_bytes = layers * batch * width * dtype.itemsize
    sets = sets_for(tap_bytes + weight_bytes, run)
    taps = [torch.randn(layers, batch, width, device=run.device, dtype=dtype) for _ in range(sets)]
    views = [torch.randn(batch, view_width, device=run.device, dtype=dtype, requires_grad=backward) for _ in taps]
    target = torch.randint(0, outputs, (batch,), device=run.device)

    def step(model: Any, loss: Any, i: int) -> tuple[Tensor, ...]:
        if not backward:
            with torch.no_grad():
                return (model(taps[i], views[i]).layer_logits,)
        value = loss(model(taps[i], views[i]).layer_logits, target, KIND)
        return torch.autograd.grad(value, [*model.parameters(), views[i]])

    def ours_step(i: int) -> tuple[Tensor, ...]:
        return step(ours, functional.layerwise_loss, i)

    def twin(i: int) -> tuple[Tensor, ...]:
        with use_backend("eager"):
            return step(ours, functional.layerwise_loss, i)

    contenders: dict[str, Step] = {
        "ours": ours_step,
        **by_other_backends("layerwise_ensemble", run.device, ours_step),
        "reference": lambda i: step(theirs, reference.layerwise_loss, i),
        "baddbmm": twin,
    }
    if compiled:
        model = torch.compile(theirs, mode="max-autotune-no-cudagraphs")
        loss = torch.compile(reference.layerwise_loss)

        def compiled_step(i: int) -> tuple[Tensor, ...]:
            if not backward:
                with torch.no_grad():
                    return (model(taps[i], views[i]).layer_logits,)
            value = loss(model(taps[i], views[i]).layer_logits, target, KIND)
            return torch.autograd.grad(value, [*theirs.parameters(), views[i]])

        contenders["compile"] = compiled_step
    row: dict[str, Any] = {
        "op": "layerwise_ensemble " + ("forward+backward" if backward else "forward"),
        "case": dict(zip("LDVHCB", case, strict=True)),
        "dtype": name,
        "error": errors(contenders, theirs, taps[0], views[0], target, backward),
        "ms": run.time(contenders, sets),
    }
    first = 2 * layers * batch * hidden * (width + view_width)
    second = 2 * layers * batch * hidden * outputs
    view_part = 2 * layers * batch * hidden * view_width
    flop = first + second + (first + view_part + 2 * second if backward else 0)
    nbytes = tap_bytes + weight_bytes * (2 if backward else 1) + batch * view_width * dtype.itemsize
    finish_row(run, row, nbytes, flop)


def errors(
    contenders: dict[str, Step], model: Any, taps: Tensor, view: Tensor, target: Tensor, backward: bool
) -> dict[str, float]:
    """The largest relative error over all results against float64, ours and same-dtype eager's."""
    parameters = [p.detach().double().requires_grad_() for p in model.parameters()]
    named = dict(zip((n for n, _ in model.named_parameters()), parameters, strict=True))
    x = view.detach().double().requires_grad_()
    layer_logits = torch.func.functional_call(model, named, (taps.double(), x)).layer_logits
    exact: tuple[Tensor, ...] = (layer_logits,)
    if backward:
        flat = layer_logits.flatten(0, 1)
        exact = torch.autograd.grad(F.cross_entropy(flat, target.repeat(len(taps))), [*parameters, x])
    return {
        name: max(error(one, two) for one, two in zip(contenders[name](0), exact, strict=True))
        for name in ("ours", "reference")
    }


def bench_loss(run: Run, case: tuple[int, int, int], name: str) -> None:
    """The layer-wise cross-entropy with its gradient."""
    logits = torch.randn(case, device=run.device, dtype=DTYPES[name], requires_grad=True)
    target = torch.randint(0, case[2], case[1:2], device=run.device)

    def step(loss: Any) -> Tensor:
        return torch.autograd.grad(loss(logits, target, KIND), [logits])[0]

    compiled = torch.compile(reference.layerwise_loss)
    contenders: dict[str, Step] = {
        "ours": lambda i: step(functional.layerwise_loss),
        **by_other_backends("layerwise_loss", run.device, lambda i: step(functional.layerwise_loss)),
        "reference": lambda i: step(reference.layerwise_loss),
    }
    if not run.quick:
        contenders["compile"] = lambda i: step(compiled)
    liger = _liger_loss(run)
    if liger is not None:
        contenders["liger"] = lambda i: step(liger)
    double = logits.detach().double().requires_grad_()
    flat = double.flatten(0, 1)
    (exact,) = torch.autograd.grad(F.cross_entropy(flat, target.repeat(case[0])), [double])
    row = {
        "op": "layerwise_loss forward+backward",
        "case": dict(zip("LBC", case, strict=True)),
        "dtype": name,
        "error": {n: error(contenders[n](0), exact) for n in ("ours", "reference")},
        "ms": run.time(contenders, 1),
    }
    finish_row(run, row, 2 * logits.numel() * logits.element_size(), 0)


def _liger_loss(run: Run) -> Any:
    """Liger's cross-entropy over all layers at once, where the package and a GPU are."""
    if run.device == "cpu":
        return None
    try:
        from liger_kernel.transformers import LigerCrossEntropyLoss
    except ImportError as missing:
        run.result.setdefault("notes", []).append(f"liger: {missing}")
        return None
    loss = LigerCrossEntropyLoss()
    # a copy, for it writes the gradient over its input
    return lambda logits, target, _: loss(logits.clone().flatten(0, 1), target.repeat(len(logits)))


def bench_unequal(run: Run, case: tuple[Any, ...], backward: bool) -> None:
    """Taps of unequal width in bfloat16; the peer for them is PyTorch's grouped product."""
    widths, view_width, hidden, outputs, batch = case
    make = dict(hidden_width=hidden, view_dropout=0.0, device=run.device, dtype=torch.bfloat16)
    theirs = reference.LayerwiseEnsemble(widths, view_width, outputs, **make)
    ours = levi_fast.LayerwiseEnsemble(widths, view_width, outputs, **make)
    ours.load_state_dict(theirs.state_dict())
    nbytes = 2 * (batch * (sum(widths) + view_width) + sum(p.numel() for p in theirs.parameters()) * (1 + backward))
    sets = sets_for(nbytes, run)
    taps = [[torch.randn(batch, w, device=run.device).bfloat16() for w in widths] for _ in range(sets)]
    views = [torch.randn(batch, view_width, device=run.device).bfloat16().requires_grad_(backward) for _ in taps]
    grad = torch.randn(len(widths), batch, outputs, device=run.device).bfloat16()
    offsets = torch.tensor(widths, device=run.device).cumsum(0).to(torch.int32)

    def grouped(i: int) -> Tensor:
        assert theirs.view_weight is not None and theirs.output_weight is not None and theirs.output_bias is not None
        rows = torch.cat([F.layer_norm(tap, tap.shape[1:]) for tap in taps[i]], 1)
        product = F.grouped_mm(rows, theirs.tap_weight, offs=offsets)  # [L, B, H]
        view = F.layer_norm(views[i], views[i].shape[1:]) @ theirs.view_weight.flatten(1)
        view = view.unflatten(1, theirs.bias.shape).transpose(0, 1)
        activation = F.gelu(product + view + theirs.bias[:, None])
        return torch.baddbmm(theirs.output_bias[:, None], activation, theirs.output_weight.permute(1, 2, 0))

    def stepped(forward: Any, model: Any) -> Step:
        def run_step(i: int) -> Any:
            if not backward:
                with torch.no_grad():
                    return (forward(i),)
            wanted = [p for p in model.parameters()] + [views[i]]
            return torch.autograd.grad(forward(i), wanted, grad)

        return run_step

    ours_step = stepped(lambda i: ours(taps[i], views[i]).layer_logits, ours)
    contenders: dict[str, Step] = {
        "ours": ours_step,
        **by_other_backends("layerwise_ensemble", run.device, ours_step),
        "reference": stepped(lambda i: theirs(taps[i], views[i]).layer_logits, theirs),
    }
    try:
        peer = stepped(grouped, theirs)
        peer(0)
        contenders["grouped_mm"] = peer
    except (RuntimeError, AttributeError, NotImplementedError) as refused:
        run.result.setdefault("notes", []).append(f"grouped_mm {case}: {str(refused)[:300]}")
    exact = theirs.double()([t.double() for t in taps[0]], views[0].double()).layer_logits
    theirs.bfloat16()
    with torch.no_grad():
        predictions = {"ours": ours, "reference": theirs}
        found = {n: error(m(taps[0], views[0]).layer_logits, exact) for n, m in predictions.items()}
        if "grouped_mm" in contenders:
            found["grouped_mm"] = error(grouped(0), exact)
    row = {
        "op": "layerwise_ensemble, unequal widths, " + ("forward+backward" if backward else "forward"),
        "case": dict(zip(("D", "V", "H", "C", "B"), case, strict=True)),
        "dtype": "bfloat16",
        "error": found,
        "ms": run.time(contenders, sets),
    }
    flop = 2 * batch * hidden * (sum(widths) + len(widths) * (view_width + outputs))
    finish_row(run, row, nbytes, flop * (2 if backward else 1))


def bench_head_step(run: Run, case: tuple[int, ...], name: str) -> None:
    """A whole training step of a head: predictions, loss, gradients, AdamW; replayed as one CUDA graph."""
    layers, width, view_width, hidden, outputs, batch = case
    dtype = DTYPES[name]
    taps = torch.randn(layers, batch, width, device=run.device, dtype=dtype)
    view = torch.randn(batch, view_width, device=run.device, dtype=dtype)
    target = torch.randint(0, outputs, (batch,), device=run.device)

    def head(kind: type[reference.LayerwiseEnsemble], loss: Any) -> Step:
        torch.manual_seed(0)
        model = kind((width,) * layers, view_width, outputs, hidden_width=hidden, view_dropout=0.0,
                     device=run.device, dtype=dtype)  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, capturable=run.device == "cuda")

        def step(_: int) -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            value = loss(model(taps, view).layer_logits, target, KIND)
            value.backward()
            optimizer.step()
            return value.detach()

        return step

    ours_step = head(levi_fast.LayerwiseEnsemble, functional.layerwise_loss)
    contenders: dict[str, Step] = {
        "ours": ours_step,
        **by_other_backends("layerwise_ensemble", run.device, ours_step),
        "reference": head(reference.LayerwiseEnsemble, reference.layerwise_loss),
    }
    with use_backend("eager"):  # the same weights as ours at their first step
        first = head(levi_fast.LayerwiseEnsemble, functional.layerwise_loss)(0)
    weights = layers * hidden * (width + view_width + outputs + 1)
    row = {
        "op": "training step of a head",
        "case": dict(zip("LDVHCB", case, strict=True)),
        "dtype": name,
        "error": {"ours": error(ours_step(0), first.double())},
        "ms": run.time(contenders, 1),
    }
    flop = 2 * layers * batch * hidden * (2 * width + 3 * view_width + 3 * outputs)
    # Weights and both moments, read and written once.
    finish_row(run, row, taps.numel() * dtype.itemsize + 6 * weights * dtype.itemsize, flop)
