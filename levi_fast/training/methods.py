"""The methods of ``levi-fast train --method``: LEVI and its baselines, as changes to LEVI's own config.

All share the data, the schedule, and selection on ID validation data: the epoch, and one choice of the method's own
among at most three candidates (LEVI: the blend, likewise the output ensemble; Head2Toe: the share of features;
WiSE-FT: the weight of the fine-tuned model).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from levi_fast.backbone_training import check_lora
from levi_fast.config import LeviConfig
from levi_fast.errors import DataError


@dataclass(frozen=True)
class Method:
    """A method.

    Args:
        source: the paper.
        fields: what it changes in LEVI's config.
        needs_view: whether it needs a task model.
        selects_features: whether it picks features of the taps on training data first.
        starts_from_probe: whether a linear probe is trained first, and its head is where training starts.
        interpolates: whether the result is a mean of the weights before and after training.
    """

    source: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    needs_view: bool = False
    selects_features: bool = False
    starts_from_probe: bool = False
    interpolates: bool = False

    @property
    def has_backbone(self) -> bool:
        return self.fields.get("taps") != "none"

    @property
    def backbone_training(self) -> str | None:
        """What of the backbone the method trains; None where that is not part of the method."""
        found = self.fields.get("backbone_training")
        return None if found is None else str(found)

    @property
    def trains_backbone(self) -> bool:
        return self.backbone_training not in (None, "frozen")

    @property
    def has_both_views(self) -> bool:
        """Whether it is LEVI, whole or with one tap: a layer-wise ensemble of taps and a task model."""
        return self.needs_view and self.has_backbone and "head" not in self.fields

    @property
    def fixes_taps(self) -> bool:
        """Whether the method itself says which layers are read."""
        return "taps" in self.fields


_ONE_LOSS = {"mix": "mean", "objective": "ensemble"}
_LINEAR = {"hidden_width": None, "dropout": 0.0}
_NO_VIEW = {"task_model": None}

_FINE_TUNING = {"taps": "last", **_LINEAR, **_NO_VIEW, **_ONE_LOSS, "backbone_training": "full"}

LEVI_PAPER = "Roh et al. 2024, arXiv 2402.04644"
PROBING_PAPER = "Alain & Bengio 2016, arXiv 1610.01644"

METHODS: dict[str, Method] = {
    "levi": Method(LEVI_PAPER, needs_view=True),
    "levi-no-standalone": Method(
        f"{LEVI_PAPER}: without the output ensemble with a task model of its own",
        {"standalone_view": False},
        needs_view=True,
    ),
    "levi-last-tap": Method(f"{LEVI_PAPER}: ablation of the layer-wise ensemble", {"taps": "last"}, needs_view=True),
    "taps-only": Method(f"{LEVI_PAPER}: ablation of the task model", {"head": "layerwise", **_NO_VIEW}),
    "linear-probe": Method(PROBING_PAPER, {"taps": "last", **_LINEAR, **_NO_VIEW, **_ONE_LOSS}),
    "mlp-probe": Method(PROBING_PAPER, {"head": "concatenated", **_NO_VIEW, **_ONE_LOSS}),
    "head2toe": Method(
        "Evci et al. 2022, arXiv 2201.03529",
        {"head": "concatenated", **_LINEAR, **_NO_VIEW, **_ONE_LOSS},
        selects_features=True,
    ),
    "output-ensemble": Method(
        "Lakshminarayanan et al. 2017, arXiv 1612.01474",
        {"head": "output-ensemble", "taps": "last", "mix": "mean", "objective": "per_layer"},
        needs_view=True,
    ),
    "task-model": Method(LEVI_PAPER, {"taps": "none", "backbone_training": "frozen", **_ONE_LOSS}, needs_view=True),
    "fine-tuning": Method("Devlin et al. 2019, arXiv 1810.04805", _FINE_TUNING),
    "lora": Method("Hu et al. 2022, arXiv 2106.09685", {**_FINE_TUNING, "backbone_training": "lora"}),
    "lp-ft": Method("Kumar et al. 2022, arXiv 2202.10054", _FINE_TUNING, starts_from_probe=True),
    "wise-ft": Method(
        "Wortsman et al. 2022, arXiv 2109.01903", _FINE_TUNING, starts_from_probe=True, interpolates=True
    ),
    "levi-fine-tuned": Method(
        f"{LEVI_PAPER}, the backbone trained with it", {"backbone_training": "full"}, needs_view=True
    ),
    "levi-lora": Method(f"{LEVI_PAPER}, with LoRA", {"backbone_training": "lora"}, needs_view=True),
}

# Other names of the same methods.
ALIASES = {"levi-no-view": "taps-only"}


def find_method(name: str) -> Method:
    """The method of a name or an alias.

    Raises:
        DataError: there is none.
    """
    if (found := METHODS.get(canonical(name))) is None:
        raise DataError(f"--method: expected one of {', '.join(METHODS)}, got {name!r}")
    return found


def canonical(name: str) -> str:
    """A method's one name from any of its names; an unknown one as it is."""
    return ALIASES.get(name, name)


def method_config(method: str, config: LeviConfig) -> LeviConfig:
    """The config of a method, from that of LEVI: the same data, budget and selection, another model.

    Raises:
        DataError: unknown method, or one that needs a task model where there is none.
    """
    found = find_method(method)
    config = copy.deepcopy(config)
    if found.needs_view and config.task_model is None:
        without = ", ".join(name for name, other in METHODS.items() if not other.needs_view)
        raise DataError(f"--method {method} needs a task model; with --task-model none there is only {without}")
    for name, value in found.fields.items():
        setattr(config, name, value)
    config.standalone_view = config.standalone_view and found.has_both_views
    config.lora = check_lora(config.lora) if config.backbone_training == "lora" else None
    return config
