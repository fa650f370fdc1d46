"""Loads the native library once, remembers a failure, and can say every cause it met."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from levi_fast.kernels.schemas import SCHEMAS

LIBRARY_NAME = "liblevi_fast.so"
CUDA_LIBRARY_NAME = "liblevi_fast_cuda.so"
_MESSAGE_BYTES = 512


@dataclass(frozen=True)
class NativeStatus:
    """What came of loading the native library.

    Attributes:
        path: the library in use; None where none could be loaded.
        build_info: the ``levi_fast._build_info`` module that belongs to it.
        causes: one line for every place tried without success.
    """

    path: Path | None
    build_info: ModuleType | None
    causes: tuple[str, ...]

    @property
    def loaded(self) -> bool:
        return self.path is not None

    @property
    def reason(self) -> str:
        """Why there is no native library, as one line for a person; empty where there is one."""
        if self.loaded:
            return ""
        return "the native library could not be loaded: " + "; ".join(self.causes)


def _folders() -> Iterator[Path]:
    """Where the library may be: beside the package's Python files, else in the installed distribution.

    The second matters to a Python started inside a checkout while a wheel is installed: the checkout's Python files
    come first on the path, the compiled files are in site-packages.
    """
    package = importlib.util.find_spec("levi_fast")
    seen: set[Path] = set()
    for location in (package.submodule_search_locations or []) if package else []:
        folder = Path(location).resolve()
        seen.add(folder)
        yield folder
    for distribution in importlib.metadata.distributions(name="levi_fast"):
        folder = Path(str(distribution.locate_file("levi_fast"))).resolve()
        if folder not in seen and folder.is_dir():
            seen.add(folder)
            yield folder


def _load_build_info(folder: Path) -> ModuleType | None:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        file = folder / f"_build_info{suffix}"
        if file.exists():
            spec = importlib.util.spec_from_file_location("levi_fast._build_info", file)
            if spec is None or spec.loader is None:
                continue
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def _try_folder(folder: Path) -> tuple[ModuleType | None, str]:
    """Load from one folder; the build-info module and an empty text, or None and the cause."""
    library = folder / LIBRARY_NAME
    if not library.exists():
        return None, f"{library}: not there (pure-Python installation, or not built)"
    try:
        info = _load_build_info(folder)
    except ImportError as error:
        return None, f"{folder}/_build_info: {error}"
    if info is None:
        return None, f"{folder}: no _build_info module for this Python ({sys.implementation.cache_tag}) beside it"
    # Before loading: once loaded, a library's definitions cannot be taken back.
    if tuple(info.schemas) != tuple(SCHEMAS.values()):
        return None, f"{library}: its op schemas differ from these Python files; build it again"
    if _release(torch.__version__) < _release(info.torch_minimum):
        return None, f"{library}: needs torch >= {info.torch_minimum}, found {torch.__version__}"
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return None, f"{library}: {error}"
    return info, ""


@functools.cache
def load() -> NativeStatus:
    """Load the native library on the first call; every later call returns the same answer, good or bad."""
    causes: list[str] = []
    for folder in _folders():
        info, cause = _try_folder(folder)
        if info is not None:
            sys.modules["levi_fast._build_info"] = info
            return NativeStatus(folder / LIBRARY_NAME, info, tuple(causes))
        causes.append(cause)
    return NativeStatus(None, None, tuple(causes))


@dataclass(frozen=True)
class CudaStatus:
    """What came of loading the library of CUDA kernels.

    Attributes:
        path: the library in use; None where none could be loaded.
        reason: why there is none, as one line for a person; empty where there is one.
    """

    path: Path | None
    reason: str


@functools.cache
def load_cuda() -> CudaStatus:
    """Load the CUDA kernels on the first call, where this PyTorch has CUDA; later calls return the same answer."""
    if torch.version.cuda is None:
        return CudaStatus(None, "this PyTorch is built without CUDA")
    load()  # defines the ops
    causes = []
    for folder in _folders():
        library = folder / CUDA_LIBRARY_NAME
        if not library.exists():
            causes.append(f"{library}: not there (built without nvcc; LEVI_FAST_CUDA=on asks for it when installing)")
            continue
        try:
            torch.ops.load_library(str(library))
            schemas = ctypes.CDLL(str(library)).levi_fast_cuda_schemas
        except (OSError, RuntimeError, AttributeError) as error:
            causes.append(f"{library}: {error}")
            continue
        schemas.restype = ctypes.c_char_p
        if tuple(schemas().decode().splitlines()) != tuple(SCHEMAS.values()):
            causes.append(f"{library}: its op schemas differ from these Python files; build it again")
            continue
        return CudaStatus(library, "")
    return CudaStatus(None, "the CUDA library could not be loaded: " + "; ".join(causes))


_warned = False


def warn_missing_once(op: str) -> None:
    """Say once per process that an op runs in plain PyTorch because the native build is missing."""
    global _warned
    if _warned or load().loaded:
        return
    _warned = True
    warnings.warn(
        f"levi_fast: {op} runs in plain PyTorch because {load().reason}. "
        "Set LEVI_FAST_BACKEND=eager to choose this without a warning.",
        RuntimeWarning,
        stacklevel=3,
    )


def cpu_isa() -> str:
    """The instruction set the native CPU kernels use: "avx512", "avx2", "neon" or "scalar".

    Raises:
        RuntimeError: if there is no native library, or ``LEVI_FAST_CPU_ISA`` names a set that cannot be used.
    """
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    if _library().levi_fast_cpu_isa(message, _MESSAGE_BYTES) != 0:
        raise RuntimeError(message.value.decode())
    return message.value.decode()


def set_cpu_isa(name: str) -> None:
    """Change the instruction set of the native CPU kernels for the whole process ("auto" = the best there is).

    Raises:
        RuntimeError: if there is no native library, or it or this machine cannot serve ``name``.
    """
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    if _library().levi_fast_set_cpu_isa(name.encode(), message, _MESSAGE_BYTES) != 0:
        raise RuntimeError(message.value.decode())


def kept_bytes() -> int:
    """Bytes that the native CPU kernels keep between training steps for the next one (at most 512 MiB).

    Raises:
        RuntimeError: if there is no native library.
    """
    function = _library().levi_fast_kept_bytes
    function.restype = ctypes.c_size_t
    return int(function())


def release_kept() -> None:
    """Give that memory back to the system.

    Raises:
        RuntimeError: if there is no native library.
    """
    _library().levi_fast_release_kept()


def _library() -> ctypes.CDLL:
    status = load()
    if status.path is None:
        raise RuntimeError(status.reason)
    return ctypes.CDLL(str(status.path))
