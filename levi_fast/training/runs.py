"""One method trained and scored on the splits of a task; LEVI and its baselines differ in their config alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import set_seed

from levi_fast.backbones import BackboneRecord
from levi_fast.cache import ActivationCache, CachedTaps
from levi_fast.config import LeviConfig
from levi_fast.data.encoded import PIXELS, EncodedDataset
from levi_fast.errors import DataError
from levi_fast.modeling import LeviModel, get_levi_model
from levi_fast.training.best_epoch import EpochProgress, FitResult
from levi_fast.training.checkpoints import CheckpointOptions
from levi_fast.training.feature_selection import select_features
from levi_fast.training.features import precompute_unique_taps, slice_taps
from levi_fast.training.fit import BACKBONE_LEARNING_RATES, TrainingOptions, fit, resolve_device
from levi_fast.training.interpolation import interpolate
from levi_fast.training.methods import canonical, find_method, method_config
from levi_fast.training.metrics import compute_metrics
from levi_fast.training.prediction import Predictions, predict

# Called with (name of the split, texts done, texts in all).
TapProgress = Callable[[str, int, int], None]


@dataclass
class Splits:
    """The encoded data of a task. Without ``test``, ID figures are those of ``validation``."""

    train: EncodedDataset
    validation: EncodedDataset
    test: EncodedDataset | None = None
    ood: dict[str, EncodedDataset] = field(default_factory=dict)

    @property
    def id_split(self) -> str:
        """Which split the ID figures come from: ``"test"`` or ``"validation"``."""
        return "validation" if self.test is None else "test"

    def named(self) -> Iterator[tuple[str, EncodedDataset]]:
        yield "train", self.train
        yield "validation", self.validation
        if self.test is not None:
            yield "test", self.test
        yield from ((f"ood {name}", dataset) for name, dataset in self.ood.items())

    def sizes(self) -> dict[str, object]:
        """Rows per split, as ``metrics.json`` has them."""
        return {
            "train": len(self.train),
            "validation": len(self.validation),
            "test": None if self.test is None else len(self.test),
            "ood": {name: len(dataset) for name, dataset in self.ood.items()},
        }


@dataclass
class MethodResult:
    """A trained model and its scores: ``id`` and ``ood[name]`` map metric names to values.

    ``choices`` is what the method chose beside epoch and blend; ``predictions`` are those of the scored splits, by
    name as in :meth:`Splits.named`.
    """

    method: str
    model: LeviModel
    fit: FitResult
    id: dict[str, float]
    ood: dict[str, dict[str, float]]
    choices: dict[str, float] = field(default_factory=dict)
    predictions: dict[str, Predictions] = field(default_factory=dict)


class TapBank:
    """The taps of every split, from one pass of the backbone, for any number of methods.

    Args:
        layers, widths: what was tapped.
        taps: per split name, taps ``[U, sum of widths]``, in memory or a cache's, and ``[N]``, which of the U each
            row uses.
    """

    def __init__(
        self, layers: list[int], widths: list[int], taps: dict[str, tuple[Tensor | CachedTaps, Tensor]]
    ) -> None:
        self.layers, self.widths, self.taps = layers, widths, taps
        self.cache: ActivationCache | None = None

    @classmethod
    def from_cache(cls, cache: ActivationCache, splits: Splits) -> TapBank:
        """The taps of a cache, memory-mapped; rows are found by their content.

        Raises:
            DataError: a text that is not in the cache; names its row.
        """
        taps = {name: cache.find(dataset, name) for name, dataset in splits.named()}
        bank = cls(cache.layers, cache.widths, dict(taps))
        bank.cache = cache
        return bank

    @classmethod
    def build(
        cls,
        backbone: nn.Module,
        config: LeviConfig,
        splits: Splits,
        *,
        batch_size: int = 32,
        device: torch.device | None = None,
        progress: TapProgress | None = None,
    ) -> TapBank:
        """Run every split's texts through the backbone once, reading ``config.taps``."""
        reads = method_config("taps-only", config)
        reads.backbone_training, reads.lora = "frozen", None
        reader = get_levi_model(backbone, reads)
        move(reader, device or torch.device("cpu"))
        taps: dict[str, tuple[Tensor | CachedTaps, Tensor]] = {}
        for name, dataset in splits.named():
            report = None if progress is None else _bound(progress, name)
            taps[name] = precompute_unique_taps(reader, dataset, batch_size=batch_size, progress=report)
        assert reader.config.tap_layers is not None and reader.config.tap_widths is not None
        return cls(reader.config.tap_layers, reader.config.tap_widths, taps)

    def for_splits(self, own: Splits, others: Splits) -> TapBank:
        """The same taps for other splits of the same texts: other labels may hold other rows out for validation.

        Args:
            own: the splits that the bank was built from.
            others: splits whose every text is in one of ``own``.

        Raises:
            ValueError: a text that the bank has no taps of.
        """
        if self.cache is not None:
            return TapBank.from_cache(self.cache, others)
        place_of: dict[bytes, int] = {}
        parts: list[Tensor] = []
        for name, dataset in own.named():
            offset = sum(len(part) for part in parts)
            keys = list(dataset.input_bytes())
            for place, row in enumerate(dataset.unique_inputs()[0]):
                place_of.setdefault(keys[row], offset + place)
            parts.append(cast(Tensor, self.taps[name][0]))
        everything = torch.cat(parts)
        taps: dict[str, tuple[Tensor | CachedTaps, Tensor]] = {}
        for name, dataset in others.named():
            first, which = dataset.unique_inputs()
            keys = list(dataset.input_bytes())
            places = [place_of.get(keys[row], -1) for row in first]
            if -1 in places:
                raise ValueError(f"taps: the bank has none of row {first[places.index(-1)] + 1} of {dataset.name}")
            taps[name] = (everything, torch.tensor(places)[which])
        return TapBank(self.layers, self.widths, taps)

    def attach(self, model: LeviModel, splits: Splits) -> None:
        """Give every split the taps that a model reads.

        Raises:
            ValueError: the model taps a layer that is not in the bank.
        """
        keep_inputs = not task_inputs(model).isdisjoint(("input_ids", PIXELS))
        for name, dataset in splits.named():
            taps, rows = self.taps[name]
            assert model.config.tap_layers is not None
            wanted = slice_taps(taps, self.layers, self.widths, model.config.tap_layers)
            dataset.set_taps(wanted, rows, keep_inputs=keep_inputs)


def task_inputs(model: LeviModel) -> frozenset[str]:
    """Names of the inputs that a model's task model reads."""
    spec = model.config.task_model or {}
    if spec.get("type") == "text" or (spec.get("type") == "table" and spec.get("text")):
        return frozenset({"input_ids", "attention_mask"})
    if spec.get("type") == "image":
        return frozenset({PIXELS})
    return frozenset({"input_ids"}) if spec.get("type") == "custom" else frozenset()


def run_method(
    method: str,
    config: LeviConfig,
    splits: Splits,
    options: TrainingOptions,
    *,
    backbone: nn.Module | BackboneRecord | None,
    bank: TapBank | None,
    backbone_batch_size: int = 32,
    loop: str = "auto",
    checkpoints: CheckpointOptions | None = None,
    keep_layers: bool = False,
    on_epoch: EpochProgress | None = None,
    on_note: Callable[[str], None] = lambda text: None,
) -> MethodResult:
    """Train one method and score it.

    Args:
        method: one of :data:`levi_fast.training.methods.METHODS`, or an alias.
        config: that of LEVI for this task; see :func:`method_config`.
        splits: encoded data with labels.
        options: the budget, the same for all methods.
        backbone: left as it is (a method that trains it trains a copy); None for ``task-model``; a record of it where
            ``bank`` has its taps.
        bank: precomputed taps; None runs the backbone in every epoch.
        backbone_batch_size: texts per forward pass of the backbone where it runs for predictions.
        loop, checkpoints, on_note: see :func:`levi_fast.training.fit.fit`.
        keep_layers: also predict the validation rows, and keep every layer's predictions.
        on_epoch: progress.

    Raises:
        DataError: see :func:`method_config` and ``fit``.
        DivergedError: training gave no finite prediction.
        ValueError: the taps cannot be found.
    """
    method = canonical(method)
    kind, own = find_method(method), method_config(method, config)
    start = None
    if kind.starts_from_probe:
        start = _probe_head(config, splits, options, backbone, bank, loop)
        # Fine-tuning is to start where the probe is: a head's learning rate would leave that behind in a few steps.
        rate = options.backbone_learning_rate or BACKBONE_LEARNING_RATES[own.backbone_training]
        options = replace(options, learning_rate=cast(float, rate))
    if own.backbone_training != "frozen":
        backbone, bank = copy.deepcopy(backbone), None  # trained in place, and others share it
    try:
        model, choices = _build(method, own, splits, options.seed, backbone, bank)
        if start is not None:
            model.ensemble.load_state_dict(start)
        move(model, resolve_device(options.device))
        before = {k: v.detach().clone() for k, v in model.state_dict().items()} if kind.interpolates else None
        result = fit(
            model, splits.train, splits.validation, options, loop=loop, checkpoints=checkpoints, on_epoch=on_epoch,
            on_note=on_note,
        )  # fmt: skip
        if before is not None:
            choices["alpha"] = interpolate(model, before, splits.validation, result, backbone_batch_size)
        predictions = {
            name: predict(model, data, backbone_batch_size=backbone_batch_size, with_layers=keep_layers)
            for name, data in splits.named()
            if name != "train" and (name != "validation" or keep_layers or splits.test is None)
        }
    finally:
        for _, dataset in splits.named():
            dataset.set_taps(None)
    scores = {
        name: compute_metrics(predictions[name].logits, _labels(data), str(own.problem_type))
        for name, data in splits.named()
        if name in predictions
    }
    ood = {name: scores[f"ood {name}"] for name in splits.ood}
    return MethodResult(method, model, result, scores[splits.id_split], ood, choices, predictions)


def _build(
    method: str,
    config: LeviConfig,
    splits: Splits,
    seed: int,
    backbone: nn.Module | BackboneRecord | None,
    bank: TapBank | None,
) -> tuple[LeviModel, dict[str, float]]:
    """A method's model, newly initialised, its taps attached to the splits; and what it chose for that."""
    kind = find_method(method)
    set_seed(seed)  # before the model is built: its initial weights come from the seed
    model = get_levi_model(backbone if kind.has_backbone else None, config)
    if bank is not None and kind.has_backbone:
        bank.attach(model, splits)
    if not kind.selects_features:
        return model, {}
    if bank is None:
        raise DataError(f"--method {method}: selects among precomputed taps; leave out --no-precompute")
    chosen, fraction = select_features(model, splits.train, splits.validation)
    config.selected_features = len(chosen)
    set_seed(seed)
    model = get_levi_model(backbone, config)
    cast(Tensor, model.ensemble.selected).copy_(chosen)
    return model, {"fraction": fraction}


def _probe_head(
    config: LeviConfig,
    splits: Splits,
    options: TrainingOptions,
    backbone: nn.Module | BackboneRecord | None,
    bank: TapBank | None,
    loop: str,
) -> dict[str, Tensor]:
    """Weights of a linear probe's head, trained on the frozen backbone: the first stage of LP-FT."""
    frozen = copy.deepcopy(config)
    frozen.backbone_training, frozen.lora = "frozen", None
    own = Splits(splits.train, splits.validation)
    if bank is None and isinstance(backbone, nn.Module):
        bank = TapBank.build(backbone, method_config("linear-probe", frozen), own)
    probe = run_method("linear-probe", frozen, own, options, backbone=backbone, bank=bank, loop=loop)
    return {name: value.detach().cpu() for name, value in probe.model.ensemble.state_dict().items()}


def _labels(dataset: EncodedDataset) -> np.ndarray:
    if dataset.labels is None:
        raise ValueError(f"{dataset.name}: expected labels")
    labels: np.ndarray = dataset.labels.numpy()
    return labels


def score(model: LeviModel, dataset: EncodedDataset, backbone_batch_size: int = 32) -> dict[str, float]:
    """Metrics of a model on a data set with labels."""
    labels = _labels(dataset)
    predictions = predict(model, dataset, backbone_batch_size=backbone_batch_size)
    return compute_metrics(predictions.logits, labels, str(model.config.problem_type))


def move(model: LeviModel, device: torch.device) -> None:
    """Move a model, backbone included; transformers' own ``to`` hides nn.Module's types."""
    torch.nn.Module.to(model, device)


def _bound(progress: TapProgress, name: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(name, done, total)
