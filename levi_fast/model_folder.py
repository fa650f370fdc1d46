"""A saved LEVI folder: its files, how it names its backbone, and what may be asked of loading it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from levi_fast.errors import DataError

WEIGHTS_NAME = "model.safetensors"
BACKBONE_FOLDER = "./backbone"
# What says where on the hub, and how, a file is fetched; as in every from_pretrained of transformers.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies", "subfolder")
# What Auto classes and pipelines pass along and LEVI has no use for.
IGNORED_ARGUMENTS = ("trust_remote_code", "_from_auto", "_from_pipeline", "_commit_hash", "adapter_kwargs")


def portable_name(name: str | None, folder: Path) -> str | None:
    """A hub id as it is; a folder as a path relative to the one that is written."""
    if name is None or not Path(name).expanduser().is_dir():
        return name if name is None or not Path(name).is_absolute() else None
    relative = os.path.relpath(Path(name).expanduser().resolve(), folder.resolve())
    return relative if relative.startswith(".") else f"./{relative}"


def located_name(name: str, folder: Path) -> str:
    """The inverse of :func:`portable_name`: a relative path is taken from the model's folder."""
    return str((folder / name).resolve()) if name.startswith(".") else name


def model_files(name: str, hub: dict[str, Any]) -> tuple[Path, Path]:
    """config.json and model.safetensors, in a folder or fetched from the hub."""
    folder = Path(name)
    if folder.is_dir():
        for required in ("config.json", WEIGHTS_NAME):
            if not (folder / required).is_file():
                raise DataError(f"model: expected {required} in {name!r}, found none; is it a saved LEVI folder?")
        return folder / "config.json", folder / WEIGHTS_NAME
    from transformers.utils import cached_file

    try:
        return Path(str(cached_file(name, "config.json", **hub))), Path(str(cached_file(name, WEIGHTS_NAME, **hub)))
    except OSError as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise DataError(f"model: {name!r} is no folder and cannot be had from the hub: {reason}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"model: {path} cannot be read: {error}") from error


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A torch dtype from itself or its name; None for None and "auto".

    Raises:
        ValueError: for another name.
    """
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype: expected a torch dtype, its name, or 'auto', got {dtype!r}")
    return found
