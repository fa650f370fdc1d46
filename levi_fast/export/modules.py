"""What is traced: positional tensors in, logits out, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from levi_fast.export.truncated import TruncatedBackbone
from levi_fast.modeling import LeviModel
from levi_fast.reference import blend


class ServingHead(nn.Module):
    """Taps and the task model's inputs -> logits [B, C], blended as the model's config says, in the label's units.

    Args:
        model: in eval mode.
        names: of the task model's inputs, in the order of the arguments behind the taps.
    """

    def __init__(self, model: LeviModel, names: Sequence[str]) -> None:
        super().__init__()
        self.task_model, self.ensemble = model.task_model, model.ensemble
        self.names = list(names)
        config: Any = model.config
        self.blend = float(config.blend)
        scaled = config.problem_type == "regression"
        self.scale = (float(config.target_std), float(config.target_mean)) if scaled else (1.0, 0.0)

    def forward(self, taps: Tensor, *inputs: Tensor) -> Tensor:
        """``taps`` [L, B, D], or [B, sum_l D_l] where the widths differ."""
        widths = list(self.ensemble.tap_widths)
        layers = taps if taps.dim() == 3 else list(taps.split(widths, dim=1))
        return self.logits(layers, dict(zip(self.names, inputs, strict=True)))

    def logits(self, taps: Tensor | Sequence[Tensor], inputs: dict[str, Tensor]) -> Tensor:
        dtype = self.ensemble.bias.dtype
        taps = taps.to(dtype) if isinstance(taps, Tensor) else [tap.to(dtype) for tap in taps]
        view = None if self.task_model is None else self.task_model(**inputs)
        asks_zeroed = view is not None and self.blend > 0 and any(self.ensemble.tap_widths)
        output = self.ensemble(taps, view, zeroed_view=asks_zeroed)
        if asks_zeroed:
            output = blend(output, self.blend)
        scale, shift = self.scale
        return cast(Tensor, output.logits if self.scale == (1.0, 0.0) else output.logits * scale + shift)


class ServingModel(nn.Module):
    """The whole model: tensors in the order of ``names`` -> logits [B, C].

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
        if self.backbone is None:  # taps="none": the task model alone
            first = inputs[0]
            empty = self.head.ensemble.bias.new_empty((first.shape[0], 0))
            return self.head.logits([empty], task)
        return self.head.logits(self.backbone(**given), task)
