"""The contenders of a training step: LEVI, LEVI without its kernels, and other ways to tune a backbone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from levi_fast import LeviConfig, LeviModel, get_levi_model, reference, swap
from levi_fast.bench.backbones import NUM_LABELS, Backbone
from levi_fast.bench.errors import WrongResultError
from levi_fast.bench.side_network import SideNetwork
from levi_fast.errors import DataError
from levi_fast.kernels import use_backend

FLOOR, OURS = "frozen-forward", "levi"
PEERS = ("levi-eager", "hidden-states", "linear-probe", "side-network", "lora", "full")  # lightest first
METHODS = (FLOOR, OURS, *PEERS)
KIND: reference.ProblemType = "single_label_classification"
LOSS_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative; the taps are rounded to the backbone's dtype
QUERY_VALUE = (("query", "value"), ("q_proj", "v_proj"), ("q", "v"))  # what architectures call them

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
        """Forward, loss, backward, clipping at 1 and AdamW; of the bare forward that alone.

        The fine-tuned peers take the same plain step: a Trainer would add its own overhead to theirs.
        """
        if self.optimizer is None:
            self.loss(batch)
            return
        self.loss(batch).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def trained_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.parameters)

    def held_bytes(self) -> int:
        """Of parameters, buffers and the optimizer's state."""
        states = () if self.optimizer is None else self.optimizer.state.values()
        kept = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        tensors = {id(t): t for t in (*self.held.parameters(), *self.held.buffers(), *kept)}
        return sum(t.numel() * t.element_size() for t in tensors.values())


def build_methods(names: tuple[str, ...], backbone: nn.Module, spec: Backbone) -> dict[str, Method]:
    """The contenders around one backbone, whose weights all but ``full`` share.

    Args:
        names: of :data:`METHODS`; LEVI's forms begin with equal weights of their own.
        backbone: in eval mode, in its dtype, on its device.
        spec: what it is.
    """
    backbone.requires_grad_(False)
    torch.manual_seed(0)
    levi = _levi(backbone, spec) if {OURS, "levi-eager", "hidden-states"} & set(names) else None
    forms = {name: _twin(levi, backbone) for name in ("levi-eager", "hidden-states") if levi and name in names}
    build: dict[str, Callable[[], Method]] = {
        FLOOR: lambda: _forward(backbone),
        OURS: lambda: _as_method(cast(LeviModel, levi)),
        "levi-eager": lambda: _eager(forms["levi-eager"]),
        "hidden-states": lambda: _hidden_states(forms["hidden-states"], backbone),
        "linear-probe": lambda: _probe(backbone),
        "side-network": lambda: _side(backbone),
        "lora": lambda: _lora(sharing(backbone)),
        "full": lambda: _full(backbone if names == ("full",) else copy.deepcopy(backbone)),
    }
    return {name: build[name]() for name in names}


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
        pairs = [(_loss_of(logits[i : i + 1], batch), _loss_of(theirs[i : i + 1], batch)) for i in range(layers)]
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


def _seeded(call: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    torch.manual_seed(0)  # dropout and view dropout draw the same
    with torch.no_grad():
        return call(batch)


def _loss_of(layer_logits: Tensor, batch: Batch) -> float:
    return float(reference.layerwise_loss(layer_logits, batch["labels"], KIND))


def _inputs(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def _levi(backbone: nn.Module, spec: Backbone) -> LeviModel:
    labels: dict[str, Any] = {"num_labels": NUM_LABELS}
    model = get_levi_model(backbone, LeviConfig(problem_type=KIND, task_model=spec.task_model, **labels))
    nn.Module.to(model, next(backbone.parameters()).device)
    return model.train()


def _twin(levi: LeviModel, backbone: nn.Module) -> LeviModel:
    """A copy around the same backbone, its own weights equal, its ensemble the reference."""
    memo: dict[int, Any] = {id(module): module for module in backbone.modules()}
    twin = copy.deepcopy(levi, memo)
    swap(twin, undo=True)
    return twin


def _as_method(model: LeviModel) -> Method:
    return Method(
        model, lambda batch: cast(Tensor, model(**batch).loss), model, lambda batch: model(**batch).layer_logits
    )


def _eager(model: LeviModel) -> Method:
    method = _as_method(model)
    plain, logits, step = method.loss, method.layer_logits, method.step

    def within(call: Any) -> Any:
        def run(batch: Batch) -> Any:
            with use_backend("eager"):
                return call(batch)

        return run

    method.loss, method.layer_logits = within(plain), within(logits)
    method.step = within(step)  # type: ignore[method-assign]  # the backward pass too
    return method


def mean_pool(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """[B, T, D] to float32 [B, D], as most code does it."""
    if mask is None:
        return hidden.mean(1).float()
    weights = mask[..., None].to(hidden.dtype)
    return ((hidden * weights).sum(1) / weights.sum(1)).float()


def _hidden_states(parts: LeviModel, backbone: nn.Module) -> Method:
    """LEVI as a user would write it: all hidden states, each pooled, the reference ensemble and loss."""
    task_model, ensemble = cast(nn.Module, parts.task_model), parts.ensemble

    def layer_logits(batch: Batch) -> Tensor:
        inputs = _inputs(batch)
        view = task_model(**inputs)
        with torch.no_grad():
            hidden = _run(backbone, inputs, output_hidden_states=True).hidden_states
            taps = [mean_pool(state, inputs.get("attention_mask")) for state in hidden[1:]]
        return ensemble(taps, view).layer_logits

    def loss(batch: Batch) -> Tensor:
        return reference.layerwise_loss(layer_logits(batch), batch["labels"], KIND)

    trained = nn.ModuleList([task_model, ensemble])
    return Method(trained, loss, nn.ModuleList([trained, backbone]), layer_logits)


def _run(backbone: nn.Module, inputs: Batch, **arguments: Any) -> Any:
    dtype = next(backbone.parameters()).dtype
    cast_inputs = {name: v.to(dtype) if v.is_floating_point() else v for name, v in inputs.items()}
    return backbone(**cast_inputs, **arguments)


def _forward(backbone: nn.Module) -> Method:
    def forward(batch: Batch) -> Tensor:
        with torch.no_grad():
            return cast(Tensor, _run(backbone, _inputs(batch)).last_hidden_state)

    return Method(None, forward, backbone)


def _head(backbone: nn.Module) -> nn.Linear:
    config: Any = backbone.config
    return nn.Linear(config.hidden_size, NUM_LABELS, device=next(backbone.parameters()).device)


def _on_last(backbone: nn.Module, head: nn.Module, batch: Batch) -> Tensor:
    inputs = _inputs(batch)
    hidden = _run(backbone, inputs).last_hidden_state
    return F.cross_entropy(head(mean_pool(hidden, inputs.get("attention_mask"))), batch["labels"])


def _probe(backbone: nn.Module) -> Method:
    head = _head(backbone)

    def loss(batch: Batch) -> Tensor:
        inputs = _inputs(batch)
        with torch.no_grad():
            pooled = mean_pool(_run(backbone, inputs).last_hidden_state, inputs.get("attention_mask"))
        return F.cross_entropy(head(pooled), batch["labels"])

    return Method(head, loss, nn.ModuleList([head, backbone]))


def _side(backbone: nn.Module) -> Method:
    config: Any = backbone.config
    side = SideNetwork(config.hidden_size, config.num_hidden_layers, NUM_LABELS)
    side.to(next(backbone.parameters()).device).train()

    def loss(batch: Batch) -> Tensor:
        inputs = _inputs(batch)
        with torch.no_grad():
            hidden = _run(backbone, inputs, output_hidden_states=True).hidden_states
        return F.cross_entropy(side(hidden, inputs.get("attention_mask")), batch["labels"])

    return Method(side, loss, nn.ModuleList([side, backbone]))


def lora_targets(backbone: nn.Module) -> list[str]:
    """What this architecture calls its query and value projections.

    Raises:
        DataError: none of the names that are known.
    """
    names = {name.rsplit(".", 1)[-1] for name, _ in backbone.named_modules()}
    for pair in QUERY_VALUE:
        if names.issuperset(pair):
            return list(pair)
    known = ", ".join(" and ".join(pair) for pair in QUERY_VALUE)
    raise DataError(f"lora: expected modules named {known}; {type(backbone).__name__} has none of these pairs")


def lora_adapted(backbone: nn.Module) -> nn.Module:
    """The backbone with LoRA's adapters (r=8) beside query and value, which replace its own modules there."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, target_modules=lora_targets(backbone))
    return cast(nn.Module, get_peft_model(cast(Any, backbone), config)).train()


def _tuned_with_head(tuned: nn.Module, backbone: nn.Module) -> Method:
    both = nn.ModuleList([tuned, _head(backbone)])
    return Method(both, lambda batch: _on_last(tuned, both[1], batch), both)


def _lora(backbone: nn.Module) -> Method:
    return _tuned_with_head(lora_adapted(backbone), backbone)


def _full(backbone: nn.Module) -> Method:
    return _tuned_with_head(backbone.requires_grad_().train(), backbone)
