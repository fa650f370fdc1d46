"""The task model by itself, beside LEVI: a third prediction that no shared layer can drown."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from levi_fast.config import LeviConfig
from levi_fast.modules import EnsembleOutput, LayerwiseEnsemble
from levi_fast.view import task_model_of


class StandaloneView(nn.Module):
    """A second task model with a head of its own, trained on the same batches; it shares no parameter with LEVI.

    It is what the method ``task-model`` trains. An output ensemble with it (Lakshminarayanan et al. 2017, arXiv
    1612.01474) holds where the taps do not; see docs/evidence.md.

    On the CPU it leaves torch's random generator as it was, so that LEVI's own training is, to the last bit, what it
    is without. (A GPU's generator cannot be put back inside a CUDA graph, nor any in code that is being compiled.)

    Args:
        config: completed: its task model, head and ``num_labels`` are built anew.
        task_model: the user's own module, which is copied, initial weights included; None builds
            ``config.task_model``'s specification.
    """

    def __init__(self, config: LeviConfig, task_model: nn.Module | None = None) -> None:
        super().__init__()
        is_custom = (config.task_model or {}).get("type") == "custom"
        self.task_model = cast(nn.Module, copy.deepcopy(task_model) if is_custom else task_model_of(config))
        self.ensemble = LayerwiseEnsemble(
            [0],
            config.view_width,
            cast(int, config.num_labels),
            hidden_width=config.hidden_width,
            activation=cast(Any, config.activation),
            normalize=config.normalize,
            dropout=config.dropout,
            view_dropout=0.0,  # a dropped view would leave nothing at all
        )

    def forward(self, inputs: dict[str, Any], *, by_token: bool = False) -> EnsembleOutput:
        """The task model's inputs -> logits [B, C] and layer_logits [1, B, C]; by token of B * T examples."""
        drawn_apart = self.training and not torch.compiler.is_compiling() and self.ensemble.bias.device.type == "cpu"
        with _generator_kept() if drawn_apart else contextlib.nullcontext():
            view: Tensor = self.task_model(**inputs)
            if by_token:
                view = view.flatten(0, 1)
            return cast(EnsembleOutput, self.ensemble([view.new_empty(view.shape[0], 0)], view))


@contextlib.contextmanager
def _generator_kept() -> Iterator[None]:
    """Inside the ``with`` block, what is drawn from torch's generator on the CPU will be drawn again after it."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
