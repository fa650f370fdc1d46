"""The task's loss over all layers' predictions at once: one pass where the reference loops."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


def layerwise_loss_eager(layer_logits: Tensor, target: Tensor, problem_type: str) -> Tensor:
    """See :func:`levi_fast.functional.layerwise_loss`, which checks the arguments and calls this."""
    layers, batch, outputs = layer_logits.shape
    logits = layer_logits.float()
    if problem_type == "single_label_classification":
        # Every layer ignores the same examples, so the mean over all kept rows is the mean of the layers' means.
        return F.cross_entropy(logits.reshape(layers * batch, outputs), target.repeat(layers))
    wide = target.to(logits.dtype).reshape(batch, outputs).expand_as(logits)
    if problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, wide)
    return F.mse_loss(logits, wide)
