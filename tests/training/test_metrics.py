"""Scores against scikit-learn, and the choice of the blend."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from levi_fast.training.metrics import BLENDS, best_blend, blend_logits, compute_metrics, selection_key


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


class TestScores:
    def test_single_label(self) -> None:
        rng = np.random.default_rng(0)
        logits, labels = rng.normal(size=(50, 3)), rng.integers(0, 3, 50)
        found = compute_metrics(logits, labels, "single_label_classification")
        assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(labels, logits.argmax(1)))
        assert found["macro_f1"] == pytest.approx(sklearn_metrics.f1_score(labels, logits.argmax(1), average="macro"))
        assert found["log_loss"] == pytest.approx(sklearn_metrics.log_loss(labels, softmax(logits)))

    def test_multi_label(self) -> None:
        rng = np.random.default_rng(1)
        logits, labels = rng.normal(size=(50, 4)), rng.integers(0, 2, (50, 4))
        found = compute_metrics(logits, labels, "multi_label_classification")
        predicted = (logits > 0).astype(int)
        assert found["micro_f1"] == pytest.approx(sklearn_metrics.f1_score(labels, predicted, average="micro"))
        assert found["macro_f1"] == pytest.approx(sklearn_metrics.f1_score(labels, predicted, average="macro"))
        assert found["subset_accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(labels, predicted))
        probability = 1 / (1 + np.exp(-logits))
        by_hand = -(labels * np.log(probability) + (1 - labels) * np.log(1 - probability)).mean()
        assert found["log_loss"] == pytest.approx(by_hand)

    def test_regression(self) -> None:
        rng = np.random.default_rng(2)
        labels = rng.normal(size=50)
        predicted = labels + rng.normal(size=50)
        found = compute_metrics(predicted[:, None], labels, "regression")
        assert found["rmse"] == pytest.approx(sklearn_metrics.root_mean_squared_error(labels, predicted))
        assert found["mae"] == pytest.approx(sklearn_metrics.mean_absolute_error(labels, predicted))
        assert "spearman" not in compute_metrics(np.ones((3, 1)), np.array([1.0, 2.0, 3.0]), "regression")

    def test_huge_logits_stay_finite(self) -> None:
        logits = np.array([[1e4, -1e4], [-1e4, 1e4]], dtype=np.float32)
        assert compute_metrics(logits, np.array([0, 1]), "single_label_classification")["log_loss"] == 0.0
        assert np.isfinite(compute_metrics(logits, np.eye(2), "multi_label_classification")["log_loss"])

    def test_refuses_what_cannot_be_scored(self) -> None:
        with pytest.raises(ValueError, match="at least one"):
            compute_metrics(np.zeros((0, 2)), np.zeros(0), "single_label_classification")
        with pytest.raises(ValueError, match="the training diverged"):
            compute_metrics(np.array([[np.nan, 0.0]]), np.array([0]), "single_label_classification")


class TestSelection:
    def test_accuracy_first_then_log_loss(self) -> None:
        better = {"accuracy": 0.9, "log_loss": 0.5}
        assert selection_key(better, "single_label_classification") > selection_key(
            {"accuracy": 0.8, "log_loss": 0.1}, "single_label_classification"
        )
        assert selection_key({"accuracy": 0.9, "log_loss": 0.4}, "single_label_classification") > selection_key(
            better, "single_label_classification"
        )

    def test_smaller_rmse_is_better(self) -> None:
        assert selection_key({"rmse": 0.9, "mae": 1}, "regression") > selection_key(
            {"rmse": 1.0, "mae": 0}, "regression"
        )

    def test_the_blend_with_the_best_score(self) -> None:
        labels = np.array([0.0, 0.0])
        with_view, without_view = np.array([[1.0], [1.0]]), np.array([[-1.0], [-1.0]])
        assert best_blend(with_view, without_view, labels, "regression")[0] == 0.5
        assert best_blend(with_view, 3 * with_view, labels, "regression")[0] == 0.0
        assert best_blend(with_view, 0 * with_view, labels, "regression") == (1.0, {"rmse": 0.0, "mae": 0.0})
        assert best_blend(with_view, None, labels, "regression")[0] == 0.0

    def test_what_validation_cannot_tell_apart_leans_on_the_pretrained_model(self) -> None:
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 2, 200)
        with_view = np.eye(2)[labels]
        with_view[:50] = 1 - with_view[:50]  # 75 % right
        few, many = with_view.copy(), with_view.copy()
        # zeroing the view mends 5 rows and spoils 6: within a standard error; or spoils 40: not within it
        for logits, spoiled in ((few, 6), (many, 40)):
            logits[:5] = 4 * (1 - with_view[:5])
            logits[50 : 50 + spoiled] = 4 * (1 - with_view[50 : 50 + spoiled])
        single = "single_label_classification"
        blend, scores = best_blend(with_view, few, labels, single)
        assert blend == 1.0 and scores["accuracy"] == pytest.approx(149 / 200)
        blend, scores = best_blend(with_view, many, labels, single)
        assert blend < 1.0 and scores["accuracy"] >= 0.75

    def test_blended_logits(self) -> None:
        with_view, without_view = np.array([[2.0]]), np.array([[4.0]])
        assert [float(blend_logits(with_view, without_view, a)[0, 0]) for a in BLENDS] == [2.0, 3.0, 4.0]
        assert blend_logits(with_view, None, 0.5) is with_view
