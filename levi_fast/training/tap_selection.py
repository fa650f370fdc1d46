"""Which layers to tap, told by taps of the training data: resolved once, before training."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from levi_fast.config import LeviConfig
from levi_fast.data.encoded import EncodedDataset
from levi_fast.data.labels import MULTI_LABEL, REGRESSION
from levi_fast.errors import DataError
from levi_fast.functional import layerwise_loss
from levi_fast.modules import LayerwiseEnsemble
from levi_fast.tap_scores import high_group, most_important, neighbour_importance, pareto_front
from levi_fast.training.metrics import compute_metrics
from levi_fast.training.runs import Splits, TapBank

# Enough for figures that no longer move in the second digit; more would only cost time.
MAX_ROWS = 4096
EPOCHS, BATCH_SIZE, LEARNING_RATE = 3, 32, 1e-3
# The two scores that a probe is judged by; minus, where less is better.
_PROBE_SCORES = {
    "single_label_classification": ("accuracy", "macro_f1"),
    MULTI_LABEL: ("micro_f1", "macro_f1"),
    REGRESSION: ("rmse", "mae"),
}


@dataclass(frozen=True)
class TapSelection:
    """A selector's choice: ``layers`` among ``candidates``, and per score a value for each candidate."""

    selector: str
    layers: list[int]
    candidates: list[int]
    scores: dict[str, list[float | None]]

    def as_dict(self) -> dict[str, Any]:
        """What the saved config and the JSON file have."""
        return asdict(self)


def select_taps(selector: str, bank: TapBank, splits: Splits, config: LeviConfig, *, seed: int = 0) -> TapSelection:
    """Choose among the layers of a bank by training data; ID validation data judges the probes.

    Args:
        selector: "cka:k" (label-free), "gradnorm", "probe", or "mix": learned mixing weights, which are shown as a
            diagnostic and choose nothing (all layers).
        bank: taps of the splits.
        splits: encoded data; at most :data:`MAX_ROWS` rows of each are read, drawn by ``seed``.
        config: of LEVI for the task: labels, and the adapting layers of "gradnorm" and "mix".
        seed: of the rows drawn and the adapting layers' training.

    Raises:
        DataError: k beyond the number of layers, fewer than two training rows.
        ValueError: another selector.
    """
    taps, labels = _sample(bank, splits.train, "train", seed)
    if len(labels) < 2:
        raise DataError(f"--taps {selector}: expected at least 2 training rows, got {len(labels)}")
    scores: dict[str, list[float | None]]
    if selector.startswith("cka:"):
        importance = neighbour_importance([tap.numpy() for tap in taps])
        scores = {"1 - CKA": importance}
        try:
            chosen = most_important(importance, int(selector.removeprefix("cka:")))
        except ValueError as error:
            raise DataError(f"--{error}") from error
    elif selector == "gradnorm":
        norms = _train(taps, labels, config, seed, mix="mean")
        scores, chosen = {"gradient norm": [*norms]}, high_group(norms)
    elif selector == "mix":
        scores, chosen = {"mixing weight": [*_train(taps, labels, config, seed, mix="learned")]}, [*range(len(taps))]
    elif selector == "probe":
        held, truth = _sample(bank, splits.validation, "validation", seed)
        scores, chosen = _probe(taps, labels, held, truth, config)
    else:
        raise ValueError(f"selector: expected cka:k, gradnorm, probe or mix, got {selector!r}")
    return TapSelection(selector, [bank.layers[place] for place in chosen], list(bank.layers), scores)


def _sample(bank: TapBank, dataset: EncodedDataset, name: str, seed: int) -> tuple[list[Tensor], Tensor]:
    """Taps ``[n, D_l]`` and labels of at most :data:`MAX_ROWS` rows."""
    if dataset.labels is None:
        raise ValueError(f"{dataset.name}: expected labels")
    rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:MAX_ROWS].sort().values
    stored, which = bank.taps[name]
    return list(stored[which[rows]].float().split(bank.widths, dim=1)), dataset.labels[rows]


def _train(taps: Sequence[Tensor], labels: Tensor, config: LeviConfig, seed: int, *, mix: Any) -> list[float]:
    """Train adapting layers on the taps alone for a few epochs.

    Returns:
        with ``mix="mean"`` each layer's mean gradient norm over the steps, else its mixing weight at the end.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ensemble = LayerwiseEnsemble(
            [tap.shape[1] for tap in taps], 0, cast(int, config.num_labels), hidden_width=config.hidden_width,
            activation=cast(Any, config.activation), normalize=config.normalize, mix=mix,
        )  # fmt: skip
        problem = str(config.problem_type)
        if problem == REGRESSION:
            labels = (labels - config.target_mean) / config.target_std
        optimizer = torch.optim.AdamW(ensemble.parameters(), lr=LEARNING_RATE)
        norms: list[Tensor] = []
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(labels)).split(BATCH_SIZE):
                output = ensemble([tap[rows] for tap in taps], None)
                loss = layerwise_loss(output.layer_logits, labels[rows], problem)
                if mix == "learned":  # per-layer losses alone give mixing weights no gradient
                    loss = (loss + layerwise_loss(output.logits[None], labels[rows], problem)) / 2
                optimizer.zero_grad()
                loss.backward()
                norms.append(_gradient_norms(ensemble))
                optimizer.step()
    if mix == "mean":
        return [float(norm) for norm in torch.stack(norms).mean(dim=0)]
    return [float(weight) for weight in ensemble.mix_weights().detach()]


def _gradient_norms(ensemble: LayerwiseEnsemble) -> Tensor:
    """Euclidean norm ``[L]`` of the gradient of each adapting layer's parameters."""
    assert ensemble.tap_weight.grad is not None
    parts = ensemble.tap_weight.grad.split(list(ensemble.tap_widths))
    squares = torch.stack([part.square().sum() for part in parts])
    for parameter, axis in ((ensemble.bias, 0), (ensemble.output_weight, 1), (ensemble.output_bias, 0)):
        if parameter is not None and parameter.grad is not None:
            squares = squares + parameter.grad.square().movedim(axis, 0).flatten(1).sum(dim=1)
    return squares.sqrt()


def _probe(
    taps: Sequence[Tensor], labels: Tensor, held: Sequence[Tensor], truth: Tensor, config: LeviConfig
) -> tuple[dict[str, list[float | None]], list[int]]:
    """A linear probe per layer; scores on validation rows, and the layers that none dominates in both."""
    problem_type = str(config.problem_type)
    names = _PROBE_SCORES[problem_type]
    found = [
        compute_metrics(_probe_logits(here, labels, there, config), truth.numpy(), problem_type)
        for here, there in zip(taps, held, strict=True)
    ]
    sign = -1.0 if problem_type == REGRESSION else 1.0
    front = pareto_front([[sign * scores[name] for name in names] for scores in found])
    return {f"probe {name}": [scores[name] for scores in found] for name in names}, front


def _probe_logits(tap: Tensor, labels: Tensor, held: Tensor, config: LeviConfig) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, x_held, y = tap.numpy(), held.numpy(), labels.numpy()

    def logistic(target: np.ndarray, classes: int) -> np.ndarray:
        """Log-probabilities ``[n, classes]``; a class that no row has gets a very small one."""
        logs = np.full((len(x_held), classes), -50.0)
        if len(np.unique(target)) == 1:
            logs[:, int(target[0])] = 0.0
            return logs
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not quite converged is near enough to rank layers
            model.fit(x, target)
        logs[:, model.classes_.astype(int)] = model.predict_log_proba(x_held).clip(-50.0)
        return logs

    if config.problem_type == REGRESSION:
        model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 4, 7)))
        predicted: np.ndarray = model.fit(x, y).predict(x_held)
        return predicted
    if config.problem_type == MULTI_LABEL:
        logs = [logistic(column.astype(int), 2) for column in y.T]
        return np.stack([one[:, 1] - one[:, 0] for one in logs], axis=1)
    return logistic(y, cast(int, config.num_labels))
