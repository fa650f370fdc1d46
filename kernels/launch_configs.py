"""How the Triton kernels are launched: frozen dataclasses, made by a named heuristic or read from a tuned file.

Nothing is measured while a program runs: no autotuning at import, at the first call or at a new batch size. A
configuration comes from the tuned file of this device (``configs/<device>.json``), at the nearest shape that was
tuned, where one is near enough; else from the heuristic, which is plain arithmetic on the shape and the number of
multiprocessors. Both depend on nothing but shapes, dtypes and the device, so the same call launches the same
programs every time: CUDA graphs can be captured, and results repeat bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

CONFIG_FOLDER = Path(__file__).parent / "configs"
# A tuned shape serves another one if no dimension differs by more than this factor.
NEAR = 4.0


@dataclass(frozen=True)
class DeviceTraits:
    """What the heuristics ask of a device.

    Attributes:
        name: as the driver tells it; names the tuned file.
        multiprocessors: NVIDIA's SMs, AMD's compute units.
        hip: whether this is an AMD device (64 threads a wave, 64 KiB of shared memory).
    """

    name: str
    multiprocessors: int
    hip: bool = False


@functools.cache
def _cuda_traits(index: int) -> DeviceTraits:
    properties = torch.cuda.get_device_properties(index)  # cached by torch: no synchronisation
    return DeviceTraits(properties.name, properties.multi_processor_count, torch.version.hip is not None)


def device_traits(device: torch.device) -> DeviceTraits:
    """Traits of a tensor's device; of a small pretended one where kernels are interpreted on the CPU."""
    if device.type != "cuda":
        return DeviceTraits("interpreter", 4)
    return _cuda_traits(device.index if device.index is not None else torch.cuda.current_device())


def ceil_div(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is at least ``n`` (and at least 1)."""
    return 1 << max(n - 1, 0).bit_length()


def _splits(programs: int, traits: DeviceTraits, steps: int, *, per_processor: int = 2, least_steps: int = 2) -> int:
    """Into how many parts to cut a reduction of ``steps`` so that about ``per_processor`` programs meet each SM.

    Each part keeps at least ``least_steps``: below that the second pass costs more than the idle processors.
    """
    wanted = per_processor * traits.multiprocessors // max(programs, 1)
    return max(1, min(wanted, steps // least_steps, 64))


@dataclass(frozen=True)
class PoolConfig:
    """Launch of the masked mean pool: a program sums ``block_t`` x ``block_d`` tiles down its part of the tokens."""

    block_t: int
    block_d: int
    splits: int
    num_warps: int

    @classmethod
    def from_bandwidth_heuristic(
        cls, traits: DeviceTraits, batch: int, length: int, width: int, itemsize: int, whole_row: bool
    ) -> PoolConfig:
        """Tiles of 16 KiB (whole rows of the tensor, so that loads are long), tokens cut up to fill the chip.

        Args:
            whole_row: one program must own all of a row's features (the fused LayerNorm of a single pass).
        """
        block_d = power_of_two(width) if whole_row else min(power_of_two(width), max(64, 1024 // itemsize))
        block_t = max(1, min(power_of_two(length), 16384 // (block_d * itemsize)))
        splits = _splits(batch * ceil_div(width, block_d), traits, ceil_div(length, block_t))
        return cls(block_t, block_d, splits, 8 if block_d > 2048 else 4)


@dataclass(frozen=True)
class RowConfig:
    """Launch of a row-wise pass (LayerNorm's sums): ``rows`` a program, ``block`` features a step."""

    rows: int
    block: int
    num_warps: int

    @classmethod
    def from_row_heuristic(cls, traits: DeviceTraits, rows: int, width: int) -> RowConfig:
        """One row a program while rows are few; with many, tiles of 2048 elements (more would spill)."""
        block = max(16, min(power_of_two(width), 1024))
        many = ceil_div(rows, 8 * traits.multiprocessors)
        return cls(max(1, min(2048 // block, 16, power_of_two(many))), block, 4)


@dataclass(frozen=True)
class ProductConfig:
    """Launch of a matrix product: output tiles ``block_m`` x ``block_n``, ``block_k`` of the sum a step.

    Attributes:
        splits: parts of the sum, each summed by its own program; a second pass adds them in a fixed order.
        group_m: tiles of this many neighbouring row blocks run one after the other, so that they share columns in L2.
    """

    block_m: int
    block_n: int
    block_k: int
    splits: int
    group_m: int
    num_warps: int
    num_stages: int

    @classmethod
    def from_tile_heuristic(
        cls, traits: DeviceTraits, batches: int, m: int, n: int, k: int, itemsize: int, most_stages: int = 4
    ) -> ProductConfig:
        """Square-ish tiles where there is work for all processors, narrower and split ones where there is not.

        fp32 products without tf32 run on the ordinary arithmetic units and keep their tiles in registers: 32 x 64 at
        most, or they spill. ``most_stages`` bounds the pipeline of a kernel whose loads spill in longer ones.
        """
        wide = itemsize <= 2
        if m <= 16:
            block_m = 16
        elif m <= 32 or not wide:
            block_m = 32
        else:
            block_m = 64 if m <= 64 or batches * ceil_div(m, 128) * ceil_div(n, 128) < traits.multiprocessors else 128
        # Rows that do not start on 32 bytes are read in small pieces, whose addresses take registers.
        block_n = 64 if not wide or block_m < 128 or n % 16 or k % 16 else 128
        block_n = max(16, min(block_n, power_of_two(n)))
        # A step reads 64 elements of each row in 16-bit types: one full 128-byte line.
        block_k = max(16, min(64 if wide else 16, power_of_two(k)))
        programs = batches * ceil_div(m, block_m) * ceil_div(n, block_n)
        splits = _splits(programs, traits, ceil_div(k, block_k))
        big = block_m * block_n >= 128 * 128
        stages = 2 if traits.hip else (3 if big else most_stages)
        # More than 32 accumulators a thread (8 in fp32, whose operands pass through registers too) would spill.
        warps = 8 if block_m * block_n > (64 * 64 if wide else 16 * 64) else 4
        return cls(block_m, block_n, block_k, splits, 8, warps, stages)


@dataclass(frozen=True)
class LossConfig:
    """Launch of the layer-wise loss: ``rows`` predictions a program, ``block`` classes at a time."""

    rows: int
    block: int
    num_warps: int

    @classmethod
    def from_class_heuristic(cls, traits: DeviceTraits, rows: int, classes: int) -> LossConfig:
        """Tiles of 2048 elements: many predictions of few classes, or one prediction of many."""
        block = min(power_of_two(classes), 1024)
        many = ceil_div(rows, 2 * traits.multiprocessors)
        return cls(max(1, min(2048 // block, 64, power_of_two(many))), block, 4)


Config = TypeVar("Config", PoolConfig, RowConfig, ProductConfig, LossConfig)


def device_slug(name: str) -> str:
    """A device's name as a file name: lower case, runs of other characters as one hyphen."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def _tuned(name: str) -> tuple[Mapping[str, Any], ...]:
    path = CONFIG_FOLDER / f"{device_slug(name)}.json"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    return tuple(json.loads(text)["entries"])


def _distance(a: Mapping[str, int], b: Mapping[str, int]) -> float:
    """The largest ratio between two shapes' dimensions; infinite where they name different ones."""
    if a.keys() != b.keys():
        return math.inf
    return max((max(a[k], b[k], 1) / max(min(a[k], b[k]), 1) for k in a), default=1.0)


@functools.lru_cache(maxsize=4096)
def _nearest(device: str, kernel: str, dtype: str, shape: tuple[tuple[str, int], ...]) -> Mapping[str, int] | None:
    wanted = dict(shape)
    best, nearest = NEAR, None
    for entry in _tuned(device):
        if entry["kernel"] == kernel and entry["dtype"] == dtype:
            distance = _distance(entry["shape"], wanted)
            if distance < best or (distance == best and nearest is None):
                best, nearest = distance, entry["config"]
    return nearest


@dataclass
class Trial:
    """What a tuner sees and sets while :func:`trial` lasts.

    Attributes:
        instead: kernel's name to the configuration to launch it with.
        asked: kernel's name to what its last launch asked: dtype, shape, and the configuration it would have had.
    """

    instead: dict[str, Any]
    asked: dict[str, tuple[str, dict[str, int], Any]]


_trial: Trial | None = None


@contextlib.contextmanager
def trial(**instead: Any) -> Iterator[Trial]:
    """Launch the kernels named with other configurations inside the block: for benchmarks/gpu/tune.py alone."""
    global _trial
    before, _trial = _trial, Trial(instead, {})
    try:
        yield _trial
    finally:
        _trial = before


def tuned_or(heuristic: Config, traits: DeviceTraits, kernel: str, dtype: torch.dtype, **shape: int) -> Config:
    """The device's tuned configuration at the nearest shape, or the heuristic's where none is near.

    Args:
        heuristic: the configuration to use otherwise; also says which dataclass to make.
        kernel: the kernel's name in the tuned file.
        shape: the dimensions that the file's entries are compared by.

    Raises:
        TypeError: if the file's entry lacks a field of the dataclass or has one too many.
    """
    name = str(dtype).removeprefix("torch.")
    nearest = _nearest(traits.name, kernel, name, tuple(shape.items()))
    config = heuristic if nearest is None else _made_of(nearest, heuristic, traits, kernel)
    if _trial is not None:
        _trial.asked[kernel] = (name, dict(shape), config)
        return cast(Config, _trial.instead.get(kernel, config))
    return config


def _made_of(nearest: Mapping[str, int], heuristic: Config, traits: DeviceTraits, kernel: str) -> Config:
    expected = {field.name for field in fields(heuristic)}
    if set(nearest) != expected:
        raise TypeError(
            f"{device_slug(traits.name)}.json: {kernel} expects the fields {sorted(expected)}, got {sorted(nearest)}"
        )
    return type(heuristic)(**nearest)
