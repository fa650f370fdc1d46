"""The contenders of a training step: LEVI, LEVI without its kernels, and other ways to tune a backbone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from levi_fast import LeviConfig, get_levi_model, reference
from levi_fast.bench import peers
from levi_fast.bench.errors import WrongResultError
from levi_fast.bench.timing import timed
from levi_fast.modeling import LeviModel
from levi_fast.training.lean import clip_gradients

FLOOR, OURS = "frozen-forward", "levi"
PEERS = (
    "levi-eager", "hidden-states", "linear-probe", "side-network", "lora", "lora-trainer", "full", "full-trainer",
)  # fmt: skip
METHODS = (FLOOR, OURS, *PEERS)  # lightest first
TRAINER_OF = {"lora-trainer": "lora", "full-trainer": "full"}  # the same modules and optimizer, in Trainer's loop
WITH_ADAPTERS = ("lora", "lora-trainer")
LOSS_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative; the taps are rounded to the backbone's dtype

Batch = Mapping[str, Tensor]


class Method:
    """One contender: its modules, the loss of a batch, and a whole training step.

    Args:
        trained: the module whose parameters are trained; None for the bare forward.
        loss: of a batch.
        held: every module that this contender keeps in memory.
        layer_logits: of LEVI's own forms, [L, B, C].
    """

    def __init__(
        self,
        trained: nn.Module | None,
        loss: Callable[[Batch], Tensor],
        held: nn.Module,
        layer_logits: Callable[[Batch], Tensor] | None = None,
    ) -> None:
        self.loss, self.held, self.layer_logits = loss, held, layer_logits
        self.parameters = [p for p in trained.parameters() if p.requires_grad] if trained is not None else []
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, fused=True) if self.parameters else None

    def step(self, batch: Batch) -> None:
        """Forward, loss, backward, clipping at 1 and AdamW; of the bare forward that alone."""
        if self.optimizer is None:
            self.loss(batch)
            return
        self.loss(batch).backward()
        clip_gradients(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self, batch: Batch) -> float:
        """Of one step; on a GPU until it is done."""
        return timed(lambda: self.step(batch), _device_of(batch))

    def trained_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.parameters)

    def held_bytes(self) -> int:
        """Of parameters, buffers and the optimizer's state."""
        states = () if self.optimizer is None else self.optimizer.state.values()
        kept = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        tensors = {id(t): t for t in (*self.held.parameters(), *self.held.buffers(), *kept)}
        return sum(t.numel() * t.element_size() for t in tensors.values())


class TrainerMethod(Method):
    """Another contender's modules, loss and optimizer, stepped by transformers' Trainer.

    A step is one call of ``train`` over one batch; timed is what the loop does from the start of the epoch, before
    it fetches the batch, to the end of the step. What ``train`` sets up before that is not.
    """

    def __init__(self, plain: Method) -> None:
        from levi_fast.bench.trainer_steps import TrainerSteps

        assert plain.optimizer is not None
        self.loss, self.held, self.layer_logits = plain.loss, plain.held, plain.layer_logits
        self.parameters, self.optimizer = plain.parameters, plain.optimizer
        self._steps = TrainerSteps(plain.held, plain.loss, plain.optimizer)

    def step(self, batch: Batch) -> None:
        self.seconds(batch)

    def seconds(self, batch: Batch) -> float:
        return self._steps.seconds(batch)


def build_methods(names: tuple[str, ...], backbone: nn.Module, config: LeviConfig) -> dict[str, Method]:
    """The contenders around one backbone, whose weights all but full fine-tuning's share.

    Args:
        names: of :data:`METHODS`; LEVI's forms begin with equal weights of their own, a method and its form in
            Trainer have the same ones.
        backbone: in eval mode, in its dtype, on its device.
        config: of LEVI: taps "all", pooling "mean", objective "per_layer"; its labels are those of every contender.
    """
    backbone.requires_grad_(False)
    torch.manual_seed(0)
    levi = _levi(backbone, config) if {OURS, "levi-eager", "hidden-states"} & set(names) else None
    forms = {name: peers.twin(levi, backbone) for name in ("levi-eager", "hidden-states") if levi and name in names}
    copied = not set(names) <= {"full", "full-trainer"}
    build: dict[str, Callable[[], Method]] = {
        FLOOR: lambda: Method(None, peers.forward(backbone), backbone),
        OURS: lambda: levi_method(cast(LeviModel, levi)),
        "levi-eager": lambda: _eager(forms["levi-eager"]),
        "hidden-states": lambda: _hidden_states(forms["hidden-states"], backbone),
        "linear-probe": lambda: Method(*peers.linear_probe(backbone, config)),
        "side-network": lambda: Method(*peers.side_network(backbone, config)),
        "lora": lambda: Method(*peers.lora(sharing(backbone), config)),
        "full": lambda: Method(*peers.full(copy.deepcopy(backbone) if copied else backbone, config)),
    }
    built: dict[str, Method] = {}
    for name in names:
        plain = TRAINER_OF.get(name, name)
        if plain not in built:
            built[plain] = build[plain]()
        if name != plain:
            built[name] = TrainerMethod(built[plain])
    return {name: built[name] for name in names}


def check(methods: Mapping[str, Method], batch: Batch, dtype: torch.dtype, final_norm: bool) -> dict[str, float]:
    """Relative difference of each LEVI form's loss to ours, on one batch with the same weights and random draws.

    The layers' losses are compared too, or differences could cancel. Of ``hidden-states`` the last layer is left
    out where transformers gives it through the model's closing norm.

    Raises:
        WrongResultError: one beyond :data:`LOSS_BOUNDS`.
    """
    bound, errors = LOSS_BOUNDS[dtype], {}
    ours = methods[OURS]
    assert ours.layer_logits is not None
    logits, loss = _seeded(ours.layer_logits, batch), float(_seeded(ours.loss, batch))
    for name in ("levi-eager", "hidden-states"):
        form = methods.get(name)
        if form is None or form.layer_logits is None:
            continue
        layers = len(logits) - (name == "hidden-states" and final_norm)
        theirs = _seeded(form.layer_logits, batch)
        pairs = [(_loss_of(logits[i], batch), _loss_of(theirs[i], batch)) for i in range(layers)]
        if layers == len(logits):
            pairs.append((loss, float(_seeded(form.loss, batch))))
        errors[name] = max(abs(a - b) / max(abs(b), 1e-6) for a, b in pairs)
        if not errors[name] <= bound:
            raise WrongResultError(
                f"{name}: its loss differs from levi's by {errors[name]:.2e} of it, with {dtype} at most {bound:.0e}"
            )
    return errors


def sharing(backbone: nn.Module) -> nn.Module:
    """A copy of the module tree that holds the same tensors."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*backbone.parameters(), *backbone.buffers())}
    return copy.deepcopy(backbone, memo)


def levi_method(model: LeviModel) -> Method:
    """LEVI with the backbone in every step."""
    model.train()
    return Method(
        model, lambda batch: cast(Tensor, model(**batch).loss), model, lambda batch: model(**batch).layer_logits
    )


def _levi(backbone: nn.Module, config: LeviConfig) -> LeviModel:
    model = get_levi_model(backbone, config)
    nn.Module.to(model, next(backbone.parameters()).device)
    return model


def _eager(model: LeviModel) -> Method:
    method = levi_method(model)
    plain, logits, step = method.loss, method.layer_logits, method.step
    method.loss, method.layer_logits = peers.without_kernels(plain), peers.without_kernels(cast(Any, logits))
    method.step = peers.without_kernels(step)  # type: ignore[method-assign, assignment]  # the backward pass too
    return method


def _hidden_states(parts: LeviModel, backbone: nn.Module) -> Method:
    trained, loss, layer_logits = peers.hidden_states(parts, backbone)
    return Method(trained, loss, nn.ModuleList([trained, backbone]), layer_logits)


def _device_of(batch: Batch) -> str:
    return next(iter(batch.values())).device.type


def _seeded(call: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    torch.manual_seed(0)  # dropout and view dropout draw the same
    with torch.no_grad():
        return call(batch)


def _loss_of(logits: Tensor, batch: Batch) -> float:
    labels = batch["labels"]
    kind: reference.ProblemType = "regression" if labels.is_floating_point() else "single_label_classification"
    return float(reference.layerwise_loss(logits[None], labels, kind))
