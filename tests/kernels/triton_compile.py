"""Compiles every Triton kernel as its launcher launches it, for a GPU that is not there; run as a program.

    python tests/kernels/triton_compile.py --target sm_90 --dtype float16 [--size large]

The launchers run on meta tensors, which have shapes and no memory, and the launches are recorded instead of made: so
what is compiled is what a user's call would launch, with its configuration for that device. Prints a line of JSON for
each kernel: registers spilled, bytes of shared memory and the target's limit. Needs no driver.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from levi_fast.kernels import (
    ensemble_tiles_triton,
    launch_configs,
    layerwise_ensemble_backward_triton,
    layerwise_ensemble_triton,
    layerwise_loss_triton,
    masked_mean_pool_triton,
)
from levi_fast.kernels.launch_configs import DeviceTraits

MODULES = (
    ensemble_tiles_triton,
    layerwise_ensemble_backward_triton,
    layerwise_ensemble_triton,
    layerwise_loss_triton,
    masked_mean_pool_triton,
)

# Bytes of spill stores and loads a thread. Two kernels still have some: the fp32 input_grad_kernel with an odd number
# of linear outputs on sm_90 (40), and hidden_grad_kernel with 1000 classes on sm_80 (16).
TOLERATED = 48


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, and its limit of shared memory a block in bytes (from the vendors' tables)."""

    gpu: GPUTarget
    traits: DeviceTraits
    shared: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), DeviceTraits("A100", 108), 163 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), DeviceTraits("H200", 132), 227 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), DeviceTraits("B200", 148), 227 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), DeviceTraits("MI300X", 304, hip=True), 64 * 1024),
}


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    kernel: JITFunction[Any]
    arguments: dict[str, Any]
    options: dict[str, int]


def record(calls: Callable[[], None], traits: DeviceTraits) -> list[Launch]:
    """The launches that ``calls`` would make on a device with these traits."""
    launches: list[Launch] = []

    def run(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False))
        options = {}
        for name, value in kwargs.items():
            if name in kernel.arg_names:
                arguments[name] = value
            else:
                options[name] = value
        launches.append(Launch(kernel, arguments, options))

    original = JITFunction.run
    for module in MODULES:
        module.device_traits = lambda device: traits  # type: ignore[attr-defined]
    JITFunction.run = run  # type: ignore[method-assign]
    try:
        calls()
    finally:
        JITFunction.run = original  # type: ignore[method-assign]
        for module in MODULES:
            module.device_traits = launch_configs.device_traits  # type: ignore[attr-defined]
    return launches


def source_of(launch: Launch) -> ASTSource:
    """The launch as Triton's own run-time would specialise it."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}


def spills(compiled: Any, target: Target) -> int:
    """Bytes a thread keeps in memory because they did not fit into registers."""
    if target.gpu.backend == "hip":
        # Scalar registers spill into lanes of vector ones, not into memory: they are not counted.
        found = dict(re.findall(r"\.(vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", compiled.asm["amdgcn"]))
        return 4 * int(found["vgpr_spill_count"]) + int(found["private_segment_fixed_size"])
    # The compiler's own count. The stack that cuobjdump shows is no measure: it has kernels that spill nothing.
    ptx = compiled.asm["ptx"]
    (name,) = re.findall(r"\.target\s+(\w+)", ptx)
    tool = get_ptxas(target.gpu.arch).path  # the one that Triton itself uses for this architecture
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [tool, "-v", f"--gpu-name={name}", source, "-o", Path(folder) / "kernel.cubin"]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    if not found:
        raise RuntimeError(f"no count of spills in {text!r}")
    return sum(int(stores) + int(loads) for stores, loads in found)


def cases(dtype: torch.dtype, size: str) -> Iterator[Callable[[], None]]:
    """Calls of every launcher: few examples of a wide head ("small"), many of a narrow one ("large")."""
    batch, layers, width, view_width, hidden, outputs = {
        "small": (16, 32, 4096, 256, 512, 2),
        "middle": (1024, 24, 1024, 128, 512, 1000),
        "large": (65536, 6, 384, 64, 128, 10),
    }[size]

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def pool() -> None:
        tokens = {"small": 512, "middle": 128, "large": 32}[size]
        for mask in (None, empty(batch, tokens, dtype=torch.int64), empty(batch, tokens, dtype=torch.bool)):
            masked_mean_pool_triton.forward(empty(batch, tokens, width), mask)
            masked_mean_pool_triton.backward(empty(batch, width), mask, tokens)
        masked_mean_pool_triton.forward(empty(batch, tokens, width), mask, normalize=True)

    def ensemble(unequal: bool, linear: bool) -> None:
        taps = [empty(batch, width + 8 * i) for i in range(layers)] if unequal else [empty(layers, batch, width)]
        rows = sum(tap.shape[1] for tap in taps) if unequal else layers * width
        first = outputs if linear else hidden
        forward = (
            taps,
            empty(batch, view_width),
            empty(batch, dtype=torch.bool),
            empty(rows, first),
            empty(view_width, layers, first),
            empty(layers, first),
            None if linear else empty(outputs, layers, hidden),
            None if linear else empty(layers, outputs),
            empty(layers),
            None if linear else empty(layers, batch, hidden, dtype=torch.bool),
        )
        # One activation a call: gelu with unequal widths, each of the others at one size.
        activation = 0 if unequal or linear else {"small": 1, "middle": 2, "large": 3}[size]
        options = (activation, True, 0.0 if linear else 0.1)
        layerwise_ensemble_triton.forward(*forward, *options, unequal, True)
        layerwise_ensemble_backward_triton.backward(
            empty(batch, outputs),
            empty(layers, batch, outputs),
            empty(batch, outputs) if unequal else None,
            None,
            *forward[:5],
            forward[6],
            forward[8],
            forward[9],
            empty(layers, batch, outputs),
            empty(layers, batch, outputs),
            empty(layers, batch, first),
            empty(layers, batch, first),
            *options,
            255,
        )

    def loss() -> None:
        logits = empty(layers, batch, outputs)
        for problem in range(3):
            target = empty(batch, dtype=torch.int64) if problem == 0 else empty(batch, outputs, dtype=torch.float32)
            layerwise_loss_triton.forward(logits, target, problem, problem != 1)
        gradient = empty(layers, batch, outputs, dtype=torch.float32)
        layerwise_loss_triton.backward(empty(1, dtype=torch.float32)[0], gradient, logits)

    yield pool
    yield loss
    yield lambda: ensemble(False, False)
    yield lambda: ensemble(True, False)
    yield lambda: ensemble(False, True)


def main(arguments: list[str]) -> int:
    """Compile, print, and return how many kernels do not fit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), required=True)
    parser.add_argument("--size", choices=("small", "middle", "large"), default="large")
    parser.add_argument("--only", default="", help="compile only kernels whose name contains this")
    parsed = parser.parse_args(arguments)
    target, dtype = TARGETS[parsed.target], getattr(torch, parsed.dtype)
    seen: set[str] = set()
    failures = 0
    for case in cases(dtype, parsed.size):
        for launch in record(case, target.traits):
            source = source_of(launch)
            key = source.hash() + str(sorted(launch.options.items()))
            if key in seen or parsed.only not in launch.kernel.__name__:
                continue
            seen.add(key)
            row: dict[str, Any] = {"kernel": launch.kernel.__name__, "options": launch.options}
            row["blocks"] = {
                name: value
                for name, value in launch.arguments.items()
                if name.isupper() and isinstance(value, int) and not isinstance(value, bool)
            }
            try:
                compiled = triton.compile(source, target=target.gpu, options=launch.options)
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"
            else:
                row |= {
                    "spills": spills(compiled, target),
                    "shared": compiled.metadata.shared,
                    "limit": target.shared,
                }
            row["fits"] = "error" not in row and row["spills"] <= TOLERATED and row["shared"] <= target.shared
            failures += not row["fits"]
            print(json.dumps(row), flush=True)
    print(json.dumps({"compiled": len(seen), "failed": failures}), flush=True)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
