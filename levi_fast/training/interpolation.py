"""WiSE-FT (Wortsman et al., CVPR 2022, arXiv 2109.01903): a mean of the weights before and after fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from levi_fast.data.encoded import EncodedDataset
from levi_fast.modeling import LeviModel
from levi_fast.training.best_epoch import FitResult
from levi_fast.training.metrics import compute_metrics, selection_key
from levi_fast.training.prediction import predict

# Weights of the fine-tuned model among which ID validation data chooses.
ALPHAS = (0.25, 0.5, 0.75)


def interpolate(
    model: LeviModel,
    before: Mapping[str, Tensor],
    validation: EncodedDataset,
    result: FitResult,
    backbone_batch_size: int = 32,
) -> float:
    """Set a model's weights to ``(1 - a) * before + a * now`` (WiSE-FT, Wortsman et al. 2022, equation 1).

    Args:
        model: after training.
        before: its ``state_dict`` before.
        validation: ID rows that choose ``a`` among :data:`ALPHAS`.
        result: of the training; its validation scores become those of the interpolated model.
        backbone_batch_size: texts per forward pass.

    Returns:
        a.
    """
    after = {name: value.detach().clone() for name, value in model.state_dict().items()}
    problem_type = str(model.config.problem_type)

    def load(alpha: float) -> None:
        mixed = {k: torch.lerp(before[k], v, alpha) if v.is_floating_point() else v for k, v in after.items()}
        model.load_state_dict(mixed)

    scores = {}
    for alpha in ALPHAS:
        load(alpha)
        scores[alpha] = _score(model, validation, backbone_batch_size)
    best = max(ALPHAS, key=lambda alpha: selection_key(scores[alpha], problem_type))
    load(best)
    result.validation = scores[best]
    return best


def _score(model: LeviModel, validation: EncodedDataset, backbone_batch_size: int) -> dict[str, float]:
    if validation.labels is None:
        raise ValueError(f"{validation.name}: expected labels")
    logits = predict(model, validation, backbone_batch_size=backbone_batch_size).logits
    return compute_metrics(logits, validation.labels.numpy(), str(model.config.problem_type))
