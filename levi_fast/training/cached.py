"""Training on an activation cache: built where there is none, checked against the run where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from levi_fast.backbones import (
    BackboneRecord,
    load_backbone,
    load_backbone_config,
    packaged_folder,
    resolve_backbone,
)
from levi_fast.cache import ActivationCache, CacheMismatchError
from levi_fast.cache.activation_cache import damages
from levi_fast.cache.key import config_key, differences, preprocessor_key
from levi_fast.cache.manifest import Manifest
from levi_fast.cache.store import LocalStore, Store, open_store, read_manifest
from levi_fast.cache.weights import same_files, weight_files
from levi_fast.errors import DataError
from levi_fast.fingerprints import fingerprint
from levi_fast.quantization import backbone_dtype as kept_dtype
from levi_fast.report.console import Console
from levi_fast.selection import resolve_taps
from levi_fast.taps import TapExtractor
from levi_fast.training.runs import Splits, TapBank

REMEDY = (
    "Build it again (levi-fast cache build --rebuild, with the same data and model flags), or name another folder"
)


@dataclass(frozen=True)
class CacheRequest:
    """What the taps of a run depend on, beside its data.

    Args:
        folder: of the cache, or an ``fsspec`` address.
        backbone: hub id or folder.
        backbone_dtype: that it is loaded in; None keeps the checkpoint's.
        taps, pooling: see :class:`levi_fast.LeviConfig`; taps None takes whatever the cache has (new: all).
        tokenizer, max_length: what made the token ids; of images, the image processor, where there is one, and None.
        dtype: that taps are stored in; None takes whatever the cache has (new: float32).
        batch_size: texts per forward pass, of a new cache.
        device: where the backbone runs.
    """

    folder: str
    backbone: str
    backbone_dtype: str | None
    taps: str | Sequence[int] | None
    pooling: str
    tokenizer: Any
    max_length: int | None
    dtype: str | None
    batch_size: int
    device: torch.device


def cached_taps(request: CacheRequest, splits: Splits, console: Console) -> tuple[BackboneRecord, TapBank]:
    """The taps of every split, from a cache; the backbone is loaded only where something is to be computed.

    A missing cache is built, an unfinished one finished, a damaged one repaired.

    Raises:
        CacheMismatchError: the cache was built from something else; the message names what changed.
        DataError: it cannot be read or written, or a text is not in it.
    """
    store = open_store(request.folder)
    manifest = read_manifest(store)
    if manifest is None or not manifest.complete:
        if not isinstance(store, LocalStore):
            raise DataError(f"cache: {store.path} holds no finished cache; build it in a folder and copy it there")
        build_cache(request, splits, console)
    else:
        check_cache(request, manifest, store.path)
        if isinstance(store, LocalStore):
            _repair(request, splits, store, manifest, console)
    # what is here was checked or built just now; elsewhere a shard is checked when it is fetched
    cache = ActivationCache.open(request.folder, check=not isinstance(store, LocalStore))
    bank = TapBank.from_cache(cache, splits)
    moved = [name for name, (taps, _) in bank.taps.items() if name not in cache or taps is not cache[name]]
    if moved:
        console.note(f"cache: the rows of {', '.join(moved)} were found one by one: they are split otherwise there")
    return _record(cache.manifest, request.backbone), bank


def build_cache(
    request: CacheRequest,
    splits: Splits,
    console: Console,
    *,
    overwrite: bool = False,
    batches_per_shard: int | None = None,
) -> ActivationCache:
    """Build a cache of all splits, or go on with one; says what it will cost before the first batch.

    Raises:
        DataError: see :meth:`levi_fast.ActivationCache.build`.
    """
    with console.status(f"loading {request.backbone}"):
        arguments = build_arguments(request, splits)
    if batches_per_shard is not None:
        arguments["batches_per_shard"] = batches_per_shard
    with console.progress("frozen backbone, into the cache") as report:
        return ActivationCache.build(
            request.folder,
            **arguments,
            overwrite=overwrite,
            progress=report,
            on_estimate=lambda estimate: console.note(f"cache: {estimate}"),
        )


def build_arguments(request: CacheRequest, splits: Splits) -> dict[str, Any]:
    """Arguments of :meth:`levi_fast.ActivationCache.build` and ``estimate`` for a run."""
    return {
        "backbone": request.backbone,
        "backbone_dtype": request.backbone_dtype,
        "data": dict(splits.named()),
        "taps": "all" if request.taps is None else request.taps,
        "pooling": request.pooling,
        "preprocessor": request.tokenizer,
        "max_length": request.max_length,
        "dtype": request.dtype or "float32",
        "batch_size": request.batch_size,
        "device": request.device,
    }


def check_cache(request: CacheRequest, manifest: Manifest, path: str) -> None:
    """Compare what a cache was built from with what a run asks for, its data aside; weights are told by their files.

    Raises:
        CacheMismatchError: naming what changed.
    """
    have = manifest.key
    wanted: dict[str, Any] = {
        "config": config_key(load_backbone_config(request.backbone)),
        "preprocessor": preprocessor_key(request.tokenizer),
        "pooling": request.pooling,
        "max_length": request.max_length,
        "views": 1,
    }
    if request.dtype is not None:
        wanted["dtype"] = request.dtype
    if request.taps is not None:
        try:
            wanted["taps"] = resolve_taps(request.taps, manifest.backbone["num_layers"])
        except ValueError as error:
            raise DataError(str(error)) from error
    changes = differences(have, wanted)
    if not changes and not _same_backbone(request, manifest):
        # The files differ in some way: only the weights themselves can tell whether the taps do.
        backbone = load_backbone(request.backbone, dtype=request.backbone_dtype)
        extractor = TapExtractor(backbone, have["taps"])
        found = fingerprint(extractor.runner, extractor.blocks, extractor.layers[-1])
        changes = differences(have, {**wanted, "fingerprint": found, "backbone_dtype": kept_dtype(backbone)})
    if changes:
        raise CacheMismatchError(path, changes, REMEDY)


def _same_backbone(request: CacheRequest, manifest: Manifest) -> bool:
    """Whether the weight files are the recorded ones, loaded in the same way."""
    recorded, asked = manifest.backbone, request.backbone_dtype
    in_the_same_way = asked in (recorded["loaded_as"], *([] if asked is None else [manifest.key["backbone_dtype"]]))
    return in_the_same_way and same_files(recorded["files"], weight_files(request.backbone))


def _repair(request: CacheRequest, splits: Splits, store: Store, manifest: Manifest, console: Console) -> None:
    with console.status(f"checking {store.path}"):
        broken = damages(store, manifest.files(), checksum=True)
    if broken:
        console.note(f"cache: {store.path} is damaged, and is being repaired: {'; '.join(map(str, broken[:3]))}")
        build_cache(request, splits, console)


def _record(manifest: Manifest, name: str) -> BackboneRecord:
    return BackboneRecord(
        name=name if packaged_folder(name) is not None else resolve_backbone(name),
        fingerprint=manifest.key["fingerprint"],
        dtype=manifest.key["backbone_dtype"],
        num_layers=manifest.backbone["num_layers"],
        layers=tuple(manifest.layers),
        widths=tuple(manifest.widths),
    )
