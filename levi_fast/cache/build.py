"""Building a cache: shard by shard, each written whole and then recorded, so that a killed build can go on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from levi_fast.cache.estimate import Estimate, probe_places, readable_bytes, total_seconds
from levi_fast.cache.key import CacheMismatchError, differences
from levi_fast.cache.lock import BuilderLock
from levi_fast.cache.manifest import MANIFEST_FILE, FileEntry, Manifest, Part, row_bytes
from levi_fast.cache.plan import PartPlan, ShardPlan, Source, padded_tokens, plan_parts, stacked
from levi_fast.cache.ranks import World, announce, check_others, wait_for_end, wait_for_others, wait_for_plan
from levi_fast.cache.shards import encode
from levi_fast.cache.store import LocalStore, damage, read_manifest
from levi_fast.errors import DataError
from levi_fast.storage import write_atomic
from levi_fast.taps import TapExtractor

Progress = Callable[[int, int], None]
Batch = tuple[str, tuple[int, ...]]  # name of the part, row numbers

_OWN_FILE = re.compile(r"manifest\.json|(shard|rows)-[0-9]+\.safetensors|shard-[0-9]+\.json|builder-[0-9]+\.lock")
_TEMPORARY = re.compile(r"\.(manifest|shard|rows)[-.].*\.tmp")
_REMEDY = "Build it again with --rebuild (overwrite=True), or name another folder"


@dataclass(frozen=True)
class Job:
    """What is to be built: the manifest without its parts, and where the parts come from."""

    extractor: TapExtractor
    sources: dict[str, Source]
    template: Manifest
    device: torch.device

    def parts(self, layout: dict[str, int]) -> dict[str, PartPlan]:
        return plan_parts(self.sources, layout["batch_size"], layout["batches_per_shard"])


class Builder:
    """Builds, resumes or repairs a cache in a folder.

    Args:
        folder: of the cache.
        job: what to build.
        overwrite: replace a cache that was built from something else.
        progress: called with (entries done, entries in all) of this process's shards.
        on_estimate: called once, before the first shard, if there is anything to do.
        wait_seconds: how long to wait for other ranks to start.
        world: this process among others.
    """

    def __init__(
        self,
        folder: Path,
        job: Job,
        *,
        overwrite: bool,
        progress: Progress | None,
        on_estimate: Callable[[Estimate], None] | None,
        wait_seconds: float,
        world: World,
    ) -> None:
        self.folder, self.job, self.overwrite = folder, job, overwrite
        self.progress, self.on_estimate = progress, on_estimate
        self.wait_seconds, self.world = wait_seconds, world
        self.store = LocalStore(folder)
        self._ready: dict[Batch, Tensor] = {}  # timed ahead for the estimate

    def run(self) -> None:
        """Build what is missing or damaged.

        Raises:
            CacheMismatchError: the folder holds a cache of something else.
            DataError: the folder cannot be written, is full or in use, holds other files, or another rank failed.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        lock = BuilderLock(self.folder, self.world.rank, self.world.launch)
        with contextlib.ExitStack() as stack:
            with writing(self.folder):
                stack.enter_context(lock)
            if self.world.rank == 0:
                manifest = self._start()
                plans = self._plans(manifest)
                self._write_indices(manifest, plans)
                with writing(self.folder):
                    announce(self.folder, self.world, lock)
            else:
                wait_for_plan(self.folder, self.world, self.wait_seconds)
                manifest = self._follow()
                plans = self._plans(manifest)
            self._build_shards(manifest, plans)
            if self.world.rank == 0:
                wait_for_others(self.folder, self.world, self.wait_seconds)
                self._finish(manifest)
            else:
                with writing(self.folder):
                    lock.say("done")
                wait_for_end(self.folder, lambda: (found := read_manifest(self.store)) is not None and found.complete)

    def _start(self) -> Manifest:
        """The manifest to fill: the one that is there, or a new one."""
        with writing(self.folder):
            names = sorted(path.name for path in self.folder.iterdir())
        foreign = [name for name in names if not _OWN_FILE.fullmatch(name) and not _TEMPORARY.fullmatch(name)]
        if foreign:
            raise DataError(
                f"cache: expected a new or empty folder or a cache, but {self.folder} holds {', '.join(foreign[:3])}"
            )
        existing = None if self.overwrite else read_manifest(self.store)
        if existing is None:
            # the manifest goes first: without it, a wipe that is cut short is finished by the next one
            keep = {f"builder-{rank}.lock" for rank in range(self.world.size)}
            for name in sorted(set(names) - keep, key=lambda name: name != MANIFEST_FILE):
                with writing(self.folder):
                    (self.folder / name).unlink(missing_ok=True)
            return self._create()
        _refuse_other(existing, self.job.template, self.folder)
        for name in names:
            if _TEMPORARY.fullmatch(name):
                with writing(self.folder):
                    (self.folder / name).unlink(missing_ok=True)
        return existing

    def _create(self) -> Manifest:
        plans = self.job.parts(self.job.template.layout)
        parts = {}
        for name, plan in plans.items():
            index = FileEntry(plan.index_file, plan.rows * plan.views, len(plan.index), _sha256(plan.index))
            shards = tuple(FileEntry(shard.file, shard.count) for shard in plan.shards)
            parts[name] = Part(plan.rows, plan.views, index, shards)
        manifest = replace(self.job.template, parts=parts)
        self._require_room(_shard_bytes(manifest, manifest.files()) + sum(len(plan.index) for plan in plans.values()))
        with writing(self.folder):
            write_atomic(self.folder / MANIFEST_FILE, manifest.to_json())
        return manifest

    def _plans(self, manifest: Manifest) -> dict[str, PartPlan]:
        """The plan behind a manifest: the same data in the same layout gives the same shards."""
        plans = self.job.parts(manifest.layout)
        planned = {name: [(shard.file, shard.count) for shard in plan.shards] for name, plan in plans.items()}
        found = {name: [(entry.file, entry.count) for entry in part.shards] for name, part in manifest.parts.items()}
        if planned != found:
            raise DataError(f"cache: {self.folder}/{MANIFEST_FILE}: its shards are not those of its data. {_REMEDY}")
        return plans

    def _require_room(self, needed: int) -> None:
        with writing(self.folder):
            free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise DataError(
                f"cache: {self.folder} needs {readable_bytes(needed)} more, and its disk has "
                f"{readable_bytes(free)} left"
            )

    def _follow(self) -> Manifest:
        """Ranks but the first: the manifest that rank 0 wrote, if it is of the same things."""
        manifest = read_manifest(self.store)
        if manifest is None:
            raise DataError(f"cache: {self.folder}: rank 0 wrote no manifest that this machine sees")
        _refuse_other(manifest, self.job.template, self.folder)
        return manifest

    def _write_indices(self, manifest: Manifest, plans: dict[str, PartPlan]) -> None:
        for name, plan in plans.items():
            if damage(self.store, manifest.parts[name].index, checksum=True) is not None:
                with writing(self.folder):
                    write_atomic(self.folder / plan.index_file, plan.index)

    def _build_shards(self, manifest: Manifest, plans: dict[str, PartPlan]) -> None:
        shards = [shard for plan in plans.values() for shard in plan.shards]
        mine = shards[self.world.rank :: self.world.size]
        entries = {entry.file: entry for entry in self._recorded(manifest)}
        left = [shard for shard in mine if damage(self.store, entries[shard.file], checksum=True) is not None]
        total, done = sum(shard.count for shard in mine), sum(shard.count for shard in mine)
        done -= sum(shard.count for shard in left)
        if left:
            self._before_first(manifest, left)
        for shard in left:
            if self.world.size > 1:
                check_others(self.folder, self.world)
            taps = torch.empty(shard.count, sum(manifest.widths))
            at = 0
            for batch in shard.batches:
                taps[at : at + len(batch)] = self._taps(shard, batch)
                at += len(batch)
                done += len(batch)
                if self.progress is not None:
                    self.progress(done, total)
            data = safetensors.torch.save(encode(taps, manifest.dtype, manifest.widths))
            record = {"bytes": len(data), "sha256": _sha256(data)}
            with writing(self.folder):
                write_atomic(self.folder / shard.file, data)
                write_atomic(self._record(shard.file), json.dumps(record))

    def _taps(self, shard: ShardPlan, batch: tuple[int, ...]) -> Tensor:
        ready = self._ready.pop((shard.part, batch), None)
        return ready if ready is not None else run_batch(self.job, shard.part, batch)

    def _before_first(self, manifest: Manifest, left: list[ShardPlan]) -> None:
        self._require_room(_shard_bytes(manifest, [FileEntry(shard.file, shard.count) for shard in left]))
        if manifest.environment != self.job.template.environment:
            warnings.warn(
                f"{self.folder} was begun with {manifest.environment}, and goes on with "
                f"{self.job.template.environment}: the last bits of new shards may differ",
                stacklevel=2,
            )
        if self.on_estimate is not None:
            self.on_estimate(self._estimate(manifest, left))

    def _estimate(self, manifest: Manifest, left: list[ShardPlan]) -> Estimate:
        # batches of the first shard alone: a build that is killed is to lose no more than the shard it is at
        seconds, self._ready = probe(self.job, left, left[:1])
        missing = [FileEntry(shard.file, shard.count) for shard in left]
        return Estimate(
            rows=sum(part.rows * part.views for part in manifest.parts.values()),
            entries=sum(part.entries for part in manifest.parts.values()),
            entries_left=sum(shard.count for shard in left),
            bytes=_shard_bytes(manifest, manifest.files()),
            bytes_left=_shard_bytes(manifest, missing),
            seconds=seconds,
        )

    def _record(self, shard_file: str) -> Path:
        return self.folder / shard_file.replace(".safetensors", ".json")

    def _recorded(self, manifest: Manifest) -> Iterator[FileEntry]:
        """The manifest's shards, with what has been built since it was written."""
        for part in manifest.parts.values():
            for entry in part.shards:
                try:
                    record = json.loads(self._record(entry.file).read_text())
                    yield replace(entry, bytes=int(record["bytes"]), sha256=str(record["sha256"]))
                except (OSError, ValueError, KeyError, TypeError, RecursionError):
                    yield entry

    def _finish(self, manifest: Manifest) -> None:
        entries = {entry.file: entry for entry in self._recorded(manifest)}
        parts = {
            name: replace(part, shards=tuple(entries[shard.file] for shard in part.shards))
            for name, part in manifest.parts.items()
        }
        for entry in entries.values():
            found = damage(self.store, entry, checksum=False)
            if found is not None:
                raise DataError(f"cache: {self.folder}/{entry.file}, just built, is {found}")
        finished = replace(manifest, parts=parts, complete=True)
        with writing(self.folder):
            if finished != manifest:
                write_atomic(self.folder / MANIFEST_FILE, finished.to_json())
            for entry in entries.values():
                self._record(entry.file).unlink(missing_ok=True)


def run_batch(job: Job, part: str, batch: tuple[int, ...]) -> Tensor:
    """Taps of some rows, float32 ``[B, sum of widths]`` on the CPU."""
    inputs = job.sources[part].rows.batch(batch)
    accepted = {k: v.to(job.device) for k, v in inputs.items() if job.extractor.accepts(k)}
    return stacked(job.extractor(**accepted))


def probe(job: Job, shards: list[ShardPlan], timed: list[ShardPlan]) -> tuple[float, dict[Batch, Tensor]]:
    """Time a few batches of different length.

    Args:
        job: what is built.
        shards: all that is to be computed.
        timed: those of them that batches are taken from.

    Returns:
        seconds for all batches of ``shards``, and the timed ones' taps for later use.
    """

    def cost(batch: Batch) -> int:
        return padded_tokens(job.sources[batch[0]].rows, batch[1])

    candidates = sorted(((shard.part, batch) for shard in timed for batch in shard.batches), key=cost)
    ready: dict[Batch, Tensor] = {}
    probed = []
    for place in probe_places(len(candidates)):
        started = time.perf_counter()
        ready[candidates[place]] = run_batch(job, *candidates[place])
        probed.append((cost(candidates[place]), time.perf_counter() - started))
    return total_seconds([cost((s.part, batch)) for s in shards for batch in s.batches], probed), ready


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Name the folder where it cannot be written.

    Raises:
        DataError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DataError(
            f"cache: {folder} cannot be written: {reason}; shards that are finished are kept, and the next build "
            "goes on from there"
        ) from error


def _refuse_other(existing: Manifest, wanted: Manifest, folder: Path) -> None:
    changes = differences(existing.key, wanted.key)
    extra = sorted(set(existing.key["data"]) - set(wanted.key["data"]))
    changes += [f"data {name!r}: in the cache, not asked for now" for name in extra]
    if changes:
        raise CacheMismatchError(str(folder), changes, _REMEDY)


def _shard_bytes(manifest: Manifest, entries: list[FileEntry]) -> int:
    size = row_bytes(manifest.dtype, manifest.widths)
    return sum(entry.count * size for entry in entries if entry.file.startswith("shard"))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
