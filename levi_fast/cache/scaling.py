"""What a build of taps would cost on hardware that is not at hand: a small model of time, memory, disk and network.

    FLOP     = examples * tokens * (2 * parameters + 4 * layers * tokens * width)      forward alone, dense attention
    seconds  = FLOP / (devices * peak FLOP/s * utilisation)
    bytes    = examples * (taps * width * bytes a number + 24)

The CPU's rate was measured (see :data:`DEVICES`). Nobody has run this library on a GPU cluster: for GPUs the vendor's
published dense bfloat16 peak is taken, times :data:`UTILISATION`, an assumption that the caller may replace.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from levi_fast.errors import DataError

UTILISATION = 0.4  # of a GPU's published peak, in a forward pass of padded batches: assumed, not measured
WRITE_BANDWIDTH = 1e9  # bytes/s a node writes to shared storage: assumed
READ_BANDWIDTH = 2e9  # bytes/s a node reads the cache with: assumed
WEIGHT_BYTES = 2  # bfloat16
HEADROOM = 1.25  # of the weights: activations and buffers of one batch
BYTES_PER_NUMBER = {"float32": 4, "bfloat16": 2, "int8": 1}
ROW_BYTES = 24  # which entry a row uses, and its digest
SCALE_BYTES = 4  # int8: one scale a tap


@dataclass(frozen=True)
class Device:
    """One accelerator, or one machine's CPU.

    Attributes:
        flops: FLOP/s: a GPU's published dense bfloat16 peak, or a rate measured end to end.
        memory: bytes.
        measured: whether ``flops`` was reached by this library; then utilisation does not apply.
        source: where ``flops`` is from.
    """

    flops: float
    memory: float
    measured: bool
    source: str


# The CPU: 1,024 texts, 187,904 padded tokens through MiniLM in 28.469 s (median build), float32, 2 threads.
DEVICES = {
    "cpu": Device(1.516e11, 16e9, True, "benchmarks/results/cache_cpu.json, build_1024_texts"),
    "A100": Device(312e12, 80e9, False, "NVIDIA A100 80GB data sheet, dense bfloat16"),
    "H100": Device(989e12, 80e9, False, "NVIDIA H100 SXM data sheet, dense bfloat16"),
    "H200": Device(989e12, 141e9, False, "NVIDIA H200 SXM data sheet, dense bfloat16"),
    "B200": Device(2250e12, 180e9, False, "NVIDIA DGX B200 data sheet, an eighth of its dense bfloat16"),
}


@dataclass(frozen=True)
class BackboneSize:
    """Parameters that run for every token, layers and width of a backbone."""

    parameters: float
    layers: int
    width: int


SIZES = {
    "MiniLM": BackboneSize(10.62e6, 6, 384),
    "1B": BackboneSize(0.97e9, 16, 2048),
    "8B": BackboneSize(6.98e9, 32, 4096),
    "70B": BackboneSize(68.5e9, 80, 8192),
}  # embeddings, which no token multiplies by, left out; the last three have the shapes of Llama 3


@dataclass(frozen=True)
class Cluster:
    """``nodes`` machines with ``per_node`` devices each."""

    nodes: int
    per_node: int
    device: str

    @property
    def devices(self) -> int:
        return self.nodes * self.per_node

    @classmethod
    def parse(cls, text: str) -> Cluster:
        """``NODESxDEVICES[:KIND]``, e.g. "4x8:H100"; the kind is H100 where none is named.

        Raises:
            DataError: another form, a number below 1, an unknown kind.
        """
        found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,3})(?::(\w+))?", text)
        if found is None:
            raise DataError(f"--cluster: expected NODESxDEVICES[:KIND], e.g. 4x8:H100, got {text!r}")
        kind = found[3] or "H100"
        if kind not in DEVICES:
            raise DataError(f"--cluster: expected a kind of {', '.join(DEVICES)}, got {kind!r}")
        return cls(int(found[1]), int(found[2]), kind)


@dataclass(frozen=True)
class Plan:
    """What a build costs.

    Attributes:
        seconds: wall time, the slower of computing and writing.
        compute_seconds, write_seconds: each of the two alone.
        device_hours: all devices, for ``seconds``.
        cache_bytes: on disk.
        memory_bytes: per device that holds a share of one copy of the weights.
        devices_per_copy: how many devices one copy of the weights needs.
        network_bytes_per_second: per node, towards the storage.
        epoch_read_seconds: reading the whole cache once, on one node.
    """

    seconds: float
    compute_seconds: float
    write_seconds: float
    device_hours: float
    cache_bytes: float
    memory_bytes: float
    devices_per_copy: int
    network_bytes_per_second: float
    epoch_read_seconds: float


def plan(
    examples: int,
    tokens: int,
    size: BackboneSize,
    cluster: Cluster,
    *,
    taps: int | None = None,
    dtype: str = "bfloat16",
    utilisation: float = UTILISATION,
) -> Plan:
    """Cost of a cache.

    Args:
        examples: different ones.
        tokens: per example, padding included.
        size: of the backbone.
        cluster: that builds it.
        taps: how many layers are kept; None keeps all. The last of them is the backbone's last layer.
        dtype: of the stored numbers.
        utilisation: of a GPU's peak.

    Raises:
        DataError: a number out of range, or a backbone that does not fit into the cluster's memory.
    """
    taps = size.layers if taps is None else taps
    for name, value, most in (("--examples", examples, 10**15), ("--tokens", tokens, 10**7)):
        if not 1 <= value <= most:
            raise DataError(f"{name}: expected a number from 1 to {most}, got {value}")
    if not 1 <= taps <= size.layers:
        raise DataError(f"--taps: expected 1 to {size.layers}, got {taps}")
    if dtype not in BYTES_PER_NUMBER:
        raise DataError(f"--dtype: expected one of {', '.join(BYTES_PER_NUMBER)}, got {dtype!r}")
    if not 0 < utilisation <= 1:
        raise DataError(f"--utilisation: expected a number above 0 and at most 1, got {utilisation}")
    device = DEVICES[cluster.device]
    weights = size.parameters * WEIGHT_BYTES * HEADROOM
    per_copy = math.ceil(weights / device.memory)
    if per_copy > cluster.devices:
        raise DataError(f"--cluster: one copy of the weights needs {per_copy} devices, got {cluster.devices}")
    busy = cluster.devices // per_copy * per_copy
    rate = device.flops * (1.0 if device.measured else utilisation)
    flop = examples * tokens * (2 * size.parameters + 4 * size.layers * tokens * size.width)
    compute = flop / (busy * rate)
    scales = SCALE_BYTES * taps if dtype == "int8" else 0
    stored = examples * (taps * size.width * BYTES_PER_NUMBER[dtype] + scales + ROW_BYTES)
    write = stored / (cluster.nodes * WRITE_BANDWIDTH)
    seconds = max(compute, write)
    return Plan(
        seconds=seconds,
        compute_seconds=compute,
        write_seconds=write,
        device_hours=seconds * cluster.devices / 3600,
        cache_bytes=stored,
        memory_bytes=weights / per_copy,
        devices_per_copy=per_copy,
        network_bytes_per_second=stored / cluster.nodes / seconds,
        epoch_read_seconds=stored / READ_BANDWIDTH,
    )


def tables() -> str:
    """The tables of docs/scaling.md, in Markdown."""
    clusters = [Cluster.parse(text) for text in ("1x1:H100", "1x8:H100", "32x8:H100")]
    lines = [
        "| backbone | examples | on disk, 4 taps | all taps | one GPU | 8 GPUs | 32 nodes of 8 | device-hours | "
        "GPUs a copy | one epoch's reading |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in ("1B", "8B", "70B"):
        for exponent in (6, 7, 8, 9):
            times, last = [], None
            for cluster in clusters:
                try:
                    last = plan(10**exponent, 256, SIZES[name], cluster, taps=4)
                    times.append(duration(last.seconds))
                except DataError:  # does not fit
                    times.append("does not fit")
            assert last is not None
            whole = plan(10**exponent, 256, SIZES[name], clusters[-1]).cache_bytes
            device_hours = plan(10**exponent, 256, SIZES[name], clusters[1], taps=4).device_hours
            cells = [name, f"10^{exponent}", decimal_bytes(last.cache_bytes), decimal_bytes(whole), *times]
            cells += [f"{device_hours:,.2g}" if device_hours < 10 else f"{device_hours:,.0f}"]
            cells += [str(last.devices_per_copy), duration(last.epoch_read_seconds)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def describe(found: Plan, cluster: Cluster, utilisation: float) -> str:
    """A plan in sentences, with what it rests on."""
    device = DEVICES[cluster.device]
    basis = "measured" if device.measured else f"published peak x {utilisation:g}, an assumption: not measured"
    slower = "computing" if found.compute_seconds >= found.write_seconds else "writing"
    return (
        f"{duration(found.seconds)} ({slower} is the slower: {duration(found.compute_seconds)} of computing, "
        f"{duration(found.write_seconds)} of writing), {found.device_hours:,.3g} device-hours\n"
        f"{decimal_bytes(found.cache_bytes)} on disk; {decimal_bytes(found.network_bytes_per_second)}/s a node; "
        f"{decimal_bytes(found.memory_bytes)} of memory a device, {found.devices_per_copy} device(s) a copy\n"
        f"one pass over the cache: {duration(found.epoch_read_seconds)} of reading on one node\n"
        f"rate of {cluster.device}: {device.flops:.3g} FLOP/s, {basis} ({device.source})"
    )


def decimal_bytes(count: float) -> str:
    """1.5e12 -> "1.5 TB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB" if count < 999.5 else f"{count:,.0f} PB"


def duration(seconds: float) -> str:
    """5400 -> "1.5 h"."""
    for unit, size, least in (("d", 86400, 172800), ("h", 3600, 5400), ("min", 60, 90)):
        if seconds >= least:
            value = seconds / size
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.2g} {unit}"
    return f"{seconds:.2g} s"
