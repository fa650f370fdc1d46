"""What is traced: positional tensors in, logits out, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from levi_fast.export.truncated import TruncatedBackbone
from levi_fast.modeling import LeviModel
from levi_fast.reference import blend, mixed


class ServingHead(nn.Module):
    """Taps and the task model's inputs -> logits [B, C], blended as the model's config says, in the label's units.

    With ``pooling="token"`` every token is an example, and the logits are [B, T, C].

    Args:
        model: in eval mode.
        names: of the task model's inputs, in the order of the arguments behind the taps.
    """

    def __init__(self, model: LeviModel, names: Sequence[str]) -> None:
        super().__init__()
        self.task_model, self.ensemble = model.task_model, model.ensemble
        self.names = list(names)
        config: Any = model.config
        self.by_token = config.pooling == "token"
        self.blend, self.view_blend = float(config.blend), float(config.view_blend)
        self.standalone = model.standalone if self.view_blend > 0 else None
        scaled = config.problem_type == "regression"
        self.scale = (float(config.target_std), float(config.target_mean)) if scaled else (1.0, 0.0)

    def forward(self, taps: Tensor, *inputs: Tensor) -> Tensor:
        """``taps`` [L, B, D] ([L, B, T, D]), or [B, sum_l D_l] ([B, T, sum_l D_l]) where the widths differ."""
        widths = list(self.ensemble.tap_widths)
        equal = len(set(widths)) == 1
        shape = tuple(taps.shape[1:-1] if equal else taps.shape[:-1])
        if self.by_token:
            taps = taps.flatten(1, 2) if equal else taps.flatten(0, 1)
        layers = taps if equal else list(taps.split(widths, dim=1))
        return self.logits(layers, dict(zip(self.names, inputs, strict=True)), shape)

    def logits(
        self, taps: Tensor | Sequence[Tensor] | None, inputs: dict[str, Tensor], shape: Sequence[int]
    ) -> Tensor:
        """Logits of a batch.

        Args:
            taps: [L, N, D] or L x [N, D_l], where N is B, or B * T by token; None with ``taps="none"``.
            inputs: the task model's.
            shape: of the batch, (B,) or (B, T).
        """
        view = None if self.task_model is None else self.task_model(**inputs)
        if view is not None and self.by_token:
            view = view.flatten(0, 1)
        dtype = self.ensemble.bias.dtype
        if taps is None:
            taps = [cast(Tensor, view).new_empty((cast(Tensor, view).shape[0], 0))]
        taps = taps.to(dtype) if isinstance(taps, Tensor) else [tap.to(dtype) for tap in taps]
        has_both = view is not None and any(self.ensemble.tap_widths)
        asks_zeroed = has_both and self.blend > 0
        output = self.ensemble(taps, view, zeroed_view=asks_zeroed)
        if asks_zeroed:
            output = blend(output, self.blend)
        if self.standalone is not None:
            output = mixed(output, self.standalone(inputs, by_token=self.by_token), self.view_blend)
        elif has_both and self.view_blend > 0:
            output = mixed(output, self.ensemble.without_taps(cast(Tensor, view)), self.view_blend)
        scale, shift = self.scale
        logits = output.logits if self.scale == (1.0, 0.0) else output.logits * scale + shift
        return cast(Tensor, logits.unflatten(0, tuple(shape)) if self.by_token else logits)


class ServingModel(nn.Module):
    """The whole model: tensors in the order of ``names`` -> logits [B, C], or [B, T, C] by token.

    Args:
        model: in eval mode, with its backbone (or one without taps).
        names: of all inputs, in the order of the arguments.
    """

    def __init__(self, model: LeviModel, names: Sequence[str], task_names: Sequence[str]) -> None:
        super().__init__()
        self.names, self.task_names = list(names), list(task_names)
        self.backbone = None if model.extractor is None else TruncatedBackbone(model.extractor)
        self.head = ServingHead(model, task_names)

    def forward(self, *inputs: Tensor) -> Tensor:
        given = dict(zip(self.names, inputs, strict=True))
        task = {name: given[name] for name in self.task_names}
        taps = None if self.backbone is None else self.backbone(**given)
        by_token = self.head.by_token
        first = given["input_ids"] if by_token else inputs[0]
        return self.head.logits(taps, task, first.shape[:2] if by_token else first.shape[:1])
