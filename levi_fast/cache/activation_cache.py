"""``ActivationCache``: the taps of a frozen backbone over a data set, on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from levi_fast.backbones import backbone_name, load_backbone
from levi_fast.cache.build import Builder, Job, Progress, probe
from levi_fast.cache.estimate import Estimate
from levi_fast.cache.key import config_key, preprocessor_key
from levi_fast.cache.lookup import find_rows
from levi_fast.cache.manifest import DTYPES, FileEntry, Manifest, row_bytes
from levi_fast.cache.plan import BATCH_SIZE, BATCHES_PER_SHARD, find_sources, plan_parts
from levi_fast.cache.ranks import World
from levi_fast.cache.reading import RESIDENT_BYTES, CachedTaps, open_part
from levi_fast.cache.rows import EncodedRows
from levi_fast.cache.store import Store, damage, open_store, read_manifest
from levi_fast.cache.weights import describe_files, weight_files
from levi_fast.data.encoded import EncodedDataset
from levi_fast.errors import DataError
from levi_fast.fingerprints import fingerprint
from levi_fast.offloading import input_device, is_placed
from levi_fast.quantization import backbone_dtype as kept_dtype
from levi_fast.taps import Pooling, TapExtractor
from levi_fast.widths import measure_widths


@dataclass(frozen=True)
class Damage:
    """A file of a cache that is not what the manifest says."""

    file: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


class ActivationCache(Mapping[str, CachedTaps]):
    """Taps on disk: safetensors shards and a JSON manifest, memory-mapped.

    A mapping from the names of the data sets that it was built from to their taps::

        cache = ActivationCache.build("taps", backbone, {"train": train, "test": test}, preprocessor=tokenizer)
        taps = cache["train"]            # like a tensor [U, sum of widths]; reads what is indexed
        taps[taps.rows[:8]]              # float32 [8, sum of widths]: the taps of the first 8 rows

    Attributes:
        path: of the folder, or its ``fsspec`` address.
        layers, widths: of the taps.
        dtype: that they are stored in: "float32", "bfloat16" or "int8".
        manifest: everything else.
    """

    def __init__(self, store: Store, manifest: Manifest, *, check: bool, resident_bytes: int) -> None:
        self.path = store.path
        self.manifest = manifest
        self.layers, self.widths, self.dtype = manifest.layers, manifest.widths, manifest.dtype
        self._store, self._check, self._resident_bytes = store, check, resident_bytes
        self._parts: dict[str, CachedTaps] = {}

    @classmethod
    def build(
        cls,
        path: str | os.PathLike[str],
        backbone: nn.Module | TapExtractor | str,
        data: Any,
        *,
        taps: str | Sequence[int] = "all",
        pooling: Pooling = "mean",
        layers: str | None = None,
        backbone_dtype: str | None = None,
        preprocessor: Any = None,
        max_length: int | None = None,
        dtype: str = "float32",
        views: int | None = None,
        view_seed: int = 0,
        pad_token_id: int | None = None,
        batch_size: int = BATCH_SIZE,
        batches_per_shard: int = BATCHES_PER_SHARD,
        device: torch.device | str | None = None,
        overwrite: bool = False,
        progress: Progress | None = None,
        on_estimate: Callable[[Estimate], None] | None = None,
        wait_seconds: float = 1800.0,
    ) -> Self:
        """Run a frozen backbone over data sets and keep its taps; go on where an earlier build ended.

        What is there already, of the same key, is checked by its checksums and kept; only what is missing or
        damaged is computed. Killed at any moment, a build loses the shard it is at; the next one goes on, and the
        files end up the same bit for bit. Distinct rows are stored once per data set, in batches of like length.

        Started by ``torchrun`` (or with RANK and WORLD_SIZE set), the processes share the work, each its own shards,
        with the same result; every one of them returns the finished cache.

        Args:
            path: folder, created if missing.
            backbone: a module, a :class:`levi_fast.TapExtractor`, or a name to load it by. Only by name the weight
                files are noted, so that a later run can tell that they are the same without loading them.
            data: a data set, or a mapping from names to data sets. A data set is an ``EncodedDataset``, or anything
                with ``len()`` whose items are mappings from input names to tensors; items of which the backbone takes
                nothing, such as labels, are left out. A single data set is named "data".
            taps, pooling, layers: see :class:`levi_fast.TapExtractor`; ignored where one is given.
            backbone_dtype: see :func:`levi_fast.load_backbone`; of a backbone given by name.
            preprocessor: the tokenizer or image processor that made the data, for the key; or a string for your own.
            max_length: at which the texts were cut, for the key.
            dtype: "float32", "bfloat16", or "int8" with one scale per tap of a row.
            views: for data sets that augment at random: store this many fixed draws of every row, so that
                ``rows`` is ``[views, N]``. Without it, such a data set is refused.
            view_seed: of those draws.
            pad_token_id: fills up shorter ``input_ids`` of mappings; the preprocessor's by default, else 0.
            batch_size: rows per forward pass. Of an existing cache, its own.
            batches_per_shard: how much work a shard is. Of an existing cache, its own.
            device: where the backbone runs; where it is by default, and None for one that accelerate has placed.
            overwrite: replace a cache that was built from something else.
            progress: called with (entries done, entries in all) of this process.
            on_estimate: called with size and time before the first shard; a few batches are timed for it, and kept.
            wait_seconds: how long ranks wait for each other to start.

        Raises:
            CacheMismatchError: the folder holds a cache of something else; the message names what changed.
            DataError: an argument or the data cannot be used; the folder cannot be written, is full, is being built
                by another process (named), or holds other files; another rank failed.
        """
        if "://" in os.fspath(path):
            raise DataError(
                f"cache: expected a folder to build in, got {os.fspath(path)!r}; addresses are for reading"
            )
        world = World.from_environment()
        job = _job(
            backbone, data, taps=taps, pooling=pooling, layers=layers, backbone_dtype=backbone_dtype,
            preprocessor=preprocessor, max_length=max_length, dtype=dtype,
            views=views, view_seed=view_seed, pad_token_id=pad_token_id,
            batch_size=batch_size, batches_per_shard=batches_per_shard, device=device,
        )  # fmt: skip
        folder = Path(os.fspath(path)).expanduser()
        if folder.exists() and not folder.is_dir():
            raise DataError(f"cache: expected a folder, but {folder} is a file")
        Builder(
            folder, job, overwrite=overwrite, progress=progress, on_estimate=on_estimate, wait_seconds=wait_seconds,
            world=world,
        ).run()  # fmt: skip
        return cls.open(folder)

    @classmethod
    def estimate(cls, backbone: nn.Module | TapExtractor | str, data: Any, **arguments: Any) -> Estimate:
        """What :meth:`build` would cost, from a few timed batches; nothing is written.

        Args:
            backbone: as for :meth:`build`.
            data: likewise.
            **arguments: those of :meth:`build` that say what is stored.

        Raises:
            DataError: as :meth:`build`.
        """
        job = _job(backbone, data, **arguments)
        plans = plan_parts(job.sources, **job.template.layout)
        shards = [shard for plan in plans.values() for shard in plan.shards]
        seconds, _ = probe(job, shards, shards)
        entries = sum(len(source.first) for source in job.sources.values())
        size = entries * row_bytes(job.template.dtype, job.template.widths)
        size += sum(len(plan.index) for plan in plans.values())
        rows = sum(len(source.which) for source in job.sources.values())
        return Estimate(rows, entries, entries, size, size, seconds)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, check: bool = True, resident_bytes: int = RESIDENT_BYTES) -> Self:
        """Open a finished cache for reading.

        Args:
            path: folder, or any ``fsspec`` address; there, shards are fetched whole.
            check: compare a shard's checksum before its first use; False compares sizes alone.
            resident_bytes: shards are unmapped whenever about this much of them has been touched, so that reading a
                large cache does not grow the process. A data set's taps cost up to this much each.

        Raises:
            DataError: no cache there, one that is not finished, or one whose manifest or files are not what they
                should be.
        """
        store = open_store(path)
        manifest = read_manifest(store)
        if manifest is None:
            raise DataError(f"cache: {store.path} holds no manifest.json; build it first")
        if not manifest.complete:
            raise DataError(f"cache: {store.path} is not finished; build it again with the same arguments to go on")
        cache = cls(store, manifest, check=check, resident_bytes=resident_bytes)
        broken = cache._damages(checksum=False)
        if broken:
            raise DataError(_damaged(store.path, broken))
        return cache

    @classmethod
    def inspect(cls, path: str | os.PathLike[str]) -> Manifest:
        """The manifest of a cache, finished or not.

        Raises:
            DataError: no cache there, or its manifest is not what it should be.
        """
        store = open_store(path)
        manifest = read_manifest(store)
        if manifest is None:
            raise DataError(f"cache: {store.path} holds no manifest.json; build it first")
        return manifest

    def verify(self) -> list[Damage]:
        """Compare every file with its checksum; [] where all are whole.

        :meth:`build` with the same arguments rebuilds what this finds, and nothing else.
        """
        return self._damages(checksum=True)

    def find(self, dataset: EncodedDataset, name: str = "data") -> tuple[CachedTaps, Tensor]:
        """The taps of a data set's rows, found by their content: see :func:`levi_fast.cache.lookup.find_rows`.

        Args:
            dataset: tokenised as the cached ones were, which the caller sees to.
            name: of the part to look in first.

        Returns:
            taps, and int64 ``[N]``: which of their entries each row uses.

        Raises:
            DataError: rows that are not in the cache.
        """
        if self.manifest.key["views"] != 1:
            raise DataError(f"cache: {self.path} holds random draws, which no content finds; use its rows")
        return find_rows(self, self.manifest, EncodedRows(dataset).digests(), name)

    def __getitem__(self, name: str) -> CachedTaps:
        if name not in self._parts:
            part = self.manifest.parts[name]
            self._parts[name] = open_part(
                self._store, part, self.dtype, self.layers, self.widths, check=self._check,
                resident_bytes=self._resident_bytes,
            )  # fmt: skip
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest.parts)

    def __len__(self) -> int:
        return len(self.manifest.parts)

    def __repr__(self) -> str:
        return f"ActivationCache({self.path!r}, {list(self)}, layers={self.layers}, dtype={self.dtype!r})"

    def _damages(self, *, checksum: bool) -> list[Damage]:
        return damages(self._store, self.manifest.files(), checksum=checksum)


def damages(store: Store, files: list[FileEntry], *, checksum: bool) -> list[Damage]:
    """What is wrong with files of a cache."""
    found = ((entry.file, damage(store, entry, checksum=checksum)) for entry in files)
    return [Damage(file, reason) for file, reason in found if reason is not None]


def _damaged(path: str, broken: list[Damage]) -> str:
    shown = "; ".join(map(str, broken[:3])) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
    return f"cache: {path} is damaged: {shown}; building it again with the same arguments rebuilds only that"


def _shown_name(name: str | None) -> str | None:
    """A hub id; of a folder its last part alone, as a cache may move or be shared."""
    return Path(name).name if name is not None and Path(name).is_dir() else name


def _job(
    backbone: nn.Module | TapExtractor | str,
    data: Any,
    *,
    taps: str | Sequence[int] = "all",
    pooling: Pooling = "mean",
    layers: str | None = None,
    backbone_dtype: str | None = None,
    preprocessor: Any = None,
    max_length: int | None = None,
    dtype: str = "float32",
    views: int | None = None,
    view_seed: int = 0,
    pad_token_id: int | None = None,
    batch_size: int = BATCH_SIZE,
    batches_per_shard: int = BATCHES_PER_SHARD,
    device: torch.device | str | None = None,
) -> Job:
    """Check the arguments, read the data once, and say what is to be built."""
    if dtype not in DTYPES:
        raise DataError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    for name, value in (("batch_size", batch_size), ("batches_per_shard", batches_per_shard)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DataError(f"{name}: expected a whole number of at least 1, got {value!r}")
    digest = preprocessor_key(preprocessor)
    files = []
    if isinstance(backbone, str):
        name = backbone
        backbone = load_backbone(name, dtype=backbone_dtype)
        files = describe_files(weight_files(name))
    try:
        extractor = (
            backbone if isinstance(backbone, TapExtractor) else TapExtractor(backbone, taps, pooling, layers=layers)
        )
        widths = measure_widths(extractor)
    except ValueError as error:  # a tap out of range, layers that cannot be found
        raise DataError(str(error)) from error
    if extractor.pooling == "token":
        raise DataError("pooling: a cache holds one row of taps a text, and 'token' has one a token")
    if device is not None and is_placed(extractor.backbone):
        raise DataError("device: accelerate has placed this backbone; expected None")
    if device is not None:
        extractor.backbone.to(device)
    pad = pad_token_id if pad_token_id is not None else getattr(preprocessor, "pad_token_id", None)
    named = data if isinstance(data, Mapping) else {"data": data}
    sources = find_sources(named, extractor, views=views, view_seed=view_seed, pad_token_id=pad or 0)
    runs_on = input_device(extractor.backbone)
    key = {
        "fingerprint": fingerprint(extractor.runner, extractor.blocks, extractor.layers[-1]),
        "backbone_dtype": kept_dtype(extractor.backbone),
        "config": config_key(getattr(extractor.backbone, "config", None)),
        "preprocessor": digest,
        "taps": extractor.layers,
        "pooling": extractor.pooling,
        "max_length": max_length,
        "dtype": dtype,
        "views": views or 1,
        "view_seed": view_seed if views else 0,
        "data": {part: source.data_key() for part, source in sources.items()},
    }
    about = {
        "name": _shown_name(backbone_name(extractor.backbone)),
        "num_layers": len(extractor.blocks),
        "widths": widths,
        "loaded_as": backbone_dtype,
        "files": files,
    }
    environment = {
        "torch": torch.__version__,
        "device": runs_on.type,
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
    }
    layout = {"batch_size": batch_size, "batches_per_shard": batches_per_shard}
    return Job(extractor, sources, Manifest(key, about, layout, environment, {}), runs_on)
