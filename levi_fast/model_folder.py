"""A saved LEVI folder: its files, how it names its backbone, and what may be asked of loading it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
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
    if Path(name).is_absolute() or name.startswith("~"):  # none is ever written
        raise DataError(
            f"{folder / 'config.json'}: backbone: expected a hub id or a path relative to the folder, got {name!r}"
        )
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


def check_weights(path: Path, expected: Callable[[], Mapping[str, Tensor]]) -> None:
    """Compare the names, shapes and dtypes in a weights file's header with a model's, before either is in memory.

    Args:
        path: a safetensors file.
        expected: builds the model's state; called on torch's meta device, where it takes no memory.

    Raises:
        DataError: naming the file, the tensor, what was expected and what is there.
    """
    found = _header(path)
    try:
        with torch.device("meta"):
            wanted = dict(expected())
    except DataError:
        raise
    except (ValueError, TypeError, RuntimeError, KeyError, OverflowError) as error:
        raise DataError(f"config.json: no model can be built from it: {str(error)[:500]}") from error
    for name, tensor in wanted.items():
        if name not in found:
            raise DataError(f"model: {path}: expected a tensor {name!r}, found none")
        shape, dtype = found[name]
        if shape != list(tensor.shape):
            raise DataError(f"model: {path}: {name}: expected shape {list(tensor.shape)}, got {shape}")
        if dtype.startswith(("F", "BF")) != tensor.is_floating_point():
            raise DataError(f"model: {path}: {name}: expected a dtype like {tensor.dtype}, got {dtype}")
    extra = [name for name in found if name not in wanted and not name.startswith("backbone.")]
    if extra:
        raise DataError(f"model: {path}: {extra[0]!r} is no tensor of this model")


def _header(path: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of every tensor of a safetensors file; its library checks lengths, offsets and overlaps."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (list(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
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
