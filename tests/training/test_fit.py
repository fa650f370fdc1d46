"""Training through Trainer: what is selected, what is kept, what stays untouched."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from levi_fast.backbones import load_backbone
from levi_fast.config import LeviConfig
from levi_fast.data.encoded import EncodedDataset
from levi_fast.errors import DataError, DivergedError
from levi_fast.modeling import LeviModel, get_levi_model
from levi_fast.training.features import precompute_taps, precompute_unique_taps, slice_taps
from levi_fast.training.fit import TrainingOptions, fit, resolve_device
from levi_fast.training.methods import METHODS, method_config
from levi_fast.training.metrics import best_blend, blend_logits, compute_metrics, selection_key
from levi_fast.training.prediction import predict
from levi_fast.training.runs import Splits, TapBank, run_method

SINGLE = "single_label_classification"
TEXT = {"type": "text", "vocab_size": 48, "embedding_dim": 8, "view_width": 8}


def dataset(count: int = 48, seed: int = 0) -> EncodedDataset:
    """Texts whose label is told by token 10 or 11 among noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    texts = []
    for label in labels.tolist():
        length = int(torch.randint(3, 9, (1,), generator=generator))
        noise = torch.randint(12, 40, (length,), generator=generator).tolist()
        texts.append([2, *noise, 10 + label, 3])
    return EncodedDataset(f"seed {seed}", token_ids=texts, labels=labels)


def config(**fields: Any) -> LeviConfig:
    return LeviConfig(**{"num_labels": 2, "problem_type": SINGLE, "task_model": TEXT, "hidden_width": 8, **fields})


@pytest.fixture
def backbone(tiny_bert_dir: str) -> torch.nn.Module:
    return load_backbone(tiny_bert_dir)


@pytest.fixture
def model(backbone: torch.nn.Module) -> LeviModel:
    torch.manual_seed(0)
    return get_levi_model(backbone, config())


class TestTaps:
    def test_precomputed_taps_are_those_of_the_backbone(self, model: LeviModel) -> None:
        data = dataset(20)
        taps = precompute_taps(model, data, batch_size=7)
        model.eval()
        for row in range(20):
            direct = model.extract_taps(**data.tokens(torch.tensor([row])))
            torch.testing.assert_close(taps[row : row + 1], direct, rtol=1e-4, atol=1e-5)

    def test_equal_texts_cross_the_backbone_once(self, model: LeviModel) -> None:
        data = EncodedDataset("d", token_ids=[[2, 5, 3], [2, 6, 7, 3], [2, 5, 3]], labels=torch.zeros(3))
        seen: list[tuple[int, int]] = []
        taps, which = precompute_unique_taps(model, data, progress=lambda done, total: seen.append((done, total)))
        assert len(taps) == 2 and which.tolist() == [0, 1, 0] and seen[-1] == (2, 2)

    def test_the_same_file_gives_the_same_bits(self, model: LeviModel) -> None:
        assert torch.equal(precompute_taps(model, dataset()), precompute_taps(model, dataset()))

    def test_slices(self) -> None:
        taps = torch.arange(12.0).view(2, 6)
        assert slice_taps(taps, [0, 1, 2], [1, 2, 3], [0, 2]).tolist() == [[0, 3, 4, 5], [6, 9, 10, 11]]
        assert slice_taps(taps, [0, 1, 2], [1, 2, 3], [0, 1, 2]) is taps
        with pytest.raises(ValueError, match=r"expected some of \[0, 1, 2\], got \[4\]"):
            slice_taps(taps, [0, 1, 2], [1, 2, 3], [4])


class TestFit:
    def test_the_best_epoch_and_blend_of_the_validation_data_are_kept(self, model: LeviModel) -> None:
        train, validation = dataset(), dataset(24, seed=1)
        for data in (train, validation):
            data.set_taps(precompute_taps(model, data))
        seen: list[dict[str, float]] = []
        options = TrainingOptions(epochs=6, batch_size=8, learning_rate=5e-3)
        result = fit(model, train, validation, options, on_epoch=lambda epoch, epochs, scores: seen.append(scores))
        assert len(seen) == 6 and seen == result.history
        keys = [selection_key(scores, SINGLE) for scores in seen]
        assert result.best_epoch == keys.index(max(keys)) + 1
        assert result.blend == seen[result.best_epoch - 1]["blend"] == model.config.blend
        assert not model.training
        # the kept weights give the reported figures again
        labels = validation.labels
        assert labels is not None
        again = compute_metrics(predict(model, validation).logits, labels.numpy(), SINGLE)
        assert again == pytest.approx(result.validation, rel=1e-5)
        model.config.blend = 0.0
        unblended = predict(model, validation)
        blend, scores = best_blend(unblended.logits, unblended.logits_without_view, labels.numpy(), SINGLE)
        assert blend == result.blend and scores == pytest.approx(result.validation, rel=1e-5)

    def test_a_given_blend_is_not_chosen_again(self, model: LeviModel) -> None:
        result = fit(model, dataset(), dataset(24, seed=1), TrainingOptions(epochs=1, blend=0.75))
        assert result.blend == model.config.blend == 0.75
        predictions = predict(model, dataset(24, seed=1))
        model.config.blend = 0.0
        plain = predict(model, dataset(24, seed=1))
        expected = blend_logits(plain.logits, plain.logits_without_view, 0.75)
        np.testing.assert_allclose(predictions.logits, expected, rtol=1e-4, atol=1e-6)

    def test_the_backbone_does_not_move(self, model: LeviModel) -> None:
        assert model.backbone is not None
        before = copy.deepcopy(model.backbone.state_dict())
        fit(model, dataset(), dataset(24, seed=1), TrainingOptions(epochs=1, learning_rate=0.1))
        assert model.backbone is not None
        for name, value in model.backbone.state_dict().items():
            assert torch.equal(value, before[name]), name

    def test_nothing_is_left_on_disk(self, model: LeviModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        fit(model, dataset(), dataset(24, seed=1), TrainingOptions(epochs=1))
        assert os.listdir(tmp_path) == []

    def test_a_training_that_diverges_says_so(self, model: LeviModel) -> None:
        with pytest.raises(DivergedError, match="lower --learning-rate"):
            fit(model, dataset(), dataset(24, seed=1), TrainingOptions(epochs=1, learning_rate=1e38))

    def test_regression_comes_back_in_label_units(self, backbone: torch.nn.Module) -> None:
        data, validation = dataset(), dataset(24, seed=1)
        for one in (data, validation):
            assert one.labels is not None
            one.labels = 1000.0 + 10.0 * one.labels.float()
        model = get_levi_model(
            backbone, config(num_labels=1, problem_type="regression", target_mean=1005.0, target_std=5.0)
        )
        result = fit(model, data, validation, TrainingOptions(epochs=15, batch_size=8, learning_rate=5e-3))
        assert result.validation["rmse"] < 5.0
        assert abs(float(predict(model, validation).logits.mean()) - 1005.0) < 5.0


class TestMethods:
    def test_they_differ_in_their_config_alone(self) -> None:
        full = config(dropout=0.1)
        assert method_config("levi", full).to_dict() == full.to_dict()
        probe = method_config("linear-probe", full)
        assert (probe.taps, probe.hidden_width, probe.task_model) == ("last", None, None)
        assert method_config("taps-only", full).task_model is None
        assert method_config("task-model", full).taps == "none"
        assert full.task_model == TEXT  # the given config is left alone

    def test_unknown_method_or_missing_task_model(self) -> None:
        with pytest.raises(DataError, match="--method: expected one of"):
            method_config("magic", config())
        with pytest.raises(DataError, match="needs a task model"):
            method_config("levi", config(task_model=None))

    @pytest.mark.parametrize("method", METHODS)
    def test_shared_taps_give_what_own_taps_give(self, backbone: torch.nn.Module, method: str) -> None:
        options = TrainingOptions(epochs=2, batch_size=8)
        splits = Splits(dataset(), dataset(24, seed=1), dataset(24, seed=2), {"new": dataset(24, seed=3)})
        shared = TapBank.build(backbone, config(), splits)
        own = shared
        if method != "task-model":
            own = TapBank.build(backbone, method_config(method, config()), splits)
        results = [
            run_method(method, config(), splits, options, backbone=backbone, bank=bank) for bank in (shared, own)
        ]
        assert results[0].id == pytest.approx(results[1].id, rel=1e-4)
        assert results[0].ood["new"] == pytest.approx(results[1].ood["new"], rel=1e-4)
        assert not any(data.has_taps for _, data in splits.named())

    def test_without_a_test_split_validation_is_reported(self, backbone: torch.nn.Module) -> None:
        splits = Splits(dataset(), dataset(24, seed=1))
        result = run_method("levi", config(), splits, TrainingOptions(epochs=1), backbone=backbone, bank=None)
        assert splits.id_split == "validation"
        assert result.id == pytest.approx(result.fit.validation, rel=1e-4)


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("epochs", 0, "--epochs"),
        ("batch_size", 0, "--batch-size"),
        ("seed", 2**32, "--seed"),
        ("learning_rate", float("nan"), "--learning-rate"),
        ("weight_decay", -1.0, "--weight-decay"),
    ],
)
def test_options_out_of_range_name_their_flag(field: str, value: Any, flag: str) -> None:
    with pytest.raises(DataError, match=flag):
        TrainingOptions(**{field: value})


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert resolve_device("auto") == torch.device("cpu")
        with pytest.raises(DataError, match="--device cuda: torch sees no CUDA device"):
            resolve_device("cuda")
