"""How a LEVI model is written to a folder and read from one: a base class of ``LeviModel``."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from levi_fast.backbone_training import without_untrained
from levi_fast.backbones import backbone_name, load_backbone
from levi_fast.config import LeviConfig
from levi_fast.config_checks import check_levi_config, read_json
from levi_fast.errors import BackboneMismatchError, DataError
from levi_fast.fingerprints import fingerprint
from levi_fast.model_folder import (
    BACKBONE_FOLDER,
    HUB_ARGUMENTS,
    IGNORED_ARGUMENTS,
    as_dtype,
    check_weights,
    located_name,
    model_files,
    portable_name,
    read_weights,
)
from levi_fast.offloading import is_offloaded, save_offloaded
from levi_fast.quantization import QUANTIZED
from levi_fast.storage import staged_directory
from levi_fast.taps import TapExtractor


class FolderModel(PreTrainedModel):
    """``save_pretrained`` and ``from_pretrained`` of a model made of a backbone, a task model and an ensemble."""

    backbone: nn.Module | None
    task_model: nn.Module | None
    standalone: nn.Module | None

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, include_backbone: bool = False, **kwargs: Any
    ) -> None:
        """Write config.json and model.safetensors: all that was trained, without the backbone's weights.

        Files are staged, fsynced and renamed, so that an interrupted save leaves what was there before. The
        backbone is named by hub id or by a path relative to ``save_directory``.

        Args:
            save_directory: created if it is missing.
            *args: transformers'.
            include_backbone: also write the whole backbone, to ``backbone/`` inside: the folder then needs nothing
                else to be loaded.
            **kwargs: transformers'.

        Raises:
            ValueError: ``include_backbone`` where there is none, or one that cannot be written (int8, int4, no
                transformers model).
        """
        if include_backbone and not isinstance(self.backbone, PreTrainedModel):
            raise ValueError(
                f"include_backbone: expected a transformers backbone, got {type(self.backbone).__name__}"
            )
        if include_backbone and self.config.backbone_training != "frozen":
            raise ValueError(
                f"include_backbone: expected a frozen backbone, and backbone_training is "
                f"{self.config.backbone_training!r}; what is trained of it is saved in any case"
            )
        dtype = self.config.backbone_dtype
        if include_backbone and dtype in QUANTIZED:
            raise ValueError(
                f"include_backbone: an {dtype} backbone is made anew on each load, from the one it names"
            )
        if not kwargs.get("is_main_process", args[0] if args else True):
            return
        folder = Path(save_directory)
        if kwargs.get("state_dict") is not None:
            kwargs["state_dict"] = without_untrained(kwargs["state_dict"], self.config.backbone_training)
        push = kwargs.pop("push_to_hub", False)
        in_memory = self.config
        self.config = copy.deepcopy(in_memory)
        self.config.backbone = BACKBONE_FOLDER if include_backbone else portable_name(in_memory.backbone, folder)
        try:
            with staged_directory(folder) as stage:
                super().save_pretrained(stage, *args, **kwargs)
                backbone = cast(PreTrainedModel, self.backbone)
                if include_backbone and is_offloaded(backbone):
                    save_offloaded(backbone, stage / BACKBONE_FOLDER)
                elif include_backbone:
                    backbone.save_pretrained(stage / BACKBONE_FOLDER)
        finally:
            self.config = in_memory
        if push:
            cast(Any, self).push_to_hub(folder.name)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        backbone: nn.Module | None = None,
        task_model: nn.Module | None = None,
        config: LeviConfig | None = None,
        load_backbone_weights: bool = True,
        dtype: torch.dtype | str | None = None,
        device_map: torch.device | str | int | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a saved LEVI folder (or hub id) in eval mode.

        Args:
            pretrained_model_name_or_path: what ``save_pretrained`` wrote.
            backbone: the backbone to use; None loads the one that the config names.
            task_model: needed where the task model was the user's own module.
            config: in place of the folder's own.
            load_backbone_weights: False leaves the backbone out: the model then runs on precomputed ``taps``.
            dtype: of the trained part; None and "auto" keep the saved one. The backbone keeps the dtype that it had
                in training, which its fingerprint holds.
            device_map: one device for the whole model; None is the CPU.
            **kwargs: transformers' arguments about the hub: ``revision``, ``token``, ``cache_dir``, ...

        Raises:
            BackboneMismatchError: if the backbone is not the one trained on; names both fingerprints.
            DataError: if the folder, its weights or the backbone cannot be loaded.
            TypeError: for an argument not listed here.
            ValueError: for a ``device_map`` that names several devices.
        """
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        for ignorable in IGNORED_ARGUMENTS:
            kwargs.pop(ignorable, None)
        if kwargs:
            raise TypeError(f"from_pretrained: unexpected arguments {sorted(kwargs)}")
        if isinstance(device_map, dict) or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
            raise ValueError(
                f"device_map: expected one device, got {device_map!r}; a backbone that is spread over several is "
                "loaded by itself and passed as backbone="
            )
        config_path, weights_path = model_files(str(pretrained_model_name_or_path), hub)
        if config is None:
            check_levi_config(read_json(config_path), str(config_path))
            config = LeviConfig.from_pretrained(config_path.parent)
        if config.tap_widths is not None:
            probe = copy.deepcopy(config)
            check_weights(weights_path, lambda: cls(probe, None, task_model).state_dict())
        if backbone is None and not load_backbone_weights and config.backbone_training != "frozen":
            raise ValueError(
                f"load_backbone_weights: expected True, as backbone_training was {config.backbone_training!r}"
            )
        if backbone is None and load_backbone_weights and config.tap_layers is not None:
            if config.backbone is None:
                raise DataError("backbone: the model was trained on one given as an object; pass backbone=")
            config.backbone = located_name(config.backbone, config_path.parent)
            backbone = load_backbone(config.backbone, dtype=config.backbone_dtype)
        if backbone is not None and config.tap_layers is not None:
            _check_fingerprint(backbone, config)
        model = cls(config, backbone, task_model)
        model.load_state_dict(read_weights(weights_path))
        trained_dtype = as_dtype(dtype)
        if trained_dtype is not None:
            for part in (model.ensemble, model.task_model, model.standalone):
                if part is not None:
                    part.to(trained_dtype)
        if device_map is not None:
            nn.Module.to(model, device_map)
        return model.eval()


def _check_fingerprint(backbone: nn.Module, config: LeviConfig) -> None:
    """Compare a backbone, before adapters or trained weights get into it, with the one that training began from."""
    if config.backbone_fingerprint is None:
        return
    taps = cast(list[int], config.tap_layers)
    found = fingerprint_of(TapExtractor(backbone, taps, layers=config.backbone_layers))
    if found != config.backbone_fingerprint:
        raise BackboneMismatchError(
            f"backbone: the model was trained on {config.backbone_fingerprint}, "
            f"and this backbone ({backbone_name(backbone) or 'unnamed'}) is {found}"
        )


def fingerprint_of(extractor: TapExtractor) -> str:
    """Of the weights that make the taps."""
    return fingerprint(extractor.runner, extractor.blocks, extractor.layers[-1])
