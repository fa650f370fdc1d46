"""What ``levi-fast cache`` does, apart from reading the command line."""

from __future__ import annotations

import time
from typing import Any

from rich import box
from rich.table import Table

from levi_fast.backbones import load_backbone_config
from levi_fast.cache import ActivationCache, Estimate
from levi_fast.cache.estimate import readable_bytes
from levi_fast.cache.manifest import Manifest
from levi_fast.cache.store import damage, open_store
from levi_fast.errors import DataError
from levi_fast.report.console import Console
from levi_fast.training.cached import CacheRequest, build_arguments, build_cache
from levi_fast.training.request import TrainRequest, backbone_of, cache_request, load_task
from levi_fast.training.runs import Splits
from levi_fast.training.tasks import TableTask


def build(
    request: TrainRequest, console: Console, *, overwrite: bool = False, batches_per_shard: int | None = None
) -> None:
    """Build the cache of a request's data, go on with it, or repair it.

    Raises:
        DataError: for anything in the request, the data or the folder that cannot be used.
    """
    wanted, splits = _prepare(request, console)
    started = time.perf_counter()
    cache = build_cache(wanted, splits, console, overwrite=overwrite, batches_per_shard=batches_per_shard)
    size = sum(entry.bytes or 0 for entry in cache.manifest.files())
    console.note(
        f"wrote {wanted.folder}: {readable_bytes(size)} of {cache.dtype} taps of {len(cache.layers)} layers, "
        f"{time.perf_counter() - started:.1f} s"
    )


def estimate(request: TrainRequest, console: Console) -> Estimate:
    """Print what :func:`build` would cost; nothing is written.

    Raises:
        DataError: for anything in the request or the data that cannot be used.
    """
    wanted, splits = _prepare(request, console)
    with console.status("timing a few batches"):
        found = ActivationCache.estimate(**build_arguments(wanted, splits))
    console.out.print(str(found), markup=False, highlight=False, soft_wrap=True)
    return found


def inspect(path: str, console: Console) -> Manifest:
    """Print what a cache holds and what it was built from; sizes are compared, checksums are not.

    Raises:
        DataError: no cache there, or its manifest is not what it should be.
    """
    manifest = ActivationCache.inspect(path)
    store = open_store(path)
    key = manifest.key
    table = Table(title=f"activation cache {path}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("", overflow="fold")
    size = sum(entry.bytes or 0 for entry in manifest.files())
    rows: dict[str, Any] = {
        "state": "finished" if manifest.complete else "not finished; cache build goes on with it",
        "size": readable_bytes(size),
        "backbone": f"{manifest.backbone['name'] or 'not named'}, {key['fingerprint']}",
        "taps": f"layers {', '.join(map(str, manifest.layers))} of {manifest.backbone['num_layers']}, "
        f"widths {', '.join(map(str, manifest.widths))}",
        "pooling": key["pooling"],
        "stored as": key["dtype"],
        "truncation": "none noted" if key["max_length"] is None else f"{key['max_length']} tokens",
        "preprocessor": key["preprocessor"] or "none noted",
        "batches": f"{manifest.layout['batch_size']} rows, {manifest.layout['batches_per_shard']} per shard",
        "computed with": ", ".join(f"{name} {value}" for name, value in manifest.environment.items()),
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    console.table(table)
    parts = Table(box=box.SIMPLE_HEAD)
    for column in ("data", "rows", "views", "stored entries", "shards", "missing or of another size"):
        parts.add_column(column, justify="left" if column == "data" else "right")
    for name, part in manifest.parts.items():
        broken = sum(damage(store, entry, checksum=False) is not None for entry in part.shards)
        counts = (part.rows, part.views, part.entries, len(part.shards), broken)
        parts.add_row(name, *(f"{count:,}" for count in counts))
    console.table(parts)
    return manifest


def verify(path: str, console: Console) -> bool:
    """Compare every file with its checksum, print what is damaged, and say whether all is well.

    Raises:
        DataError: no cache there, or its manifest is not what it should be.
    """
    manifest, store = ActivationCache.inspect(path), open_store(path)
    files = manifest.files()
    broken = []
    with console.progress("checking") as report:
        for done, entry in enumerate(files, start=1):
            reason = damage(store, entry, checksum=True)
            if reason is not None:
                broken.append(f"{entry.file}: {reason}")
            report(done, len(files))
    for line in broken:
        console.out.print(line, markup=False, highlight=False, soft_wrap=True)
    if broken:
        console.note(f"{len(broken)} of {len(files)} files; levi-fast cache build rebuilds them, and nothing else")
        return False
    if not manifest.complete:
        console.note("every file is there, and the build is not finished; levi-fast cache build ends it")
        return False
    console.out.print(f"{len(files)} files are what the manifest says", highlight=False)
    return True


def _prepare(request: TrainRequest, console: Console) -> tuple[CacheRequest, Splits]:
    """Read and encode the data."""
    task = load_task(request)
    if isinstance(task, TableTask) and not task.processor.columns.text:
        raise DataError("--text-column: expected the text that the backbone is to read")
    name = backbone_of(request, task, console)
    tokenizer, config = task.load_preprocessor(name), load_backbone_config(name)
    with console.status("reading the data"):
        splits = task.encode(tokenizer, max_length=request.max_length, backbone_config=config)
    max_length = task.processor.max_length if task.processor.columns.text else None
    return cache_request(request, name, tokenizer, max_length), splits
